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
from oned_backup.operations.context import Context
from oned_backup.operations.damage import broken_with, mark_broken
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.steps import Step
from oned_backup.store import Backup, BackupState, Transaction


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
        options = {"BACKUP_IDS": row.backup_id}
        if percent is not None:
            options["PERCENT"] = str(percent)
        report = VerifyReport.from_xml(
            document(stored.call_image(services, caller, "verify", image, options), "REPORT")
        )
        found += [_only(report, row.backup_id)]
        before += size
    return {
        "report": xmldoc.serialize(VerifyReport(tuple(found)).to_xml()),
        "whole": percent in {None, 100},
    }


def _wanted(context: Context, image: Image) -> Sequence[Backup]:
    rows = context.services.store.backups(image_id=image.id)
    increment_id = context.arguments.get("increment_id")
    if increment_id is None or not image.increments:
        return rows
    needed = {increment.id for increment in chain_to(image.increments, increment_id)}
    return [row for row in rows if row.increment_id in needed]


def _only(report: VerifyReport, backup_id: str) -> VerifiedBackup:
    for backup in report.backups:
        if backup.backup_id == backup_id:
            return backup
    raise DriverBug(f"verify: the report says nothing of backup {backup_id}")


def _report(context: Context) -> VerifyReport:
    return VerifyReport.from_xml(xmldoc.parse(context.facts["report"], what="REPORT"))


def _record(context: Context, tx: Transaction) -> Mapping[str, Any]:
    image = Image(tx.get("image", context.integer("image_id")).element)
    failures = {backup.backup_id: backup.failures for backup in _report(context).backups}
    rows = {row.backup_id: row for row in tx.backups(image_id=image.id)}
    damaged = [backup_id for backup_id, found in failures.items() if found and backup_id in rows]
    manifests = [parse_manifest(row.manifest) for row in rows.values()]
    now = context.services.clock()
    texts = {
        backup_id: "; ".join(f"{name}: {text}" for name, text in failures[backup_id]) for backup_id in damaged
    }
    broken, ends_chain = mark_broken(tx, image.id, texts)
    if context.facts["whole"]:
        known_bad = {row.backup_id for row in rows.values() if row.state is not BackupState.GOOD}
        still_bad = set(broken_with(sorted((known_bad - set(failures)) | set(damaged)), manifests))
        for backup_id in failures.keys() & rows.keys() - still_bad:  # not what was merged meanwhile
            tx.mark_backup(backup_id, state=BackupState.GOOD, verified_at=now, failure="")
    return {"broken": list(broken), "ends_chain": ends_chain}


def _judge(context: Context) -> None:
    failures = [
        (backup.backup_id, name, text)
        for backup in _report(context).backups
        for name, text in backup.failures
    ]
    if context.facts["ends_chain"]:
        context.note("the damaged chain is closed: the next backup starts a new one")
    if failures:
        backup_id, name, text = failures[0]
        more = f" and {len(failures) - 1} more" if len(failures) > 1 else ""
        raise DataCorrupt(
            f"image {context.integer('image_id')}: backup {backup_id}: {name}: {text}{more}",
            hint="`oned-backup image show` tells which restore points are whole.",
        )


def _result(context: Context) -> Mapping[str, Any]:
    if "report" not in context.facts:
        return {}
    return {
        "backups": [
            {
                "backup_id": backup.backup_id,
                "read_bytes": backup.read_bytes,
                "failures": [{"file": name, "text": text} for name, text in backup.failures],
            }
            for backup in _report(context).backups
        ],
        "broken": context.facts.get("broken", []),
        "whole": context.facts["whole"],
    }


VERIFY = OperationKind(
    name="verify",
    steps=(Step("READ", do=_read), Step("RECORD", record=_record), Step("JUDGE", do=_judge)),
    result=_result,
)
