"""SCRUB: CHOOSE → READ → RECORD → JUDGE: the daemon reads its stores again, some of them every day.

    CHOOSE   the backups of a datastore that were proved longest ago, as many as the budget allows
    READ     the driver's `verify` of each, as VERIFY does
    RECORD   one transaction: as VERIFY does
    JUDGE    fails with `DataCorrupt` if anything was broken

The budget of a datastore is its SCRUB_GB_PER_DAY, else the setting `scrub_gb_per_day`: no more is
read within 24 hours. What was read is in the journal, so a restart changes nothing; of an operation
that was cut off all that it chose counts as read. A backup is due when it is stored, and
`scrub_every_days` after it was proved. One that is larger than the budget of a day is never read
whole: when nothing else is due a random share of it is, which finds damage but proves nothing.

It has a thread of its own and no VM's lock, so nothing ever waits for it. What is merged or
removed while it is read does not count as damaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.documents import VerifiedBackup, VerifyReport
from oned_backup.contract.driver_toml import SCRUB_BUDGET
from oned_backup.errors import Cancelled, DataCorrupt, OnedBackupError, Unavailable
from oned_backup.model.datastore import Datastore
from oned_backup.model.manifest import parse_manifest
from oned_backup.operations.context import Context
from oned_backup.operations.damage import note_closed_chain, record_verified
from oned_backup.operations.engine import FailedAttempt, OperationKind
from oned_backup.operations.exclusion import scrub_lock
from oned_backup.operations.services import Services
from oned_backup.operations.steps import Step
from oned_backup.operations.verify import read_again, told
from oned_backup.runner.run import Progress
from oned_backup.store import Operation, OperationState, RestorePoint, Transaction

_GB = 10**9
_DAY_S = 86_400.0
#: what one operation reads at most; what it read counts when it ends
_MOST_BACKUPS = 100
_MOST_BYTES = 10 * _GB
#: a store that could not be read is left alone for so long
_PAUSE_S = 3600.0
#: more scrubs than a datastore can have in a day
_RECENT = 2000


@dataclass(frozen=True)
class Choice:
    """A backup to read again; `size_bytes` is what that takes at most."""

    backup_id: str
    image_id: int
    size_bytes: int


@dataclass(frozen=True)
class Chosen:
    """What one scrub reads: whole backups, or the share `percent` of one."""

    backups: tuple[Choice, ...] = ()
    percent: int | None = None

    @property
    def size_bytes(self) -> int:
        """What reading it takes at most."""
        return sum(choice.size_bytes for choice in self.backups) * (self.percent or 100) // 100


def budget_bytes(services: Services, datastore: Datastore) -> int:
    """How much of a datastore may be read within 24 hours; 0: it is not scrubbed."""
    own = datastore.parameters.get(SCRUB_BUDGET)
    gigabytes = services.settings.scrub_gb_per_day if own is None else float(own)
    return int(gigabytes * _GB)


def recent(services: Services, datastore_id: int) -> list[Operation]:
    """The scrubs of a datastore that have not ended, or did within the last 24 hours, newest first."""
    found = services.store.journal.list(kind="scrub", datastore_id=datastore_id, limit=_RECENT)
    now = services.clock()
    return [one for one in found if one.ended_at is None or abs(now - one.ended_at) < _DAY_S]


def read_bytes(operations: list[Operation]) -> int:
    """How much these scrubs have read, or may have read."""
    return sum(int(one.result.get("read_bytes", 0)) for one in operations)


def due(services: Services) -> list[int]:
    """The datastores for which a scrub is to be queued now."""
    found = []
    for entry in services.store.find("datastore"):
        datastore = Datastore(entry.element)
        before = recent(services, datastore.id)
        if not any(_is_open(one) for one in before) and not _pauses(services, before):
            found += [datastore.id] if choose(services, datastore, before).backups else []
    return found


def _is_open(operation: Operation) -> bool:
    return not operation.state.is_final


def _pauses(services: Services, before: list[Operation]) -> bool:
    """Whether the last scrub could not read its store, or was not wanted."""
    last = before[0] if before else None
    if last is None or last.ended_at is None or last.state is OperationState.DONE:
        return False
    return not last.result.get("backups") and abs(services.clock() - last.ended_at) < _PAUSE_S


def choose(services: Services, datastore: Datastore, before: list[Operation]) -> Chosen:
    """What is to be read next; `before`: the scrubs of the last 24 hours, without the one at hand."""
    budget = budget_bytes(services, datastore)
    if not budget or not _can_verify(services, datastore):
        return Chosen()
    left = budget - read_bytes(before)
    tried = {backup_id for one in before for backup_id in one.result.get("tried", ())}
    room = _MOST_BYTES
    fitting: list[Choice] = []
    large: Choice | None = None
    for choice in _candidates(services, datastore, tried):
        if choice.size_bytes > budget:
            large = large or choice
            continue
        if choice.size_bytes > left or (fitting and choice.size_bytes > room):
            return Chosen(tuple(fitting))  # it is the next one: smaller ones must not take its turn
        fitting.append(choice)
        left -= choice.size_bytes
        room -= choice.size_bytes
        if len(fitting) == _MOST_BACKUPS:
            break
    return Chosen(tuple(fitting)) if fitting or large is None else _sample(large, left)


def _sample(choice: Choice, left: int) -> Chosen:
    """A share of a backup that reads half of what is left: a driver rounds up, and reads digests besides."""
    percent = left * 50 // choice.size_bytes
    return Chosen((choice,), percent) if percent else Chosen()


def _candidates(services: Services, datastore: Datastore, tried: set[str]) -> Iterator[Choice]:
    """The good backups that are due, in their order, without those that were tried in the last 24 hours."""
    every_s = services.settings.scrub_every_days * _DAY_S
    due_ids = services.store.due_for_proof(datastore.id, now=services.clock(), every_s=every_s)
    for backup_id in due_ids:
        if backup_id not in tried:
            row = services.store.backup(backup_id)
            yield Choice(row.backup_id, row.image_id, _size_bytes(services, row))


def _size_bytes(services: Services, row: RestorePoint) -> int:
    """What a backup takes in its store; its driver may have told no files."""
    told_bytes = parse_manifest(row.manifest, what=row.backup_id).size_bytes
    if told_bytes:
        return told_bytes
    image = services.image(row.image_id)
    sizes_mb = {increment.source: increment.size_mb for increment in image.increments}
    return max(sizes_mb.get(row.backup_id, image.size_mb), 1) << 20


def _can_verify(services: Services, datastore: Datastore) -> bool:
    try:
        return services.driver(Kind.DATASTORE, datastore.ds_mad).supports("verify")
    except OnedBackupError:
        return False


def view(services: Services, datastore: Datastore) -> dict[str, Any]:
    """How far the backups of a datastore are proved, and what the budget of the last 24 hours went to."""
    return {
        **asdict(services.store.proof_of(datastore.id)),
        "budget_bytes": budget_bytes(services, datastore) if _can_verify(services, datastore) else 0,
        "read_bytes": read_bytes(recent(services, datastore.id)),
    }


# --- the operation


def _choose(context: Context) -> Mapping[str, Any]:
    services = context.services
    datastore = services.datastore(context.integer("datastore_id"))
    before = [one for one in recent(services, datastore.id) if one.id != context.operation.id]
    chosen = choose(services, datastore, before)
    return {"backups": [asdict(choice) for choice in chosen.backups], "percent": chosen.percent}


def _chosen(context: Context) -> Chosen:
    backups = tuple(Choice(**choice) for choice in context.facts.get("backups", ()))
    return Chosen(backups, context.facts.get("percent"))


def _read(context: Context) -> Mapping[str, Any]:
    """What could be read; an error is for JUDGE to raise, so that what was read counts."""
    chosen = _chosen(context)
    services = context.services
    found: list[VerifiedBackup] = []
    tried: list[str] = []
    unproved, error = 0, ""
    for choice in chosen.backups:
        context.check_cancelled()
        caller = context.caller
        seen = _Seen(caller.progress)
        caller.progress = seen
        try:
            image = services.image(choice.image_id)
            if image.is_ready:
                found.append(read_again(services, caller, image, choice.backup_id, chosen.percent))
        except Cancelled:
            raise
        except OnedBackupError as failed:
            error = error or str(failed)
            unproved += choice.size_bytes if seen.done else 0
            context.note(f"backup {choice.backup_id} could not be read: {failed}")
            if isinstance(failed, Unavailable):
                break
        tried.append(choice.backup_id)
    return {
        "report": xmldoc.serialize(VerifyReport(tuple(found)).to_xml()),
        "read_bytes": sum(report.read_bytes for report in found) + unproved,
        "tried": tried,
        "unread": "" if found else error,
    }


class _Seen:
    """Passes on the progress of a driver, and knows whether there was any."""

    def __init__(self, report: Progress | None) -> None:
        self._report = report
        self.done = 0

    def __call__(self, done: int, total: int) -> None:
        self.done = done
        if self._report is not None:
            self._report(done, total)


def _report(context: Context) -> tuple[VerifiedBackup, ...]:
    return VerifyReport.from_xml(xmldoc.parse(context.facts["report"], what="REPORT")).backups


def _record(context: Context, tx: Transaction) -> Mapping[str, Any]:
    chosen = _chosen(context)
    image_of = {choice.backup_id: choice.image_id for choice in chosen.backups}
    reports = _report(context)
    broken: list[str] = []
    ends_chain = False
    for image_id in sorted({image_of[report.backup_id] for report in reports}):
        mine = [report for report in reports if image_of[report.backup_id] == image_id]
        if tx.backups(image_id=image_id):
            now = context.services.clock()
            hit, ends = record_verified(tx, image_id, mine, whole=chosen.percent is None, now=now)
            broken += hit
            ends_chain = ends_chain or ends
    return {"broken": broken, "ends_chain": ends_chain}


def _judge(context: Context) -> None:
    if context.facts["unread"]:
        raise Unavailable(context.facts["unread"])
    if context.facts["ends_chain"]:
        note_closed_chain(context)
    broken = set(context.facts["broken"])
    for report in _report(context):
        if report.failures and report.backup_id in broken:
            raise DataCorrupt(
                f"backup {report.backup_id}: {report.failure_texts[0]};"
                f" broken by it: {', '.join(sorted(broken))}",
                hint="`oned-backup image show` tells which restore points are whole.",
            )


def _result(context: Context) -> Mapping[str, Any]:
    chosen = _chosen(context)
    facts = context.facts
    result: dict[str, Any] = {
        # of what was cut off all may have been read
        "read_bytes": facts.get("read_bytes", chosen.size_bytes),
        "tried": facts.get("tried", [choice.backup_id for choice in chosen.backups]),
        "percent": chosen.percent,
    }
    if "report" in facts:
        result |= {"backups": told(_report(context)), "broken": facts.get("broken", [])}
    return result


def _not_again(_context: Context, _failed: FailedAttempt) -> None:
    """What could not be read has its turn later."""


def _next(context: Context, _state: OperationState, _error: OnedBackupError | None) -> None:
    """Queue the next one at once, as long as there is something to read and budget for it."""
    services = context.services
    if "report" not in context.facts or not _report(context):
        return
    datastore = services.datastore(context.integer("datastore_id"))
    this = replace(context.operation, result=_result(context), ended_at=services.clock())
    before = [one for one in recent(services, datastore.id) if one.id != this.id]
    if not any(_is_open(one) for one in before) and choose(services, datastore, [this, *before]).backups:
        queue(services, datastore.id)


def queue(services: Services, datastore_id: int) -> Operation:
    """Queue a scrub of a datastore."""
    arguments = {"datastore_id": datastore_id}
    journal = services.store.journal
    return journal.enqueue("scrub", scrub_lock(datastore_id), arguments, datastore_id=datastore_id)


SCRUB = OperationKind(
    name="scrub",
    steps=(
        Step("CHOOSE", do=_choose),
        Step("READ", do=_read),
        Step("RECORD", record=_record),
        Step("JUDGE", do=_judge),
    ),
    again=_not_again,
    result=_result,
    ended=_next,
)
