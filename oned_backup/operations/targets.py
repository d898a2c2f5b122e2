"""What a restore or download has a transfer manager do on the host where the files are wanted.

The facts of the operation have `directory`, and after PREPARE `targets`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Outcome
from oned_backup.contract.result import document
from oned_backup.contract.targets import DiskTarget, NewDisk, disks_option, targets_from_xml
from oned_backup.errors import DriverBug, NoSpace, Unavailable, Unsupported
from oned_backup.model.datastore import Datastore
from oned_backup.model.host import Host
from oned_backup.operations.caller import Caller
from oned_backup.operations.context import Context


def host_of(context: Context) -> Host | None:
    """The host on which the files are wanted; None for this machine."""
    host_id = context.arguments.get("host_id", context.arguments.get("define_host_id"))
    return None if host_id is None else context.services.host(host_id)


def start_ahead(context: Context, action: str) -> None:
    """Have the transfer manager wait for the request of that action."""
    context.caller.start_ahead(Kind.TM, _tm_of(context), action)


def _tm_of(context: Context) -> str:
    return context.text("tm_mad", "qcow2")


def _call_tm(
    context: Context, caller: Caller, action: str, outcome: Outcome | None = None, **options: str
) -> dict[str, str]:
    """The answer of the transfer manager to one of the actions about what is restored."""
    host = host_of(context)
    settings = context.services.settings
    return caller.tm(
        action,
        _tm_of(context),
        host=None if host is None else host.element,
        outcome=outcome,
        deadline_s=settings.deadlines.post_backup_s,
        options={
            "DIRECTORY": context.facts["directory"],
            "SOCKET_DIR": str(settings.nbd_dir),
            "INSTALLATION": context.services.store.installation,
            **options,
        },
    )


def prepare(
    context: Context,
    datastore: Datastore,
    disks: Mapping[int, NewDisk],
    files: Mapping[str, bytes],
    disk_format: str,
    *,
    room_bytes: int = 0,
) -> dict[str, list[str]]:
    """Have room made for disks and small files; TARGET and FORMAT of each disk, by its id.

    `NoSpace` if less than `room_bytes` are free there, before anything is made. `Unsupported` if the
    driver of the `datastore` they come from cannot write there.
    """
    caller = context.backup_caller("stream")
    assert caller.source_dir is not None  # noqa: S101 - that is what a backup caller has
    for name, data in files.items():
        path = caller.source_dir / name
        path.touch(mode=0o600)
        path.write_bytes(data)
    answer = _call_tm(
        context,
        caller,
        "pre_restore",
        DISKS=disks_option(list(disks.values())),
        FORMAT=disk_format,
        ROOM_BYTES=str(room_bytes),
    )
    targets = targets_from_xml(document(answer, "TARGETS"))
    if set(targets) != set(disks):
        raise DriverBug("TARGETS does not have the disks that were asked for")
    driver = context.services.driver(Kind.DATASTORE, datastore.ds_mad)
    if "nbd" not in driver.manifest.features and any(target.is_export for target in targets.values()):
        raise Unsupported(
            f"{driver} cannot write to another host: it has no feature nbd",
            hint="Restore to this machine, and copy the files.",
        )
    return {str(target.disk_id): [target.target, target.format] for target in targets.values()}


@contextmanager
def writing_to(context: Context, target: DiskTarget) -> Iterator[None]:
    """Inside, a full target is named as people know it; its driver sees only the end of a tunnel."""
    try:
        yield
    except NoSpace as error:
        host = host_of(context)
        if host is None or not target.is_export:
            raise
        place = f"{host.name}:{context.facts['directory']}"
        raise NoSpace(f"{place}: no space left", hint="Make room there, or use another directory.") from error


def remove_all(context: Context) -> None:
    """Undo of PREPARE, and of all that came after it: nothing that was made is left."""
    try:
        _call_tm(
            context,
            context.caller,
            "post_restore",
            Outcome.FAILURE,
            DOMAIN_UUID=context.facts.get("uuid", ""),
        )
    except Unavailable as error:
        left = f".oned-backup-{context.operation.id}"
        raise Unavailable(
            f"{error.message}; {left} in or above {context.facts['directory']} may be left"
        ) from error


def clean(context: Context) -> None:
    """Servers and sockets are gone; what was restored stays."""
    _call_tm(context, context.caller, "post_restore", Outcome.SUCCESS)


def of(context: Context) -> dict[int, DiskTarget]:
    """What PREPARE has found, by disk."""
    return {
        int(disk_id): DiskTarget(int(disk_id), target, image_format)
        for disk_id, (target, image_format) in context.facts["targets"].items()
    }


def place(context: Context, names: Sequence[str]) -> None:
    """Give all of these files their names: they are durable, and have replaced nothing."""
    _call_tm(context, context.caller, "restore", NAMES=",".join(names))
