"""Which restore points of a VM are kept, and why; what is done about the others.

A point is kept if *any* rule keeps it. The rules count good points only, newest first, over
all chains and full backups of the VM in one datastore; each datastore is counted for itself:

    pinned          somebody said so
    newest          the newest good point: whatever the settings are, it is never deleted;
                    nor the one made last, which looks old if the clock was ahead before
    active-chain    the newest point of the active chain: the next increment continues it
    keep-last n     the n newest; an image of MODE=FULL is one point, an increment is one
    keep-daily n    the newest of each of the n newest days that have one; likewise
                    keep-weekly (ISO weeks), keep-monthly, keep-yearly, as in restic and PBS
    damaged         a broken point that a rule would keep if it were good: verification may find it
                    whole again, or something of it be saved. It never counts, so it pushes no good one out
    continued       cannot go, because what is kept continues it and they cannot be merged
    imported        is in a datastore that holds nothing of the VM but what was imported

Without any setting all points are kept. Days, weeks, months and years are those of one
time zone, the host's own unless another is given.

What is not kept goes without touching what is:

    0 ── 1 ── 2 ── 3 ── 4 ── 5          kept: 2 and 4
    └────┴──> 2    └──> 4    └──> gone  two runs are merged, the end is cut off

A run of points before a kept one is merged into it; the points after the last kept one
are cut off; an image of which nothing is kept goes as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime, tzinfo
from enum import StrEnum
from itertools import chain, groupby


@dataclass(frozen=True)
class Point:
    """A restore point as retention sees it; `date` in seconds since 1970, `increment_id` 0 of MODE=FULL."""

    image_id: int
    increment_id: int
    date: int
    size_mb: int = 0
    good: bool = True
    pinned: bool = False
    #: the datastore that keeps it
    store: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """What tells it from all other points."""
        return self.image_id, self.increment_id


@dataclass(frozen=True)
class Rules:
    """How many to keep by each rule; 0: the rule keeps nothing. All 0: everything is kept."""

    keep_last: int = 0
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self))


class Fate(StrEnum):
    """What becomes of a restore point."""

    KEPT = "KEPT"
    MERGED = "MERGED"  # its changes live on in the next kept increment
    GOES = "GOES"


@dataclass(frozen=True)
class Verdict:
    """A point, what becomes of it, and why; `into`: the increment that a MERGED one is merged into."""

    point: Point
    fate: Fate
    reasons: tuple[str, ...]
    into: int | None = None


@dataclass(frozen=True)
class Merge:
    """A run of consecutive increments of an image, oldest first; the last one is the kept one."""

    image_id: int
    increment_ids: tuple[int, ...]


@dataclass(frozen=True)
class RetentionPlan:
    """What retention does with a VM's restore points: oldest first within each image, images by age."""

    verdicts: tuple[Verdict, ...]
    merges: tuple[Merge, ...] = ()
    #: (image, its increments that are cut off at the end)
    cuts: tuple[tuple[int, tuple[int, ...]], ...] = ()
    #: images that go as a whole
    images: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.merges or self.cuts or self.images)


def plan_retention(
    points: Iterable[Point],
    rules: Rules,
    *,
    active_image: int = -1,
    unmergeable: Collection[int] = (),
    imported: Collection[int] = (),
    zone: tzinfo | None = None,
) -> RetentionPlan:
    """What becomes of all restore points of a VM.

    `active_image` holds the active chain, -1 if there is none. `unmergeable`: images that the driver
    of their datastore cannot merge. `imported`: datastores that are to be left as they are.
    """
    ordered = sorted(points, key=lambda point: point.key)
    reasons = kept_by_rules(ordered, rules, active_image=active_image, imported=imported, zone=zone)
    verdicts: list[Verdict] = []
    merges: list[Merge] = []
    cuts: list[tuple[int, tuple[int, ...]]] = []
    images: list[int] = []
    for image_id, members in groupby(ordered, key=lambda point: point.image_id):
        fates = _fates(list(members), reasons, can_merge=image_id not in unmergeable)
        verdicts += fates
        if all(verdict.fate is Fate.GOES for verdict in fates):
            images.append(image_id)
            continue
        merges += _merges(image_id, fates)
        cut = tuple(entry.point.increment_id for entry in fates if entry.fate is Fate.GOES)
        if cut:
            cuts.append((image_id, cut))
    return RetentionPlan(tuple(verdicts), tuple(merges), tuple(cuts), tuple(images))


def kept_by_rules(
    points: Iterable[Point],
    rules: Rules,
    *,
    active_image: int = -1,
    imported: Collection[int] = (),
    zone: tzinfo | None = None,
) -> dict[tuple[int, int], tuple[str, ...]]:
    """The points that a rule keeps, by key, each with the reasons; each datastore is counted for itself."""
    reasons: dict[tuple[int, int], tuple[str, ...]] = {}
    stores: dict[int, list[Point]] = {}
    for point in points:
        stores.setdefault(point.store, []).append(point)
    for store, members in stores.items():
        if not rules:
            kept = _all(members, "no retention is set")
        elif store in imported:
            kept = _all(members, "imported: nothing was backed up to its datastore since")
        else:
            kept = _by_settings(members, rules, active_image, zone)
        for point, reason in chain(((point, "pinned") for point in members if point.pinned), kept):
            reasons[point.key] = (*reasons.get(point.key, ()), reason)
        for point in _damaged(members, rules, active_image, zone):
            reasons[point.key] = (*reasons.get(point.key, ()), "damaged: verification may find it whole")
    return reasons


def _damaged(
    points: Sequence[Point], rules: Rules, active_image: int, zone: tzinfo | None
) -> Iterator[Point]:
    """The broken points that a rule would keep if they were good; each is looked at for itself."""
    good = [point for point in points if point.good]
    for point in points:
        if rules and not point.good:
            whole = replace(point, good=True)
            if any(kept is whole for kept, _ in _by_settings([*good, whole], rules, active_image, zone)):
                yield point


def _all(points: Iterable[Point], reason: str) -> Iterator[tuple[Point, str]]:
    return ((point, reason) for point in points)


def _by_settings(
    points: Sequence[Point], rules: Rules, active_image: int, zone: tzinfo | None
) -> Iterator[tuple[Point, str]]:
    newest_first = sorted(points, key=lambda point: (point.date, *point.key), reverse=True)
    good = [point for point in newest_first if point.good]
    for point in good[:1]:
        yield point, "newest good one"
    if good and (made_last := max(good, key=lambda point: point.key)) != good[0]:
        yield made_last, "made last"
    active = [point for point in points if point.image_id == active_image]
    for point in active[-1:]:
        yield point, "the next increment continues it"
    for number, point in enumerate(good[: rules.keep_last], start=1):
        yield point, f"KEEP_LAST {number} of {rules.keep_last}"
    for name, count, bucket in _periods(rules):
        for number, (period, point) in enumerate(_last_of_each(good, bucket, count, zone), start=1):
            yield point, f"{name} {number} of {count}: {period}"


#: a day before the end of the year 9999: in no time zone is it later than calendars go
_LAST_DATE = 253_402_214_400

_Bucket = Callable[[datetime], str]


def _periods(rules: Rules) -> tuple[tuple[str, int, _Bucket], ...]:
    return (
        ("KEEP_DAILY", rules.keep_daily, lambda day: f"{day:%Y-%m-%d}"),
        ("KEEP_WEEKLY", rules.keep_weekly, lambda day: f"{day:%G-W%V}"),
        ("KEEP_MONTHLY", rules.keep_monthly, lambda day: f"{day:%Y-%m}"),
        ("KEEP_YEARLY", rules.keep_yearly, lambda day: f"{day:%Y}"),
    )


def _last_of_each(
    newest_first: Iterable[Point], bucket: _Bucket, count: int, zone: tzinfo | None
) -> list[tuple[str, Point]]:
    """The newest point of each of the `count` newest periods that have one."""
    found: dict[str, Point] = {}
    for point in newest_first:
        if len(found) == count:
            break
        found.setdefault(bucket(datetime.fromtimestamp(min(point.date, _LAST_DATE), zone)), point)
    return list(found.items())


def _fates(
    members: Sequence[Point], reasons: dict[tuple[int, int], tuple[str, ...]], *, can_merge: bool
) -> list[Verdict]:
    """The verdicts of one image's points, oldest first."""
    fates: list[Verdict] = []
    follower: Point | None = None  # the nearest newer point that is kept
    for point in reversed(members):
        kept = reasons.get(point.key)
        if kept:
            fates.append(Verdict(point, Fate.KEPT, kept))
        elif follower is None:
            fates.append(Verdict(point, Fate.GOES, ("no rule keeps it",)))
            continue
        elif can_merge and point.good and follower.good:
            into = follower.increment_id
            fates.append(Verdict(point, Fate.MERGED, ("no rule keeps it",), into))
            continue
        else:
            why = "its store cannot merge" if not can_merge else "what is damaged is not merged"
            fates.append(
                Verdict(point, Fate.KEPT, (f"increment {follower.increment_id} continues it: {why}",))
            )
        follower = point
    return fates[::-1]


def _merges(image_id: int, fates: Sequence[Verdict]) -> list[Merge]:
    merges = []
    run: list[int] = []
    for verdict in fates:
        if verdict.fate is Fate.MERGED:
            run.append(verdict.point.increment_id)
        elif run:
            merges.append(Merge(image_id, (*run, verdict.point.increment_id)))
            run = []
    return merges
