"""SIGKILL for daemon, driver or both while a real guest is backed up: it goes on, and so does its chain.

The failpoints are where the guest is at stake, from its freeze to the end of its job; those of the journal
are in `test_kill_matrix`. By default the rows run that say most, with `--whole-matrix` all.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import product
from typing import Any

import pytest
from lab import Libvirtd, wait_for

from oned_backup.errors import DaemonUnreachable
from oned_backup.hypervisor.guardian import on_guard
from tests.faults.daemon_site import DaemonSite
from tests.faults.live import LiveSite, live_site

pytestmark = pytest.mark.guest

#: `freeze_timeout_s`, and what the guardian allows beyond it
FREEZE_LIMIT_S = 15
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
    "fs.backup.disk.chunk",
    "fs.backup.rename.acted",
    "qcow2.post_backup.begun",
    "qcow2.post_backup.files.removed",
    "qcow2.post_backup.acted",
)
#: run by default: each place once, each way to die several times
DEFAULT_LIVE = {
    ("INCREMENT", "qcow2.pre_backup_live.freeze.frozen", "both"),
    ("INCREMENT", "qcow2.pre_backup_live.job.acted", "daemon"),
    ("FULL", "fs.backup.disk.chunk", "both"),
    ("INCREMENT", "qcow2.post_backup_live.begun", "driver"),
}
DEFAULT_OFF = {("INCREMENT", "qcow2.pre_backup.serve.acted", "both")}


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
    if ".freeze." in point:  # whoever is left
        wait_for("the guest to go on, without the daemon", lambda: not site.guest.is_paused(), 30)
        wait_for("thaw, without the daemon", site.is_thawed, 30)
    if not site.product.is_running:
        site.start()
    site.wait_recovered()
    site.learn()
    site.assert_sound(running=running)
    assert site.backup_and_compare() == "INCREMENT"


@pytest.mark.parametrize("victim", [pytest.param("driver", marks=pytest.mark.whole_matrix), "both"])
def test_killed_while_the_guest_is_suspended(site: LiveSite, victim: str) -> None:
    site.set(FS_FREEZE="SUSPEND")
    killed(site, "INCREMENT", "qcow2.pre_backup_live.freeze.suspended", victim)


@pytest.mark.fault("daemon", "whoever froze the guest is killed inside the freeze")
def test_the_guardian_acts_unless_it_is_told_in_time(site: LiveSite) -> None:
    guest = site.guest
    with on_guard(guest.uri, guest.uuid, limit_s=600) as goes_on:
        guest.agent("guest-fsfreeze-freeze")
        goes_on()
    wait_for("end of the guardian", lambda: not site.processes(), 30)
    assert not site.is_thawed()
    with on_guard(guest.uri, guest.uuid, limit_s=600):
        assert not site.is_thawed()
    wait_for("thaw after the end without a word", site.is_thawed, 30)
    with on_guard(guest.uri, guest.uuid, limit_s=1) as goes_on:
        guest.agent("guest-fsfreeze-freeze")
        wait_for("thaw after the limit", site.is_thawed, 30)
        goes_on()
    wait_for("end of the guardian", lambda: not site.processes(), 30)


@pytest.mark.whole_matrix
def test_a_freeze_that_hangs_is_ended_by_the_guardian(site: LiveSite) -> None:
    site.set(FS_FREEZE="AGENT")
    site.write()
    operation_id, gate = site.held_backup("qcow2.pre_backup_live.freeze.frozen")
    assert not site.is_thawed()
    (driver,) = site.freezing()
    os.kill(driver, signal.SIGSTOP)
    try:
        wait_for("thaw by the guardian", site.is_thawed, FREEZE_LIMIT_S + 15)
        gate.unlink()
    finally:
        os.kill(driver, signal.SIGCONT)
    assert site.ended(operation_id)["state"] == "DONE"
    site.learn()
    site.assert_sound()
    assert site.backup_and_compare() == "INCREMENT"


@pytest.mark.fault("guest", "thawed by somebody else inside our freeze")
def test_a_freeze_that_somebody_else_ends_is_told_as_none(
    site: LiveSite, record_property: Callable[[str, object], None]
) -> None:
    site.set(FS_FREEZE="AGENT")
    operation_id, gate = site.held_backup("qcow2.pre_backup_live.freeze.frozen")
    site.guest.agent("guest-fsfreeze-thaw")
    gate.unlink()
    freeze = site.done(operation_id)["freeze"]
    assert freeze["method"] == "NONE"
    record_property("observed", freeze["warning"])
    site.learn()
    site.assert_sound()


@pytest.mark.fault("host", "hypervisor unreachable inside the freeze")
def test_libvirtd_is_killed_while_the_guest_is_frozen(site: LiveSite) -> None:
    site.set(FS_FREEZE="AGENT")
    site.write()
    operation_id, gate = site.held_backup("qcow2.pre_backup_live.freeze.frozen")
    site.libvirtd.kill()
    gate.unlink()
    site.libvirtd.resume()
    wait_for("thaw", site.is_thawed, 30)
    assert site.ended(operation_id)["state"] == "DONE"
    site.learn()
    site.assert_sound()


def test_libvirtd_is_killed_in_the_middle_of_the_transfer(site: LiveSite) -> None:
    """The job lives in QEMU and goes on."""
    site.set(FS_FREEZE="AGENT")
    site.write()
    operation_id, gate = site.held_backup("fs.backup.disk.chunk")
    site.libvirtd.kill()
    site.libvirtd.resume()
    gate.unlink()
    assert site.ended(operation_id)["state"] == "DONE"
    site.learn()
    site.assert_sound()
    assert site.backup_and_compare() == "INCREMENT"


def test_a_job_and_bitmaps_of_others_are_not_touched(site: LiveSite) -> None:
    socket, scratch = site.directory / "theirs.sock", site.disks / "theirs.scratch"
    domain = site.libvirtd.connection.lookupByName("web")
    domain.checkpointCreateXML("<domaincheckpoint><name>theirs</name></domaincheckpoint>", 0)
    before = site.bitmaps()
    assert all("theirs" in names for names in before.values())
    killed(site, "INCREMENT", "qcow2.pre_backup_live.job.acted", "both")
    assert all("theirs" in names for names in site.bitmaps().values())
    assert "theirs" in site.checkpoints()

    site.set(FS_FREEZE="AGENT")
    operation_id, _ = site.held_backup("qcow2.pre_backup_live.job.begun")
    domain.backupBegin(
        f"<domainbackup mode='pull'><server transport='unix' socket='{socket}'/><disks>"
        f"<disk name='vda' backup='yes' type='file'><scratch file='{scratch}'/></disk>"
        "<disk name='vdb' backup='no'/></disks></domainbackup>",
        None,
        0,
    )
    site.product.kill()
    site.start()
    site.wait_recovered()
    assert site.ended(operation_id)["state"] == "FAILED"
    assert str(socket) in domain.backupGetXMLDesc(0)
    assert site.is_thawed()
    assert site.ended(site.submit("vms/0/backup"))["state"] == "FAILED"
    assert str(socket) in domain.backupGetXMLDesc(0)
    domain.abortJob()
    wait_for("end of their job", lambda: not site.guest.has_backup_job())
    domain.checkpointLookupByName("theirs").delete(0)
    site.assert_sound()
    assert site.backup_and_compare() == "INCREMENT"


@pytest.mark.whole_matrix
@pytest.mark.fault("daemon", "two daemons that back up one guest")
@pytest.mark.fault("concurrency", "two backups of one domain at the hypervisor")
def test_another_daemon_backs_up_the_same_guest(
    site: LiveSite, record_property: Callable[[str, object], None]
) -> None:
    directory = site.directory / "2"
    directory.mkdir()
    other = DaemonSite(directory)
    other.arm()
    other.start(ODB_RETRY__FOR_S="1")
    try:
        other.client.post("hosts", {"name": "local", "uri": site.guest.uri})
        other.client.post("hosts/0/import", {"domains": ["web"]})
        values = {"BASE_PATH": str(other.store)}
        other.client.post("datastores", {"name": "theirs", "driver": "fs", "values": values})
        other.client.patch("vms/0/config", {"values": {"MODE": "INCREMENT", "FS_FREEZE": "AGENT"}})
        assert other.done(other.submit("vms/0/backup"))["type"] == "FULL"
        assert site.backup_and_compare() == "INCREMENT"
        before = site.bitmaps()

        site.set(FS_FREEZE="AGENT")
        operation_id, gate = site.held_backup("fs.backup.disk.chunk")
        refused = other.ended(other.submit("vms/0/backup"))["error"]
        assert (refused["code"], "somebody else" in refused["message"]) == ("Busy", True)
        record_property("observed", refused["message"].partition(", at ")[0])
        assert site.guest.has_backup_job()
        other.product.kill()
        other.start()
        other.wait_recovered()
        assert site.guest.has_backup_job(), "it is not theirs"
        gate.unlink()
        assert site.done(operation_id)["type"] == "INCREMENT"
        site.learn()

        assert other.done(other.submit("vms/0/backup"))["type"] == "INCREMENT"
        assert site.backup_and_compare() == "INCREMENT"
        assert {target: len(names) for target, names in site.bitmaps().items()} == {
            target: len(names) for target, names in before.items()
        }
        other.done(other.submit("images/0", method="delete"))
        theirs = f"odb-{other.client.get('status')['installation']}-"
        domain = site.libvirtd.connection.lookupByName("web")
        for name in site.checkpoints():
            if name.startswith(theirs):
                domain.checkpointLookupByName(name).delete(0)
    finally:
        other.tear_down()
    site.assert_sound()


def test_every_restore_point_is_still_what_it_was(site: LiveSite) -> None:
    points = {(point["image_id"], point["increment_id"]) for point in site.points()}
    assert points == site.known.keys()
    for point in points:
        site.assert_known(point)


@pytest.fixture
def off(site: LiveSite) -> LiveSite:
    """The guest off, with a chain that goes on from when it ran."""
    if site.guest.is_active():
        site.guest.stop()
        assert site.backup_and_compare() == "INCREMENT"
    return site


@pytest.mark.parametrize(("kind", "point", "victim"), rows(OFF, DEFAULT_OFF))
def test_killed_while_the_guest_is_off(off: LiveSite, kind: str, point: str, victim: str) -> None:
    killed(off, kind, point, victim)


@pytest.mark.parametrize("victim", [pytest.param("driver", marks=pytest.mark.whole_matrix), "both"])
@pytest.mark.parametrize(
    "point",
    [
        pytest.param("kvm.define.begun", marks=pytest.mark.whole_matrix),
        pytest.param("kvm.define.tpm.acted", marks=pytest.mark.whole_matrix),
        "kvm.define.acted",
    ],
)
def test_killed_around_the_definition_of_a_restored_domain(off: LiveSite, point: str, victim: str) -> None:
    site, target = off, off.directory / "restored"
    body = {"to": str(target), "define_host_id": 0}
    site.arm(f"{point}={HOW[victim]}")
    with suppress(DaemonUnreachable):
        site.submit(f"images/{site.newest_image()}/restore", body)
    wait_for("end of it, or of the daemon", lambda: site.is_idle() or not site.product.is_running, 60)
    site.arm()
    if not site.product.is_running:
        site.start()
    site.wait_recovered()
    (newest, *_) = site.operations("restore")
    assert newest["state"] == "FAILED"
    others = [domain for domain in site.libvirtd.connection.listAllDomains() if domain.name() != "web"]
    defined = [domain.name() for domain in others]
    for domain in others:
        domain.undefine()
    files = sorted(path.name for path in target.iterdir()) if target.exists() else []
    shutil.rmtree(target, ignore_errors=True)
    if point == "kvm.define.acted":
        whole = ["disk.0.qcow2", "disk.1.qcow2", "domain.xml", "vm.xml"]
        assert (defined, files) == (["web-restored-1"], whole)
    else:
        assert (defined, files) == ([], [])
    site.assert_sound(running=False)


@pytest.mark.whole_matrix
def test_a_foreign_domain_of_that_name_is_not_taken_for_ours(off: LiveSite) -> None:
    site, target, gate = off, off.directory / "restored", off.directory / "gate"
    site.arm(f"kvm.define.begun=wait:{gate}")
    site.submit(f"images/{site.newest_image()}/restore", {"to": str(target), "define_host_id": 0})
    wait_for("definition", gate.exists)
    theirs = site.libvirtd.connection.defineXML(
        "<domain type='qemu'><name>web-restored-1</name><memory>1024</memory>"
        "<os><type>hvm</type></os></domain>"
    )
    site.product.kill()
    site.arm()
    site.start()
    site.wait_recovered()
    assert site.libvirtd.connection.lookupByName("web-restored-1").UUID() == theirs.UUID()
    theirs.undefine()
    assert not target.exists()
    site.assert_sound(running=False)
