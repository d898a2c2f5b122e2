"""A guest that is stopped, killed, changed or taken away while its backup reads it.

Daemon, drivers, store, libvirt and QEMU are real. The backup stands still in the middle of a
disk, or at a step, while the fault happens; `survives` says what must hold afterwards.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt
import pytest
from backed_up_vm import compare
from lab import Libvirtd, wait_for

from tests.faults.live import LiveSite, live_site

pytestmark = pytest.mark.guest

IN_A_DISK = "fs.backup.disk.chunk"


@pytest.fixture(scope="module")
def one_site() -> Iterator[LiveSite]:
    """One guest for all tests here, on a libvirtd that may be killed."""
    with Libvirtd() as libvirtd, live_site(libvirtd) as site:
        yield site


@pytest.fixture
def site(one_site: LiveSite) -> LiveSite:
    """The guest, running, and with a chain; if a failed test has left it otherwise, it is started anew."""
    guest = one_site.guest
    if not guest.is_active() or not guest._agent_answers():
        if guest.is_active():
            guest.end()
        guest.start()
        guest.wait_ready()
    return one_site


@dataclass
class Held:
    """A backup that stands still at a failpoint, and copies of the disks by QEMU at its instant."""

    site: LiveSite
    operation_id: str
    copies: list[Path]
    gate: Path

    def ended(self) -> dict[str, Any]:
        """The operation, after it was let go."""
        self.gate.unlink(missing_ok=True)
        return self.site.ended(self.operation_id, 120)

    def assert_is_the_instant(self, ended: dict[str, Any]) -> None:
        """What was stored is what the guest had when the backup began."""
        assert ended["state"] == "DONE", ended["error"]
        key = ended["result"]["image_id"], ended["result"]["increment_id"]
        restored = self.site._restored(*key)
        for path, copy in zip(restored, self.copies, strict=True):
            compare(path, copy)
        shutil.rmtree(restored[0].parent)


@contextmanager
def held(site: LiveSite, failpoint: str = IN_A_DISK, *, fs_freeze: str = "NONE") -> Iterator[Held]:
    """A backup that waits at a failpoint; the guest goes on meanwhile."""
    site.write()
    site.set(FS_FREEZE=fs_freeze)
    gate = site.directory / "gate"
    copies: list[Path] = []
    if fs_freeze == "NONE":
        site.guest.suspend()
        copies += site.guest.push_copy(site.directory / "truth-held").values()
    site.arm(f"{failpoint}=wait:{gate}")
    backup = Held(site, site.submit("vms/0/backup"), copies, gate)
    try:
        wait_for(f"backup at {failpoint}", gate.exists, 30)
        site.arm()
        if site.guest.is_paused():
            site.guest.resume()
        yield backup
    finally:
        site.arm()
        gate.unlink(missing_ok=True)
        for copy in copies:
            copy.unlink()


def survives(site: LiveSite) -> str:
    """The type of the next backup; all that must hold after any fault holds."""
    if not site.guest.is_active():
        site.guest.start()
        site.guest.wait_ready()
    site.settle()
    site.learn()
    wait_for("thaw of the guest", lambda: site.guest._agent_answers() and site.is_thawed(), 30)
    kind = site.backup_and_compare()
    site.assert_sound()
    for key in site.known:
        site.assert_known(key)
    return kind


def reasons(ended: dict[str, Any]) -> str:
    """Why each disk was stored as it was."""
    return ", ".join(sorted({disk["reason"] for disk in ended["result"]["disks"]}))


Observed = Callable[[str, object], None]


@pytest.mark.whole_matrix
@pytest.mark.fault("guest", "stopped in mid-transfer")
def test_it_stops(site: LiveSite, record_property: Observed) -> None:
    with held(site) as backup:
        site.guest.stop()
        ended = backup.ended()
    assert ended["state"] == "DONE", ended["error"]
    assert not ended["result"]["live"]
    record_property("observed", f"backed up again while off: {reasons(ended)}; next one {survives(site)}")


@pytest.mark.whole_matrix
@pytest.mark.fault("guest", "rebooted in mid-transfer")
def test_it_reboots(site: LiveSite, record_property: Observed) -> None:
    with held(site) as backup:
        site.guest.shell("(sleep 1; reboot -f) </dev/null >/dev/null 2>&1 &")
        wait_for("reboot of the guest", lambda: _serial(site).count(b"LAB-GUEST READY") > 1, 120)
        backup.assert_is_the_instant(backup.ended())
    # libvirt 9.0 does not notice an agent that comes back while a backup job runs, until it is restarted
    site.set(FS_FREEZE="AGENT")
    freeze = site.done(site.submit("vms/0/backup"))["freeze"]
    site.libvirtd.kill()
    site.libvirtd.resume()
    wait_for("answer of the agent", site.guest._agent_answers, 60)
    assert survives(site) == "INCREMENT"
    said = f"the backup is of its instant; the next one: {freeze['warning'] or 'frozen by the agent'}"
    record_property("observed", said)


@pytest.mark.whole_matrix
@pytest.mark.fault("guest", "QEMU killed in mid-transfer")
def test_qemu_is_killed(site: LiveSite, record_property: Observed) -> None:
    with held(site) as backup:
        site.guest.kill()
        ended = backup.ended()
    assert ended["state"] == "DONE", ended["error"]
    assert not ended["result"]["live"]
    record_property("observed", f"backed up again while off: {reasons(ended)}; next one {survives(site)}")


@pytest.mark.whole_matrix
@pytest.mark.fault("guest", "undefined in mid-transfer")
def test_it_is_undefined(site: LiveSite, record_property: Observed) -> None:
    with held(site) as backup:
        site.guest.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        backup.assert_is_the_instant(backup.ended())
    site.guest.domain = site.libvirtd.connection.defineXML(site.guest.xml())
    assert survives(site) == "INCREMENT"
    record_property("observed", "the backup is of its instant; defined again, the next one is an increment")


@pytest.mark.whole_matrix
@pytest.mark.fault("guest", "undefined and ended in mid-transfer")
def test_it_is_undefined_and_ended(site: LiveSite, record_property: Observed) -> None:
    with held(site) as backup:
        site.guest.domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
        site.guest.end()
        ended = backup.ended()
    assert ended["state"] == "FAILED"
    site.guest.domain = site.libvirtd.connection.defineXML(site.guest.xml())
    record_property("observed", f"{ended['error']['code']}; defined again, the next one is {survives(site)}")


@pytest.mark.whole_matrix
@pytest.mark.fault("guest", "agent dies inside the freeze")
def test_the_agent_dies_inside_the_freeze(site: LiveSite, record_property: Observed) -> None:
    # once: libvirt itself can lose an agent for good that is killed while it answers
    hook = "/etc/qemu/fsfreeze-hook.d/die"
    kill = "touch /run/died; sleep 1; killall -9 qemu-ga; echo AGENT KILLED >/dev/ttyS0"
    script = f"[ -e /run/died ] || ({kill}) >/dev/null 2>&1 </dev/null &"
    site.guest.write_file(hook, f"#!/bin/sh\n{script}\n".encode())
    site.guest.shell(f"chmod 755 {hook}")
    with held(site, "qcow2.pre_backup_live.freeze.frozen", fs_freeze="AGENT") as backup:
        wait_for("end of the agent", lambda: b"AGENT KILLED" in _serial(site), 60)
        ended = backup.ended()
    assert ended["state"] == "DONE", ended["error"]
    (first,) = ended["result"]["notes"]
    assert "may still be frozen" in first
    wait_for("thaw of the guest", site.is_thawed, 60)
    site.guest.shell(f"rm {hook}")
    record_property("observed", f"tried again, thawed, then DONE; the increment says: {first}")
    survives(site)


def _serial(site: LiveSite) -> bytes:
    assert site.guest.serial is not None
    return site.guest.serial.read_bytes()
