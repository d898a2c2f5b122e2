"""Retention of a real store: every restore point that is kept stays what it was, whoever dies or reads.

The hypervisor is the dummy one; daemon, driver and store are real. What each increment held is
known, so that a merged one can be compared with it under its new backup id.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lab import wait_for

from tests.faults.simulation import Simulation


class Site(Simulation):
    """A simulation that knows what each increment held."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.held: dict[tuple[int, int], list[bytes]] = {}

    def chain(self) -> list[int]:
        """The increments of the newest image."""
        return [point["increment_id"] for point in self.points() if point["image_id"] == self.newest_image()]

    def backup(self, **options: Any) -> str:
        """The type of a new backup, whose content is remembered by image and increment."""
        self.write()
        result = self.done(self.submit("vms/0/backup", options))
        self.held[result["image_id"], result["increment_id"]] = self.content()
        self.remember()
        return str(result["type"])

    def remember(self) -> None:
        """Know each restore point again under whatever backup id it has now."""
        for point in self.points():
            key = point["image_id"], point["increment_id"]
            if key in self.held:
                self.truth[point["backup_id"]] = self.held[key]

    def settle(self) -> None:
        """Wait until nothing is queued or running any more."""
        wait_for("end of all operations", lambda: not self._open_operations(), 60)
        self.remember()

    def flatten(self, increment_id: int) -> str:
        """The id of the operation that takes an increment out of the newest image."""
        return self.submit(f"images/{self.newest_image()}?increment_id={increment_id}", method="delete")

    def set(self, **values: str) -> None:
        """Settings of the VM."""
        self.client.patch("vms/0/config", {"values": values})

    def operations(self, kind: str) -> list[dict[str, Any]]:
        """All operations of a kind, newest first."""
        return [row for row in self.client.get("operations", limit=1000) if row["kind"] == kind]


@pytest.fixture
def site() -> Iterator[Site]:
    """A chain of three, and a daemon that looks at failpoints."""
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = Site(directory)
    try:
        site.set_up()
        yield site
    finally:
        site.tear_down()
        shutil.rmtree(directory, ignore_errors=True)


def test_a_rolling_chain_of_five_restores_at_every_point(site: Site) -> None:
    site.set(KEEP_LAST="5")
    for _ in range(6):
        assert site.backup() == "INCREMENT"
        site.settle()
    assert site.chain() == [4, 5, 6, 7, 8]
    assert {row["state"] for row in site.operations("flatten")} == {"DONE"}
    assert len(site.operations("flatten")) == 4
    site.assert_sound(restore_all=True)


def test_keep_last_1_and_the_chain_goes_on(site: Site) -> None:
    site.set(KEEP_LAST="1")
    for _ in range(3):
        assert site.backup() == "INCREMENT"
        site.settle()
    assert site.chain() == [5]
    site.assert_sound(restore_all=True)


def test_pins_hold_and_the_newest_image_goes_on(site: Site) -> None:
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


def test_single_increments_go(site: Site) -> None:
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


def test_backups_and_restores_run_beside_a_merge(site: Site) -> None:
    gate = site.directory / "gate"
    site.arm(f"fs.increment_flatten.begun=wait:{gate}")
    merge = site.flatten(0)
    wait_for("the merge", gate.exists, 30)
    assert site.backup() == "INCREMENT"
    assert [site.restore(0, number) for number in range(4)] == [site.held[0, number] for number in range(4)]
    gate.unlink()
    site.done(merge)
    site.settle()
    assert site.chain() == [1, 2, 3]
    site.assert_sound(restore_all=True)


def test_what_a_restore_reads_is_not_removed_under_it(site: Site) -> None:
    gate = site.directory / "gate"
    site.arm(f"fs.download.begun=wait:{gate}")
    target = site.directory / "slow"
    restore = site.submit("images/0/restore", {"to": str(target), "increment_id": 1, "format": "raw"})
    wait_for("the restore", gate.exists, 30)
    site.arm()
    old = {path.name for path in site.store.glob("0/*")}
    site.done(site.flatten(0))
    (removal,) = site.operations("remove")
    assert site.client.get(f"operations/{removal['id']}")["waits_for"]["id"] == restore
    assert old < {path.name for path in site.store.glob("0/*")}
    gate.unlink()
    site.done(restore)
    assert [(target / f"disk.{number}.raw").read_bytes() for number in range(2)] == site.held[0, 1]
    site.settle()
    site.assert_sound(restore_all=True)


def test_damage_is_not_merged(site: Site) -> None:
    folder = next(path for path in site.store.glob("0/*") if path.name == site.points()[1]["backup_id"])
    disk = folder / "disk.0.1"
    data = bytearray(disk.read_bytes())
    data[-1000] ^= 1
    disk.write_bytes(data)
    failed = site.ended(site.flatten(0))
    assert (failed["state"], failed["error"]["code"]) == ("FAILED", "DataCorrupt")
    assert [point["state"] for point in site.points()] == ["GOOD", "BROKEN", "BROKEN"]
    assert site.chain() == [0, 1, 2]
    assert site.restore(0, 0) == site.held[0, 0]
    assert site.backup() == "FULL"
    site.set(KEEP_LAST="1")
    site.done(site.submit("vms/0/retention"))
    site.settle()
    assert [point["image_id"] for point in site.points()] == [1]


@pytest.mark.parametrize(
    "armed",
    [
        "flatten.MERGE.begun=kill",
        "fs.increment_flatten.acted=kill-both",
        "fs.increment_flatten.acted=kill,flatten.undo-MERGE.begun=kill",
        "flatten.MERGE.ended=kill",
        "flatten.SWITCH.ended=kill",
        "retention.APPLY.ended=kill",
        "remove.REMOVE.begun=kill",
        "fs.rm.acted=kill-both",
        "remove.FORGET.ended=kill",
    ],
)
def test_killed(killed_site: Site, armed: str) -> None:
    site = killed_site
    while len(site.chain()) < 3:
        assert site.backup() == "INCREMENT"
    wanted = site.chain()[-2:]
    site.set(KEEP_LAST="2")
    site.arm(armed)
    site.submit("vms/0/retention")
    wait_for("the daemon's death", lambda: not site.product.is_running, 60)
    site.arm()
    site.start()
    site.wait_recovered()
    site.done(site.submit("vms/0/retention"))
    site.settle()
    assert site.chain() == wanted
    site.assert_sound(restore_all=True)
    site.set(KEEP_LAST="0")
    assert site.backup() == "INCREMENT"


@pytest.fixture(scope="module")
def killed_site() -> Iterator[Site]:
    """One for all rows: each leaves it sound."""
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = Site(directory)
    try:
        site.set_up()
        yield site
    finally:
        site.tear_down()
        shutil.rmtree(directory, ignore_errors=True)
