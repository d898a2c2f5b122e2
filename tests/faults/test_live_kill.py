"""SIGKILL for daemon, driver or both while a real guest is backed up: it goes on, and so does its chain.

The failpoints are where the guest is at stake, from its freeze to the end of its job; those of the journal
are in `test_kill_matrix`. By default the rows run that say most, with `--whole-matrix` all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from lab import Libvirtd, wait_for

from oned_backup.errors import DaemonUnreachable
from tests.faults.live import LiveSite, live_site

pytestmark = pytest.mark.guest

HOW = {"driver": "kill", "daemon": "kill-parent", "both": "kill-both"}
STORE = (
    "fs.backup.begun",
    "fs.backup.disk.chunk",
    "fs.backup.rename.begun",
    "fs.backup.rename.acted",
    "fs.backup.acted",
)
LIVE = (
    "qcow2.pre_backup_live.begun",
    "qcow2.pre_backup_live.freeze.frozen",
    "qcow2.pre_backup_live.job.begun",
    "qcow2.pre_backup_live.job.acted",
    "qcow2.pre_backup_live.acted",
    *STORE,
    "qcow2.post_backup_live.begun",
    "qcow2.post_backup_live.job.ended",
    "qcow2.post_backup_live.files.removed",
    "qcow2.post_backup_live.acted",
)
OFF = (
    "qcow2.pre_backup.begun",
    "qcow2.pre_backup.bitmaps.acted",
    "qcow2.pre_backup.serve.acted",
    "qcow2.pre_backup.acted",
    *STORE,
    "qcow2.post_backup.begun",
    "qcow2.post_backup.files.removed",
    "qcow2.post_backup.acted",
)
#: run by default: each place once, each way to die several times
DEFAULT_LIVE = {
    ("INCREMENT", "qcow2.pre_backup_live.freeze.frozen", "both"),
    ("FULL", "qcow2.pre_backup_live.freeze.frozen", "driver"),
    ("INCREMENT", "qcow2.pre_backup_live.job.begun", "daemon"),
    ("INCREMENT", "qcow2.pre_backup_live.job.acted", "both"),
    ("FULL", "fs.backup.disk.chunk", "daemon"),
    ("INCREMENT", "fs.backup.rename.acted", "both"),
    ("FULL", "qcow2.post_backup_live.begun", "driver"),
    ("INCREMENT", "qcow2.post_backup_live.job.ended", "both"),
}
DEFAULT_OFF = {
    ("INCREMENT", "qcow2.pre_backup.bitmaps.acted", "both"),
    ("INCREMENT", "qcow2.post_backup.files.removed", "driver"),
}


def rows(points: tuple[str, ...], default: set[tuple[str, str, str]]) -> list[Any]:
    """All rows; those that are not run by default are marked."""
    return [
        pytest.param(*row, marks=[] if row in default else pytest.mark.whole_matrix)
        for row in product(("FULL", "INCREMENT"), points, HOW)
    ]


@pytest.fixture(scope="module")
def libvirtd() -> Iterator[Libvirtd]:
    """A private libvirtd for these guests."""
    with Libvirtd() as server:
        yield server


@pytest.fixture(scope="module")
def site(libvirtd: Libvirtd) -> Iterator[LiveSite]:
    """A running guest for all rows: each leaves it and its chain sound."""
    with live_site(libvirtd) as site:
        yield site


@pytest.mark.parametrize(("kind", "point", "victim"), rows(LIVE, DEFAULT_LIVE))
def test_killed_while_the_guest_runs(site: LiveSite, kind: str, point: str, victim: str) -> None:
    site.set(FS_FREEZE="AGENT")
    killed(site, kind, point, victim)


def killed(site: LiveSite, kind: str, point: str, victim: str) -> None:
    """One row: begin a backup, let it die, and see that everything holds and goes on."""
    if not site.product.is_running:  # an earlier row was found wanting
        site.start()
    site.drop_old_images()
    running = site.guest.is_active()
    log = site.directory / "reached"
    log.unlink(missing_ok=True)
    site.write()
    once = site.directory / "once"
    once.touch()
    site.arm(f"*=record:{log},{point}={HOW[victim]}:{once}")
    with suppress(DaemonUnreachable):  # it may die before it has answered
        site.submit("vms/0/backup", {"reset": kind == "FULL"})
    wait_for("end of it, or of the daemon", lambda: site.is_idle() or not site.product.is_running, 60)
    site.arm()
    assert point in log.read_text().split()
    assert not once.exists()
    assert site.product.is_running == (victim == "driver")
    if point.endswith("freeze.frozen"):  # whoever is left
        wait_for("thaw, without the daemon", lambda: not site.is_frozen(), 10)
    if not site.product.is_running:
        site.start()
    site.wait_recovered()
    site.learn()
    site.assert_sound(running=running)
    assert site.backup_and_compare() == "INCREMENT"


def test_every_restore_point_is_still_what_it_was(site: LiveSite) -> None:
    site.assert_sound(restore_all=True)
