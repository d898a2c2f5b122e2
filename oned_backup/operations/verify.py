"""VERIFY: READ → RECORD → JUDGE.

    READ     the datastore's driver re-reads each backup of the chain and compares checksums
    RECORD   one transaction: verified_at of what is whole; what is not is BROKEN, and with
             it all backups that continue it; the VM's active chain ends if it is hit
    JUDGE    fails with `DataCorrupt` if anything was broken

A sample (`percent`) can find damage, but it proves nothing: it sets no verified_at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.documents import VerifiedBackup, VerifyReport
from oned_backup.contract.result import document
from oned_backup.errors import Conflict, DataCorrupt, DriverBug, InvalidInput
from oned_backup.model.image import Image
from oned_backup.model.increments import chain_to
from oned_backup.model.manifest import parse_manifest
from oned_backup.operations import stored
from oned_backup.operations.caller import Caller
from oned_backup.operations.context import Context
from oned_backup.operations.damage import note_closed_chain, record_verified
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.services import Services
from oned_backup.operations.steps import Step
from oned_backup.store import RestorePoint, Transaction


def _read(context: Context) -> Mapping[str, Any]:
    percent = context.arguments.get("percent")
    if percent is not None and not 1 <= percent <= 100:
        raise InvalidInput(f"percent is {percent}, not from 1 to 100")
    services = context.services
    image = services.image(context.integer("image_id"))
    if not image.is_ready:
        raise Conflict(f"image {image.id} is in state {image.state_name}: it cannot be verified")
    rows = _wanted(context, image)
    sizes = [parse_manifest(row.manifest, what=row.backup_id).size_bytes for row in rows]
    total, before = sum(sizes), 0
    found = []
    for row, size in zip(rows, sizes, strict=True):
        context.check_cancelled()
        caller = context.caller
        caller.progress = lambda done, _total, offset=before: context.report("READ", offset + done, total)
        found += [read_again(services, caller, image, row.backup_id, percent)]
        before += size
    return {
        "report": xmldoc.serialize(VerifyReport(tuple(found)).to_xml()),
        "whole": percent in {None, 100},
    }


def read_again(
    services: Services, caller: Caller, image: Image, backup_id: str, percent: int | None
) -> VerifiedBackup:
    """What the store's driver finds when it reads a backup of `image` again, or a share of it."""
    options = {"BACKUP_IDS": backup_id} | ({} if percent is None else {"PERCENT": str(percent)})
    answer = stored.call_image(services, caller, "verify", image, options)
    for backup in VerifyReport.from_xml(document(answer, "REPORT")).backups:
        if backup.backup_id == backup_id:
            return backup
    raise DriverBug(f"verify: the report says nothing of backup {backup_id}")


def _wanted(context: Context, image: Image) -> Sequence[RestorePoint]:
    rows = context.services.store.backups(image_id=image.id)
    increment_id = context.arguments.get("increment_id")
    if increment_id is None or not image.increments:
        return rows
    needed = {increment.id for increment in chain_to(image.increments, increment_id)}
    return [row for row in rows if row.increment_id in needed]


def _report(context: Context) -> VerifyReport:
    return VerifyReport.from_xml(xmldoc.parse(context.facts["report"], what="REPORT"))


def _record(context: Context, tx: Transaction) -> Mapping[str, Any]:
    broken, ends_chain = record_verified(
        tx,
        context.integer("image_id"),
        _report(context).backups,
        whole=context.facts["whole"],
        now=context.services.clock(),
    )
    return {"broken": list(broken), "ends_chain": ends_chain}


def _judge(context: Context) -> None:
    failures = [
        f"backup {backup.backup_id}: {text}"
        for backup in _report(context).backups
        for text in backup.failure_texts
    ]
    if context.facts["ends_chain"]:
        note_closed_chain(context)
    if failures:
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise DataCorrupt(
            f"image {context.integer('image_id')}: {failures[0]}{more}",
            hint="`oned-backup image show` tells which restore points are whole.",
        )


def told(backups: Sequence[VerifiedBackup]) -> list[dict[str, Any]]:
    """What a result tells of backups that were read again."""
    return [
        {
            "backup_id": backup.backup_id,
            "read_bytes": backup.read_bytes,
            "failures": [{"file": name, "text": text} for name, text in backup.failures],
        }
        for backup in backups
    ]


def _result(context: Context) -> Mapping[str, Any]:
    if "report" not in context.facts:
        return {}
    return {
        "backups": told(_report(context).backups),
        "broken": context.facts.get("broken", []),
        "whole": context.facts["whole"],
    }


VERIFY = OperationKind(
    name="verify",
    steps=(Step("READ", do=_read), Step("RECORD", record=_record), Step("JUDGE", do=_judge)),
    result=_result,
)
