"""Where everything lies in a qcow2 file that has not been written yet.

    cluster 0        header (v3, 104 bytes) and one header extension
    refcount table   one entry for each refcount block
    refcount blocks  16 bits a cluster, all 1
    L1 table         one entry for each 512 MiB of the guest
    L2 tables        only those that are needed, ascending
    data clusters    in guest order

Every metadata cluster is made on demand from the runs, so nothing of the size
of the disk is ever held in memory. Format: docs/interop/qcow2.txt of QEMU.

The header's size must be a multiple of 512 (QEMU truncates it otherwise), so
the exact size of the disk stands in a header extension of our own, which
others skip: type 0x4F444253 ("ODBS"), eight bytes, big endian.
"""

from __future__ import annotations

import struct
import sys
from array import array

from oned_backup.disk.spans import CLUSTER, CLUSTER_BITS, Spans
from oned_backup.errors import Unsupported

MAGIC = 0x514649FB
VERSION = 3
HEADER = struct.Struct(">IIQIIQIIQQIIQQQQII")
EXACT_SIZE_EXTENSION = 0x4F444253
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO_FLAG = 1
#: what the length of compressed clusters is counted in
SECTOR = 512
#: incompatible feature: the header tells the type of compression, which is not zlib
COMPRESSION_BIT = 8
L2_ENTRIES = CLUSTER // 8
REFCOUNTS = CLUSTER // 2
#: QEMU opens no longer L1 table (QCOW_MAX_L1_SIZE)
MAX_L1_BYTES = 32 << 20
MAX_GUEST_BYTES = MAX_L1_BYTES // 8 * L2_ENTRIES * CLUSTER


class Layout:
    """The computed file: its size, its metadata clusters, and where each data cluster comes from."""

    def __init__(self, guest_bytes: int, data: Spans, zero: Spans) -> None:
        if not 0 <= guest_bytes <= MAX_GUEST_BYTES:
            raise Unsupported(f"disk of {guest_bytes} bytes: at most {MAX_GUEST_BYTES} fit into a qcow2 file")
        self.guest_bytes = guest_bytes
        self.data = data
        self.zero = zero
        self._tables = data.scaled(L2_ENTRIES).union(zero.scaled(L2_ENTRIES))
        guest_clusters = -(-guest_bytes // CLUSTER)
        self._l1_entries = max(1, -(-guest_clusters // L2_ENTRIES))
        l1_clusters = -(-self._l1_entries * 8 // CLUSTER)
        fixed = 1 + l1_clusters + self._tables.total + data.total
        self._refcount_blocks, self._refcount_clusters = _refcount_sizes(fixed)
        self._blocks_at = 1 + self._refcount_clusters
        self._l1_at = self._blocks_at + self._refcount_blocks
        self._l2_at = self._l1_at + l1_clusters
        self.metadata_clusters = self._l2_at + self._tables.total
        self.clusters = fixed + self._refcount_blocks + self._refcount_clusters

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.clusters * CLUSTER

    @property
    def data_offset(self) -> int:
        """File offset of the first data cluster."""
        return self.metadata_clusters * CLUSTER

    def guest_run(self, cluster: int) -> tuple[int, int]:
        """The guest cluster that this data cluster of the file holds, and where its run ends."""
        return self.data.select(cluster - self.metadata_clusters)

    def metadata_cluster(self, index: int) -> bytes:
        """The bytes of one of the first `metadata_clusters` clusters of the file."""
        if index >= self._l2_at:
            return self._l2_table(self._tables.select(index - self._l2_at)[0])
        if index >= self._l1_at:
            return self._l1_cluster(index - self._l1_at)
        if index >= self._blocks_at:
            return self._refcount_block(index - self._blocks_at)
        if index >= 1:
            return self._refcount_table(index - 1)
        return self._header()

    def _header(self, incompatible: int = 0, more: bytes = b"") -> bytes:
        """The header with these features, and with `more` fields than everybody knows."""
        header = HEADER.pack(
            MAGIC,
            VERSION,
            0,  # no backing file: a chain is described by whoever opens it
            0,
            CLUSTER_BITS,
            -(-self.guest_bytes // 512) * 512,
            0,  # not encrypted
            self._l1_entries,
            self._l1_at * CLUSTER,
            1 * CLUSTER,
            self._refcount_clusters,
            0,  # no internal snapshots
            0,
            incompatible,
            0,  # compatible features
            0,  # autoclear features
            4,  # refcounts of 2^4 bits
            HEADER.size + len(more),
        )
        extension = struct.pack(">IIQ", EXACT_SIZE_EXTENSION, 8, self.guest_bytes)
        return (header + more + extension).ljust(CLUSTER, b"\0")

    def _refcount_table(self, index: int) -> bytes:
        first = index * L2_ENTRIES
        count = min(L2_ENTRIES, self._refcount_blocks - first)
        start = (self._blocks_at + first) * CLUSTER
        return big_endian(array("Q", range(start, start + count * CLUSTER, CLUSTER)))

    def _refcount_block(self, index: int) -> bytes:
        used = min(REFCOUNTS, self.clusters - index * REFCOUNTS)
        return (b"\0\1" * used).ljust(CLUSTER, b"\0")

    def _l1_cluster(self, index: int) -> bytes:
        entries = array("Q", bytes(CLUSTER))
        base = index * L2_ENTRIES
        for first, end in self._tables.within(base, base + L2_ENTRIES):
            start = COPIED + (self._l2_at + self._tables.rank(first)) * CLUSTER
            stop = start + (end - first) * CLUSTER
            entries[first - base : end - base] = array("Q", range(start, stop, CLUSTER))
        return big_endian(entries)

    def _l2_table(self, index: int) -> bytes:
        entries = array("Q", bytes(CLUSTER))
        base = index * L2_ENTRIES
        start = COPIED + (self.metadata_clusters + self.data.rank(base)) * CLUSTER
        for first, end in self.data.within(base, base + L2_ENTRIES):
            stop = start + (end - first) * CLUSTER
            entries[first - base : end - base] = array("Q", range(start, stop, CLUSTER))
            start = stop
        for first, end in self.zero.within(base, base + L2_ENTRIES):
            entries[first - base : end - base] = array("Q", [ZERO_FLAG]) * (end - first)
        return big_endian(entries)


def _refcount_sizes(fixed: int) -> tuple[int, int]:
    """Refcount blocks, and clusters of the refcount table, so that they count themselves too."""
    blocks, table = 0, 0
    while True:
        clusters = fixed + blocks + table
        needed = -(-clusters // REFCOUNTS)
        if needed <= blocks:
            return blocks, table
        blocks, table = needed, -(-needed // L2_ENTRIES)


def big_endian(entries: array[int]) -> bytes:
    """A cluster of a table: these entries, then zeros."""
    if sys.byteorder == "little":
        entries.byteswap()
    return entries.tobytes().ljust(CLUSTER, b"\0")
