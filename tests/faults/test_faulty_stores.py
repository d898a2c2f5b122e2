"""A store that fails at the worst moment: what was good stays, nothing half is left, it goes on.

The store is a real file system on a disk that can be told to fail; daemon, drivers and catalogue are
real, the hypervisor is the dummy one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.faulty_disk import FaultyDisk, mounted_disk
from tests.faults.simulation import Simulation, simulation

#: failures that may pass are given up soon
IMPATIENT = {"ODB_RETRY__FOR_S": "1", "ODB_RETRY__FIRST_WAIT_S": "0.2", "ODB_RETRY__LONGEST_WAIT_S": "0.5"}


@pytest.fixture(scope="module")
def the_site() -> Iterator[Simulation]:
    with simulation(disk=mounted_disk) as site:
        site.restart(**IMPATIENT)
        yield site


@pytest.fixture
def site(the_site: Simulation) -> Iterator[Simulation]:
    """A chain in a store that may be made to fail; afterwards all is as it must be, and goes on."""
    yield the_site
    the_site.arm()
    (the_site.directory / "gate").unlink(missing_ok=True)
    (the_site.store / ".filler").unlink(missing_ok=True)
    if the_site.client.get("datastores/100")["state"] == "DISABLED":
        the_site.client.patch("datastores/100", {"values": {}})
    the_site.settle()
    the_site.assert_sound()
    oldest = min(the_site.truth)
    assert the_site.restore(*oldest) == the_site.truth[oldest]
    assert the_site.backup() == "INCREMENT"


@pytest.fixture
def disk(the_site: Simulation) -> FaultyDisk:
    """What the store lies on."""
    found = the_site.disk
    assert isinstance(found, FaultyDisk)
    return found


def begun(site: Simulation, point: str) -> tuple[str, Path]:
    """A backup of new content that waits at a failpoint."""
    site.write()
    return site.held_backup(point)


def known(site: Simulation, ended: dict[str, Any]) -> dict[str, Any]:
    """A finished backup, whose truth is kept."""
    assert ended["state"] == "DONE", ended["error"]
    result: dict[str, Any] = ended["result"]
    site.truth[result["image_id"], result["increment_id"]] = site.content()
    return result


def failed(ended: dict[str, Any], code: str) -> str:
    """The words of a failure of that kind."""
    assert (ended["state"], ended["error"] and ended["error"]["code"]) == ("FAILED", code), ended["error"]
    return str(ended["error"]["message"])


@pytest.mark.fault("store", "I/O errors when writing")
def test_io_errors_when_writing(site: Simulation, disk: FaultyDisk, record_property: Any) -> None:
    with disk.failing("pwrite"):
        said = failed(site.ended(site.submit("vms/0/backup")), "Unavailable")
    assert "Input/output error" in said
    record_property("observed", "failed: Input/output error; nothing left")


@pytest.mark.fault("store", "I/O errors when reading")
def test_io_errors_when_reading(site: Simulation, disk: FaultyDisk, record_property: Any) -> None:
    """Nothing at all can be read: the store cannot be reached, which says nothing about what it holds."""
    target = site.directory / "restored"
    with disk.failing("pread"):
        restore = {"to": str(target), "format": "raw"}
        said = failed(site.ended(site.submit("images/0/restore", restore)), "Unavailable")
        assert "Input/output error" in said
        assert not list(target.glob("*"))
        failed(site.ended(site.submit("images/0/verify")), "Unavailable")
    assert {point["state"] for point in site.points()} == {"GOOD"}
    record_property("observed", "restore and verify fail, nothing is marked broken, nothing given out")


@pytest.mark.whole_matrix
@pytest.mark.fault("store", "slow")
def test_slow(site: Simulation, disk: FaultyDisk) -> None:
    with disk.slow("2M"):
        site.write()
        known(site, site.ended(site.submit("vms/0/backup")))


@pytest.mark.fault("store", "full at publish")
def test_full_at_publish(site: Simulation, disk: FaultyDisk, record_property: Any) -> None:
    """What is left to do needs no room; the next one is refused before the guest is touched."""
    running, gate = begun(site, "fs.backup.rename.begun")
    filler = disk.fill()
    gate.unlink()
    known(site, site.ended(running))
    site.product.run("datastore", "monitor", "100")
    said = failed(site.ended(site.submit("vms/0/backup")), "NoSpace")
    assert "MB free" in said
    filler.unlink()
    site.product.run("datastore", "monitor", "100")
    record_property("observed", "published; the next one is refused with the numbers")


@pytest.mark.fault("store", "full in mid-transfer")
def test_full_in_mid_transfer(site: Simulation, disk: FaultyDisk) -> None:
    running, gate = begun(site, "fs.backup.disk.chunk")
    filler = disk.fill()
    gate.unlink()
    failed(site.ended(running), "NoSpace")
    filler.unlink()
    site.product.run("datastore", "monitor", "100")


@pytest.mark.fault("store", "read-only")
def test_read_only_in_the_middle(site: Simulation, disk: FaultyDisk, record_property: Any) -> None:
    running, gate = begun(site, "fs.backup.begun")
    disk.remount("ro")
    gate.unlink()
    said = failed(site.ended(running), "PermissionDenied")
    assert "Read-only file system" in said
    datastore = site.client.get("datastores/100")
    assert (datastore["state"], "Read-only" in datastore["error"]) == ("DISABLED", True)
    newest = max(site.truth)
    assert site.restore(*newest) == site.truth[newest]
    site.done(site.submit("images/0/verify"))
    disk.remount("rw")
    record_property(
        "observed", "refused with the reason, datastore disabled until it is updated; restores work"
    )


@pytest.mark.fault("store", "unreachable in mid-transfer")
def test_unmounted_in_the_middle(site: Simulation, disk: FaultyDisk, record_property: Any) -> None:
    running, gate = begun(site, "fs.backup.begun")
    disk.unmount(lazily=True)
    gate.unlink()
    failed(site.ended(running), "Unavailable")
    assert list(site.store.iterdir()) == [], "nothing may be written beneath what is not mounted"
    disk.mount()
    record_property("observed", "unavailable; nothing written beneath")


@pytest.mark.fault("store", "another store in its place")
def test_another_store_is_mounted(site: Simulation, disk: FaultyDisk, record_property: Any) -> None:
    """As with disks that are swapped once a week: what is not on this one is not lost."""
    newest = max(site.truth)
    verify = f"images/{newest[0]}/verify"
    disk.unmount()
    marker = site.store / ".oned-backup-store"
    marker.write_text(f"oned-backup store, version 1\n{'0' * 32}\n")
    try:
        said = failed(site.ended(site.submit("vms/0/backup")), "Unavailable")
        assert "this is store 00000000000000000000000000000000, not " in said
        failed(site.ended(site.submit(verify)), "Unavailable")
        failed(site.ended(site.flatten(site.chain()[0])), "Unavailable")
        body = {"to": str(site.directory / "from-another"), "format": "raw"}
        failed(site.ended(site.submit(f"images/{newest[0]}/restore", body)), "Unavailable")
        assert [path.name for path in site.store.iterdir()] == [marker.name]
        assert {point["state"] for point in site.points()} == {"GOOD"}
    finally:
        marker.unlink()
        disk.mount()
    site.done(site.submit(verify))
    told = said.replace(str(site.directory), "…").partition(", not ")[0]
    record_property("observed", f"{told}, and not ours; nothing is marked as broken, nothing written")


@pytest.mark.fault("store", "unreachable at publish")
def test_unmounted_at_publish(site: Simulation, disk: FaultyDisk, record_property: Any) -> None:
    """The disk is taken away from under a driver that has all data there, and comes back."""
    running, gate = begun(site, "fs.backup.rename.begun")
    disk.unmount(lazily=True)
    gate.unlink()
    ended = site.ended(running)
    assert list(site.store.iterdir()) == []
    disk.mount()
    if ended["state"] == "DONE":
        known(site, ended)
    record_property("observed", f"{ended['state']}: a restore point exists wholly or not at all")


@pytest.mark.fault("store", "unreachable at delete")
def test_unmounted_at_delete(site: Simulation, disk: FaultyDisk) -> None:
    running, gate = site.held_at("fs.rm.begun", lambda: site.flatten(site.chain()[-2]))
    disk.unmount(lazily=True)
    gate.unlink()
    site.settle()
    assert site.state(running) == "DONE"
    assert site.operations("remove")[0]["state"] == "FAILED"
    disk.mount()
    site.done(site.submit("vms/0/retention"))
    site.settle()
    merged = [
        key for key in site.truth if key not in {(p["image_id"], p["increment_id"]) for p in site.points()}
    ]
    for key in merged:
        del site.truth[key]
