"""Transfer manager for the dummy hypervisor: disks are copied into staged files, always full.

No libvirt, QEMU or NBD: thousands of backups a minute, for tests and simulation.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.contract.exports import (
    BackupType,
    DiskExport,
    ExcludedDisk,
    Exports,
    Freeze,
    Reason,
    disk_file_name,
)
from oned_backup.contract.request import Request
from oned_backup.disk.buffers import Batch, Part, batches
from oned_backup.disk.image import VirtualImage
from oned_backup.disk.ordered import OrderedFill
from oned_backup.disk.spans import Spans
from oned_backup.errors import Busy, InvalidInput
from oned_backup.hypervisor.dummy import DummyDomain, DummyHost
from oned_backup.model.disk import Disk
from oned_backup.model.host import Host
from oned_backup.model.selection import select_disks
from oned_backup.model.vm import Vm
from oned_backup.sdk import Answer, Call, Driver
from oned_backup.sdk.files import BLOCKS_SUFFIX
from oned_backup.sdk.publish import publish_path


class Dummy(Driver):
    """Every backup is full: there is nothing that tracks changes."""

    def pre_backup_live(self, call: Call) -> Answer:
        """The disks of a domain that runs."""
        return _export(call, running=True)

    def pre_backup(self, call: Call) -> Answer:
        """The disks of a domain that is off."""
        return _export(call, running=False)

    def post_backup(self, call: Call) -> None:
        """The domain is not frozen; staged files are the daemon's to remove."""
        host, vm = _place(call.request)
        host.update(host.find(vm.uuid), frozen=False)

    post_backup_live = post_backup

    def restore(self, call: Call) -> Answer:
        """A restored image under its final name."""
        target = Path(call.option("TARGET"))
        publish_path(Path(call.option("PATH")), target)
        return {"PATH": str(target)}


class SparseFile:
    """A raw file as a source for the data engine; holes are not read."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.guest_bytes = os.fstat(self._file).st_size

    def extents(self) -> Spans:
        """The clusters that are not holes."""
        data = Spans()
        offset = 0
        while offset < self.guest_bytes:
            try:
                start = os.lseek(self._file, offset, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                break
            offset = os.lseek(self._file, start, os.SEEK_HOLE)
            data.add_bytes(start, offset)
        return data

    def stream(self, data: Spans) -> Generator[Batch, None, None]:
        """These clusters in order."""
        return OrderedFill(batches(data), self._fill, threads=1).run()

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view`; zeros beyond the end of the file."""
        content = os.pread(self._file, len(view), offset)
        view[:] = content.ljust(len(view), b"\0")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _fill(self, parts: list[Part], batch: Batch) -> None:
        batch.load(parts)
        for part in parts:
            self.read_into(part.offset, batch.view[part.position : part.position + part.length])


def _export(call: Call, *, running: bool) -> Answer:
    request = call.request
    host, vm = _place(request)
    domain = host.find(vm.uuid)
    if (domain.state != "OFF") != running:
        raise Busy(f"domain {domain.name} is {domain.state.lower()}")
    mode = vm.config.fs_freeze.value if running else "NONE"
    if mode != "NONE":
        host.update(domain, frozen=True)
    try:
        included, excluded = select_disks(vm)
        disks = tuple(_stage(call, domain, disk) for disk in included)
    finally:
        host.update(domain, frozen=False)
    (call.source_dir / "vm.xml").write_text(xmldoc.serialize(vm.element, pretty=True))
    (call.source_dir / "domain.xml").write_text(xmldoc.serialize(domain.to_xml()))
    exports = Exports(
        disks=disks,
        freeze=Freeze(requested=vm.config.fs_freeze.value, method=mode),
        excluded=tuple(
            ExcludedDisk(entry.disk.target, Reason(entry.reason.value), entry.disk.disk_id, entry.text)
            for entry in excluded
        ),
        files=("vm.xml", "domain.xml"),
    )
    return {"EXPORTS": exports.to_xml()}


def _stage(call: Call, domain: DummyDomain, disk: Disk) -> DiskExport:
    found = next((entry for entry in domain.disks if entry.target == disk.target), None)
    if found is None:
        raise Busy(f"domain {domain.name} has no disk {disk.target} any more")
    export = DiskExport(
        disk_id=disk.disk_id,
        target=disk.target,
        file=disk_file_name(disk.disk_id, 0),
        type=BackupType.FULL,
        reason=_reason(call.request),
        size_bytes=found.size_bytes,
        format="raw",
        source=found.source,
    )
    path = call.source_dir / export.file
    source = SparseFile(Path(found.source))
    with VirtualImage(source, source.extents(), Spans()) as image:
        with path.open("wb") as file:
            file.writelines(image.chunks())
        Path(f"{path}{BLOCKS_SUFFIX}").write_bytes(b"".join(image.blocks_bytes()))
    return replace(export, path=str(path))


def _reason(request: Request) -> Reason:
    if request.parent is not None:
        return Reason.NO_CHANGE_TRACKING
    return Reason(request.options.get("FULL_REASON") or Reason.FIRST_BACKUP)


def _place(request: Request) -> tuple[DummyHost, Vm]:
    if request.host is None or request.vm is None:
        raise InvalidInput("request: the sections HOST and VM are needed")
    return DummyHost(Host(request.host).uri), Vm(request.vm)


DRIVER = Dummy()
