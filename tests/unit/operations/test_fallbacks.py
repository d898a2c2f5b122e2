"""An increment was due and a full was taken: said in the record, the journal, the log and the metrics."""

from __future__ import annotations

import json

import pytest

from oned_backup import xmldoc
from oned_backup.contract.exports import DiskExport, Exports, Reason, disk_file_name
from oned_backup.contract.request import Request
from oned_backup.daemon.metrics import Metrics
from oned_backup.model.image import Image, ImageState, with_state
from oned_backup.model.increments import BackupType
from oned_backup.operations.context import Context
from oned_backup.operations.engine import run_operation
from oned_backup.operations.inventory import configure_vm
from oned_backup.operations.kinds import KINDS
from oned_backup.store import BackupState, Operation

from .conftest import GIB, World

OF_DISKS = sorted(
    {reason for reason in Reason if reason.is_fallback}
    - {Reason.CHAIN_ENDED, Reason.CHAIN_DAMAGED, Reason.CHAIN_LOST}
)


def test_what_was_asked_for_is_no_fallback() -> None:
    asked = {
        Reason.INCREMENT,
        Reason.FULL_MODE,
        Reason.FIRST_BACKUP,
        Reason.RESET,
        Reason.OTHER_DATASTORE,
        Reason.CHAIN_LENGTH,
    }
    excluded = {
        Reason.CDROM,
        Reason.FLOPPY,
        Reason.VOLATILE,
        Reason.NOT_SELECTED,
        Reason.READ_ONLY,
        Reason.NO_MEDIUM,
        Reason.UNSUPPORTED_SOURCE,
    }
    assert {reason for reason in Reason if not reason.is_fallback} == asked | excluded


def backup(world: World) -> tuple[Operation, list[str]]:
    """A backup that ran, and the warnings of its log."""
    world.services.store.journal.enqueue("backup", "test", {"vm_id": 0}, vm_id=0)
    operation = world.services.store.journal.claim()
    assert operation is not None
    lines: list[tuple[int, str]] = []
    context = Context(world.services, operation, log=lambda level, line: lines.append((level, line)))
    run_operation(KINDS["backup"], context)
    return world.services.store.journal.get(operation.id), [line for level, line in lines if level <= 4]


def recorded_reasons(world: World, operation: Operation) -> list[str]:
    row = world.services.store.backup(operation.result["backup_id"])
    return [disk["reason"] for disk in json.loads(row.manifest)["backup"]["disks"]]


def counted(operation: Operation) -> str:
    metrics = Metrics()
    metrics.observe(operation)
    text = metrics.counted().decode()
    return next(
        (line for line in text.splitlines() if line.startswith("oned_backup_disk_fallbacks_total")), ""
    )


@pytest.mark.parametrize("reason", OF_DISKS)
@pytest.mark.parametrize("all_disks", [True, False])
def test_a_disk_that_is_stored_whole(world: World, reason: Reason, *, all_disks: bool) -> None:
    world.run("backup", vm_id=0)
    world.drivers.answers["pre_backup_live"] = lambda request: exports(request, reason, all_disks=all_disks)
    done, warnings = backup(world)
    assert done.result["type"] == ("FULL" if all_disks else "INCREMENT")
    assert recorded_reasons(world, done)[0] == reason
    assert done.result["disks"][0]["reason"] == reason
    told = f"disk 0 (vda) is stored whole: {reason} (told why)"
    assert told in done.result["notes"]
    assert told in warnings
    assert ("new chain: no disk could be continued" in warnings) is all_disks
    assert counted(done) == f'oned_backup_disk_fallbacks_total{{reason="{reason}",vm_id="0"}} 1.0'


def exports(request: Request, reason: Reason, *, all_disks: bool) -> dict[str, str]:
    """`vda` is whole for that reason; there is a `vdb` that is not, unless that would be all."""
    assert request.backup is not None
    number = 0 if all_disks else request.backup.increment_id
    disks = [disk(0, number, BackupType.FULL, reason, "told why")]
    if not all_disks:
        disks.append(disk(1, number, BackupType.INCREMENT, Reason.INCREMENT))
    found = Exports(tuple(disks), number, request.backup.checkpoint)
    return {"EXPORTS": xmldoc.serialize(found.to_xml())}


def disk(number: int, increment: int, kind: BackupType, reason: Reason, text: str = "") -> DiskExport:
    return DiskExport(
        disk_id=number,
        target=f"vd{'ab'[number]}",
        file=disk_file_name(number, increment),
        type=kind,
        reason=reason,
        text=text,
        size_bytes=GIB,
        format="qcow2",
        source=f"/srv/web{number}.qcow2",
    )


def end_by_setting(world: World) -> None:
    configure_vm(world.services, 0, {"MODE": "FULL"})
    configure_vm(world.services, 0, {"MODE": "INCREMENT"})


def damage(world: World) -> None:
    (row,) = world.services.store.backups()
    world.services.store.mark_backup(row.backup_id, state=BackupState.BROKEN)


def lose(world: World) -> None:
    world.services.store.change(
        "image", 0, lambda element: with_state(Image(element), ImageState.DELETE).element
    )


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (end_by_setting, Reason.CHAIN_ENDED),
        (damage, Reason.CHAIN_DAMAGED),
        (lose, Reason.CHAIN_LOST),
    ],
)
def test_a_chain_that_cannot_be_continued(world: World, fault: object, reason: Reason) -> None:
    configure_vm(world.services, 0, {"MODE": "INCREMENT"})
    world.run("backup", vm_id=0)
    assert callable(fault)
    fault(world)
    done, warnings = backup(world)
    assert (done.result["type"], done.result["image_id"]) == ("FULL", 1)
    assert recorded_reasons(world, done) == [reason]
    assert any(line.startswith(f"new chain ({reason}): ") for line in warnings)
    assert any(note.startswith(f"new chain ({reason}): ") for note in done.result["notes"])
    assert counted(done) == f'oned_backup_disk_fallbacks_total{{reason="{reason}",vm_id="0"}} 1.0'
