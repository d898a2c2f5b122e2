"""What the dummy transfer manager hands over: each disk of a domain copied into a staged file.

A checkpoint is a sparse copy of the disk beside it, `<disk>.<checkpoint>`; an increment is
what differs from the parent's.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.contract.companions import DOMAIN_XML, VM_XML
from oned_backup.contract.exports import (
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
from oned_backup.disk.spans import CLUSTER, Spans
from oned_backup.errors import Busy
from oned_backup.hypervisor.dummy import DummyDomain, DummyHost, checkpoint_path
from oned_backup.model.disk import Disk
from oned_backup.model.increments import BackupType
from oned_backup.model.selection import select_disks
from oned_backup.model.vm import Vm
from oned_backup.sdk import Answer, Call
from oned_backup.sdk.files import BLOCKS_SUFFIX


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

    def changes_since(self, before: SparseFile) -> tuple[Spans, Spans]:
        """The clusters that differ from `before`: those with data, and those that are zero now."""
        data, zero = Spans(), Spans()
        for cluster in _clusters(self.extents(), before.extents()):
            now = self._cluster(cluster)
            if now != before._cluster(cluster):
                (data if any(now) else zero).add(cluster, cluster + 1)
        return data, zero

    def copy_to(self, path: Path) -> None:
        """A new sparse file of the same content."""
        with path.open("xb") as target:
            target.truncate(self.guest_bytes)
            for first, end in self.extents():
                for cluster in range(first, end):
                    target.seek(cluster * CLUSTER)
                    target.write(os.pread(self._file, CLUSTER, cluster * CLUSTER))

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

    def _cluster(self, number: int) -> bytes:
        return os.pread(self._file, CLUSTER, number * CLUSTER).ljust(CLUSTER, b"\0")

    def _fill(self, parts: list[Part], batch: Batch) -> None:
        batch.load(parts)
        for part in parts:
            self.read_into(part.offset, batch.view[part.position : part.position + part.length])


def _clusters(*spans: Spans) -> Iterator[int]:
    """The members of all these sets, in order."""
    yield from sorted({cluster for span in spans for run in span for cluster in range(*run)})


def export(call: Call, host: DummyHost, vm: Vm, *, running: bool) -> Answer:
    """EXPORTS of the VM's domain, whose disks are staged; `Busy` unless it is `running` as is expected."""
    request = call.request
    domain = host.find(vm.uuid)
    if (domain.state != "OFF") != running:
        raise Busy(f"domain {domain.name} is {domain.state.lower()}")
    mode = vm.config.fs_freeze.value if running else "NONE"
    checkpoint = request.backup.checkpoint if request.backup else ""
    if mode != "NONE":
        host.update(domain, frozen=True)
    try:
        included, excluded = select_disks(vm)
        views = [_view(domain, disk, checkpoint) for disk in included]
    finally:
        host.update(domain, frozen=False)
    parents = [_parent_path(request, view) for view in views]
    # All disks whole: a new chain, whose first files are numbered 0.
    number = request.backup.increment_id if request.backup and any(parents) else 0
    disks = tuple(_stage(call, view, parent, number) for view, parent in zip(views, parents, strict=True))
    (call.source_dir / VM_XML).write_text(xmldoc.serialize(vm.element, pretty=True))
    (call.source_dir / DOMAIN_XML).write_text(xmldoc.serialize(domain.to_xml()))
    exports = Exports(
        disks=disks,
        increment_id=number,
        checkpoint=checkpoint,
        freeze=Freeze(requested=vm.config.fs_freeze.value, method=mode),
        excluded=tuple(
            ExcludedDisk(entry.disk.target, Reason(entry.reason.value), entry.disk.disk_id, entry.text)
            for entry in excluded
        ),
        files=(VM_XML, DOMAIN_XML),
    )
    return {"EXPORTS": exports.to_xml()}


@dataclass(frozen=True)
class _View:
    """A disk as it is backed up: the file of its new checkpoint, or its own without one."""

    disk: Disk
    source: str
    path: Path


def _view(domain: DummyDomain, disk: Disk, checkpoint: str) -> _View:
    found = next((entry for entry in domain.disks if entry.target == disk.target), None)
    if found is None:
        raise Busy(f"domain {domain.name} has no disk {disk.target} any more")
    if not checkpoint:
        return _View(disk, found.source, Path(found.source))
    path = checkpoint_path(found.source, checkpoint)
    path.unlink(missing_ok=True)  # of an earlier attempt
    partial = path.with_name(f".{path.name}")
    with closing(SparseFile(Path(found.source))) as source:
        source.copy_to(partial)
    partial.replace(path)
    return _View(disk, found.source, path)


def _parent_path(request: Request, view: _View) -> Path | None:
    """The disk at its last backup; None if nothing can be compared with it."""
    parent = request.parent
    if parent is None or not parent.checkpoint:
        return None
    before = next((disk for disk in parent.disks if disk.disk_id == view.disk.disk_id), None)
    path = checkpoint_path(view.source, parent.checkpoint)
    if before is None or before.source != view.source or not path.exists():
        return None
    return path if path.stat().st_size <= view.path.stat().st_size else None


def _stage(call: Call, view: _View, parent: Path | None, number: int) -> DiskExport:
    file = disk_file_name(view.disk.disk_id, number)
    path = call.source_dir / file
    source = SparseFile(view.path)
    data, zero = source.extents(), Spans()
    if parent is not None:
        with closing(SparseFile(parent)) as before:
            data, zero = source.changes_since(before)
    with VirtualImage(source, data, zero) as image:
        with path.open("wb") as target:
            target.writelines(image.chunks())
        Path(f"{path}{BLOCKS_SUFFIX}").write_bytes(b"".join(image.blocks_bytes()))
    return DiskExport(
        disk_id=view.disk.disk_id,
        target=view.disk.target,
        file=file,
        type=BackupType.INCREMENT if parent else BackupType.FULL,
        reason=Reason.INCREMENT if parent else _reason(call.request),
        size_bytes=source.guest_bytes,
        format="raw",
        source=view.source,
        path=str(path),
    )


def _reason(request: Request) -> Reason:
    if request.parent is not None:
        return Reason.BITMAP_MISSING
    return Reason(request.options.get("FULL_REASON") or Reason.FIRST_BACKUP)
