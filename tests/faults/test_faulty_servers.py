"""Stores on a server that stands still, shows another host key, or is gone; behind a real sshd."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sshd import ALIAS, Sshd

from tests.faults.simulation import Simulation, simulation

PASSWORD = "what the repository is sealed with"  # noqa: S105
SETTINGS = {
    "ODB_SSH__CONNECT_TIMEOUT_S": "2",
    "ODB_SSH__KEEPALIVE_S": "1",
    "ODB_RETRY__FOR_S": "1",
    "ODB_RETRY__FIRST_WAIT_S": "0.2",
    "ODB_RETRY__LONGEST_WAIT_S": "0.5",
}


@pytest.fixture(scope="module")
def sshd() -> Iterator[Sshd]:
    directory = Path(tempfile.mkdtemp(prefix="odb-sshd-"))
    try:
        with Sshd(directory) as server:
            yield server
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def settings(sshd: Sshd) -> dict[str, str]:
    """How the daemon reaches the server, and gives up soon."""
    files = {"IDENTITY_FILE": sshd.directory / "id", "INCLUDE": sshd.directory / "hosts"}
    return {**SETTINGS, **{f"ODB_SSH__{name}": str(path) for name, path in files.items()}}


@pytest.fixture(scope="module")
def the_site(sshd: Sshd) -> Iterator[Simulation]:
    """A daemon that reaches the server; no backups there yet."""
    with simulation() as site:
        site.restart(**settings(sshd))
        yield site


@pytest.fixture(params=["rsync", "restic"])
def store(request: pytest.FixtureRequest, the_site: Simulation, sshd: Sshd) -> Iterator[int]:
    """A datastore there with a chain of two; afterwards the chain restores and goes on."""
    site, driver = the_site, str(request.param)
    store_id = next(
        (one["id"] for one in site.client.get("datastores") if one["name"] == driver), None
    ) or _created(site, sshd, driver)
    if site.images()[-1]["datastore_id"] != store_id:
        assert site.backup(datastore_id=store_id) == "FULL"
    assert site.backup(datastore_id=store_id) == "INCREMENT"
    yield int(store_id)
    site.arm()
    site.settle()
    if site.client.get(f"datastores/{store_id}")["state"] == "DISABLED":
        site.client.patch(f"datastores/{store_id}", {"values": {}})
    assert site.backup(datastore_id=store_id) == "INCREMENT"
    newest = max(site.truth)
    assert site.restore(*newest) == site.truth[newest]
    assert {point["state"] for point in site.points()} == {"GOOD"}


def _created(site: Simulation, sshd: Sshd, driver: str) -> int:
    place = site.directory / driver
    place.mkdir()
    user = sshd.target.partition("@")[0]
    values = {
        "rsync": {"RSYNC_HOST": ALIAS, "RSYNC_USER": user},
        "restic": {
            "RESTIC_SFTP_SERVER": ALIAS,
            "RESTIC_SFTP_USER": user,
            "RESTIC_PASSWORD": PASSWORD,
        },
    }[driver]
    body = {
        "name": driver,
        "driver": driver,
        "values": {"BASE_PATH": str(place), **values},
        "accept_host_key": sshd.fingerprint,
    }
    return int(site.client.post("datastores", body)["id"])


@contextmanager
def standing_still(sshd: Sshd) -> Iterator[None]:
    """Neither the server nor any of its sessions does anything, and no connection is closed."""
    master = int((sshd.directory / "sshd.pid").read_text())
    stopped: list[int] = []
    for pid in _with_descendants(master):
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)
    try:
        yield
    finally:
        for pid in stopped:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGCONT)


def _with_descendants(pid: int) -> Iterator[int]:
    yield pid
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False).stdout
    for child in map(int, found.split()):
        yield from _with_descendants(child)


def why(ended: dict[str, Any]) -> str:
    """The kind of failure of an operation that must have failed."""
    assert ended["state"] == "FAILED", ended
    return str(ended["error"]["code"])


@pytest.mark.whole_matrix
@pytest.mark.fault("store", "stands still")
def test_a_server_that_stands_still(
    the_site: Simulation, store: int, sshd: Sshd, record_property: Any
) -> None:
    site = the_site
    driver = site.client.get(f"datastores/{store}")["driver"]
    site.restart(**settings(sshd), ODB_DEADLINES__TRANSFER_S="40")
    site.write()
    body = {"datastore_id": store}
    running, gate = site.held_at(f"{driver}.backup.disk.chunk", lambda: site.submit("vms/0/backup", body))
    with standing_still(sshd):
        gate.unlink()
        ended = site.ended(running, 120)
        verify = site.ended(site.submit(f"images/{site.newest_image()}/verify"), 120)
    assert why(ended) == "Unavailable"
    assert why(verify) == "Unavailable"
    site.restart(**settings(sshd))
    assert not site.hypervisor.find("web").frozen
    record_property("observed", f"{ended['error']['message'][:60]}; nothing marked broken")


@pytest.mark.fault("store", "host key changed")
def test_a_server_with_another_host_key(the_site: Simulation, store: int, sshd: Sshd) -> None:
    """Somebody stands in its place: no backup goes there, nothing is believed that comes from there."""
    site = the_site
    image = site.newest_image()
    kept = {name: (sshd.directory / name).read_bytes() for name in ("host_key", "host_key.pub")}
    sshd.stop()
    sshd.new_host_key()
    sshd.start()
    target = site.directory / "refused"
    try:
        ended = [
            site.ended(site.submit("vms/0/backup", {"datastore_id": store})),
            site.ended(site.submit(f"images/{image}/restore", {"to": str(target)})),
            site.ended(site.submit(f"images/{image}/verify")),
        ]
    finally:
        sshd.stop()
        for name, content in kept.items():
            (sshd.directory / name).write_bytes(content)
        sshd.start()
    for one in ended:
        assert why(one) in {"PermissionDenied", "Misconfigured"}, one["error"]
        assert "host key" in one["error"]["message"].lower()
    assert not target.exists()


@pytest.mark.fault("store", "unreachable at delete")
def test_a_server_that_is_gone_when_something_is_removed(
    the_site: Simulation, store: int, sshd: Sshd
) -> None:
    site = the_site
    driver = site.client.get(f"datastores/{store}")["driver"]
    merge, gate = site.held_at(f"{driver}.rm.begun", lambda: site.flatten(site.chain()[0]))
    sshd.stop()
    gate.unlink()
    site.settle()
    sshd.start()
    assert site.operations("remove")[0]["state"] == "FAILED"
    assert site.state(merge) == "DONE"
    site.done(site.submit("vms/0/retention"))
    site.settle()
    assert site.operations("remove")[0]["state"] == "DONE"
    left = {(point["image_id"], point["increment_id"]) for point in site.points()}
    site.truth = {key: disks for key, disks in site.truth.items() if key in left}


@pytest.mark.whole_matrix
@pytest.mark.fault("data", "damaged pack of restic that the next full backup refers to")
def test_a_full_backup_of_damaged_data_is_found_broken_at_once(sshd: Sshd) -> None:
    with simulation() as site:
        site.restart(**settings(sshd))
        store_id = _created(site, sshd, "restic")
        assert site.backup(datastore_id=store_id) == "FULL"
        pack = max((site.directory / "restic").rglob("data/*/*"), key=lambda path: path.stat().st_size)
        data = bytearray(pack.read_bytes())
        data[len(data) // 3] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(data)
        damaged = site.images()[-1]["id"]
        assert site.ended(site.submit(f"images/{damaged}/verify"))["error"]["code"] == "DataCorrupt"
        again = site.done(site.submit("vms/0/backup", {"datastore_id": store_id}))  # of the same content
        assert again["type"] == "FULL"
        site.settle()
        states = {point["image_id"]: point["state"] for point in site.points()}
        assert (states[damaged], states[max(states)]) == ("BROKEN", "BROKEN")
        assert max(states) > damaged
