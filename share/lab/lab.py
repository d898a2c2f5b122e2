"""A real libvirt and real guests, for tests and the demo.

    with Libvirtd() as libvirtd:
        guest = Guest(libvirtd, directory, "web", [root_disk(directory), data_disk(directory, 64)])
        guest.start()
        guest.wait_ready()
        print(guest.run("cat", "/proc/uptime"))
        guest.destroy()

Everything has a deadline (`LabError` when it passes). What a killed run left
behind, libvirtd and guests included, is removed when the next one starts: each
run holds a lock on its directory for as long as it lives.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self
from xml.sax.saxutils import escape, quoteattr

import libvirt
import libvirt_qemu
from waiting import LabError, wait_for

if TYPE_CHECKING:
    from netlab import Machine

HERE = Path(__file__).resolve().parent
CACHE = HERE.parents[1] / "build" / "lab"

_PREFIX = "odb-lab-"
_KERNEL_ARGUMENTS = "console=ttyS0 root=/dev/vda2 quiet panic=5"


def guest_image() -> Path:
    """The directory with vmlinuz, initrd.img and guest.qcow2, built the first time."""
    directory = CACHE / "guest"
    _command([str(HERE / "build-guest.sh"), str(directory)], timeout_s=300)
    return directory


class Libvirtd:
    """A private libvirtd in a short directory of its own; see private-libvirtd.sh.

    In a `machine` of a network lab it is that machine's own; everything else is the same.
    """

    def __init__(
        self,
        *,
        qemu_user: str = "root",
        dynamic_ownership: bool = True,
        swtpm_user: str = "root",
        machine: Machine | None = None,
    ) -> None:
        self._qemu_user = qemu_user
        #: whether libvirt gives the files of a guest to that user
        self._dynamic_ownership = dynamic_ownership and qemu_user != "root"
        #: a TPM that has no state yet is made by root only; takes effect with `restart`
        self.swtpm_user = swtpm_user
        self._machine = machine
        self._lock = -1
        self._connection: Any = None
        self.directory = Path()

    @property
    def uri(self) -> str:
        """What libvirt clients connect to; for a machine's, those that can see its directory."""
        return f"qemu:///system?socket={self.directory}/run/libvirt-sock"

    @property
    def swtpm_dir(self) -> Path:
        """Where its guests' TPM state lies, as seen from outside."""
        return self.directory / "lib" / "swtpm"

    def start(self) -> None:
        """Start it, after cleaning up what killed runs left."""
        if self._machine is not None:
            self.directory = self._machine.own / "libvirtd"
            self._script("start")
            return
        remove_leftovers()
        self.directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir="/tmp"))
        self.directory.chmod(0o755)
        self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._script("start")

    def stop(self) -> None:
        """End it and all its guests, and remove its directory."""
        self.disconnect()
        if self._machine is not None:
            self._script("stop")
        if self._lock < 0:
            return
        self._script("stop")
        shutil.rmtree(self.directory, ignore_errors=True)
        os.close(self._lock)
        self._lock = -1

    def disconnect(self) -> None:
        """Close our connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def restart(self) -> None:
        """Stop libvirtd with its guests, and start it again in the same directory."""
        self._script("stop")
        self._script("start")
        self._connection = None

    def kill(self) -> None:
        """SIGKILL libvirtd itself; its guests run on."""
        pid = self.pid_in("libvirtd.pid")
        os.kill(pid, signal.SIGKILL)
        wait_for("end of libvirtd", lambda: not Path(f"/proc/{pid}").exists())
        self._connection = None

    def resume(self) -> None:
        """Start libvirtd again after `kill`; it finds its guests."""
        self._script("start")

    def pid_in(self, file: str) -> int:
        """The process, as seen from here, of a pid file in its run directory."""
        pid = int((self.directory / "run" / file).read_text())
        return pid if self._machine is None else self._machine.outer_pid(pid)

    @property
    def connection(self) -> Any:
        """An open libvirt connection."""
        if self._connection is None or not self._connection.isAlive():
            libvirt.registerErrorHandler(lambda *_: None, None)
            self._connection = libvirt.open(self.uri)
        return self._connection

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _script(self, verb: str) -> None:
        argv = [str(HERE / "private-libvirtd.sh"), verb, str(self.directory)]
        environment = {
            **os.environ,
            "LAB_QEMU_USER": self._qemu_user,
            "LAB_DYNAMIC_OWNERSHIP": str(int(self._dynamic_ownership)),
            "LAB_SWTPM_USER": self.swtpm_user,
        }
        if self._machine is not None:
            argv, environment["LAB_MOUNTS_PRIVATE"] = self._machine.argv(argv), "1"
        _command(argv, timeout_s=60, environment=environment)


def remove_leftovers() -> None:
    """End and remove the private libvirtds whose runs are no longer alive."""
    for directory in Path("/tmp").glob(f"{_PREFIX}*"):  # noqa: S108
        try:
            lock = os.open(directory / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # just being made, or not ours
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its run lives
        else:
            _command([str(HERE / "private-libvirtd.sh"), "stop", str(directory)], timeout_s=60)
            shutil.rmtree(directory, ignore_errors=True)
        finally:
            os.close(lock)


@dataclass(frozen=True)
class LabDisk:
    """A disk for a guest."""

    path: Path
    format: str = "qcow2"
    device: str = "disk"
    read_only: bool = False


def root_disk(directory: Path, *, name: str = "root", disk_format: str = "qcow2") -> LabDisk:
    """A fresh copy of the guest's bootable disk: its own file, no overlay."""
    path = directory / f"{name}.{disk_format}"
    source = guest_image() / "guest.qcow2"
    _command(["qemu-img", "convert", "-f", "qcow2", "-O", disk_format, str(source), str(path)])
    return LabDisk(path, disk_format)


def data_disk(directory: Path, size_mib: int, *, name: str = "data", disk_format: str = "qcow2") -> LabDisk:
    """A new disk with an empty ext4 on it; the guest mounts the second one at /data/vdb, and so on."""
    path = directory / f"{name}.{disk_format}"
    raw = directory / f".{name}.mkfs"
    with raw.open("wb") as file:
        file.truncate(size_mib << 20)
    _command(["mkfs.ext4", "-q", "-F", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(raw)])
    _command(["qemu-img", "convert", "-f", "raw", "-O", disk_format, str(raw), str(path)])
    raw.unlink()
    return LabDisk(path, disk_format)


def cdrom(path: Path | None = None) -> LabDisk:
    """A CD-ROM drive, with or without a medium."""
    return LabDisk(path or Path(), "raw", "cdrom", read_only=True)


class Guest:
    """One domain. Its disks belong to the caller; all else that it makes lies in `directory`."""

    def __init__(
        self,
        libvirtd: Libvirtd,
        directory: Path,
        name: str,
        disks: Sequence[LabDisk],
        *,
        boot: str = "kernel",
        agent: bool = True,
        uefi: bool = False,
        tpm: bool = False,
        memory_mib: int = 192,
    ) -> None:
        self.libvirtd = libvirtd
        self.directory = directory
        self.name = name
        self.uuid = str(uuid.uuid4())
        self.disks = list(disks)
        self.nvram = directory / f"{name}_VARS.fd" if uefi else None
        self._boot, self._agent, self._tpm, self._memory_mib = boot, agent, tpm, memory_mib
        self.serial: Path | None = directory / f"{name}.serial"
        self.domain = libvirtd.connection.defineXML(self.xml())

    @classmethod
    def adopt(cls, libvirtd: Libvirtd, name: str) -> Self:
        """A guest for a domain with an agent that somebody else has defined."""
        guest = cls.__new__(cls)
        guest.libvirtd, guest.name, guest.disks = libvirtd, name, []
        guest.domain = libvirtd.connection.lookupByName(name)
        guest.uuid = guest.domain.UUIDString()
        guest.serial, guest._agent = None, True  # noqa: SLF001
        return guest

    def xml(self) -> str:
        """The domain's definition."""
        firmware = kernel = ""
        if self._boot == "kernel":
            image = guest_image()
            kernel = (
                f"<kernel>{image}/vmlinuz</kernel><initrd>{image}/initrd.img</initrd>"
                f"<cmdline>{_KERNEL_ARGUMENTS}</cmdline>"
            )
        if self.nvram:
            firmware = (
                "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader>"
                f"<nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'>{escape(str(self.nvram))}</nvram>"
            )
        disks = "".join(disk_xml(disk, _target(index, disk)) for index, disk in enumerate(self.disks))
        channel = (
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
            if self._agent
            else ""
        )
        tpm = "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>" if self._tpm else ""
        return f"""<domain type='qemu'>
          <name>{escape(self.name)}</name><uuid>{self.uuid}</uuid>
          <memory unit='MiB'>{self._memory_mib}</memory><vcpu>1</vcpu>
          <os><type arch='x86_64' machine='pc'>hvm</type>{firmware}{kernel}</os>
          <features><acpi/></features>
          <on_poweroff>destroy</on_poweroff><on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
          <devices>{disks}{channel}{tpm}
            <controller type='usb' model='none'/><memballoon model='none'/>
            <serial type='file'><source path={quoteattr(str(self.serial))}/></serial>
          </devices></domain>"""

    @property
    def uri(self) -> str:
        """Its libvirt's."""
        return self.libvirtd.uri

    @property
    def pid(self) -> int:
        """QEMU's process."""
        return self.libvirtd.pid_in(f"qemu/{self.name}.pid")

    def start(self) -> None:
        """Power on."""
        if self.serial is not None:
            self.serial.unlink(missing_ok=True)
        self._lookup().create()

    def wait_ready(self, timeout_s: float = 90) -> None:
        """Wait until it has booted, and its agent answers."""
        wait_for("sign of life from the guest", self._has_booted, timeout_s)
        if self._agent:
            wait_for("answer from the guest's agent", self._agent_answers, timeout_s)

    def agent(self, command: str, timeout_s: int = 30, **arguments: object) -> Any:
        """What the guest's agent returns for `command`."""
        request = {"execute": command, **({"arguments": arguments} if arguments else {})}
        reply = libvirt_qemu.qemuAgentCommand(self._lookup(), json.dumps(request), timeout_s, 0)
        return json.loads(reply)["return"]

    def agent_exec(self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60) -> bytes:
        """What a program in the guest prints; `LabError` if it fails."""
        arguments = {
            "path": argv[0],
            "arg": list(argv[1:]),
            "input-data": base64.b64encode(stdin).decode(),
            "capture-output": True,
        }
        pid = self.agent("guest-exec", **arguments)["pid"]

        def finished() -> dict[str, Any] | None:
            status: dict[str, Any] = self.agent("guest-exec-status", pid=pid)
            return status if status["exited"] else None

        status = wait_for(f"end of {argv[0]} in the guest", finished, timeout_s)
        output = base64.b64decode(status.get("out-data", ""))
        if status.get("exitcode") != 0:
            complaint = base64.b64decode(status.get("err-data", "")).decode("utf-8", "replace")
            raise LabError(f"{' '.join(argv)} in the guest: exit {status.get('exitcode')}: {complaint}")
        return output

    def run(self, *argv: str) -> str:
        """The same as text, without the last newline."""
        return self.agent_exec(argv).decode().rstrip("\n")

    def shell(self, script: str) -> str:
        """What a shell script in the guest prints."""
        return self.run("/bin/sh", "-ec", script)

    def write_file(self, path: str, content: bytes) -> None:
        """Make a file in the guest, on its disk when this returns (up to some 30 KiB)."""
        self.agent_exec(["/bin/sh", "-ec", 'cat >"$0"; sync', path], stdin=content)

    def read_file(self, path: str) -> bytes:
        """A file of the guest."""
        return self.agent_exec(["/bin/cat", path])

    def suspend(self) -> None:
        """Stop its processors."""
        self._lookup().suspend()

    def resume(self) -> None:
        """Let them go on."""
        self._lookup().resume()

    def is_paused(self) -> bool:
        """Whether its processors are stopped."""
        return bool(self._lookup().state()[0] == libvirt.VIR_DOMAIN_PAUSED)

    def is_active(self) -> bool:
        """Whether a QEMU runs for it."""
        return bool(self._lookup().isActive())

    def stop(self, timeout_s: float = 60) -> None:
        """Have the operating system shut down, by the guest's agent."""
        self._lookup().shutdownFlags(libvirt.VIR_DOMAIN_SHUTDOWN_GUEST_AGENT)
        wait_for("end of the guest", lambda: not self.is_active(), timeout_s)

    def end(self) -> None:
        """End QEMU in good order, whatever the operating system does: images are closed."""
        self._lookup().destroyFlags(libvirt.VIR_DOMAIN_DESTROY_GRACEFUL)

    def kill(self) -> None:
        """SIGKILL its QEMU: nothing is closed, nothing flushed."""
        os.kill(self.pid, signal.SIGKILL)
        wait_for("libvirt's notice of the guest's death", lambda: not self.is_active())

    def has_backup_job(self) -> bool:
        """Whether a backup job runs in its QEMU."""
        try:
            self._lookup().backupGetXMLDesc(0)
        except libvirt.libvirtError:
            return False
        return True

    def writable_disks(self) -> dict[str, LabDisk]:
        """Its disks by target, without CD-ROMs and read-only ones."""
        return {_target(i, disk): disk for i, disk in enumerate(self.disks) if not disk.read_only}

    def push_copy(self, path: Path, timeout_s: float = 60) -> dict[str, Path]:
        """Copies of its disks, made by QEMU itself through a push-mode job: `<path>-<target>`, qcow2."""
        targets = self.writable_disks()
        copies = {target: path.with_name(f"{path.name}-{target}") for target in targets}
        disks = "".join(
            f"<disk name='{target}' backup='yes' type='file'><driver type='qcow2'/>"
            f"<target file={quoteattr(str(copy))}/></disk>"
            for target, copy in copies.items()
        )
        others = {_target(i, disk) for i, disk in enumerate(self.disks)} - set(targets)
        disks += "".join(f"<disk name='{target}' backup='no'/>" for target in others)
        self._lookup().backupBegin(
            f"<domainbackup mode='push'><disks>{disks}</disks></domainbackup>", None, 0
        )
        wait_for("end of the push-mode copy", lambda: not self.has_backup_job(), timeout_s)
        return copies

    def commit(self, target: str, timeout_s: float = 60) -> None:
        """Commit the overlay of a disk into the image below, and go on with that one."""
        flags = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE | libvirt.VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
        self._lookup().blockCommit(target, None, None, 0, flags)

        def is_ready() -> bool:
            info = self._lookup().blockJobInfo(target)
            return bool(info) and info["cur"] == info["end"]

        wait_for("end of the commit", is_ready, timeout_s)

        def has_pivoted() -> bool:
            try:
                self._lookup().blockJobAbort(target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_BLOCK_COPY_ACTIVE:
                    raise
                return False  # not synchronized yet
            return True

        wait_for("change to the image below", has_pivoted, timeout_s)

    def use_disk(self, index: int, path: Path) -> None:
        """Define the guest, which is off, with another image in the place of one of its disks."""
        self.disks[index] = replace(self.disks[index], path=path)
        self.domain = self.libvirtd.connection.defineXML(self.xml())

    def attach(self, disk: LabDisk) -> None:
        """Plug in another disk, now and for the next start."""
        xml = disk_xml(disk, _target(len(self.disks), disk))
        flags = libvirt.VIR_DOMAIN_AFFECT_CONFIG
        if self.is_active():
            flags |= libvirt.VIR_DOMAIN_AFFECT_LIVE
        self._lookup().attachDeviceFlags(xml, flags)
        self.disks.append(disk)

    def destroy(self) -> None:
        """Pull the plug and forget the domain; its disks stay."""
        try:
            domain = self._lookup()
        except libvirt.libvirtError:
            return
        if domain.isActive():
            domain.destroy()
        domain.undefineFlags(
            libvirt.VIR_DOMAIN_UNDEFINE_NVRAM
            | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
            | libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
        )

    def _lookup(self) -> Any:
        return self.libvirtd.connection.lookupByUUIDString(self.uuid)

    def _has_booted(self) -> bool:
        return self.serial is None or (
            self.serial.exists() and b"LAB-GUEST READY" in self.serial.read_bytes()
        )

    def _agent_answers(self) -> bool:
        try:
            self.agent("guest-ping", timeout_s=2)
        except libvirt.libvirtError:
            return False
        return True


def disk_xml(disk: LabDisk, target: str) -> str:
    """Libvirt's element for a disk of a guest."""
    source = f"<source file={quoteattr(str(disk.path))}/>" if disk.path != Path() else ""
    bus = "ide" if disk.device == "cdrom" else "virtio"
    unmap = " discard='unmap'" if disk.device == "disk" else ""
    return (
        f"<disk type='file' device='{disk.device}'><driver name='qemu' type='{disk.format}'{unmap}/>{source}"
        f"<target dev='{target}' bus='{bus}'/>{'<readonly/>' if disk.read_only else ''}</disk>"
    )


def _target(index: int, disk: LabDisk) -> str:
    return f"{'hd' if disk.device == 'cdrom' else 'vd'}{chr(ord('a') + index)}"


def _command(
    argv: list[str], *, timeout_s: float = 120, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        argv,
        check=False,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        raise LabError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done
