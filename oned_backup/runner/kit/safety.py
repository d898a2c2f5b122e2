"""Clauses about repetition, removal and death: what was restorable stays so, what was not begun anew."""

from __future__ import annotations

import secrets
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from oned_backup.errors import DriverBug, NotFound
from oned_backup.runner.kit.bench import Bench
from oned_backup.runner.kit.called import Called
from oned_backup.runner.kit.catalogue import Attempt, Chain, Store
from oned_backup.runner.kit.clause import NotApplicable, Unmet, clause
from oned_backup.runner.kit.disturbances import cancel_after, cancel_at_state, filled_files
from oned_backup.runner.kit.folders import tree
from oned_backup.runner.process import Cancellation, Limits

#: the daemon's patience after TERM (2.7 of the specification)
_GRACE_S = 10.0
#: what a repository's own indexes and logs may grow by
_BOOKKEEPING_BYTES = 128 << 10
#: when to end a backup: after this share of the time that one takes …
_MOMENTS = (0.15, 0.4, 0.6, 0.75, 0.85, 0.95)
#: … and as soon as the store was seen in that many different states
_STATES = (1, 2, 4, 6, 8)
_ODD_IDS = (
    "..",
    ".",
    "../../escaped",
    "a b",
    "it's",
    'say "no"',
    "a;touch odd",
    "$(touch odd)",
    "`touch odd`",
    "-rf",
    "--help",
    "a/b",
    "*",
    "a\nb",
    "\N{SNOWMAN}",
    "x" * 300,
)


@clause("DS-20", "backup with the same id again gives the same answer and changes nothing")
def same_id_twice(bench: Bench) -> None:
    """The daemon asks again if it does not know whether the first call got through."""
    chain = bench.new_chain(bench.new_store())
    attempt = bench.plan(chain, bench.guests.points[0])
    first = bench.backup(attempt)
    again = bench.backup(attempt)
    one, two = first.answer(), again.answer()
    if any(one[key] != two[key] for key in ("BACKUP_ID", "SIZE_MB", "FORMAT")):
        raise again.unmet(f"answers {two}, and answered {one} before")
    bench.record(attempt, again)
    bench.check_restored(chain, 0, bench.guests.points[0])


@clause("DS-21", "rm removes, and removing what is absent succeeds")
def remove_twice(bench: Bench) -> None:
    """Afterwards the backup is positively absent."""
    store = bench.new_store()
    bench.must_backup(bench.new_chain(store), bench.guests.tiny)
    attempt = bench.must_backup(bench.new_chain(store), bench.guests.tiny)
    for _ in range(2):
        bench.read("rm", attempt.chain).answer()
        bench.read("ls", attempt.chain).require(NotFound, "the answer about a removed backup")
    never = bench.plan(bench.new_chain(store), bench.guests.tiny)
    bench.read("rm", never.supposed).answer()


@clause("DS-22", "rm removes nothing but what it is told to")
def remove_exactly(bench: Bench) -> None:
    """The newest increment goes by BACKUP_IDS, then another VM's chain; the rest restores as before."""
    store = bench.new_store()
    chain, other = bench.new_chain(store), bench.new_chain(store)
    for point in bench.guests.points:
        bench.must_backup(chain, point)
    bench.must_backup(other, bench.guests.tiny)
    bench.read("rm", chain, BACKUP_IDS=chain.increments.pop().source).answer()
    bench.check_restored(chain, 1, bench.guests.points[1])
    bench.read("rm", other).answer()
    for number in (0, 1):
        bench.check_restored(chain, number, bench.guests.points[number])


@clause("DS-23", "backup_cancel removes an unfinished backup, may be repeated, and spares finished ones")
def cancel(bench: Bench) -> None:
    """A killed backup is cancelled twice; one that never began and one that is finished, once."""
    store = bench.new_store()
    chain = bench.new_chain(store)
    finished = bench.must_backup(chain, bench.guests.tiny)
    before, size = _names(store.own_path), _stored_bytes(store.own_path)
    attempt = _killed_in_the_middle(bench, store)
    for _ in range(2):
        _succeeds(bench.cancel_backup(attempt))
        bench.find(attempt).require(NotFound, "the answer about a cancelled backup")
    left = _names(store.own_path) - before
    if _stored_bytes(store.own_path) - size < _BOOKKEEPING_BYTES:
        left = {name for name in left if attempt.backup.id in name}  # a repository renames its own files
    if left:
        raise bench.cancel_backup(attempt).unmet(f"left in {store.own_path}: {', '.join(sorted(left)[:5])}")
    bench.record(attempt, bench.backup(attempt))
    bench.check_restored(attempt.chain, 0, bench.guests.points[0])
    _succeeds(bench.cancel_backup(bench.plan(bench.new_chain(store), bench.guests.tiny)))
    _succeeds(bench.cancel_backup(finished))
    bench.check_restored(chain, 0, bench.guests.tiny)


@clause("DS-24", "a backup killed at any moment leaves nothing that looks finished, and a retry succeeds")
def killed(bench: Bench) -> None:
    """SIGKILL to the group, at moments spread over the time of a backup and over the states of the store."""
    _end_at_moments(bench, Limits(bench.settings.timeout_s, grace_s=0, stop_signal=signal.SIGKILL), "KILL")


@clause("DS-25", f"TERM ends a backup within {_GRACE_S:g} s, and leaves it such that a retry succeeds")
def terminated(bench: Bench) -> None:
    """The daemon sends TERM when an operation is cancelled, and KILL when patience ends."""
    _end_at_moments(bench, Limits(bench.settings.timeout_s, grace_s=_GRACE_S), "TERM")


@clause("DS-26", "odd backup ids are refused or handled, and nothing outside BASE_PATH is touched")
def odd_ids(bench: Bench) -> None:
    """Ids that climb, that a shell would interpret, or that look like options; the same for rm."""
    store = bench.new_store()
    chain = bench.new_chain(store)
    bench.must_backup(chain, bench.guests.tiny)
    outside = bench.root if store.own_path is None else store.own_path.parent
    (outside / "escaped").mkdir(exist_ok=True)
    (outside / "escaped" / "canary").write_text("must live")
    before = _outside(outside, store.own_path)
    for odd in _ODD_IDS:
        attempt = bench.plan(bench.new_chain(store), bench.guests.tiny, backup_id=odd)
        refused = [
            bench.backup(attempt),
            bench.cancel_backup(attempt),
            bench.read("rm", chain, BACKUP_IDS=odd),
        ]
        for called in refused:
            if called.exit_code == DriverBug.exit_code or b"Traceback" in called.stderr:
                raise called.unmet(f"the id {odd!r} led to {called.ended_with}")
            if _outside(outside, store.own_path) != before:
                raise called.unmet(f"the id {odd!r} changed something in {outside}, outside BASE_PATH")
    bench.check_restored(chain, 0, bench.guests.tiny)


@clause("DS-27", "what is positively absent is NotFound (66)")
def absent(bench: Bench) -> None:
    """A backup that never was, in a store that has others; a disk and an increment that are not there."""
    chain = bench.good_chain
    attempt = bench.plan(bench.new_chain(chain.store), bench.guests.tiny)
    why = "the answer about an absent backup"
    for action in ("ls", "stat", "restore"):
        bench.find(attempt, action).require(NotFound, why)
        bench.read(action, chain, INCREMENT_ID=99).require(NotFound, "the answer about an absent increment")
        bench.read(action, chain, DISK_ID=99).require(NotFound, "the answer about an absent disk")
    url = bench.disks(chain)[0].url
    gone = url.replace(chain.increments[0].source, attempt.backup.id)
    gone = gone.replace(chain.increments[-1].source, f"{attempt.backup.id}x")
    bench.read("download", chain, URL=gone, FORMAT="raw", TARGET=bench.new_path()).require(NotFound, why)


@clause("DS-28", "a backup whose source breaks off is not published")
def source_fails(bench: Bench) -> None:
    """The export is gone before it was read: a failure, and nothing that looks finished."""
    chain = bench.new_chain(bench.new_store())
    bench.must_backup(chain, bench.guests.tiny)
    attempt = bench.plan(bench.new_chain(chain.store), bench.guests.points[0])
    called = bench.backup(attempt, source_is_gone=True)
    if called.exit_code in {0, DriverBug.exit_code}:
        raise called.unmet(f"ended with {called.ended_with} although a disk could not be read")
    bench.find(attempt).require(NotFound, "the answer about a backup that failed")
    bench.record(attempt, bench.backup(attempt))
    bench.check_restored(attempt.chain, 0, bench.guests.points[0])


def _end_at_moments(bench: Bench, limits: Limits, name: str) -> None:
    """End backups of one store at many moments and judge what each leaves."""
    store = bench.new_store()
    chain = bench.new_chain(store)
    usual_s = _timed_backup(bench, chain)
    triggers: list[tuple[str, Callable[[Cancellation], None]]] = []
    for share in _MOMENTS:
        delay_s = usual_s * (share + (secrets.randbelow(100) - 50) / 1000)
        triggers.append((f"{name} after {delay_s:.3f} s", partial(cancel_after, delay_s=delay_s)))
    if store.own_path is not None:
        path = store.own_path
        triggers += [
            (f"{name} at state {n} of the store", partial(cancel_at_state, path=path, number=n))
            for n in _STATES
        ]
    for number, (moment, trigger) in enumerate(triggers):
        attempt = bench.plan(bench.new_chain(store), bench.guests.points[0])
        called = _ended(bench, attempt, limits, trigger)
        if name == "TERM" and called.exit_code == -signal.SIGKILL:
            raise called.unmet(f"{moment}: was still running {_GRACE_S:g} s later")
        _judge_leftovers(bench, attempt, called, moment, cancel_first=number % 2 == 0)
    bench.check_restored(chain, 0, bench.guests.points[0])


def _judge_leftovers(
    bench: Bench, attempt: Attempt, called: Called, moment: str, *, cancel_first: bool
) -> None:
    """The backup is either absent or really complete; a retry makes it complete."""
    found = bench.find(attempt)
    if found.exit_code == 0:
        try:
            bench.check_restored(attempt.supposed, 0, attempt.point)
        except Unmet as unmet:
            raise called.unmet(f"{moment}: left a backup that looks finished, but: {unmet}") from unmet
    else:
        found.require(NotFound, f"the answer about a backup that was ended ({moment})")
        bench.find(attempt, "restore").require(
            NotFound, f"the answer about a backup that was ended ({moment})"
        )
        if cancel_first:
            _succeeds(bench.cancel_backup(attempt))
    retried = bench.backup(attempt)
    if retried.exit_code != 0:
        raise retried.unmet(f"the retry of a backup that was ended ({moment}) failed: {retried.ended_with}")
    bench.record(attempt, retried)
    bench.check_restored(attempt.chain, 0, attempt.point)
    _succeeds(bench.read("rm", attempt.chain))


def _ended(bench: Bench, attempt: Attempt, limits: Limits, trigger: Callable[[Cancellation], None]) -> Called:
    cancellation = Cancellation()
    thread = threading.Thread(target=trigger, args=(cancellation,))
    called = bench.backup(attempt, limits=limits, cancellation=cancellation, on_start=thread.start)
    cancellation.cancel()
    thread.join()
    return called


def _killed_in_the_middle(bench: Bench, store: Store) -> Attempt:
    """A backup that was killed before it was finished; earlier each time that the kill came too late."""
    limits = Limits(bench.settings.timeout_s, grace_s=0, stop_signal=signal.SIGKILL)
    path = store.own_path
    usual_s = 0.0 if path else _timed_backup(bench, bench.new_chain(store))
    for number in (3, 2, 1):
        attempt = bench.plan(bench.new_chain(store), bench.guests.points[0])
        trigger = (
            partial(cancel_at_state, path=path, number=number)
            if path
            else partial(cancel_after, delay_s=usual_s * number / 4)
        )
        _ended(bench, attempt, limits, trigger)
        if bench.find(attempt).exit_code != 0:
            return attempt
        _succeeds(bench.read("rm", attempt.supposed))
    raise NotApplicable("each backup was finished before it could be killed")


def _timed_backup(bench: Bench, chain: Chain) -> float:
    attempt = bench.plan(chain, bench.guests.points[0])
    called = bench.backup(attempt)
    bench.record(attempt, called)
    return called.elapsed_s


def _names(path: Path | None) -> set[str]:
    """The files below a store's directory; directories that hold nothing do not count."""
    return set() if path is None else {str(p.relative_to(path)) for p in path.rglob("*") if not p.is_dir()}


def _stored_bytes(path: Path | None) -> int:
    return 0 if path is None else sum(file.stat().st_size for file in filled_files(path))


def _outside(path: Path, store: Path | None) -> dict[str, tuple[int, int, bytes]]:
    """What lies beside a store, without the kit's own changing directories."""
    found = tree(path / "escaped") if store is None else tree(path)
    kept = {name: (mode, size, content) for name, (mode, size, _, content) in found.items()}
    return {name: value for name, value in kept.items() if not store or name.split("/")[0] != store.name}


def _succeeds(called: Called) -> None:
    if called.exit_code != 0:
        raise called.unmet(f"ended with {called.ended_with}, but should have succeeded")
