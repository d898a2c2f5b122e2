"""The other side of each row: libvirt's push mode, QEMU's tools, virtnbdbackup, cp."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import libvirt

from .machines import Machine


def timed(argv: list[str], *, durable: Path | None = None) -> float:
    """Seconds that a command took, with what it wrote made durable; its complaint is raised if it fails.

    We end with fsync, so what is compared with us must be durable too.
    """
    started = time.monotonic()
    done = subprocess.run(argv, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if durable is not None:
        for path in [durable, *durable.rglob("*")]:
            _sync(path)
    elapsed = time.monotonic() - started
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}: {done.stderr[-2000:]}")
    return elapsed


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class Push:
    """Libvirt's push mode: QEMU itself writes a qcow2. Checkpoints `bench-N` link the increments."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self._machine, self.directory, self._number = machine, directory, 0
        directory.mkdir(exist_ok=True)

    def run(self, *, full: bool) -> tuple[float, Path]:
        """Seconds from the start of the job until it ended and its file is durable."""
        domain = self._machine.domain
        target = self.directory / f"push.{self._number}"
        if full:
            for former in self.directory.glob("push.*"):
                former.unlink()
        previous = f"bench-{self._number - 1}"
        incremental = "" if full else f"<incremental>{previous}</incremental>"
        backup = f"""<domainbackup mode='push'>{incremental}<disks>
            <disk name='vda' backup='no'/>
            <disk name='vdb' backup='yes' type='file'>
              <driver type='qcow2'/><target file='{target}'/></disk>
          </disks></domainbackup>"""
        checkpoint = f"""<domaincheckpoint><name>bench-{self._number}</name><disks>
            <disk name='vda' checkpoint='no'/>
            <disk name='vdb' checkpoint='bitmap'/></disks></domaincheckpoint>"""
        started = time.monotonic()
        domain.backupBegin(backup, checkpoint, 0)
        while domain.jobStats().get("type", 0) != libvirt.VIR_DOMAIN_JOB_NONE:
            time.sleep(0.005)
        _sync(target)
        elapsed = time.monotonic() - started
        if not domain.jobStats(libvirt.VIR_DOMAIN_JOB_STATS_COMPLETED).get("success", True):
            raise RuntimeError("push-mode backup failed")
        if self._number:
            domain.checkpointLookupByName(previous).delete()
        self._number += 1
        return elapsed, target


class VirtNbdBackup:
    """virtnbdbackup into a directory, without compression; a whole process each time."""

    def __init__(self, machine: Machine, directory: Path) -> None:
        self._machine, self.directory = machine, directory

    def run(self, *, full: bool) -> float:
        """Seconds of the whole command."""
        if full:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._forget_checkpoints()
        uri = self._machine.guest.uri
        return timed(
            ["virtnbdbackup", "-U", uri, "-d", self._machine.name, "-l", "full" if full else "inc",
             "-i", "vdb", "-o", str(self.directory)],
            durable=self.directory,
        )  # fmt: skip

    def restore(self, target: Path) -> float:
        """Seconds to restore everything that was backed up to a qcow2."""
        shutil.rmtree(target, ignore_errors=True)
        uri = self._machine.guest.uri
        return timed(
            ["virtnbdrestore", "-U", uri, "-a", "restore", "-i", str(self.directory), "-o", str(target)],
            durable=target,
        )

    def _forget_checkpoints(self) -> None:
        for checkpoint in self._machine.domain.listAllCheckpoints():
            if checkpoint.getName().startswith("virtnbdbackup"):
                checkpoint.delete()


def convert_chain(files: list[Path], target: Path) -> float:
    """Seconds for qemu-img to write the merged view of a chain (oldest first) to a raw file."""
    target.unlink(missing_ok=True)
    return timed(
        ["qemu-img", "convert", "-O", "raw", "-W", "-m", "16", chain_node(files), str(target)],
        durable=target,
    )


def chain_node(files: list[Path]) -> str:
    """How QEMU's tools are told of a chain (oldest first) whose files name no backing files."""
    chain = None
    for path in files:
        node: dict[str, object] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
        if chain is not None:
            node["backing"] = chain
        chain = node
    return f"json:{json.dumps(chain)}"


def copy_file(source: Path, target: Path) -> float:
    """Seconds for cp to copy the same bytes, without a reflink, and make them durable."""
    target.unlink(missing_ok=True)
    return timed(["cp", "--reflink=never", "--", str(source), str(target)], durable=target)


def nbdcopy(source: Path, target: Path) -> float:
    """Seconds for nbdcopy to copy the disk, served by qemu-nbd, to a raw file."""
    target.unlink(missing_ok=True)
    return timed(
        ["nbdcopy", "--flush", "--", "[", "qemu-nbd", "-r", "-f", "qcow2", str(source), "]", str(target)]
    )
