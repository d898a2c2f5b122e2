"""The daemon's own directory is full, read-only or damaged: it says so, and harms nothing."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from lab import wait_for

from oned_backup.errors import DataCorrupt, Misconfigured, OnedBackupError
from tests.faults.simulation import Simulation

pytestmark = pytest.mark.whole_matrix

Observed = Callable[[str, object], None]


@pytest.fixture
def site() -> Iterator[Simulation]:
    """A chain of three; the state directory is a small file system of its own."""
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    site = Simulation(directory)
    state = site.product.state_dir
    state.mkdir(mode=0o700)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=700", "state", str(state)], check=True)
    try:
        site.set_up()
        yield site
    finally:
        site.tear_down()
        subprocess.run(["umount", "-l", str(state)], check=True)
        shutil.rmtree(directory, ignore_errors=True)


def fill(site: Simulation) -> Path:
    """No byte is free any more."""
    filler = site.product.state_dir / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue
    return filler


def goes_on(site: Simulation) -> None:
    """All that was there is, and the chain goes on."""
    site.settle()
    site.assert_sound(restore_all=True)
    assert site.backup() == "INCREMENT"


@pytest.mark.fault("daemon", "disk of the catalogue full")
@pytest.mark.parametrize("point", ["", "dummy.pre_backup_live.acted", "fs.backup.rename.acted"])
def test_it_is_full(site: Simulation, record_property: Observed, point: str) -> None:
    site.write()
    content = site.content()
    gate = site.directory / "gate"
    operation = ""
    if point:
        operation, gate = site.held_backup(point)
    filler = fill(site)
    try:
        operation = operation or site.submit("vms/0/backup")
        gate.unlink(missing_ok=True)
        wait_for("end of the driver", lambda: not site.drivers(), 60)
        wait_for("thaw", lambda: not site.hypervisor.find("web").frozen, 60)
        said = ""
    except OnedBackupError as refused:
        assert not point
        said = str(refused)
    filler.unlink()
    if operation:
        ended = site.ended(operation)
        said = f"{ended['state']}: {(ended['error'] or {}).get('message', '')}"
    assert "full" in said or "No space left" in said or said.startswith("DONE")
    record_property("observed", said.replace(str(site.directory), "…"))
    site.learn(content)
    goes_on(site)


@pytest.mark.fault("daemon", "directory of the catalogue is read-only")
def test_it_is_read_only(site: Simulation, record_property: Observed) -> None:
    state = str(site.product.state_dir)
    site.product.stop()
    subprocess.run(["mount", "-o", "remount,ro", state], check=True)
    refused = site.product.call("serve", timeout_s=60)
    subprocess.run(["mount", "-o", "remount,rw", state], check=True)
    told = refused.stderr.decode().strip()
    assert refused.returncode == Misconfigured.exit_code, told
    assert "Traceback" not in told
    record_property("observed", told.splitlines()[-1].replace(str(site.directory), "…"))
    site.start()
    goes_on(site)


@pytest.mark.fault("daemon", "catalogue damaged")
@pytest.mark.parametrize("damage", ["head", "cut off"])
def test_it_is_damaged(site: Simulation, record_property: Observed, damage: str) -> None:
    """It does not start with what it cannot read, and touches nothing; the stores make it anew."""
    site.product.stop()
    database = site.product.state_dir / "oned-backup.sqlite"
    data = database.read_bytes()
    database.write_bytes(b"\xff" * 100 + data[100:] if damage == "head" else data[: len(data) // 2])
    kept = database.read_bytes()
    refused = site.product.call("serve", timeout_s=60)
    told = refused.stderr.decode().strip()
    assert refused.returncode == DataCorrupt.exit_code, told
    assert "Move the file away" in told
    assert "Traceback" not in told
    assert database.read_bytes() == kept
    record_property("observed", " ".join(told.split()).replace(str(site.directory), "…"))
    database.rename(database.with_name("damaged"))
    site.start()
    values = {"BASE_PATH": str(site.store)}
    site.client.post("datastores", {"name": "nightly", "driver": "fs", "values": values})
    site.done(site.submit("datastores/100/import"))
    assert len(site.points()) == 3
    site.assert_sound(restore_all=True)
