"""A merge as the clauses call it, and what must hold of the chain afterwards."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from oned_backup.contract.documents import Catalogue, VerifyReport
from oned_backup.contract.request import Backup
from oned_backup.errors import NotFound, OnedBackupError
from oned_backup.model.manifest import parse_manifest
from oned_backup.model.names import checked_name
from oned_backup.runner.kit.bench import Bench
from oned_backup.runner.kit.called import Called
from oned_backup.runner.kit.catalogue import Attempt, Chain
from oned_backup.runner.kit.clause import Unmet
from oned_backup.runner.kit.guest import Point
from oned_backup.runner.process import Cancellation, Limits

ACTION = "increment_flatten"


@dataclass(frozen=True)
class Merge:
    """A merge of the backups from `first` to `last` (places in the chain), under an id chosen beforehand."""

    attempt: Attempt
    first: int
    last: int

    @property
    def chain(self) -> Chain:
        """The chain as it is before."""
        return self.attempt.chain

    @property
    def ids(self) -> list[str]:
        """What is merged."""
        return [increment.source for increment in self.chain.increments[self.first : self.last + 1]]

    @property
    def supposed(self) -> Chain:
        """The chain as if the merge were done, under the id that it was given."""
        return self.switched(self.attempt.backup.id, 1)

    def switched(self, backup_id: str, size_mb: int) -> Chain:
        """The chain as the catalogue has it afterwards."""
        before = self.chain.increments
        merged = replace(
            before[self.last],
            parent_id=before[self.first].parent_id,
            size_mb=size_mb,
            source=backup_id,
            type=before[self.first].type,
        )
        return replace(self.chain, increments=[*before[: self.first], merged, *before[self.last + 1 :]])


def plan(bench: Bench, chain: Chain, first: int, last: int) -> Merge:
    """A merge that has not been asked for yet, with a new id."""
    newest = chain.increments[last]
    planned = bench.plan(chain, bench.guests.tiny).backup
    backup = Backup(
        id=planned.id,
        chain_id=planned.chain_id,
        increment_id=newest.id,
        date=newest.date,
        parent_id=chain.increments[first - 1].source if first else "",
    )
    return Merge(Attempt(chain, bench.guests.tiny, backup), first, last)


def call(
    bench: Bench,
    merge: Merge,
    *,
    limits: Limits | None = None,
    cancellation: Cancellation | None = None,
    on_start: Callable[[], None] = lambda: None,
    **options: str,
) -> Called:
    """Ask the driver for the merge; `options` go before those that it needs."""
    given: Mapping[str, str] = {"MERGE_IDS": ",".join(merge.ids), **options}
    request = bench.request_for(merge.chain.store, ACTION, attempt=merge.attempt, options=given)
    return bench.call(ACTION, request, limits=limits, cancellation=cancellation, on_start=on_start)


def switched(merge: Merge, called: Called) -> Chain:
    """The chain after a merge; `Unmet` if the answer is not what it must be."""
    answer = called.answer()
    if not answer["SIZE_MB"].isdecimal():
        raise called.unmet(f"SIZE_MB={answer['SIZE_MB']!r} is not a whole number")
    try:
        backup_id = checked_name(answer["BACKUP_ID"], "BACKUP_ID")
        manifest = parse_manifest(answer["MANIFEST"], what="MANIFEST") if "MANIFEST" in answer else None
    except OnedBackupError as error:
        raise called.unmet(error.message) from error
    after = merge.switched(backup_id, int(answer["SIZE_MB"]))
    wanted = ",".join(f"{increment.id}:{increment.source}" for increment in after.increments)
    if answer["CHAIN"] != wanted:
        raise called.unmet(f"CHAIN={answer['CHAIN']}, but the chain is {wanted} afterwards")
    if manifest is not None:
        replaced = [name for name in manifest.replaces if name in merge.ids]
        if replaced != merge.ids or not manifest.stands_for or manifest.stands_for[-1] != merge.ids[-1]:
            raise called.unmet(
                f"MANIFEST replaces {', '.join(manifest.replaces)} and stands for "
                f"{', '.join(manifest.stands_for) or 'nothing'}, but {', '.join(merge.ids)} were merged"
            )
    return after


@contextlib.contextmanager
def merged(bench: Bench, chain: Chain, first: int, last: int) -> Iterator[tuple[Called, Chain]]:
    """A merge that succeeds, and the chain afterwards; its result is removed in the end."""
    merge = plan(bench, chain, first, last)
    with removed(bench, merge):
        called = call(bench, merge)
        yield called, switched(merge, called)


@contextlib.contextmanager
def removed(bench: Bench, merge: Merge) -> Iterator[None]:
    """Whatever the merge published is removed in the end."""
    yield
    backup_id = merge.attempt.backup.id
    called = bench.read("rm", merge.chain, BACKUP_IDS=backup_id)
    if called.exit_code != 0:
        raise called.unmet(f"a merged backup that nothing continues cannot be removed: {called.ended_with}")


def require_absent(bench: Bench, merge: Merge, what: str) -> None:
    """`Unmet` unless nothing of the merge is published; `what` became of it."""
    newest = merge.chain.increments[merge.last].id
    found = bench.read("ls", merge.supposed, INCREMENT_ID=newest)
    found.require(NotFound, f"the answer about a merge that {what}")


def require_restores(bench: Bench, called: Called, chain: Chain, increment_id: int, point: Point) -> None:
    """`Unmet`, with the call of the merge, unless an increment restores to `point`."""
    try:
        bench.check_restored(chain, increment_id, point)
    except Unmet as unmet:
        raise called.unmet(f"afterwards: {unmet}") from unmet


def require_well(bench: Bench, called: Called, chain: Chain) -> None:
    """`Unmet` if the driver can verify and finds damage in the chain."""
    if not bench.driver.supports("verify"):
        return
    report = VerifyReport.from_xml(bench.read("verify", chain).element("REPORT"))
    if any(backup.failures for backup in report.backups):
        raise called.unmet("verify finds damage afterwards")


def require_catalogue(bench: Bench, called: Called, chain: Chain, *, absent: list[str]) -> None:
    """`Unmet` if the driver has a catalogue that lacks one of the chain, or has one of `absent`."""
    if not bench.driver.supports("catalogue"):
        return
    found = Catalogue.from_xml(bench.read("catalogue", chain).element("CATALOGUE"))
    ids = {parse_manifest(text).id for text in found.manifests}
    missing = {increment.source for increment in chain.increments} - ids
    if missing or ids & set(absent):
        raise called.unmet(f"catalogue lacks {sorted(missing)}, and has {sorted(ids & set(absent))}")
