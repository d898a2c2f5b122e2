from hypothesis import given
from hypothesis import strategies as st

from oned_backup.disk.spans import CLUSTER, Spans

numbers = st.sets(st.integers(0, 60))


def spans(members: set[int]) -> Spans:
    result = Spans()
    for member in sorted(members):
        result.add(member, member + 1)
    return result


def members(found: Spans) -> set[int]:
    return {member for first, end in found for member in range(first, end)}


@given(numbers, numbers)
def test_set_operations(left: set[int], right: set[int]) -> None:
    a, b = spans(left), spans(right)
    assert a.union(b) == spans(left | right)
    assert a.intersection(b) == spans(left & right)
    assert a.difference(b) == spans(left - right)


@given(numbers, st.integers(0, 61))
def test_rank_counts_the_smaller_members(left: set[int], value: int) -> None:
    assert spans(left).rank(value) == len([member for member in left if member < value])


@given(numbers)
def test_select_is_the_inverse_of_rank(left: set[int]) -> None:
    found = spans(left)
    assert [found.select(rank)[0] for rank in range(found.total)] == sorted(left)
    for rank in range(found.total):
        first, end = found.select(rank)
        assert set(range(first, end)) <= left
        assert end not in left


@given(numbers, st.integers(0, 61), st.integers(0, 61))
def test_within_cuts_at_the_borders(left: set[int], first: int, end: int) -> None:
    assert members(Spans.of(*spans(left).within(first, end))) == {n for n in left if first <= n < end}


@given(numbers, st.integers(1, 9))
def test_scaled_names_the_groups_touched(left: set[int], factor: int) -> None:
    assert members(spans(left).scaled(factor)) == {member // factor for member in left}


def test_bytes_are_rounded_outwards() -> None:
    found = Spans()
    found.add_bytes(CLUSTER - 1, CLUSTER + 1)
    found.add_bytes(5 * CLUSTER, 5 * CLUSTER)
    found.add_bytes(5 * CLUSTER + 7, 5 * CLUSTER + 8)
    assert list(found) == [(0, 2), (5, 6)]
