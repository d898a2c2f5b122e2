"""Retention of a real store: every restore point that is kept stays what it was, whoever dies or reads.

The hypervisor is the dummy one; daemon, driver and store are real. What each increment held is
known, so that a merged one can be compared with it under its new backup id.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.simulation import Simulation, simulation


@pytest.fixture
def site() -> Iterator[Simulation]:
    """A chain of three, and a daemon that looks at failpoints."""
    with simulation() as site:
        yield site


def test_a_rolling_chain_of_five_restores_at_every_point(site: Simulation) -> None:
    site.set(KEEP_LAST="5")
    for _ in range(6):
        assert site.backup() == "INCREMENT"
        site.settle()
    assert site.chain() == [4, 5, 6, 7, 8]
    assert {row["state"] for row in site.operations("flatten")} == {"DONE"}
    assert len(site.operations("flatten")) == 4
    site.assert_sound(restore_all=True)


def test_keep_last_1_and_the_chain_goes_on(site: Simulation) -> None:
    site.set(KEEP_LAST="1")
    for _ in range(3):
        assert site.backup() == "INCREMENT"
        site.settle()
    assert site.chain() == [5]
    site.assert_sound(restore_all=True)


def test_pins_hold_and_the_newest_image_goes_on(site: Simulation) -> None:
    site.client.post("images/0/pin", {"increment_id": 1})
    site.set(KEEP_LAST="2")
    assert site.backup(reset=True) == "FULL"
    assert site.backup() == "INCREMENT"
    site.settle()
    assert [(point["image_id"], point["increment_id"]) for point in site.points()] == [(0, 1), (1, 0), (1, 1)]
    site.client.post("images/0/pin", {"increment_id": 1, "pinned": False})
    site.done(site.submit("vms/0/retention"))
    site.settle()
    assert [image["id"] for image in site.images()] == [1]
    site.assert_sound(restore_all=True)


def test_single_increments_go(site: Simulation) -> None:
    site.done(site.flatten(1))
    site.settle()
    assert site.chain() == [0, 2]
    site.done(site.flatten(0))
    site.settle()
    assert site.chain() == [2]
    assert site.backup() == "INCREMENT"
    site.done(site.flatten(3))
    site.settle()
    assert site.chain() == [2]
    site.assert_sound(restore_all=True)
    assert site.backup() == "FULL"


@pytest.mark.fault("concurrency", "flatten beside a backup")
@pytest.mark.fault("concurrency", "flatten beside a restore")
def test_backups_and_restores_run_beside_a_merge(site: Simulation) -> None:
    merge, gate = site.held_at("fs.increment_flatten.begun", lambda: site.flatten(0))
    assert site.backup() == "INCREMENT"
    assert [site.restore(0, number) for number in range(4)] == [site.truth[0, number] for number in range(4)]
    gate.unlink()
    site.done(merge)
    site.settle()
    assert site.chain() == [1, 2, 3]
    site.assert_sound(restore_all=True)


@pytest.mark.fault("concurrency", "delete beside a restore of the same chain")
def test_what_a_restore_reads_is_not_removed_under_it(site: Simulation) -> None:
    target = site.directory / "slow"
    wanted = {"to": str(target), "increment_id": 1, "format": "raw"}
    restore, gate = site.held_at("fs.download.begun", lambda: site.submit("images/0/restore", wanted))
    old = {path.name for path in site.store.glob("0/*")}
    site.done(site.flatten(0))
    (removal,) = site.operations("remove")
    assert site.client.get(f"operations/{removal['id']}")["waits_for"]["id"] == restore
    assert old < {path.name for path in site.store.glob("0/*")}
    gate.unlink()
    site.done(restore)
    assert [(target / f"disk.{number}.raw").read_bytes() for number in range(2)] == site.truth[0, 1]
    site.settle()
    site.assert_sound(restore_all=True)


@pytest.mark.fault("data", "broken increment in mid-chain: flatten")
@pytest.mark.fault("data", "broken increment in mid-chain: next backup")
def test_damage_is_not_merged(site: Simulation) -> None:
    folder = next(path for path in site.store.glob("0/*") if path.name == site.points()[1]["backup_id"])
    disk = folder / "disk.0.1"
    data = bytearray(disk.read_bytes())
    data[-1000] ^= 1
    disk.write_bytes(data)
    failed = site.ended(site.flatten(0))
    assert (failed["state"], failed["error"]["code"]) == ("FAILED", "DataCorrupt")
    assert [point["state"] for point in site.points()] == ["GOOD", "BROKEN", "BROKEN"]
    assert site.chain() == [0, 1, 2]
    assert site.restore(0, 0) == site.truth[0, 0]
    assert site.backup() == "FULL"
    site.set(KEEP_LAST="1")
    site.done(site.submit("vms/0/retention"))
    site.settle()
    assert [point["image_id"] for point in site.points()] == [1]
