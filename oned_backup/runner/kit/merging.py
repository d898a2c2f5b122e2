"""Clauses about merging: what is kept restores as before, whatever else becomes of the merge."""

from __future__ import annotations

import os
import secrets
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from oned_backup.errors import DataCorrupt, DriverBug, NoSpace, NotFound, OnedBackupError
from oned_backup.runner.kit import merges
from oned_backup.runner.kit.bench import Bench
from oned_backup.runner.kit.called import Called
from oned_backup.runner.kit.catalogue import Chain
from oned_backup.runner.kit.clause import NotApplicable, Unmet, clause
from oned_backup.runner.kit.disturbances import (
    cancel_after,
    cancel_at_state,
    changed_byte,
    filled_files,
    free_bytes,
    small_file_system,
)
from oned_backup.runner.kit.folders import tree
from oned_backup.runner.kit.guest import MIB, Point, make_points
from oned_backup.runner.process import Cancellation, Limits

#: when to kill a merge: after this share of the time that one takes …
_MOMENTS = (0.3, 0.6, 0.8, 0.95)
#: … and as soon as the store was seen in that many different states
_STATES = (1, 3, 6)
#: files that are damaged in one place only
_SMALL_BYTES = 64 * 1024


@clause("DS-40", "merging the oldest backups keeps what is kept, byte for byte, in the old chain and the new")
def merged_to_full(bench: Bench) -> None:
    """Of several disks, one grown meanwhile, one added, one removed, and one that was FULL again."""
    chain, points = _chain(bench), bench.guests.changing
    with merges.merged(bench, chain, 0, 2) as (called, after):
        for number in (2, 3):
            merges.require_restores(bench, called, after, number, points[number])
        for number in (1, 3):
            merges.require_restores(bench, called, chain, number, points[number])
        merges.require_well(bench, called, after)


@clause("DS-41", "an increment that is merged into the next leaves all others as they are")
def merged_in_the_middle(bench: Bench) -> None:
    """Zeros in it must go on hiding what lies beneath, and what it does not say must show that."""
    chain, points = _chain(bench), bench.guests.changing
    with merges.merged(bench, chain, 1, 2) as (called, after):
        for number in (0, 2, 3):
            merges.require_restores(bench, called, after, number, points[number])
        merges.require_well(bench, called, after)


@clause(
    "DS-42", "rm of what was merged takes nothing else, and what was merged can be merged again, down to one"
)
def merged_again(bench: Bench) -> None:
    """The middle, then the oldest, then all; after each the replaced ones are removed."""
    chain = bench.new_chain(_chain(bench).store)
    for point in bench.guests.changing:
        bench.must_backup(chain, point)
    for first, last in ((1, 2), (0, 1), (0, 1)):
        merge = merges.plan(bench, chain, first, last)
        replaced = merge.ids
        called = merges.call(bench, merge)
        after = merges.switched(merge, called)
        removed = bench.read("rm", chain, BACKUP_IDS=",".join(replaced))
        if removed.exit_code != 0:
            raise removed.unmet(f"what was merged cannot be removed: {removed.ended_with}")
        chain.increments = after.increments
        for increment in chain.increments:
            merges.require_restores(bench, called, chain, increment.id, bench.guests.changing[increment.id])
        merges.require_well(bench, called, chain)
        merges.require_catalogue(bench, called, chain, absent=replaced)


@clause("DS-43", "merging changes nothing in what it merges")
def inputs_are_untouched(bench: Bench) -> None:
    """Names, modes, change times and contents of everything that was in the store."""
    chain = _chain(bench)
    path = bench.own_path(chain.store)
    before = tree(path)
    with merges.merged(bench, chain, 0, 1) as (called, _):
        after = tree(path)
        changed = [n for n, value in before.items() if not (path / n).is_dir() and after.get(n) != value]
        if changed:
            raise called.unmet(f"changed in {path}: {', '.join(sorted(changed)[:5])}")


@clause("DS-44", "a merge with the same id again gives the same answer and changes nothing")
def merged_twice(bench: Bench) -> None:
    """The daemon asks again if it does not know whether the first call got through."""
    chain = _chain(bench)
    path = chain.store.own_path
    merge = merges.plan(bench, chain, 0, 1)
    with merges.removed(bench, merge):
        first = merges.call(bench, merge).answer()
        before = tree(path) if path else {}
        again = merges.call(bench, merge)
        if path and tree(path) != before:
            raise again.unmet(f"changed something in {path}")
        if any(first[key] != again.answer()[key] for key in ("BACKUP_ID", "SIZE_MB", "CHAIN")):
            raise again.unmet(f"answers otherwise than before: {first}")
        merges.require_restores(bench, again, merges.switched(merge, again), 1, bench.guests.changing[1])


@clause("DS-45", "a merge killed at any moment leaves nothing that looks finished, and a retry succeeds")
def killed_merge(bench: Bench) -> None:
    """SIGKILL to the group; the old chain stays as it is, and every other time backup_cancel comes first."""
    chain = _chain(bench)
    merge = merges.plan(bench, chain, 0, 2)
    with merges.removed(bench, merge):
        usual_s = merges.call(bench, merge).elapsed_s
    path = chain.store.own_path
    triggers: list[tuple[str, Callable[[Cancellation], None]]] = []
    for share in _MOMENTS:
        delay_s = usual_s * (share + (secrets.randbelow(100) - 50) / 1000)
        triggers.append((f"KILL after {delay_s:.3f} s", partial(cancel_after, delay_s=delay_s)))
    if path is not None:
        triggers += [
            (f"KILL at state {n} of the store", partial(cancel_at_state, path=path, number=n))
            for n in _STATES
        ]
    for number, (moment, trigger) in enumerate(triggers):
        merge = merges.plan(bench, chain, 0, 2)
        with merges.removed(bench, merge):
            _judge_killed(bench, merge, moment, trigger, cancel_first=number % 2 == 0)
    bench.check_restored(chain, 3, bench.guests.changing[3])


@clause("DS-46", "a merge that does not fit is NoSpace (73): no debris, and the chain restores")
def merge_does_not_fit(bench: Bench) -> None:
    """Two backups of 9 MB, in a file system of 28 MB, or where the command fill leaves too little."""
    _chain(bench)
    store = bench.new_store()
    chain = bench.new_chain(store)
    if "fill" in bench.settings.commands:
        points = _noise(bench)
        for point in points:
            bench.must_backup(chain, point)
        with bench.settings.between("fill", "unfill", store):
            _is_full(bench, chain, points)
        return
    if store.own_path is None or os.geteuid() != 0:
        raise NotApplicable("needs root, and a store of the kit's own, to mount a small file system")
    with small_file_system(store.own_path, 28):
        points = _noise(bench)
        for point in points:
            bench.must_backup(chain, point)
        bench.own_path(store)
        before = free_bytes(store.own_path)
        called = _is_full(bench, chain, points)
        lost = before - free_bytes(store.own_path)
        if called.exit_code != 0 and lost > 256 * 1024:
            raise called.unmet(f"{lost} bytes of a merge that did not fit are left after backup_cancel")


@clause("DS-47", "what does not follow each other in the chain is not merged")
def strangers_are_refused(bench: Bench) -> None:
    """A gap, the wrong order, one alone, one that is not of this image, and an odd id."""
    chain = _chain(bench)
    ids = [increment.source for increment in chain.increments]
    for wrong in ([ids[0], ids[2]], [ids[1], ids[0]], ids[:1], [ids[0], f"{ids[1]}x"], [ids[0], "../x"]):
        merge = merges.plan(bench, chain, 0, 1)
        called = merges.call(bench, merge, MERGE_IDS=",".join(wrong))
        if called.exit_code in {0, DriverBug.exit_code} or b"Traceback" in called.stderr:
            raise called.unmet(
                f"MERGE_IDS={','.join(wrong)} of the chain {','.join(ids)}: {called.ended_with}"
            )
        merges.require_absent(bench, merge, "was refused")


@clause("DS-48", "damage never gets into a merged backup (65)")
def damage_is_not_merged(bench: Bench) -> None:
    """One byte of each file of an increment is changed: the merge fails, or does without it."""
    _chain(bench)
    chain = bench.new_chain(bench.new_store())
    bench.must_backup(chain, bench.guests.points[0])
    path = bench.own_path(chain.store)
    old = set(filled_files(path))
    bench.must_backup(chain, bench.guests.points[1])
    for file in sorted(set(filled_files(path)) - old):
        for share in (0.5, 0.99) if file.stat().st_size > _SMALL_BYTES else (0.5,):
            _merge_damaged(bench, chain, file, share)
    bench.check_restored(chain, 1, bench.guests.points[1])


@clause("DS-49", "what is being merged can be restored meanwhile")
def restored_meanwhile(bench: Bench) -> None:
    """The chain of before is downloaded again and again while two merges of it are made."""
    chain = _chain(bench)
    problems: list[Exception] = []
    begun, done = threading.Event(), threading.Event()

    def read() -> None:
        point = Point(bench.guests.changing[3].disks[:1])
        try:
            while not done.is_set():
                begun.set()
                bench.check_restored(chain, 3, point)
        except (Unmet, OnedBackupError) as problem:
            problems.append(problem)
        finally:
            begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        begun.wait()
        for first in (0, 1):
            with merges.merged(bench, chain, first, first + 2) as (called, after):
                merges.require_restores(bench, called, after, 3, bench.guests.changing[3])
    finally:
        done.set()
        reader.join()
    if problems:
        raise Unmet(f"download while the chain was merged: {problems[0]}") from problems[0]


def _chain(bench: Bench) -> Chain:
    """The chain of the guest whose disks change; `NotApplicable` for a driver that cannot merge."""
    if not bench.driver.supports(merges.ACTION):
        raise NotApplicable(f"the driver has no action {merges.ACTION}")
    return bench.changing_chain


def _judge_killed(
    bench: Bench,
    merge: merges.Merge,
    moment: str,
    trigger: Callable[[Cancellation], None],
    *,
    cancel_first: bool,
) -> None:
    cancellation = Cancellation()
    thread = threading.Thread(target=trigger, args=(cancellation,))
    limits = Limits(bench.settings.timeout_s, grace_s=0, stop_signal=signal.SIGKILL)
    called = merges.call(bench, merge, limits=limits, cancellation=cancellation, on_start=thread.start)
    cancellation.cancel()
    thread.join()
    after = merge.supposed
    found = bench.read("ls", after, INCREMENT_ID=2)
    if found.exit_code == 0:
        try:
            bench.check_restored(after, 2, bench.guests.changing[2])
        except Unmet as unmet:
            raise called.unmet(f"{moment}: left a backup that looks finished, but: {unmet}") from unmet
    else:
        found.require(NotFound, f"the answer about a merge that was ended ({moment})")
        if cancel_first:
            cancelled = bench.cancel_backup(merge.attempt)
            if cancelled.exit_code != 0:
                raise cancelled.unmet(f"after a merge that was ended ({moment}): {cancelled.ended_with}")
    retried = merges.call(bench, merge)
    if retried.exit_code != 0:
        raise retried.unmet(f"the retry of a merge that was ended ({moment}) failed: {retried.ended_with}")
    merges.require_restores(bench, retried, merges.switched(merge, retried), 2, bench.guests.changing[2])


def _merge_damaged(bench: Bench, chain: Chain, file: Path, share: float) -> None:
    merge = merges.plan(bench, chain, 0, 1)
    with merges.removed(bench, merge):
        with changed_byte(file, share):
            called = merges.call(bench, merge)
            if called.exit_code != 0:
                called.require(DataCorrupt, f"the answer when one byte of {file} was changed")
                merges.require_absent(bench, merge, "failed")
        if called.exit_code == 0:
            merges.require_restores(bench, called, merges.switched(merge, called), 1, bench.guests.points[1])


def _noise(bench: Bench) -> tuple[Point, ...]:
    """Two points of 9 MB each that no store can make smaller."""
    noise = bench.root / "noise-to-merge"
    noise.write_bytes(secrets.token_bytes(18 * MIB))
    commands = [[f"write -s {noise} 0 9M"], [f"write -s {noise} 9M 9M"]]
    points = make_points(bench.root / "merged-noise", [(18 * MIB, commands)])
    noise.unlink()
    return points


def _is_full(bench: Bench, chain: Chain, points: tuple[Point, ...]) -> Called:
    """The call of a merge for which there is no room; a store that keeps nothing twice may have it."""
    merge = merges.plan(bench, chain, 0, 1)
    called = merges.call(bench, merge)
    if called.exit_code == 0:
        merges.require_restores(bench, called, merges.switched(merge, called), 1, points[1])
        return called
    called.require(NoSpace, "the answer of a full store")
    merges.require_absent(bench, merge, "did not fit")
    cancelled = bench.cancel_backup(merge.attempt)
    if cancelled.exit_code != 0:
        raise cancelled.unmet(f"after a merge that did not fit: {cancelled.ended_with}")
    for number, point in enumerate(points):
        merges.require_restores(bench, called, chain, number, point)
    return called
