"""The extents pass against servers that answer in any way that the protocol allows."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given, settings
from hypothesis import strategies as st

from oned_backup.disk.extents import ExtentPass
from oned_backup.disk.spans import CLUSTER, Spans

UNIT = CLUSTER // 4
units = st.lists(st.booleans(), min_size=1, max_size=60)


def answer(flags: list[int], size: int, offset: int, units: int) -> list[int]:
    """Extents from `offset` on for that many units, the first one cut off where the request begins."""
    first = offset // UNIT
    pairs: list[int] = []
    position = offset
    for value, group in groupby(flags[first : first + units]):
        end = min((position // UNIT + len(list(group))) * UNIT, size)
        pairs += [end - position, value]
        position = end
    return pairs


@settings(max_examples=200)
@given(st.data(), units, st.integers(0, UNIT - 1))
def test_whatever_the_server_tells_at_a_time(draw: st.DataObject, filled: list[bool], tail: int) -> None:
    dirty = draw.draw(st.lists(st.booleans(), min_size=len(filled), max_size=len(filled)))
    size = len(filled) * UNIT - tail
    # data: neither hole nor zero, or a hole of unknown content; zero: both, or written zeros
    allocation = [draw.draw(st.sampled_from([0, 1] if data else [2, 3])) for data in filled]
    survey = ExtentPass(size, ["base:allocation", "bitmap"], "bitmap")
    while (request := survey.next_request()) is not None:
        offset, length = request
        assert 0 < length <= size - offset
        for context, flags in (("bitmap", list(map(int, dirty))), ("base:allocation", allocation)):
            survey.take(context, offset, answer(flags, size, offset, draw.draw(st.integers(1, 60))), None)
        assert survey.advanced_beyond(offset)
    data, zero = survey.result()
    expected_data, expected_zero = Spans(), Spans()
    for cluster in range(-(-size // CLUSTER)):
        inside = slice(cluster * 4, cluster * 4 + 4)
        if any(dirty[inside]):
            (expected_data if any(filled[inside]) else expected_zero).add(cluster, cluster + 1)
    assert (data, zero) == (expected_data, expected_zero)


def test_a_server_that_tells_nothing_is_noticed() -> None:
    survey = ExtentPass(1 << 20, ["base:allocation"], "")
    survey.take("base:allocation", 0, [], None)
    assert not survey.advanced_beyond(0)
    survey.take("base:allocation", 4096, [4096, 0], None)  # beyond what was asked for
    assert not survey.advanced_beyond(0)


def test_without_any_context_everything_is_data() -> None:
    survey = ExtentPass(3 * CLUSTER + 1, [], "")
    assert survey.next_request() is None
    assert survey.result() == (Spans.of((0, 4)), Spans())


def test_extents_of_a_disk_beyond_32_bits() -> None:
    size = 9 << 30
    survey = ExtentPass(size, ["base:allocation"], "")
    requests = []
    while (request := survey.next_request()) is not None:
        requests.append(request)
        survey.take("base:allocation", request[0], [request[1], 3], None)
    assert all(length < 1 << 32 for _, length in requests)
    assert sum(length for _, length in requests) == size
    assert survey.result() == (Spans(), Spans())
