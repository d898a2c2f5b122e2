"""What else may be asked of a chain while a merge of it stands still in the middle."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.faults.simulation import Simulation, simulation

Observed = Callable[[str, object], None]


@pytest.fixture(scope="module")
def site() -> Iterator[Simulation]:
    """One VM and its chain for all tests here: each leaves it sound."""
    with simulation() as site:
        yield site


@pytest.fixture
def merge(site: Simulation) -> Iterator[str]:
    """A merge of the oldest two of the chain, which stands still until the test lets it go."""
    while len(site.chain()) < 3:
        site.backup()
    merge, gate = site.held_at("fs.increment_flatten.begun", lambda: site.flatten(site.chain()[0]))
    yield merge
    gate.unlink(missing_ok=True)


def let_go(site: Simulation, merge: str) -> None:
    """The merge comes to its end, and all that waited for it."""
    (site.directory / "gate").unlink()
    site.done(merge)
    site.settle()
    site.assert_sound(restore_all=True)


@pytest.mark.fault("concurrency", "flatten beside a verification")
def test_a_verification(site: Simulation, merge: str, record_property: Observed) -> None:
    before = site.chain()
    site.done(site.submit(f"images/{site.newest_image()}/verify"))
    assert site.state(merge) == "RUNNING"
    let_go(site, merge)
    assert site.chain() == before[1:]
    assert site.backup() == "INCREMENT"
    record_property("observed", "verified meanwhile; the merge goes on")


@pytest.mark.fault("concurrency", "flatten beside a delete of the same chain")
def test_a_removal_of_its_newest(site: Simulation, merge: str, record_property: Observed) -> None:
    before = site.chain()
    removal = site.submit(f"images/{site.newest_image()}?increment_id={before[-1]}", method="delete")
    assert site.client.get(f"operations/{removal}")["waits_for"]["id"] == merge
    let_go(site, merge)
    assert site.state(removal) == "DONE"
    assert site.chain() == before[1:-1]
    assert site.backup() == "FULL"
    record_property("observed", "it waits for the merge; then the chain ends, as it was asked to")


@pytest.mark.fault("concurrency", "flatten beside a delete of the same chain")
def test_a_removal_of_all(site: Simulation, merge: str) -> None:
    old = site.newest_image()
    assert site.backup(reset=True) == "FULL"
    removal = site.submit(f"images/{old}", method="delete")
    assert site.client.get(f"operations/{removal}")["waits_for"]["id"] == merge
    let_go(site, merge)
    assert site.state(removal) == "DONE"
    assert old not in {image["id"] for image in site.images()}
    assert site.backup() == "INCREMENT"
