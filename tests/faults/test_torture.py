"""A few rounds of `make torture`, which goes on for as long as is wanted."""

from __future__ import annotations

import random

import pytest

from tests.faults.simulation import simulation
from tests.faults.torture import torture

SEED, ROUNDS = 1, 4


@pytest.mark.fault("daemon", "killed at random moments")
def test_killed_at_random_moments() -> None:
    chance = random.Random(SEED)
    with simulation() as site:
        for number in range(1, ROUNDS + 1):
            torture(site, chance, number)
