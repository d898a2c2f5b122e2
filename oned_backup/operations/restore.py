"""RESTORE to a directory: PLAN → DOWNLOAD → PLACE → DEFINE.

    PLAN      the store's plan; names free, domain XML rebuilt, new name chosen; nothing is written
    DOWNLOAD  each disk, verified on the way, to DIR/.<name>.partial-<operation>    (undo: REMOVE)
    PLACE     make all durable and give them their names, replacing nothing          (undo: UNPLACE)
    DEFINE    with --define: a new domain over the files                             (undo: KEEP)

All or nothing: what is made has its final name only when all of it is there and
proved, and a restore that fails removes what it made, and only that (by inode).
A domain that turns out to be defined keeps its files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.documents import RestorePlan, StoredDisk
from oned_backup.errors import (
    Conflict,
    DataCorrupt,
    InvalidInput,
    NotFound,
    PermissionDenied,
    Salvaged,
)
from oned_backup.model.domain import RestoredDisk, rebuild_domain
from oned_backup.model.host import Host
from oned_backup.model.names import checked_name
from oned_backup.operations import stored
from oned_backup.operations.context import Context
from oned_backup.operations.damage import found_while_reading
from oned_backup.operations.domains import list_domains
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.steps import Step, Undo

_DOMAIN = "domain.xml"
#: in the operation's own directory
_PLAN_FILE = "plan.xml"
_DOMAIN_FILE = "domain-to-define.xml"
_NVRAM = "nvram.fd"
_TPM = "tpm.tar"
FORMATS = ("qcow2", "raw")


def _plan(context: Context) -> Mapping[str, Any]:
    image_format = context.text("format", "qcow2")
    if image_format not in FORMATS:
        raise InvalidInput(f"format '{image_format[:20]}' is none of {', '.join(FORMATS)}")
    directory = _directory(context.text("to"))
    image = context.services.image(context.integer("image_id"))
    whole_vm = context.arguments.get("disk_id") is None
    if image.has_selected_disks and whole_vm and context.arguments.get("define_host_id") is not None:
        raise InvalidInput(
            f"image {image.id}: cannot restore a VM from a selected disk backup",
            hint="Restore the files without --define, or name the disk with --disk-id.",
        )
    plan = stored.plan_restore(
        context.services,
        context.caller,
        image,
        context.arguments.get("increment_id"),
        context.arguments.get("disk_id"),
    )
    names = {disk.disk_id: f"disk.{disk.disk_id}.{image_format}" for disk in plan.disks}
    files = [checked_name(name, "file in the backup") for name, _ in plan.files]
    for name in (*names.values(), *files):
        if os.path.lexists(directory / name):
            raise Conflict(f"{directory / name} exists already", hint="Choose an empty directory with --to.")
    facts: dict[str, Any] = {
        "directory": str(directory),
        "format": image_format,
        "increment_id": plan.increment_id,
        "backup_id": plan.backup_id,
        "names": {str(disk_id): name for disk_id, name in names.items()},
        "files": files,
    }
    # Not into the journal: the small files may hold secrets (TPM state, passwords of consoles).
    _keep(context, _PLAN_FILE, xmldoc.serialize(plan.to_xml()))
    return facts | _plan_domain(context, plan, directory, names, image_format)


def _keep(context: Context, name: str, text: str) -> None:
    path = context.work_dir / name
    path.touch(mode=0o600)
    path.write_text(text)


def _directory(text: str) -> Path:
    directory = Path(text)
    if "\0" in text or not directory.is_absolute() or ".." in directory.parts:
        raise InvalidInput(f"--to: '{text[:200]}' is not an absolute path")
    if directory.exists() and not directory.is_dir():
        raise InvalidInput(f"--to: {directory} is not a directory")
    return directory


def _plan_domain(
    context: Context, plan: RestorePlan, directory: Path, names: Mapping[int, str], image_format: str
) -> dict[str, Any]:
    """The domain to define as XML, its name and what was left out of it; also a check before any effect."""
    domain_xml = plan.file(_DOMAIN)
    host_id = context.arguments.get("define_host_id")
    if domain_xml is None:
        if host_id is not None:
            raise NotFound("the backup holds no domain.xml: there is nothing to define")
        return {}
    host = None if host_id is None else context.services.host(host_id)
    domain = xmldoc.parse(domain_xml, what=_DOMAIN)
    name = context.text("name") or _free_name(context, host, domain.findtext("name", "").strip())
    if host is None:
        return {"name": name}
    if context.text("name") and name in _taken_names(context, host):
        raise Conflict(f"host {host.name} has a domain '{name}' already", hint="Choose another --name.")
    manifest = stored.manifest_of(context.services, plan.backup_id)
    targets = {disk.disk_id: disk.target for disk in manifest.disks}
    rebuilt = rebuild_domain(
        domain,
        name=name,
        disks={
            targets[disk.disk_id]: RestoredDisk(str(directory / names[disk.disk_id]), image_format)
            for disk in plan.disks
        },
        allowed_roots=[str(directory)],
        nvram_path="" if plan.file(_NVRAM) is None else str(directory / _NVRAM),
        no_nic=bool(context.arguments.get("no_nic")),
        no_ip=bool(context.arguments.get("no_ip")),
    )
    _keep(context, _DOMAIN_FILE, xmldoc.serialize(rebuilt.element))
    return {"name": name, "defines": True, "dropped": list(rebuilt.dropped)}


def _free_name(context: Context, host: Host | None, old: str) -> str:
    """`<old>-restored-<n>` with the smallest n that nobody has."""
    taken = _taken_names(context, host)
    number = 1
    while f"{old}-restored-{number}" in taken:
        number += 1
    return f"{old}-restored-{number}"


def _taken_names(context: Context, host: Host | None) -> set[str]:
    names = {entry.element.findtext("NAME", "") for entry in context.services.store.find("vm")}
    if host is not None:
        names |= {domain.name for domain in list_domains(context.caller, host)}
    return names


def _restore_plan(context: Context) -> RestorePlan:
    return RestorePlan.from_xml(xmldoc.parse((context.work_dir / _PLAN_FILE).read_text(), what="PLAN"))


def _partials(context: Context) -> dict[str, Any]:
    """What DOWNLOAD is going to make: partial path by final path, and the directories."""
    directory = Path(context.facts["directory"])
    made = []
    parent = directory
    while not parent.exists():
        made.append(str(parent))
        parent = parent.parent
    names = [*context.facts["names"].values(), *context.facts["files"]]
    suffix = f"partial-{context.operation.id}"
    return {
        "partials": {str(directory / name): str(directory / f".{name}.{suffix}") for name in names},
        "made_directories": made,
    }


def _download(context: Context) -> Mapping[str, Any]:
    plan = _restore_plan(context)
    directory = Path(context.facts["directory"])
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:  # below /proc, say
        raise InvalidInput(f"--to: {directory} cannot be made: {error.strerror}") from error
    for made in context.facts["made_directories"]:
        Path(made).chmod(0o755)  # QEMU runs as another user; the files themselves are private
    partials = context.facts["partials"]
    salvaged = []
    for disk in plan.disks:
        context.check_cancelled()
        damaged = f"disk {disk.disk_id} could not be proved by a restore"
        target = partials[str(directory / context.facts["names"][str(disk.disk_id)])]
        try:
            _download_disk(context, disk, target)
        except DataCorrupt as damage:
            found_while_reading(context, plan.backup_id, f"{damaged}: {damage}")
            raise
        except Salvaged as damage:
            found_while_reading(context, plan.backup_id, f"{damaged}: {damage}")
            salvaged.append(f"disk {disk.disk_id}: {damage}")
    for name, data in plan.files:
        _write_new(Path(partials[str(directory / name)]), data)
    made = {final: list(_identity(Path(partial))) for final, partial in partials.items()}
    return {"made": made, "salvaged": salvaged}


def _download_disk(context: Context, disk: StoredDisk, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    options = {"URL": disk.url, "FORMAT": context.facts["format"], "TARGET": target}
    if context.arguments.get("salvage"):
        options["SALVAGE"] = "YES"
    services = context.services
    image = services.image(context.integer("image_id"))
    try:
        stored.call_image(services, context.caller, "download", image, options)
    except DataCorrupt as error:
        raise DataCorrupt(
            error.message,
            hint="An older increment may be whole (--increment); --salvage fills what is lost with zeros.",
        ) from error


def _write_new(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat(follow_symlinks=False)
    return status.st_dev, status.st_ino


def _remove_partials(context: Context) -> None:
    """Undo of DOWNLOAD: the partial files, and the directories that were made for them."""
    for partial in context.facts.get("partials", {}).values():
        Path(partial).unlink(missing_ok=True)
    for directory in context.facts.get("made_directories", ()):
        try:
            Path(directory).rmdir()
        except OSError:
            return


def _place(context: Context) -> Mapping[str, Any]:
    """Give everything its name. The transfer manager knows how for disks; the rest is linked here."""
    directory = Path(context.facts["directory"])
    disks = {str(directory / name) for name in context.facts["names"].values()}
    for final, partial in context.facts["partials"].items():
        if final in disks:
            context.caller.tm(
                "restore", context.text("tm_mad", "qcow2"), options={"PATH": partial, "TARGET": final}
            )
        else:
            _rename_new(Path(partial), Path(final))
    _sync_directory(directory)
    return {"placed": sorted(context.facts["partials"])}


def _rename_new(partial: Path, final: Path) -> None:
    """Rename unless `final` exists: a link is refused where a rename would replace."""
    try:
        os.link(partial, final, follow_symlinks=False)
    except FileExistsError as error:
        raise Conflict(f"{final} exists already") from error
    except PermissionError as error:
        raise PermissionDenied(f"{final}: {error.strerror}") from error
    partial.unlink()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unplace(context: Context) -> None:
    """Undo of PLACE: the files that are the ones we made, whoever has put others there."""
    for final, identity in context.facts.get("made", {}).items():
        path = Path(final)
        try:
            if list(_identity(path)) == identity:
                path.unlink()
        except FileNotFoundError:
            continue


def _define(context: Context) -> Mapping[str, Any]:
    if not context.facts.get("defines"):
        return {}
    host = context.services.host(context.arguments["define_host_id"])
    options = {"DOMAIN": (context.work_dir / _DOMAIN_FILE).read_text()}
    if _TPM in context.facts["files"]:
        options["TPM_TAR"] = str(Path(context.facts["directory"]) / _TPM)
    answer = context.caller.vmm("define", host, options=options)
    return {"deploy_id": answer["DEPLOY_ID"]}


def _keep_if_defined(context: Context) -> None:
    """Undo of DEFINE: nothing if there is no such domain; else its files must stay."""
    if not context.facts.get("defines"):
        return
    host = context.services.host(context.arguments["define_host_id"])
    name = context.facts["name"]
    if name in {domain.name for domain in list_domains(context.caller, host)}:
        raise Conflict(
            f"domain {name} is defined on {host.name} and uses the files in {context.facts['directory']}:"
            " they are kept"
        )


def _result(context: Context) -> Iterator[tuple[str, Any]]:
    wanted = ("directory", "backup_id", "increment_id", "format", "placed", "name", "dropped", "deploy_id")
    for name in (*wanted, "salvaged"):
        if name in context.facts:
            yield name, context.facts[name]


RESTORE = OperationKind(
    name="restore",
    steps=(
        Step("PLAN", do=_plan),
        Step("DOWNLOAD", do=_download, intend=_partials, undo=Undo("REMOVE", _remove_partials)),
        Step("PLACE", do=_place, undo=Undo("UNPLACE", _unplace)),
        Step("DEFINE", do=_define, undo=Undo("KEEP", _keep_if_defined, guards=True)),
    ),
    result=lambda context: dict(_result(context)),
)
