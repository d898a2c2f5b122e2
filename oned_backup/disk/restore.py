"""Writing a chain's disk somewhere: one pass over the stored files, no copy in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from oned_backup.disk.chain import ChainReader, Layer
from oned_backup.disk.image import VirtualImage
from oned_backup.disk.spans import CLUSTER, Spans
from oned_backup.disk.target import NbdExport, Target, open_target
from oned_backup.errors import InvalidInput

Progress = Callable[[int, int], None]

__all__ = ["Layer", "Restored", "restore_chain"]


@dataclass(frozen=True)
class Restored:
    """What was written. `salvaged`: guest ranges (offset, length) that are zero-filled for want of proof."""

    bytes_written: int
    salvaged: tuple[tuple[int, int], ...] = ()


def restore_chain(
    layers: Sequence[Layer],
    target: Path | int | NbdExport,
    *,
    format: str,  # noqa: A002  # the word of every tool in this field
    progress: Progress | None = None,
    salvage: bool = False,
) -> Restored:
    """Write the merged view of the layers (oldest first) as `qcow2` or `raw`.

    `target` is a path (a new file, an existing file, which is replaced in
    place, or a block device), an NBD export, or a descriptor that is written sequentially.
    New files are created exclusively and removed again if the restore fails.
    `DataCorrupt` names the layer, the place in its file and the guest range.
    """
    if format not in {"qcow2", "raw"}:
        raise InvalidInput(f"format {format!r}: must be qcow2 or raw")
    with ChainReader(layers, salvage=salvage) as chain:
        data = chain.data()
        report = _Reporter(progress, data.total * CLUSTER)
        image = VirtualImage(chain, data, Spans(), checksums=False) if format == "qcow2" else None
        size = image.size_bytes if image else chain.guest_bytes
        with open_target(target, size, is_a_layer=chain.uses) as writer:
            if image:
                written = _write_image(image, writer, report)
            else:
                written = _write_raw(chain, data, writer, report)
            writer.finish()
        return Restored(written, chain.salvaged)


class _Reporter:
    """Counts the data that has passed and tells whoever wants to know."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _write_image(image: VirtualImage, writer: Target, report: _Reporter) -> int:
    offset = 0
    with closing(image.chunks()) as chunks:
        for chunk in chunks:
            writer.write(offset, chunk)
            offset += len(chunk)
            if offset > image.layout.data_offset:
                report.add(len(chunk))
    return offset


def _write_raw(chain: ChainReader, data: Spans, writer: Target, report: _Reporter) -> int:
    position, written, end = 0, 0, chain.guest_bytes
    with closing(chain.stream(data)) as stream:
        for batch in stream:
            for part in batch.parts:
                writer.zero(position, part.offset)
                length = min(part.length, end - part.offset)
                writer.write(part.offset, batch.view[part.position : part.position + length])
                position = part.offset + length
                written += length
            report.add(len(batch.view))
    writer.zero(position, end)
    return written
