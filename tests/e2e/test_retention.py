"""A week of a real guest with KEEP_LAST: the daemon dies in a merge and after a switch, the chain goes on.

Every kept restore point is compared with QEMU's own copy of the same instant.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backed_up_vm import command
from lab import Guest, data_disk, root_disk, wait_for
from product import Product

from oned_backup import failpoints


class Week:
    """The guest, its daemon with failpoints, and the truth of each increment."""

    def __init__(self, guest: Guest, product: Product, directory: Path) -> None:
        self.guest = guest
        self.product = product
        self.directory = directory
        self.truth: dict[int, list[Path]] = {}
        self._armed = product.state_dir.parent / "armed"

    def start(self, armed: str = "") -> None:
        """Start the daemon; `armed` acts from now on."""
        self.arm(armed)
        self.product.start({failpoints.VARIABLE: f"@{self._armed}"})

    def arm(self, armed: str) -> None:
        """These failpoints act from now on."""
        self._armed.write_text(armed)

    def day(self) -> None:
        """The guest writes, and is backed up while it is suspended."""
        number = len(self.truth)
        self.guest.shell(f"head -c 700000 /dev/urandom >/data/vdb/{number % 3}; sync")
        self.guest.suspend()
        copies = self.guest.push_copy(self.directory / f"truth-{number}")
        result = self.product.ask("vm", "backup", "0")["result"]
        self.guest.resume()
        assert (result["image_id"], result["increment_id"]) == (0, number)
        assert {disk["type"] for disk in result["disks"]} == {"INCREMENT" if number else "FULL"}
        self.truth[number] = list(copies.values())

    def chain(self) -> list[int]:
        """The increments once nothing is queued or running any more."""
        wait_for("end of all operations", self._is_quiet, 60)
        return [point["increment_id"] for point in self.product.ask("image", "show", "0")["increments"]]

    def assert_all_restore(self) -> None:
        """Each kept restore point is what it was, both disks."""
        for number in self.chain():
            target = self.directory / f"restored-{number}-{len(self.truth)}"
            self.product.run("image", "restore", "0", "--increment", str(number), "--to", str(target))
            for disk_id, copy in enumerate(self.truth[number]):
                restored = target / f"disk.{disk_id}.qcow2"
                said = command("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(restored), str(copy))
                assert said == "Images are identical.\n"

    def _is_quiet(self) -> bool:
        states = {entry["state"] for entry in self.product.ask("operation", "list")}
        return not states & {"QUEUED", "RUNNING"}


@pytest.fixture
def week(make_guest: Callable[..., Guest], short_dir: Path, tmp_path: Path) -> Iterator[Week]:
    """A guest with two disks, known to the daemon, without a backup."""
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 64)])
    product = Product(short_dir)
    week = Week(guest, product, tmp_path)
    store = tmp_path / "store"
    store.mkdir()
    try:
        week.start()
        product.run("host", "add", "local", "--uri", guest.uri)
        product.run("vm", "import", "local", guest.name)
        product.run("vm", "set", "0", "FS_FREEZE=NONE")
        product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={store}")
        yield week
    finally:
        product.stop()


@pytest.mark.guest
@pytest.mark.whole_matrix  # faults/test_kill_matrix has its kills without a guest, e2e/test_week the rest
def test_a_week(week: Week) -> None:
    for _ in range(3):
        week.day()
    week.product.run("vm", "set", "0", "KEEP_LAST=2")
    week.arm("fs.increment_flatten.acted=kill-both")
    week.product.run("vm", "retention", "0", "--no-wait")
    wait_for("the daemon's death in the merge", lambda: not week.product.is_running, 60)
    week.start()
    assert week.chain() == [1, 2]
    week.product.run("vm", "set", "0", "KEEP_LAST=")
    week.day()
    week.day()
    week.product.run("vm", "set", "0", "KEEP_LAST=3")
    week.arm("flatten.SWITCH.ended=kill")
    week.product.run("vm", "retention", "0", "--no-wait")
    wait_for("the daemon's death after the switch", lambda: not week.product.is_running, 60)
    week.start()
    assert week.chain() == [2, 3, 4]
    week.assert_all_restore()

    week.product.run("vm", "set", "0", "KEEP_LAST=1")
    for number in (5, 6):
        week.day()
        assert week.chain() == [number]
    week.assert_all_restore()
    assert len(week.guest.domain.listAllCheckpoints(0)) == 1
    assert len(list(week.directory.glob("store/0/*"))) == 1
