"""A qcow2 file from a store, read without trusting it.

Everything is checked before memory is allocated for it or it is followed:
sizes against QEMU's own limits, tables against the end of the file, each L2
table against all others (one table under many L1 entries would make a small
file a huge disk). Refused are backing files (whoever opens a chain says what
it is made of), data files, encryption, and features that we do not know.
"""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from oned_backup.disk.codec import CODECS, DEFLATE, Unpack
from oned_backup.disk.layout import (
    COMPRESSED,
    COMPRESSION_BIT,
    EXACT_SIZE_EXTENSION,
    HEADER,
    MAGIC,
    MAX_L1_BYTES,
    SECTOR,
)
from oned_backup.disk.stored import OpenedFile
from oned_backup.errors import DataCorrupt, Unsupported

_OFFSET_MASK = 0x00FFFFFFFFFFFE00
_ZERO = 1
_DIRTY_BIT = 1  # refcounts may be stale: of no interest to a reader
_CORRUPT_BIT = 2
_DATA_FILE_BIT = 4
_V2_HEADER_BYTES = 72
_MAX_HEADER_BYTES = 64 << 10
_END_EXTENSION = 0
_NOT_NULL = re.compile(rb"[^\0]")


class Kind(IntEnum):
    """What a layer says of a range; what it does not mention shows the layer below."""

    DATA = 1
    ZERO = 2
    BAD = 3  # the table that would tell cannot be proved
    PACKED = 4  # data, compressed


@dataclass(frozen=True, slots=True)
class Extent:
    """Guest bytes `[start, end)`; `host` is where DATA begins in the file.

    PACKED is one cluster or a part of it; `host` is where the `packed` bytes
    of the whole cluster begin.
    """

    start: int
    end: int
    kind: Kind
    host: int = 0
    packed: int = 0


@dataclass(frozen=True)
class Header:
    """What a reader needs of the header. `guest_bytes` is exact, also where no multiple of 512."""

    guest_bytes: int
    cluster_bits: int
    l1_offset: int
    l1_entries: int
    compression: int
    names_backing: bool = False


def parse_header(data: bytes, file_bytes: int, what: str, *, foreign: bool = False) -> Header:
    """The header at the start of a file of that size; `DataCorrupt` or `Unsupported` with the reason.

    `foreign`: that it names a backing file is noted, and means nothing.
    """
    if len(data) < _V2_HEADER_BYTES or struct.unpack_from(">I", data)[0] != MAGIC:
        raise DataCorrupt(f"{what}: not a qcow2 file")
    fields = HEADER.unpack_from(data.ljust(HEADER.size, b"\0"))
    _, version, backing, _, cluster_bits, size, encryption, l1_entries, l1_offset = fields[:9]
    incompatible, length = fields[13], fields[17]
    if version == 2:
        incompatible, length = 0, _V2_HEADER_BYTES
    elif version != 3:
        raise Unsupported(f"{what}: qcow2 version {version}")
    if backing and not foreign:
        raise Unsupported(f"{what}: names a backing file, which a stored image must not")
    if encryption:
        raise Unsupported(f"{what}: encrypted with method {encryption}")
    if not _V2_HEADER_BYTES <= length <= min(file_bytes, _MAX_HEADER_BYTES):
        raise DataCorrupt(f"{what}: header of {length} bytes in a file of {file_bytes} bytes")
    compression = data[HEADER.size] if incompatible & COMPRESSION_BIT and length > HEADER.size else DEFLATE
    _refuse_features(incompatible, compression, what)
    if not 9 <= cluster_bits <= 21:
        raise DataCorrupt(f"{what}: clusters of 2^{cluster_bits} bytes")
    if length > 1 << cluster_bits:
        raise DataCorrupt(f"{what}: header of {length} bytes")
    cluster = 1 << cluster_bits
    needed = -(-size // (cluster * (cluster // 8)))
    if l1_entries * 8 > MAX_L1_BYTES or l1_entries < needed:
        raise DataCorrupt(f"{what}: L1 table of {l1_entries} entries for {size} bytes")
    if needed and (l1_offset % cluster or not cluster <= l1_offset <= file_bytes - needed * 8):
        raise DataCorrupt(f"{what}: L1 table at {l1_offset} in a file of {file_bytes} bytes")
    exact = _exact_size(data, length)
    if exact is not None and -(-exact // 512) * 512 != size:
        raise DataCorrupt(f"{what}: sizes {exact} and {size} contradict each other")
    guest_bytes = size if exact is None else exact
    return Header(guest_bytes, cluster_bits, l1_offset, needed, compression, bool(backing))


def _refuse_features(incompatible: int, compression: int, what: str) -> None:
    if incompatible & _CORRUPT_BIT:
        raise DataCorrupt(f"{what}: marked as corrupt by QEMU")
    if incompatible & _DATA_FILE_BIT:
        raise Unsupported(f"{what}: keeps its data in another file")
    if unknown := incompatible & ~(_DIRTY_BIT | COMPRESSION_BIT):
        raise Unsupported(f"{what}: uses qcow2 features {unknown:#x}")
    if compression not in CODECS:
        raise Unsupported(f"{what}: compressed by method {compression}")


class Qcow2File:
    """The map of one stored image. `lenient`: report unreadable tables as BAD instead of raising.

    `foreign`: as for `parse_header`.
    """

    def __init__(
        self, stored: OpenedFile, what: str, *, lenient: bool = False, foreign: bool = False
    ) -> None:
        self._stored = stored
        self._what = what
        self._lenient = lenient
        start = memoryview(bytearray(min(_MAX_HEADER_BYTES, stored.size_bytes)))
        if stored.read_into(0, start):
            raise DataCorrupt(f"{what}: the header does not match its checksum")
        self.header = parse_header(bytes(start), stored.size_bytes, what, foreign=foreign)
        #: how to read what is PACKED
        self.unpack: Unpack = CODECS[self.header.compression]
        self.cluster_bytes = self._cluster = 1 << self.header.cluster_bits
        self._table_bytes = self._cluster * (self._cluster // 8)
        self._l1, self._l1_bad = self._read_l1()
        self._loaded: tuple[int, bytes, array[int]] | None = None

    @property
    def guest_bytes(self) -> int:
        """Virtual size."""
        return self.header.guest_bytes

    def extents(self, start: int, end: int) -> Iterator[Extent]:
        """What the layer says of guest bytes `[start, end)`, in order; neighbours may touch."""
        end = min(end, self.guest_bytes)
        for index in range(start // self._table_bytes, -(-end // self._table_bytes)):
            base = index * self._table_bytes
            low, high = max(start, base), min(end, base + self._table_bytes)
            if index in self._l1_bad:
                yield Extent(low, high, Kind.BAD)
            elif self._l1[index] & _OFFSET_MASK:
                yield from self._table_extents(index, base, low, high)

    def _table_extents(self, index: int, base: int, low: int, high: int) -> Iterator[Extent]:
        table = self._l2_table(index)
        if table is None:
            yield Extent(low, high, Kind.BAD)
            return
        raw, entries = table
        cluster = self._cluster
        position, stop = (low - base) // cluster, -(-(high - base) // cluster)
        while position < stop:
            found = _NOT_NULL.search(raw, position * 8, stop * 8)
            if found is None:
                return
            position = found.start() // 8
            first, entry = position, entries[position]
            kind = self._kind(entry, base + first * cluster)
            position += 1
            if kind is Kind.ZERO:
                while position < stop and entries[position] == entry:
                    position += 1
            elif kind is Kind.DATA:
                following = entry + cluster
                while position < stop and entries[position] == following:
                    following += cluster
                    position += 1
            elif kind is None:
                continue
            begin, end = max(low, base + first * cluster), min(high, base + position * cluster)
            if kind is Kind.PACKED:
                yield self._packed(begin, end, entry)
            elif kind is Kind.ZERO:
                yield Extent(begin, end, kind)
            else:
                host = (entry & _OFFSET_MASK) + begin - (base + first * cluster)
                yield from self._within_file(Extent(begin, end, kind, host))

    def _kind(self, entry: int, guest: int) -> Kind | None:
        if entry & COMPRESSED:
            return Kind.PACKED
        if entry & _ZERO:
            return Kind.ZERO
        if not entry & _OFFSET_MASK:
            return None
        if (entry & _OFFSET_MASK) % self._cluster:
            raise DataCorrupt(f"{self._what}: unaligned cluster for guest byte {guest}")
        return Kind.DATA

    def _packed(self, start: int, end: int, entry: int) -> Extent:
        bits = 62 - (self.header.cluster_bits - 8)
        host = entry & ((1 << bits) - 1)
        sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1
        packed = sectors * SECTOR - host % SECTOR
        if self._cluster <= host <= self._limit() - packed:
            return Extent(start, end, Kind.PACKED, host, packed)
        if not self._lenient:
            raise self._beyond(start, end, host)
        return Extent(start, end, Kind.BAD)

    def _limit(self) -> int:
        # QEMU may leave a file short within its last cluster: the rest reads as zero
        return -(-self._stored.size_bytes // self._cluster) * self._cluster

    def _beyond(self, start: int, end: int, host: int) -> DataCorrupt:
        return DataCorrupt(
            f"{self._what}: guest bytes {start} to {end} lie at {host} "
            f"in a file of {self._stored.size_bytes} bytes"
        )

    def _within_file(self, extent: Extent) -> Iterator[Extent]:
        limit = self._limit()
        length = extent.end - extent.start
        if self._cluster <= extent.host <= limit - length:
            yield extent
            return
        if not self._lenient:
            raise self._beyond(extent.start, extent.end, extent.host)
        there = max(0, min(length, limit - extent.host)) if extent.host >= self._cluster else 0
        if there:
            yield Extent(extent.start, extent.start + there, extent.kind, extent.host)
        yield Extent(extent.start + there, extent.end, Kind.BAD)

    def _l2_table(self, index: int) -> tuple[bytes, array[int]] | None:
        if self._loaded is not None and self._loaded[0] == index:
            return self._loaded[1:]
        view = memoryview(bytearray(self._cluster))
        offset = self._l1[index] & _OFFSET_MASK
        if self._stored.read_into(offset, view):
            if self._lenient:
                return None
            raise self._bad_table("L2", offset, index)
        raw = bytes(view)
        entries = _from_big_endian(raw)
        self._loaded = (index, raw, entries)
        return raw, entries

    def _bad_table(self, name: str, offset: int, index: int) -> DataCorrupt:
        low = index * self._table_bytes
        return DataCorrupt(
            f"{self._what}: the {name} table at file offset {offset}, for guest bytes {low} to "
            f"{min(low + self._table_bytes, self.guest_bytes)}, does not match its checksum"
        )

    def _read_l1(self) -> tuple[array[int], frozenset[int]]:
        view = memoryview(bytearray(self.header.l1_entries * 8))
        bad: set[int] = set()
        for offset, length in self._stored.read_into(self.header.l1_offset, view):
            first = (offset - self.header.l1_offset) // 8
            if not self._lenient:
                raise self._bad_table("L1", offset, first)
            bad.update(range(first, first + -(-length // 8)))
        entries = _from_big_endian(bytes(view))
        seen: set[int] = set()
        last = self._stored.size_bytes - self._cluster
        for index, entry in enumerate(entries):
            offset = entry & _OFFSET_MASK
            if not offset:
                continue
            if offset % self._cluster or not self._cluster <= offset <= last or offset in seen:
                if not self._lenient:
                    raise DataCorrupt(f"{self._what}: L2 table {index} at {offset} cannot be there")
                bad.add(index)
            seen.add(offset)
        return entries, frozenset(bad)


def _exact_size(data: bytes, position: int) -> int | None:
    while position + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, position)
        position += 8
        if kind == _END_EXTENSION:
            return None
        if kind == EXACT_SIZE_EXTENSION and length == 8 and position + 8 <= len(data):
            return int(struct.unpack_from(">Q", data, position)[0])
        position += -(-length // 8) * 8
    return None


def _from_big_endian(data: bytes) -> array[int]:
    entries = array("Q", data)
    if sys.byteorder == "little":
        entries.byteswap()
    return entries
