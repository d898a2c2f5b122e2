"""Cables pulled, disks filled, programs killed in mid-transfer: the store stays good, the next one works."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import wait_for
from netlab import Machine, Netlab
from product import Product
from remote_site import STORES, Site, SiteVm

pytestmark = pytest.mark.guest

#: a dead link is noticed after 3 s, and the daemon tries again soon
SETTINGS = {
    "ODB_SSH__KEEPALIVE_S": "1",
    "ODB_SSH__CONNECT_TIMEOUT_S": "2",
    "ODB_RETRY__FIRST_WAIT_S": "0.5",
    "ODB_RETRY__LONGEST_WAIT_S": "1",
}
#: what is written before each disturbed backup, and how fast it may go: about 3 s
KIB, RATE = 12 * 1024, "32mbit"
SLOW = pytest.mark.whole_matrix


@pytest.fixture(scope="module")
def site(whole_netlab: Netlab) -> Iterator[Site]:
    """Two VMs on the daemon's machine, one for each store; each store is a file system of 256 MB."""
    whole_netlab.calm()
    daemon = whole_netlab["daemon"]
    product = Product(Path(tempfile.mkdtemp(prefix="p", dir=daemon.own)), machine=daemon)
    product.start(SETTINGS)
    site = Site(whole_netlab, product)
    try:
        for driver in STORES:
            site.add_store(driver, size="256m")
        site.add_vms(*(("daemon", driver) for driver in STORES))
        site.back_up(site.vms)
        yield site
    finally:
        whole_netlab.calm()
        site.close()
        product.stop()


@pytest.fixture(params=STORES)
def vm(request: pytest.FixtureRequest, site: Site) -> Iterator[SiteVm]:
    """The VM of each store in turn; afterwards its whole chain restores, and the next backup works."""
    vm = next(one for one in site.vms if one.store == request.param)
    yield vm
    site.netlab.calm()
    if vm.guest.is_paused():  # the test has failed
        vm.guest.resume()
    site.settle()
    site.write(vm, "next")
    ended = site.back_up_one(vm)
    assert ended["result"]["type"] == "INCREMENT"
    points = site.points(vm)
    for point in points[-2:]:
        site.assert_restores(vm, point)
    site.product.run("image", "verify", str(points[-1][0]))
    assert vm.guest.shell("echo alive") == "alive"


@contextlib.contextmanager
def slow(machine: Machine) -> Iterator[None]:
    machine.rate(RATE)
    yield
    machine.rate("")


def stored_bytes(site: Site, vm: SiteVm) -> int:
    """What the store takes on the server's disk."""
    used = site.netlab["backup"].run(["df", "-B1", "--output=used", f"/srv/{vm.store}"]).stdout
    return int(used.split()[-1])


def wait_until_sent(site: Site, vm: SiteVm, before: int, share: float) -> None:
    """Wait until that share of what was written has reached the server's disk (restic sends packs)."""
    wanted = before + int(share * KIB * 1024)
    wait_for("data at the store", lambda: stored_bytes(site, vm) >= wanted, 60)


def connections(site: Site) -> set[int]:
    """The SSH clients on the daemon's machine."""
    return set(site.netlab["daemon"].processes("ssh", "backup"))


def has_noticed(site: Site, operation_id: str, tried: set[int]) -> bool:
    """Whether a connection, one of `tried` or begun since, was given up."""
    now = connections(site)
    tried |= now
    return site.is_troubled(operation_id) or bool(tried - now)


@pytest.mark.parametrize("share", [pytest.param(0.0, marks=SLOW), 0.3, pytest.param(0.8, marks=SLOW)])
@pytest.mark.fault("store", "unreachable in mid-transfer")
def test_the_cable_is_pulled(site: Site, vm: SiteVm, share: float) -> None:
    backup = site.netlab["backup"]
    site.write(vm, "big", KIB)
    with slow(backup):
        before = stored_bytes(site, vm)
        running = site.begin(vm)
        if share:
            wait_until_sent(site, vm, before, share)
        tried = connections(site)
        backup.link(up=False)
        wait_for("notice of the dead link", lambda: has_noticed(site, running.operation_id, tried), 120)
    backup.link(up=True)
    assert site.finish(running)["state"] == "DONE", "it is tried again until the link is back"


@pytest.mark.fault("store", "full in mid-transfer")
def test_the_servers_disk_is_full(site: Site, vm: SiteVm) -> None:
    backup, filler = site.netlab["backup"], f"/srv/{vm.store}/.filler"
    free = int(backup.run(["df", "-B1", "--output=avail", f"/srv/{vm.store}"]).stdout.split()[-1])
    backup.run(["fallocate", "-l", str(free - (4 << 20)), filler])
    try:
        site.write(vm, "big", KIB)
        ended = site.finish(site.begin(vm))
        assert (ended["state"], ended["error"]["code"]) == ("FAILED", "NoSpace"), ended["error"]
    finally:
        backup.run(["rm", filler])


@pytest.mark.parametrize("where", ["here", pytest.param("there", marks=SLOW)])
@pytest.mark.fault("store", "program (rsync, restic) killed here or there")
def test_the_program_is_killed(site: Site, vm: SiteVm, where: str) -> None:
    """Here: restic or rsync on the daemon's machine; there: the server's side of the SSH connection."""
    backup = site.netlab["backup"]
    site.write(vm, "big", KIB)
    with slow(backup):
        before = stored_bytes(site, vm)
        running = site.begin(vm)
        wait_until_sent(site, vm, before, 0.3)
        machine, name = (site.netlab["daemon"], vm.store) if where == "here" else (backup, "sshd: root")
        victims = [pid for pid, argv in machine.processes().items() if Path(argv[0]).name.startswith(name)]
        assert victims
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        site.finish(running)
