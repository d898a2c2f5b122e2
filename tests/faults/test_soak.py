"""A short soak; `make soak CYCLES=1000` is the long one. And that it would notice what it looks for."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from tests.faults.simulation import simulation
from tests.faults.soak import Sample, Soak, growth

REST = Sample(descriptors=30, threads=20, children=0, files=9, rss_mib=90.0)


@pytest.mark.whole_matrix
@pytest.mark.timeout(900)
def test_twenty_cycles_leave_the_daemon_as_it_was() -> None:
    with simulation() as site:
        soak = Soak(site, random.Random(20))
        done = [soak.cycle(number) for number in range(1, 21)]
        assert growth(soak.samples) == {}
        assert len({change for one in done for change in one.split(", ")}) >= 5, done


@pytest.mark.parametrize(
    ("name", "each"), [("descriptors", 1), ("threads", 1), ("children", 1), ("files", 1), ("rss_mib", 1.5)]
)
def test_what_grows_from_cycle_to_cycle_is_noticed(name: str, each: float) -> None:
    def sample(number: int) -> Sample:
        return replace(REST, **{name: getattr(REST, name) + number * each})

    assert set(growth([sample(number) for number in range(20)])) == {name}
    # a warm-up is no growth
    assert growth([sample(min(number, 3)) for number in range(20)]) == {}


def test_a_restore_point_that_is_another_one_is_noticed() -> None:
    with simulation() as site:
        for content in site.truth.values():
            content[0] = bytes(len(content[0]))
        with pytest.raises(AssertionError, match="is another one"):
            Soak(site, random.Random(1)).cycle(25)
