"""The daemon reads its stores again by itself: finds damage, keeps to its budget, is in nobody's way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from lab import wait_for

from tests.faults.simulation import Simulation, simulation

ON = {"ODB_SCRUB_GB_PER_DAY": "1"}


@pytest.fixture
def site() -> Iterator[Simulation]:
    """A chain of three whose store nobody has read again yet."""
    with simulation() as site:
        yield site


def proof(site: Simulation) -> dict[str, Any]:
    """What `datastore show` tells."""
    return dict(site.client.get("datastores/100")["proof"])


def is_done(site: Simulation, scrubs: int) -> bool:
    """Whether so many scrubs were there, and have ended."""
    return len(site.operations("scrub")) >= scrubs and site.is_idle()


def flip(site: Simulation, number: int, name: str) -> None:
    """Change one bit in a file of a restore point."""
    path = site.store / "0" / site.points()[number]["backup_id"] / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_what_is_stored_is_proved_without_being_asked(site: Simulation) -> None:
    assert [point["verified_at"] for point in site.points()] == [None] * 3
    site.restart(**ON)
    wait_for("proof of all backups", lambda: proof(site)["proved"] == 3, 30)
    site.settle()
    assert all(point["verified_at"] for point in site.points())
    assert site.client.get("vms/0")["last_verified_at"] is not None
    stored = sum(path.stat().st_size for path in site.store.glob("0/*/*") if path.name != "manifest.json")
    assert proof(site)["read_bytes"] == stored
    site.assert_sound()


def test_damage_is_found_by_the_scrub_alone(site: Simulation) -> None:
    flip(site, 1, "disk.0.1")
    site.restart(**ON)
    wait_for("the scrub", lambda: is_done(site, 1), 30)
    (scrub,) = site.operations("scrub")
    assert (scrub["state"], scrub["error"]["code"]) == ("FAILED", "DataCorrupt")
    assert "disk.0.1" in scrub["error"]["message"]
    points = site.points()
    assert [point["state"] for point in points] == ["GOOD", "BROKEN", "BROKEN"]
    assert "disk.0.1" in points[1]["failure"]
    assert points[1]["backup_id"] in points[2]["failure"]
    assert proof(site)["broken"] == 2
    (shown,) = site.client.get("vms/0")["images"]
    assert shown["state"] == "BROKEN"
    said = site.product.run("datastore", "show", "100")
    assert "1 of 3 backups" in said
    assert site.restore(0, 0) == site.truth[0, 0]
    assert site.backup() == "FULL"
    assert site.backup() == "INCREMENT"


def test_no_more_than_the_budget_is_read_also_across_restarts(site: Simulation) -> None:
    """The full backup alone fits; what was read before a restart counts after it."""
    sizes = [
        sum(path.stat().st_size for path in (site.store / "0" / point["backup_id"]).iterdir())
        for point in site.points()
    ]
    budget = {"ODB_SCRUB_GB_PER_DAY": f"{(sizes[0] + 1000) / 1e9:.9f}"}
    site.restart(**budget)
    wait_for("the first scrub", lambda: is_done(site, 1), 30)
    assert [bool(point["verified_at"]) for point in site.points()] == [True, False, False]
    for _ in range(2):
        site.restart(**budget)
        site.done(site.submit("datastores/100/scrub"))
        found = proof(site)
        assert found["proved"] == 1
        assert 0 < found["read_bytes"] <= found["budget_bytes"]
    site.restart(**ON)
    wait_for("proof of all backups", lambda: proof(site)["proved"] == 3, 30)


def test_a_killed_scrub_counts_as_read_and_leaves_nothing_behind(site: Simulation) -> None:
    gate = site.directory / "gate"
    site.arm(f"fs.verify.begun=wait:{gate}")
    site.restart(**ON)
    wait_for("the scrub", gate.exists, 30)
    site.product.kill()
    site.arm()
    gate.unlink()
    site.start(**ON)
    site.wait_recovered()
    assert [row["state"] for row in site.operations("scrub")] == ["FAILED"], "once a day is enough"
    assert proof(site)["read_bytes"] > 0
    assert [point["state"] for point in site.points()] == ["GOOD"] * 3
    site.assert_sound(restore_all=True)


def test_a_scrub_delays_neither_a_backup_nor_what_removes_what_it_reads(site: Simulation) -> None:
    """The only worker is free for others; what went while it was read is not damaged."""
    gate = site.directory / "gate"
    site.arm(f"fs.verify.begun=wait:{gate}")
    site.restart(ODB_WORKERS="1", **ON)
    wait_for("the scrub", gate.exists, 30)
    assert site.backup() == "INCREMENT"
    site.set(KEEP_LAST="1")
    site.done(site.submit("vms/0/retention"))
    wait_for(
        "the end of what was merged",
        lambda: [row["state"] for row in site.operations("remove")] == ["DONE"],
        30,
    )
    assert [row["state"] for row in site.operations("scrub")] == ["RUNNING"]
    site.arm()
    gate.unlink()
    site.settle()
    assert {row["state"] for row in site.operations("scrub")} == {"DONE"}
    assert [(point["increment_id"], point["state"]) for point in site.points()] == [(3, "GOOD")]
    site.set(KEEP_LAST="0")
    assert site.backup() == "INCREMENT"
    site.assert_sound(restore_all=True)
