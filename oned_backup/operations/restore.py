"""RESTORE to a directory of a host: PLAN → PREPARE → DOWNLOAD → PLACE → DEFINE → CLEAN.

    PLAN      the store's plan; domain XML rebuilt, new name chosen; nothing is written
    PREPARE   tm pre_restore: names free, room for the disks below DIR/.oned-backup-<operation>, or above
              DIR where that is still to be made; the small files are there    (undo: REMOVE)
    DOWNLOAD  all disks side by side, each verified on the way
    PLACE     tm restore: all durable and under their names, replacing nothing
    DEFINE    with --define: a new domain over the files; commits              (undo: KEEP)
    CLEAN     tm post_restore: servers and the directory they wrote to

All or nothing: what is made has its final name only when all of it is there and
proved, and a restore that fails removes what it made, and only that. A domain that
turns out to be defined keeps its files. The transfer manager does all of this on the
host where the files are wanted, which without --host is this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from oned_backup import xmldoc
from oned_backup.contract.companions import DOMAIN_XML, NVRAM, TPM
from oned_backup.contract.documents import RestorePlan, StoredDisk
from oned_backup.contract.targets import DiskTarget, NewDisk, checked_format
from oned_backup.contract.url import parse_url
from oned_backup.errors import (
    Conflict,
    DataCorrupt,
    InvalidInput,
    NotFound,
    OnedBackupError,
    Salvaged,
)
from oned_backup.model.domain import RestoredDisk, rebuild_domain
from oned_backup.model.host import Host
from oned_backup.model.image import Image
from oned_backup.model.increments import chain_to
from oned_backup.model.manifest import StoredFile
from oned_backup.model.names import checked_name
from oned_backup.model.vm import VmState
from oned_backup.operations import stored, targets
from oned_backup.operations.caller import Caller
from oned_backup.operations.context import Context
from oned_backup.operations.damage import found_while_reading
from oned_backup.operations.domains import list_domains
from oned_backup.operations.engine import OperationKind, result_of
from oned_backup.operations.steps import Step, Undo
from oned_backup.operations.together import call_together

#: in the operation's own directory
_PLAN_FILE = "plan.xml"
_DOMAIN_FILE = "domain-to-define.xml"
_DAMAGED = (
    "`oned-backup image verify` tells which increments are whole (--increment); --salvage fills what is lost"
    " with zeros."
)
_NOT_SALVAGED = (
    "Nothing can be salvaged without it; `oned-backup image verify` tells which increments are whole"
    " (--increment)."
)
#: of the original's name in that of its copy, which must not be too long
_OLD_NAME_CHARACTERS = 100


def _plan(context: Context) -> Mapping[str, Any]:
    image_format = checked_format(context.text("format", "qcow2"))
    directory = _directory(context.text("to"))
    image = context.services.image(context.integer("image_id"))
    whole_vm = context.arguments.get("disk_id") is None
    if image.has_selected_disks and whole_vm and context.arguments.get("define_host_id") is not None:
        raise InvalidInput(
            f"image {image.id}: cannot restore a VM from a selected disk backup",
            hint="Restore the files without --define, or name the disk with --disk-id.",
        )
    targets.start_ahead(context, "pre_restore")
    plan = _plan_of_store(context, image)
    names = {disk.disk_id: f"disk.{disk.disk_id}.{image_format}" for disk in plan.disks}
    files = [checked_name(name, "file in the backup") for name, _ in plan.files]
    facts: dict[str, Any] = {
        "directory": str(directory),
        "format": image_format,
        "increment_id": plan.increment_id,
        "backup_id": plan.backup_id,
        "names": {str(disk_id): name for disk_id, name in names.items()},
        "files": files,
        "left_out": _left_out(context, plan),
    }
    host = targets.host_of(context)
    if host is not None:
        facts["host"] = host.name
    # Not into the journal: the small files may hold secrets (TPM state, passwords of consoles).
    _keep(context, _PLAN_FILE, xmldoc.serialize(plan.to_xml()))
    return facts | _plan_domain(context, plan, directory, names, image_format)


def _plan_of_store(context: Context, image: Image) -> RestorePlan:
    """What the store's driver says it takes; damage that it meets is entered."""
    increment_id = context.arguments.get("increment_id")
    try:
        return stored.plan_restore(
            context.services,
            context.caller,
            image,
            increment_id,
            context.arguments.get("disk_id"),
            salvage=bool(context.arguments.get("salvage")),
        )
    except DataCorrupt as error:
        newest = chain_to(image.increments, increment_id)[-1].source if image.increments else image.source
        found_while_reading(context, newest, f"could not be restored: {error.message}")
        hint = _NOT_SALVAGED if context.arguments.get("salvage") else _DAMAGED
        raise DataCorrupt(error.message, hint=hint) from error


def _left_out(context: Context, plan: RestorePlan) -> list[str]:
    """The small files that are damaged, and so are not among what is to be salvaged."""
    if not context.arguments.get("salvage"):
        return []
    with suppress(NotFound):
        manifest = stored.manifest_of(context.services, plan.backup_id)
        of_disks = tuple(disk.file for disk in manifest.disks)
        names = [file.name for file in manifest.files if not file.name.startswith(of_disks)]
        return [name for name in names if plan.file(name) is None]
    return []


def _keep(context: Context, name: str, text: str) -> None:
    path = context.work_dir / name
    path.touch(mode=0o600)
    path.write_text(text)


def _directory(text: str) -> Path:
    directory = Path(text)
    if "\0" in text or not directory.is_absolute() or ".." in directory.parts:
        raise InvalidInput(f"--to: '{text[:200]}' is not an absolute path")
    return directory


def _plan_domain(
    context: Context, plan: RestorePlan, directory: Path, names: Mapping[int, str], image_format: str
) -> dict[str, Any]:
    """The domain to define as XML, its name and what was left out of it; also a check before any effect."""
    domain_xml = plan.file(DOMAIN_XML)
    host_id = context.arguments.get("define_host_id")
    if domain_xml is None:
        if host_id is not None:
            raise NotFound(f"the backup holds no {DOMAIN_XML}: there is nothing to define")
        return {}
    host = None if host_id is None else context.services.host(host_id)
    domain = xmldoc.parse(domain_xml, what=DOMAIN_XML)
    name = context.text("name") or _free_name(context, host, domain.findtext("name", "").strip())
    if host is None:
        return {"name": name}
    if context.text("name") and name in {there.name for there in list_domains(context.caller, host)}:
        raise Conflict(f"host {host.name} has a domain '{name}' already", hint="Choose another --name.")
    manifest = stored.manifest_of(context.services, plan.backup_id)
    device = {disk.disk_id: disk.target for disk in manifest.disks}
    uuid = str(uuid4())  # ours to choose, so that the domain is known whatever becomes of us
    rebuilt = rebuild_domain(
        domain,
        name=name,
        uuid=uuid,
        disks={
            device[disk.disk_id]: RestoredDisk(str(directory / names[disk.disk_id]), image_format)
            for disk in plan.disks
        },
        allowed_roots=[str(directory)],
        nvram_path="" if plan.file(NVRAM) is None else str(directory / NVRAM),
        no_nic=bool(context.arguments.get("no_nic")),
        no_ip=bool(context.arguments.get("no_ip")),
    )
    _keep(context, _DOMAIN_FILE, xmldoc.serialize(rebuilt.element))
    _note_shared_addresses(context, rebuilt.element)
    return {"name": name, "uuid": uuid, "defines": True, "dropped": list(rebuilt.dropped)}


def _note_shared_addresses(context: Context, domain: xmldoc.Element) -> None:
    """Say it if the VM that was backed up is still there, and has MAC addresses of the new domain."""
    vm = context.services.vm(context.services.image(context.integer("image_id")).vm_id)
    if vm.state == VmState.DONE:
        return
    there = {address.text for address in vm.element.iterfind("TEMPLATE/NIC/MAC")}
    shared = {mac.get("address") for mac in domain.iterfind("devices/interface/mac")} & there
    if shared:
        context.note(
            f"VM {vm.id} ({vm.name}) has the same MAC address {', '.join(sorted(filter(None, shared)))}:"
            " the two must not run in one network; --no-ip or --no-nic avoids it"
        )


def _free_name(context: Context, host: Host | None, old: str) -> str:
    """`<old>-restored-<n>` with the smallest n that nobody has."""
    taken = _taken_names(context, host)
    old = old[:_OLD_NAME_CHARACTERS]
    number = 1
    while f"{old}-restored-{number}" in taken:
        number += 1
    return f"{old}-restored-{number}"


def _taken_names(context: Context, host: Host | None) -> set[str]:
    names = {row["name"] for row in context.services.store.rows("vm")}
    if host is not None:
        names |= {domain.name for domain in list_domains(context.caller, host)}
    return names


def _restore_plan(context: Context) -> RestorePlan:
    return RestorePlan.from_xml(xmldoc.parse((context.work_dir / _PLAN_FILE).read_text(), what="PLAN"))


def _prepare(context: Context) -> Mapping[str, Any]:
    plan = _restore_plan(context)
    names = context.facts["names"]
    services = context.services
    datastore = services.datastore(services.image(context.integer("image_id")).datastore_id)
    disks = {
        disk.disk_id: NewDisk(disk.disk_id, names[str(disk.disk_id)], disk.size_bytes) for disk in plan.disks
    }
    room_bytes = 0
    if context.arguments.get("check_space", True):
        room_bytes = sum(_least_bytes(context, disk) for disk in plan.disks)
    try:
        found = targets.prepare(
            context, datastore, disks, dict(plan.files), context.facts["format"], room_bytes=room_bytes
        )
        return {"targets": found}
    except Conflict as error:
        raise Conflict(error.message, hint="Choose an empty directory.") from error


def _download(context: Context) -> Mapping[str, Any]:
    """All disks side by side. `Salvaged` is an answer, any other error the end of all."""
    plan = _restore_plan(context)
    wanted = targets.of(context)
    targets.start_ahead(context, "restore")
    damage: dict[int, DataCorrupt] = {}

    def fetch(disk: StoredDisk, caller: Caller) -> str:
        try:
            return _download_disk(context, caller, disk, wanted[disk.disk_id])
        except DataCorrupt as error:
            damage[disk.disk_id] = error
            raise

    try:
        found = call_together(
            context,
            {disk.disk_id: partial(fetch, disk) for disk in plan.disks},
            at_a_time=context.services.settings.disks_at_a_time,
            expected_bytes={disk.disk_id: _expected_bytes(context, disk) for disk in plan.disks},
        )
    finally:
        for disk_id, error in damage.items():
            _enter_damage(context, plan, disk_id, error)
    salvaged = [f"{name} is damaged and left out" for name in context.facts["left_out"]]
    for disk_id, text in found.items():
        if text:
            _enter_damage(context, plan, disk_id, text)
            salvaged.append(f"disk {disk_id}: {text.removeprefix(f'disk {disk_id}: ')}")
    return {"salvaged": salvaged}


def _download_disk(context: Context, caller: Caller, disk: StoredDisk, target: DiskTarget) -> str:
    """What was salvaged, in words; empty if all of the disk could be proved."""
    options = {"URL": disk.url, "FORMAT": target.format, "TARGET": target.target}
    if context.arguments.get("salvage"):
        options["SALVAGE"] = "YES"
    services = context.services
    image = services.image(context.integer("image_id"))
    try:
        with targets.writing_to(context, target):
            stored.call_image(services, caller, "download", image, options)
    except Salvaged as salvaged:
        return str(salvaged)
    except DataCorrupt as error:
        hint = _NOT_SALVAGED if context.arguments.get("salvage") else _DAMAGED
        raise DataCorrupt(error.message, hint=hint) from error
    return ""


def _enter_damage(context: Context, plan: RestorePlan, disk_id: int, damage: object) -> None:
    found_while_reading(context, plan.backup_id, f"disk {disk_id} could not be proved by a restore: {damage}")


def _expected_bytes(context: Context, disk: StoredDisk) -> int:
    """About how much there is to read for a disk."""
    return sum(file.size_bytes for file in _chain_files(context, disk))


def _least_bytes(context: Context, disk: StoredDisk) -> int:
    """About how much a disk takes at least: as much as the largest file of its chain has.

    Less only if the guest has freed a lot since that one was made.
    """
    files = _chain_files(context, disk)
    largest = max((file.uncompressed_bytes or file.size_bytes for file in files), default=0)
    return min(largest, disk.size_bytes)


def _chain_files(context: Context, disk: StoredDisk) -> list[StoredFile]:
    """The files of a disk's chain, as far as the catalogue knows them."""
    files = []
    for _, backup_id in parse_url(disk.url).chain:
        with suppress(OnedBackupError):
            manifest = stored.manifest_of(context.services, backup_id)
            there = manifest.disk(disk.disk_id)
            file = manifest.file(there.file) if there else None
            files += [file] if file else []
    return files


def _place(context: Context) -> Mapping[str, Any]:
    names = [*context.facts["names"].values(), *context.facts["files"]]
    targets.start_ahead(context, "post_restore")
    targets.place(context, names)
    return {"placed": sorted(str(Path(context.facts["directory"]) / name) for name in names)}


def _define(context: Context) -> Mapping[str, Any]:
    if not context.facts.get("defines"):
        return {}
    host = context.services.host(context.arguments["define_host_id"])
    options = {"DOMAIN": (context.work_dir / _DOMAIN_FILE).read_text()}
    if TPM in context.facts["files"]:
        options["TPM_TAR"] = str(Path(context.facts["directory"]) / TPM)
    answer = context.caller.vmm("define", host, options=options)
    return {"deploy_id": answer["DEPLOY_ID"]}


def _keep_if_defined(context: Context) -> None:
    """Undo of DEFINE: nothing if our domain is not there; else its files must stay."""
    if not context.facts.get("defines"):
        return
    host = context.services.host(context.arguments["define_host_id"])
    name = context.facts["name"]
    if context.facts["uuid"] in {domain.uuid for domain in list_domains(context.caller, host)}:
        with suppress(OnedBackupError):
            targets.clean(context)
        raise Conflict(
            f"domain {name} is defined on {host.name} and uses the files in {context.facts['directory']}:"
            " they are kept"
        )


RESTORE = OperationKind(
    name="restore",
    steps=(
        Step("PLAN", do=_plan),
        Step("PREPARE", do=_prepare, undo=Undo("REMOVE", targets.remove_all)),
        Step("DOWNLOAD", do=_download),
        Step("PLACE", do=_place),
        Step("DEFINE", do=_define, undo=Undo("KEEP", _keep_if_defined, guards=True), commits=True),
        Step("CLEAN", do=targets.clean),
    ),
    result=result_of(
        "directory",
        "backup_id",
        "increment_id",
        "format",
        "placed",
        "host",
        "name",
        "dropped",
        "deploy_id",
        "salvaged",
    ),
)
