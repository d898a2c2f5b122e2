"""A driver that not even SIGKILL ends, because the kernel holds it: its store's file system is frozen."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import wait_for

from tests.faults.daemon_site import RECOVERY_S
from tests.faults.simulation import Simulation, simulation


@pytest.fixture
def site() -> Iterator[Simulation]:
    """A simulation whose store is a file system of its own."""
    with simulation(store_mb=32) as site:
        yield site


def freeze(path: Path, *, frozen: bool) -> None:
    subprocess.run(["fsfreeze", "--freeze" if frozen else "--unfreeze", str(path)], check=True)


def is_held_by_kernel(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state == "D"


def test_recovery_ends_and_forgets_nothing(site: Simulation) -> None:
    operation_id, gate = site.held_backup("fs.backup.disk.chunk")
    freeze(site.store, frozen=True)
    try:
        gate.unlink()
        wait_for("driver that hangs", lambda: any(map(is_held_by_kernel, site.drivers())))
        site.product.kill()
        site.start()
        ended = site.ended(operation_id, RECOVERY_S)
        assert ended["state"] == "FAILED"
        assert any("hangs in the kernel" in note for note in ended["result"]["notes"])
        assert not site.hypervisor.find("web").frozen
        assert any(map(is_held_by_kernel, site.drivers()))
    finally:
        freeze(site.store, frozen=False)
    wait_for("end of all drivers", lambda: not site.drivers(), 30)
    assert site.backup() == "INCREMENT"
    site.done(site.submit("vms/0/retention"))
    site.settle()
    site.assert_sound(restore_all=True)
