"""A full backup and its increments as one disk: in each range the newest layer wins.

    increment 2   ....D.....Z...      D data, Z zero cluster: hides what is below
    increment 1   ..DD......D...      . nothing said: look further down
    full          DDDDDD..DDDDDD      below the full: zeros
    merged        DDDDDD..DD0DDD

The newest layer's virtual size is the disk's. A layer that was smaller reads
as zeros beyond its end, whatever lies below it.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from oned_backup.disk.buffers import BATCH_BYTES, Batch, Part, batches
from oned_backup.disk.ordered import OrderedFill
from oned_backup.disk.qcow2 import Extent, Kind, Qcow2File
from oned_backup.disk.spans import CLUSTER, Spans
from oned_backup.disk.stored import OpenedFile
from oned_backup.errors import DataCorrupt, InvalidInput, NotFound

#: guest bytes that are merged at a time; what one L2 table covers
_WINDOW = 512 << 20
#: windows that are remembered: one more than threads may be in
_WINDOWS = 3
#: readers that fetch and prove data while the consumer writes
_THREADS = 2
_ZEROS = bytes(CLUSTER)


@dataclass(frozen=True)
class Layer:
    """A stored image. `blocks`: its checksums, None if there are none; `name` is used in messages.

    `path`: None for one that is lost, which only salvaging gets past. `foreign`: made by
    somebody else, it may name a backing file; that is passed over.
    """

    path: Path | None
    blocks: Path | None
    name: str
    foreign: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """Guest bytes `[start, end)` of the merged disk and the layer that has them; see `qcow2.Extent`."""

    start: int
    end: int
    kind: Kind
    layer: int
    host: int
    packed: int = 0

    def cut(self, start: int, end: int) -> Piece:
        """The part of it within `[start, end)`."""
        if start <= self.start and self.end <= end:
            return self
        begin = max(self.start, start)
        host = self.host if self.packed else self.host + begin - self.start
        return Piece(begin, min(self.end, end), self.kind, self.layer, host, self.packed)


class ChainReader:
    """The merged view of layers, oldest first; every cluster is proved before it is given out.

    What cannot be proved raises `DataCorrupt`. With `salvage` it reads as
    zeros instead and is listed in `salvaged`.
    """

    def __init__(self, layers: Sequence[Layer], *, salvage: bool = False) -> None:
        if not layers:
            raise InvalidInput("a chain of no layers")
        self.layers = tuple(layers)
        self._salvage = salvage
        self._lock = threading.Lock()
        self._bad: set[tuple[int, int]] = set()
        self._windows: dict[int, list[Piece]] = {}
        self._stored: dict[int, OpenedFile] = {}
        self._maps: list[Qcow2File | None] = []
        try:
            for number, layer in enumerate(layers):
                self._maps.append(self._open(number, layer))
            newest = self._maps[-1]
            if newest is None:
                raise DataCorrupt(f"{layers[-1].name}: nothing can be salvaged without the newest layer")
        except BaseException:
            self.close()
            raise
        self._guest_bytes = newest.guest_bytes

    @property
    def guest_bytes(self) -> int:
        """Virtual size of the newest layer."""
        return self._guest_bytes

    @property
    def salvaged(self) -> tuple[tuple[int, int], ...]:
        """Guest ranges (offset, length) given out as zeros because they could not be proved."""
        with self._lock:
            return merge_ranges(self._bad)

    def uses(self, device: int, inode: int) -> bool:
        """Whether that file is one of the layers, under whatever name."""
        return any(stored.identity == (device, inode) for stored in self._stored.values())

    def data(self) -> Spans:
        """The clusters that do not read as zero."""
        result = Spans()
        for start in range(0, self._guest_bytes, _WINDOW):
            for piece in self._merged(start):
                if piece.kind is Kind.BAD:
                    self._give_up(piece.start, piece.end)
                else:
                    result.add_bytes(piece.start, piece.end)
        return result

    def covered(self) -> Spans:
        """The byte ranges in which nothing from below these layers can show.

        Those of which a layer says anything, and what is beyond the end of one.
        """
        result = Spans()
        for start in range(0, self._guest_bytes, _WINDOW):
            end = min(start + _WINDOW, self._guest_bytes)
            found: list[tuple[int, int]] = []
            for image in self._maps:
                if image is None or image.guest_bytes < end:
                    found.append((max(start, image.guest_bytes) if image else start, end))
                found += [(extent.start, extent.end) for extent in self._extents(image, start, end)]
            for first, stop in sorted(found):
                result.add(first, stop)
        return result

    def stream(self, data: Spans) -> Generator[Batch, None, None]:
        """These clusters in guest order; see `source.Source`."""
        return OrderedFill(batches(data), self._fill, threads=_THREADS).run()

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` with the guest's bytes at `offset`; zeros beyond the end of the disk."""
        position = 0  # up to which the view is filled
        packed: list[Piece] = []
        for piece in self._pieces(offset, offset + len(view)):
            begin, end = piece.start - offset, piece.end - offset
            _clear(view[position:begin])
            if piece.kind is Kind.PACKED:
                packed.append(piece)
            elif piece.kind is Kind.DATA:
                self._read_piece(piece, view[begin:end])
            else:
                _clear(view[begin:end])
                self._give_up(piece.start, piece.end)
            position = end
        _clear(view[position:])
        for group in _together(packed):
            self._unpack(group, offset, view)

    def close(self) -> None:
        """Close all files."""
        for stored in self._stored.values():
            stored.close()
        self._stored.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self, number: int, layer: Layer) -> Qcow2File | None:
        """The layer's map; None for one that is lost altogether, when salvaging."""
        try:
            if layer.path is None:
                raise DataCorrupt(f"{layer.name}: nothing of it can be proved")
            stored = self._stored[number] = OpenedFile(layer.path, layer.blocks)
            return Qcow2File(stored, layer.name, lenient=self._salvage, foreign=layer.foreign)
        except (DataCorrupt, NotFound):
            if not self._salvage:
                raise
            return None

    def _fill(self, parts: list[Part], batch: Batch) -> None:
        batch.load(parts)
        for part in parts:
            self.read_into(part.offset, batch.view[part.position : part.position + part.length])

    def _read_piece(self, piece: Piece, view: memoryview) -> None:
        for offset, length in self._stored[piece.layer].read_into(piece.host, view):
            start = piece.start + offset - piece.host
            end = min(start + length, piece.end)
            if not self._salvage:
                raise DataCorrupt(
                    f"{self.layers[piece.layer].name}: guest bytes {start} to {end} "
                    f"(file offset {offset}) cannot be read or do not match their checksum"
                )
            self._give_up(start, end)

    def _unpack(self, pieces: Sequence[Piece], offset: int, view: memoryview) -> None:
        """Compressed clusters of one layer that lie close together: read and prove all, then expand each."""
        layer = pieces[0].layer
        stored, image = self._stored[layer], self._maps[layer]
        if image is None:
            raise RuntimeError("a piece of a layer that has no map")
        first = pieces[0].host // CLUSTER * CLUSTER
        data = memoryview(bytearray(-(-(pieces[-1].host + pieces[-1].packed - first) // CLUSTER) * CLUSTER))
        bad = stored.read_into(first, data)
        for piece in pieces:
            place = view[piece.start - offset : piece.end - offset]
            proved = not any(
                start < piece.host + piece.packed and piece.host < start + size for start, size in bad
            )
            at = piece.host - first
            found = image.unpack(data[at : at + piece.packed], image.cluster_bytes) if proved else None
            if found is not None:
                skip = piece.start % image.cluster_bytes
                place[:] = memoryview(found)[skip : skip + len(place)]
                continue
            if not self._salvage:
                why = "cannot be expanded" if proved else "cannot be read or do not match their checksum"
                raise DataCorrupt(
                    f"{self.layers[layer].name}: guest bytes {piece.start} to {piece.end} "
                    f"(file offset {piece.host}, compressed) {why}"
                )
            _clear(place)
            self._give_up(piece.start, piece.end)

    def _give_up(self, start: int, end: int) -> None:
        with self._lock:
            self._bad.add((start, min(end, self._guest_bytes)))

    def _pieces(self, start: int, end: int) -> Iterator[Piece]:
        end = min(end, self._guest_bytes)
        for base in range(start // _WINDOW * _WINDOW, end, _WINDOW):
            with self._lock:
                merged = self._merged(base)
            index = max(0, bisect_right(merged, start, key=_start_of) - 1)
            while index < len(merged) and merged[index].start < end:
                if merged[index].end > start:
                    yield merged[index].cut(start, end)
                index += 1

    def _merged(self, base: int) -> list[Piece]:
        """The pieces of one window, in order."""
        if base in self._windows:
            return self._windows[base]
        open_ranges = [(base, min(base + _WINDOW, self._guest_bytes))]
        pieces: list[Piece] = []
        for layer in reversed(range(len(self._maps))):
            image = self._maps[layer]
            if image is not None:
                open_ranges = _below(open_ranges, image.guest_bytes)
            if not open_ranges:
                break
            extents = self._extents(image, open_ranges[0][0], open_ranges[-1][1])
            open_ranges = _overlay(open_ranges, extents, layer, pieces)
        pieces.sort(key=_start_of)
        while len(self._windows) >= _WINDOWS:
            del self._windows[next(iter(self._windows))]
        self._windows[base] = pieces
        return pieces

    def _extents(self, image: Qcow2File | None, start: int, end: int) -> list[Extent]:
        if image is None:
            return [Extent(start, end, Kind.BAD)]
        try:
            return list(image.extents(start, end))
        except DataCorrupt:
            if not self._salvage:
                raise
            return [Extent(start, end, Kind.BAD)]


def merge_ranges(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ranges (start, end) in any order, as sorted, disjoint ranges (offset, length)."""
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif start < end:
            merged.append((start, end))
    return tuple((start, end - start) for start, end in merged)


def _overlay(
    open_ranges: list[tuple[int, int]], extents: list[Extent], layer: int, pieces: list[Piece]
) -> list[tuple[int, int]]:
    """Add to `pieces` what this layer says of the open ranges; what stays open comes back."""
    rest: list[tuple[int, int]] = []
    index, count = 0, len(extents)
    for start, end in open_ranges:
        position = start
        while index < count and extents[index].end <= position:
            index += 1
        at = index
        while at < count and extents[at].start < end:
            extent = extents[at]
            begin, stop = max(extent.start, position), min(extent.end, end)
            if begin > position:
                rest.append((position, begin))
            if extent.kind is not Kind.ZERO:
                piece = Piece(extent.start, extent.end, extent.kind, layer, extent.host, extent.packed)
                pieces.append(piece.cut(begin, stop))
            position = stop
            at += 1
        if position < end:
            rest.append((position, end))
    return rest


def _together(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Compressed pieces that one read can serve: of one layer, ascending, within the size of a buffer."""
    group: list[Piece] = []
    for piece in pieces:
        if group and not (
            piece.layer == group[0].layer
            and group[-1].host <= piece.host <= group[0].host + BATCH_BYTES
            and piece.host <= group[-1].host + group[-1].packed + CLUSTER
        ):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _below(ranges: list[tuple[int, int]], limit: int) -> list[tuple[int, int]]:
    return [(start, min(end, limit)) for start, end in ranges if start < limit]


def _start_of(piece: Piece) -> int:
    return piece.start


def _clear(view: memoryview) -> None:
    for start in range(0, len(view), CLUSTER):
        piece = view[start : start + CLUSTER]
        piece[:] = _ZEROS[: len(piece)]
