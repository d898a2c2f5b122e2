"""Which restore points retention keeps, merges and lets go."""

from __future__ import annotations

import time
from dataclasses import replace
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oned_backup.model.retention import Fate, Merge, Point, RetentionPlan, Rules, plan_retention

DAY = 86_400
NOON = int(datetime(2026, 3, 2, 12, tzinfo=UTC).timestamp())  # a Monday


def chain(
    *days: float, image: int = 0, bad: tuple[int, ...] = (), pinned: tuple[int, ...] = ()
) -> list[Point]:
    """Increments of an image, made so many days after a Monday noon in UTC."""
    return [
        Point(image, number, NOON + int(day * DAY), 1, number not in bad, number in pinned)
        for number, day in enumerate(days)
    ]


def kept(plan: RetentionPlan) -> list[tuple[int, int]]:
    return [verdict.point.key for verdict in plan.verdicts if verdict.fate is Fate.KEPT]


def reasons(plan: RetentionPlan, increment: int, image: int = 0) -> str:
    return "; ".join(
        next(verdict.reasons for verdict in plan.verdicts if verdict.point.key == (image, increment))
    )


def test_without_settings_everything_is_kept() -> None:
    plan = plan_retention(chain(0, 1, 2), Rules(), active_image=0)
    assert not plan
    assert len(kept(plan)) == 3
    assert reasons(plan, 0) == "no retention is set"


def test_keep_last_merges_the_oldest_increments_of_a_chain() -> None:
    plan = plan_retention(chain(0, 1, 2, 3, 4), Rules(keep_last=3), active_image=0)
    assert kept(plan) == [(0, 2), (0, 3), (0, 4)]
    assert plan.merges == (Merge(0, (0, 1, 2)),)
    assert (plan.cuts, plan.images) == ((), ())
    assert plan.verdicts[0].into == 2
    assert reasons(plan, 2) == "KEEP_LAST 3 of 3"
    assert reasons(plan, 4) == "newest good one; the next increment continues it; KEEP_LAST 1 of 3"


def test_keep_last_of_full_backups_counts_images() -> None:
    points = [point for image in range(5) for point in chain(image, image=image)]
    plan = plan_retention(points, Rules(keep_last=2))
    assert plan.images == (0, 1, 2)
    assert not plan.merges


def test_keep_last_counts_points_over_all_chains() -> None:
    plan = plan_retention([*chain(0, 1, 2, 3), *chain(4, 5, image=7)], Rules(keep_last=3), active_image=7)
    assert kept(plan) == [(0, 3), (7, 0), (7, 1)]
    assert plan.merges == (Merge(0, (0, 1, 2, 3)),)
    gone = plan_retention([*chain(0, 1, 2, 3), *chain(4, 5, 6, image=7)], Rules(keep_last=3), active_image=7)
    assert gone.images == (0,)
    assert not gone.merges


def test_each_datastore_is_counted_for_itself() -> None:
    local = chain(0, 2, 4)
    away = [replace(point, store=101) for point in chain(1, 3, 900, image=1)]
    rules = Rules(keep_last=2, keep_yearly=1)
    plan = plan_retention([*local, *away], rules, active_image=0)
    assert kept(plan) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert reasons(plan, 2, image=0) == (
        "newest good one; the next increment continues it; KEEP_LAST 1 of 2; KEEP_YEARLY 1 of 1: 2026"
    )


def test_a_datastore_with_nothing_but_what_was_imported_is_left_as_it_is() -> None:
    archive = [replace(point, store=101) for point in chain(0, 1, 900, image=1, bad=(1,))]
    plan = plan_retention([*chain(2, 3), *archive], Rules(keep_last=1), active_image=0, imported=[101])
    assert kept(plan) == [(0, 1), (1, 0), (1, 1), (1, 2)]
    assert reasons(plan, 0, image=1) == "imported: nothing was backed up to its datastore since"
    assert plan_retention(archive, Rules(keep_last=1)).merges == ()  # what is damaged is not merged
    assert kept(plan_retention(archive[:1], Rules(), imported=[101])) == [(1, 0)]


def test_keep_daily_keeps_the_last_of_each_day_that_has_one() -> None:
    plan = plan_retention(chain(0, 0.1, 0.2, 1, 1.1, 5, 5.1, 5.2), Rules(keep_daily=3), active_image=0)
    assert kept(plan) == [(0, 2), (0, 4), (0, 7)]
    assert plan.merges == (Merge(0, (0, 1, 2)), Merge(0, (3, 4)), Merge(0, (5, 6, 7)))
    assert "KEEP_DAILY 3 of 3: 2026-03-02" in reasons(plan, 2)


def test_weeks_begin_on_monday_and_years_follow_the_week() -> None:
    plan = plan_retention(chain(-1, 0, 6, 7), Rules(keep_weekly=3), active_image=0, zone=UTC)
    assert kept(plan) == [(0, 0), (0, 2), (0, 3)]
    new_year = int(datetime(2027, 1, 1, 12, tzinfo=UTC).timestamp())  # a Friday of week 53 of 2026
    plan = plan_retention(
        [Point(0, 0, new_year - DAY), Point(0, 1, new_year)], Rules(keep_weekly=9), active_image=0, zone=UTC
    )
    assert kept(plan) == [(0, 1)]
    assert "2026-W53" in reasons(plan, 1)


def test_gfs_rules_each_count_for_themselves() -> None:
    points = chain(*range(400))
    rules = Rules(keep_last=2, keep_daily=7, keep_weekly=4, keep_monthly=6, keep_yearly=2)
    plan = plan_retention(points, rules, active_image=0, zone=UTC)
    dates = [f"{datetime.fromtimestamp(points[number].date, UTC):%m-%d}" for _, number in kept(plan)]
    assert dates == [
        *("11-30", "12-31", "01-31", "02-28"),  # months; 12-31 is the year 2026 as well
        *("03-21", "03-28", "03-30", "03-31"),
        *("04-01", "04-02", "04-03", "04-04", "04-05"),
    ]
    assert "KEEP_YEARLY 2 of 2: 2026" in reasons(plan, 304)
    assert "KEEP_MONTHLY 5 of 6: 2026-12" in reasons(plan, 304)


def test_a_day_is_one_of_the_time_zone() -> None:
    late = int(datetime(2026, 7, 1, 22, 30, tzinfo=UTC).timestamp())  # past midnight in Berlin
    points = [Point(0, 0, late - 7200), Point(0, 1, late)]
    assert kept(plan_retention(points, Rules(keep_daily=5), zone=UTC)) == [(0, 1)]
    assert len(kept(plan_retention(points, Rules(keep_daily=5), zone=ZoneInfo("Europe/Berlin")))) == 2


def test_no_date_that_a_manifest_may_have_is_too_late() -> None:
    points = [Point(0, 0, 1), Point(0, 1, 253_402_300_799), Point(0, 2, 2**31 + 7)]
    plan = plan_retention(points, Rules(keep_yearly=3), zone=ZoneInfo("Pacific/Kiritimati"))
    assert len(kept(plan)) == 3
    assert "KEEP_YEARLY 1 of 3: 9999" in reasons(plan, 1)
    assert "KEEP_YEARLY 2 of 3: 2038" in reasons(plan, 2)


def test_without_a_zone_it_is_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    late = int(datetime(2026, 7, 1, 22, 30, tzinfo=UTC).timestamp())
    points = [Point(0, 0, late - 7200), Point(0, 1, late)]
    for zone, count in (("UTC", 1), ("Europe/Berlin", 2)):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        assert len(kept(plan_retention(points, Rules(keep_daily=5)))) == count
    monkeypatch.undo()
    time.tzset()


def test_the_hour_that_comes_twice_is_of_one_day() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    night = int(datetime(2026, 10, 25, 0, 30, tzinfo=UTC).timestamp())  # 02:30, and again an hour later
    points = [Point(0, 0, night), Point(0, 1, night + 3600)]
    assert kept(plan_retention(points, Rules(keep_daily=2), zone=berlin)) == [(0, 1)]


def test_a_pinned_point_stays_and_splits_the_run() -> None:
    plan = plan_retention(chain(0, 1, 2, 3, pinned=(1,)), Rules(keep_last=1), active_image=0)
    assert kept(plan) == [(0, 1), (0, 3)]
    assert plan.merges == (Merge(0, (0, 1)), Merge(0, (2, 3)))
    assert reasons(plan, 1) == "pinned"


def test_a_pinned_point_of_an_old_chain_loses_what_follows_it() -> None:
    points = [*chain(0, 1, 2, 3, pinned=(1,)), *chain(4, image=1)]
    plan = plan_retention(points, Rules(keep_last=1), active_image=1)
    assert plan.merges == (Merge(0, (0, 1)),)
    assert plan.cuts == ((0, (2, 3)),)
    assert plan.images == ()


def test_broken_points_count_for_nothing() -> None:
    plan = plan_retention(chain(0, 1, 2, 3, 4, bad=(3, 4)), Rules(keep_last=2))
    assert kept(plan) == [(0, 1), (0, 2), (0, 3), (0, 4)]
    assert plan.merges == (Merge(0, (0, 1)),)
    assert "damaged" in reasons(plan, 4)
    assert "newest good one" in reasons(plan, 2)


def test_old_broken_points_go_with_those_of_their_age() -> None:
    points = [*chain(0, 1, 2, bad=(2,)), *chain(3, 4, image=1)]
    plan = plan_retention(points, Rules(keep_last=2), active_image=1)
    assert plan.images == (0,)
    assert not plan.merges


def test_broken_points_stay_until_enough_good_ones_are_newer() -> None:
    old = chain(0, 1, 2, bad=(0, 1, 2))
    new = [chain(3 + number, image=1 + number)[0] for number in range(3)]
    rules = Rules(keep_last=3)
    assert len(kept(plan_retention([*old, new[0]], rules))) == 4, "what is saved of them may be all there is"
    plan = plan_retention([*old, *new[:2]], rules)
    assert kept(plan) == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    assert reasons(plan, 2) == "damaged: verification may find it whole"
    assert reasons(plan, 1) == reasons(plan, 2)
    assert plan_retention([*old, *new], rules).images == (0,)
    ancient = chain(-900, image=9, pinned=(0,))  # does not hold the space of the broken ones for ever
    assert plan_retention([*old, *new, *ancient], rules).images == (0,)


def test_what_is_damaged_is_not_merged() -> None:
    points = [*chain(0, 1, 2, 3, bad=(1,), pinned=(3,)), *chain(4, image=1)]
    plan = plan_retention(points, Rules(keep_last=1), active_image=1)
    assert plan.merges == (Merge(0, (2, 3)),)
    assert reasons(plan, 1) == "increment 3 continues it: what is damaged is not merged"
    assert reasons(plan, 0) == "increment 1 continues it: what is damaged is not merged"


def test_nothing_is_left_but_broken_points() -> None:
    plan = plan_retention(chain(0, 1, bad=(0, 1)), Rules(keep_last=1))
    assert not plan
    assert len(kept(plan)) == 2


def test_a_driver_that_cannot_merge_keeps_the_chain() -> None:
    plan = plan_retention(chain(0, 1, 2), Rules(keep_last=1), active_image=0, unmergeable=[0])
    assert not plan
    assert reasons(plan, 0) == "increment 1 continues it: its store cannot merge"


points_of_a_vm = st.lists(
    st.lists(
        st.tuples(st.integers(0, 900), st.booleans(), st.sampled_from([True, False, False, False])),
        min_size=1,
        max_size=8,
    ),
    max_size=5,
).map(
    lambda images: [
        Point(image, number, NOON + 3600 * hours, 1, good, pinned)
        for image, members in enumerate(images)
        for number, (hours, good, pinned) in enumerate(members)
    ]
)
some_rules = st.builds(Rules, *[st.integers(0, 4)] * 5)


@given(points_of_a_vm, some_rules, st.integers(-1, 4), st.sets(st.integers(0, 4)))
def test_whatever_the_rules_nothing_that_matters_goes(
    points: list[Point], rules: Rules, active: int, unmergeable: set[int]
) -> None:
    plan = plan_retention(points, rules, active_image=active, unmergeable=unmergeable, zone=UTC)
    by_key = {verdict.point.key: verdict for verdict in plan.verdicts}
    assert sorted(by_key) == sorted(point.key for point in points)
    good = [point for point in points if point.good]
    newest = sorted(good, key=lambda point: (point.date, *point.key), reverse=True)
    must_stay = [*newest[: max(rules.keep_last, 1)], *(point for point in points if point.pinned)]
    assert all(by_key[point.key].fate is Fate.KEPT for point in must_stay)
    if not rules:
        assert not plan
    for merge in plan.merges:
        members = [point for point in points if point.image_id == merge.image_id]
        numbers = [point.increment_id for point in members]
        start = numbers.index(merge.increment_ids[0])
        assert tuple(numbers[start : start + len(merge.increment_ids)]) == merge.increment_ids
        assert all(members[number].good for number in merge.increment_ids)
        assert merge.image_id not in unmergeable
        *gone, into = merge.increment_ids
        assert all(by_key[merge.image_id, number].into == into for number in gone)
        assert by_key[merge.image_id, into].fate is Fate.KEPT
    for image_id, cut in plan.cuts:
        members = [point.increment_id for point in points if point.image_id == image_id]
        assert members[-len(cut) :] == list(cut)
        assert image_id != active


@given(points_of_a_vm, some_rules, st.integers(-1, 4))
def test_a_second_look_changes_nothing(points: list[Point], rules: Rules, active: int) -> None:
    first = plan_retention(points, rules, active_image=active, zone=UTC)
    left = [verdict.point for verdict in first.verdicts if verdict.fate is Fate.KEPT]
    second = plan_retention(left, rules, active_image=active, zone=UTC)
    assert not second


@given(points_of_a_vm, some_rules)
def test_a_broken_point_never_pushes_a_good_one_out(points: list[Point], rules: Rules) -> None:
    with_broken = plan_retention(points, rules, zone=UTC)
    without = plan_retention([point for point in points if point.good], rules, zone=UTC)
    assert set(kept(without)) <= set(kept(with_broken))
