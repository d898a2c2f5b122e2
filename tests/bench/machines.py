"""Guests to measure with: a running VM whose second disk has data of a known kind and amount."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import libvirt_qemu
from lab import Guest, LabDisk, Libvirtd, root_disk

CLUSTER = 64 * 1024
MIB = 1 << 20


@dataclass(frozen=True)
class Data:
    """What the measured disk holds: `extents` of data (bytes) spread over `virtual` bytes."""

    virtual: int
    extents: tuple[tuple[int, int], ...]

    @property
    def allocated(self) -> int:
        """Bytes of data."""
        return sum(length for _, length in self.extents)

    def clusters(self) -> list[int]:
        """The offsets of all clusters that hold data."""
        return [offset for start, length in self.extents for offset in range(start, start + length, CLUSTER)]


def spread(virtual: int, allocated: int, seed: int) -> Data:
    """Data in some 500 extents of about the same size, at random places."""
    chooser = random.Random(seed)
    count = min(504, allocated // MIB)
    length = allocated // count // CLUSTER * CLUSTER
    slots = chooser.sample(range(virtual // length), count)
    return Data(virtual, tuple((slot * length, length) for slot in sorted(slots)))


def build_disk(path: Path, data: Data, seed: int) -> None:
    """A qcow2 with that data: half of it random, half of it like text."""
    chooser = random.Random(seed)
    raw = path.with_suffix(".raw")
    words = [chooser.randbytes(chooser.randint(3, 9)).hex().encode() for _ in range(4096)]
    text = b" ".join(chooser.choices(words, k=1 << 17))[:MIB].ljust(MIB, b".")
    with raw.open("wb") as file:
        file.truncate(data.virtual)
        for number, (offset, length) in enumerate(data.extents):
            file.seek(offset)
            for done in range(0, length, MIB):
                piece = os.urandom(MIB) if number % 2 else bytes([done // MIB % 256]) + text[1:]
                file.write(piece[: min(MIB, length - done)])
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-W", str(raw), str(path)], check=True)
    raw.unlink()


def dirty_all(machines: Sequence[Machine], data: Data, percent: float, seed: int) -> None:
    """Overwrite the same share of the same clusters on all machines, side by side."""
    with ThreadPoolExecutor(len(machines)) as pool:
        for done in [pool.submit(machine.dirty, data, percent, seed) for machine in machines]:
            done.result()


class Machine:
    """One running guest with the measured disk as vdb."""

    def __init__(self, libvirtd: Libvirtd, directory: Path, name: str, template: Path) -> None:
        directory.mkdir()
        self.disk = directory / "data.qcow2"
        subprocess.run(["cp", "--reflink=auto", "--", str(template), str(self.disk)], check=True)
        self.name = name
        self.directory = directory
        self.guest = Guest(libvirtd, directory, name, [root_disk(directory), LabDisk(self.disk)])
        self.guest.start()
        self.guest.wait_ready()

    @property
    def domain(self) -> Any:
        """Libvirt's handle."""
        return self.guest.libvirtd.connection.lookupByName(self.name)

    def dirty(self, data: Data, percent: float, seed: int) -> int:
        """Overwrite that share of the data's clusters, through QEMU, at random; the bytes written."""
        clusters = data.clusters()
        chosen = random.Random(seed).sample(clusters, max(1, int(len(clusters) * percent / 100)))
        device, noise = self._device(), self.directory / "noise"
        for number, offset in enumerate(sorted(chosen)):
            # no two alike, so that a store that deduplicates has something to store
            noise.write_bytes(random.Random(f"{seed}.{number}").randbytes(CLUSTER))
            complaint = self._monitor(f'qemu-io -d {device} "write -q -s {noise} {offset} {CLUSTER}"')
            if complaint.strip():
                raise RuntimeError(f"write at {offset}: {complaint}")
        noise.unlink()
        return len(chosen) * CLUSTER

    def remove(self) -> None:
        """End the guest and delete its disks."""
        self.guest.destroy()
        shutil.rmtree(self.directory)

    def _device(self) -> str:
        """QEMU's name for the device that the measured disk belongs to."""
        found = re.search(
            rf"{re.escape(str(self.disk))} \(qcow2\)\s+Attached to:\s+(\S+)", self._monitor("info block")
        )
        if not found:
            raise RuntimeError(f"no device for {self.disk}")
        return found[1]

    def _monitor(self, command: str) -> str:
        flags = libvirt_qemu.VIR_DOMAIN_QEMU_MONITOR_COMMAND_HMP
        return str(libvirt_qemu.qemuMonitorCommand(self.domain, command, flags))
