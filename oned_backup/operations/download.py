"""DOWNLOAD of one disk by its pseudo-URL: PLAN → PREPARE → DOWNLOAD → PLACE → CLEAN.

The target is a new file (made beside its name, renamed when it is proved), a
file or block device that exists (written in place), a FIFO that somebody
reads from (`oned-backup download URL -`), or a new file on another host, for which the
transfer manager prepares, places and cleans as it does for a restore.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

from oned_backup.contract.targets import NewDisk, checked_format
from oned_backup.contract.url import DiskUrl, parse_url
from oned_backup.errors import Cancelled, Conflict, DataCorrupt, InvalidInput, NotFound, Salvaged, Unavailable
from oned_backup.model.manifest import parse_manifest
from oned_backup.model.names import checked_name
from oned_backup.operations import stored, targets
from oned_backup.operations.context import Context
from oned_backup.operations.damage import found_while_reading
from oned_backup.operations.engine import FailedAttempt, OperationKind, result_of, retry_wait
from oned_backup.operations.steps import Step, Undo

_READER_WAIT_S = 30.0
_BEGINNING_BYTES = 1 << 20


def _plan(context: Context) -> Mapping[str, Any]:
    url = parse_url(context.text("url"))
    stored.datastore_of_url(context.services, url.datastore_id, url.scheme)
    url = _present_url(context, url)
    image_format = checked_format(context.text("format", "raw"))
    target = Path(context.text("target"))
    if "\0" in str(target) or not target.is_absolute() or ".." in target.parts:
        raise InvalidInput(f"target '{str(target)[:200]}' is not an absolute path")
    if context.arguments.get("host_id") is not None:
        return {
            "url": str(url),
            "datastore_id": url.datastore_id,
            "format": image_format,
            "target": str(target),
            "kind": "host",
            "directory": str(target.parent),
            "name": checked_name(target.name, "name of the file"),
        }
    kind = _kind_of(target)
    if kind in {"file", "device"} and not context.arguments.get("overwrite") and _holds_something(target):
        raise Conflict(f"{target} exists and is not empty", hint="--overwrite writes over it.")
    return {
        "url": str(url),
        "datastore_id": url.datastore_id,
        "format": image_format,
        "target": str(target),
        "kind": kind,
    }


def _present_url(context: Context, url: DiskUrl) -> DiskUrl:
    """`url`, or where backups in it were merged since: the URL by which the same content is had now.

    `NotFound` if that content is gone. A store that the catalogue does not know is asked as it is.
    """
    store = context.services.store
    manifest = stored.recorded(store, url.backup_id)
    if manifest is None:
        for row in store.backups(vm_id=url.vm_id, datastore_id=url.datastore_id):
            other = parse_manifest(row.manifest, what=f"backup {row.backup_id}")
            if url.backup_id in other.replaces:
                raise NotFound(
                    f"restore point {url.backup_id} was merged into {other.id}, which is a later one",
                    hint=f"`oned-backup image ls {row.image_id}` shows what there is.",
                )
        return url
    if all(_is_recorded(context, backup_id) for _, backup_id in url.chain):
        return url
    row = store.backup(manifest.id)
    image = context.services.image(row.image_id)
    listing = stored.list_disks(context.services, context.caller, image, row.increment_id)
    found = next((disk for disk in listing.disks if disk.disk_id == url.disk_id), None)
    if found is None:
        raise NotFound(f"backup {manifest.id} has no disk {url.disk_id}")
    context.note(f"backups of this URL were merged since; the same disk is now {found.url}")
    return parse_url(found.url)


def _is_recorded(context: Context, backup_id: str) -> bool:
    with suppress(NotFound):
        return bool(context.services.store.backup(backup_id))
    return False


def _kind_of(target: Path) -> str:
    """new, file, device or fifo; `InvalidInput` for what no disk can be written to."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if target.parent.is_dir():
            return "new"
        raise InvalidInput(f"there is no directory {target.parent}") from None
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISBLK(mode):
        return "device"
    if stat.S_ISFIFO(mode):
        return "fifo"
    raise InvalidInput(f"{target} is neither a file nor a block device")


def _holds_something(target: Path) -> bool:
    """Whether a file has anything in it, or a device where partitions and file systems begin."""
    if target.is_file():
        return target.stat().st_size > 0
    with target.open("rb", buffering=0) as device:
        return any(device.read(_BEGINNING_BYTES))


def _prepare(context: Context) -> Mapping[str, Any]:
    """On another host: a place for the disk, whose size the catalogue knows."""
    facts = context.facts
    if facts["kind"] != "host":
        return {}
    url = parse_url(facts["url"])
    manifest = stored.recorded(context.services.store, url.backup_id)
    disk = manifest.disk(url.disk_id) if manifest else None
    if disk is None:
        raise NotFound(
            f"the catalogue knows no disk {url.disk_id} of backup {url.backup_id}",
            hint="Import the datastore, or download to this machine.",
        )
    new = NewDisk(url.disk_id, facts["name"], disk.size_bytes)
    datastore = context.services.datastore(facts["datastore_id"])
    return {"targets": targets.prepare(context, datastore, {new.disk_id: new}, {}, facts["format"])}


def _remove_prepared(context: Context) -> None:
    if context.facts["kind"] == "host":
        targets.remove_all(context)


def _partial(context: Context) -> Mapping[str, Any]:
    if context.facts["kind"] != "new":
        return {}
    target = Path(context.facts["target"])
    return {"partial": str(target.parent / f".{target.name}.partial-{context.operation.id}")}


def _download(context: Context) -> Mapping[str, Any]:
    facts = context.facts
    options = {"URL": facts["url"], "FORMAT": facts["format"]}
    if context.arguments.get("salvage"):
        options["SALVAGE"] = "YES"
    descriptor = None
    place: AbstractContextManager[None] = nullcontext()
    if facts["kind"] == "fifo":
        descriptor = _open_fifo(context, facts["target"])
    elif facts["kind"] == "host":
        (target,) = targets.of(context).values()
        options |= {"TARGET": target.target, "FORMAT": target.format}
        place = targets.writing_to(context, target)
    else:
        options["TARGET"] = facts.get("partial", facts["target"])
        if "partial" in facts:
            Path(facts["partial"]).unlink(missing_ok=True)
    datastore = context.services.datastore(facts["datastore_id"])
    url = parse_url(facts["url"])
    catalogue = stored.catalogue_of(context.services, (backup_id for _, backup_id in url.chain))
    salvaged = ""
    try:
        with place:
            context.caller.datastore(
                "download", datastore, options=options, catalogue=catalogue, stdout_fd=descriptor
            )
    except (DataCorrupt, Salvaged) as damage:
        found_while_reading(context, url.backup_id, f"a disk could not be proved by a download: {damage}")
        if not isinstance(damage, Salvaged):
            raise
        salvaged = str(damage)
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return {"salvaged": [salvaged] if salvaged else []}


def _open_fifo(context: Context, path: str) -> int:
    """The writing end, once a reader has opened the other; `Unavailable` if none comes."""
    deadline = time.monotonic() + _READER_WAIT_S
    while time.monotonic() < deadline:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:  # which says that nobody reads yet
                raise Unavailable(f"{path}: {error.strerror}") from error
            if context.cancellation.wait(0.05):
                raise Cancelled("download was cancelled") from None
            continue
        os.set_blocking(descriptor, True)
        return descriptor
    raise Unavailable(f"{path}: nobody reads from it")


def _remove_partial(context: Context) -> None:
    """Undo of DOWNLOAD: the partial file. What was written over cannot be brought back."""
    partial = context.facts.get("partial")
    if partial and os.path.lexists(partial):  # a read-only file system refuses also what is not there
        Path(partial).unlink(missing_ok=True)


def _place(context: Context) -> Mapping[str, Any]:
    if context.facts["kind"] == "host":
        targets.place(context, [context.facts["name"]])
    if "partial" not in context.facts:
        return {}
    partial, target = Path(context.facts["partial"]), Path(context.facts["target"])
    for path in (partial, target.parent):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if path == target.parent:
                _rename_new(partial, target)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return {}


def _rename_new(partial: Path, target: Path) -> None:
    try:
        os.link(partial, target, follow_symlinks=False)
    except FileExistsError as error:
        raise Conflict(f"{target} has come into being meanwhile") from error
    partial.unlink()


def _clean(context: Context) -> None:
    if context.facts["kind"] == "host":
        targets.clean(context)


def _again(context: Context, failed: FailedAttempt) -> float | None:
    """What has gone down a pipe cannot be sent again."""
    return None if context.facts.get("kind") == "fifo" else retry_wait(context, failed)


DOWNLOAD = OperationKind(
    name="download",
    steps=(
        Step("PLAN", do=_plan),
        Step("PREPARE", do=_prepare, undo=Undo("REMOVE-PREPARED", _remove_prepared)),
        Step("DOWNLOAD", do=_download, intend=_partial, undo=Undo("REMOVE", _remove_partial)),
        Step("PLACE", do=_place, commits=True),
        Step("CLEAN", do=_clean),
    ),
    again=_again,
    result=result_of("target", "format", "salvaged"),
)
