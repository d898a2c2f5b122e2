r"""`.blocks` files: one digest for each 64 KiB of a stored file.

    0   magic `ODBBLK1\n`
    8   version (u32) 1
    12  cluster bits (u32) 16
    16  data offset (u64)
    24  count (u64)
    32  zeros
    64  count × XXH3-128, 16 bytes each, big endian as XXH3's canonical form

All integers little endian. Digest i covers the bytes of the stored file from
`data offset + i × 64 KiB`; the last one covers what is left of the file. The
writer uses data offset 0, so that the tables of an image are proved by the
same means as its data: a restore trusts neither.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from xxhash import xxh3_128, xxh3_128_digest

from oned_backup.disk.spans import CLUSTER, CLUSTER_BITS
from oned_backup.errors import DataCorrupt

MAGIC = b"ODBBLK1\n"
VERSION = 1
HEADER_BYTES = 64
DIGEST_BYTES = 16
_HEADER = struct.Struct("<8sIIQQ")
#: digests beyond this go to an unlinked temporary file (512 KiB is 2 GiB of data)
_IN_MEMORY = 512 << 10


def blocks_size_bytes(file_bytes: int) -> int:
    """Size of the `.blocks` file for a stored file of that size."""
    return HEADER_BYTES + DIGEST_BYTES * -(-file_bytes // CLUSTER)


class BlockDigests:
    """Digests of a file that passes by in pieces of any size.

    It may pass from the multiple of 64 KiB `begin` to its end, which then is
    such a multiple too, and from offset 0 to `begin` last.
    """

    def __init__(self, begin: int = 0) -> None:
        self._before = begin // CLUSTER
        self._spool = tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY)  # noqa: SIM115  # closed below
        self._count = 0
        self._partial = xxh3_128()
        self._partial_bytes = 0

    def update(self, view: memoryview) -> None:
        """Add the next bytes of the file."""
        position = 0
        if self._partial_bytes:
            position = min(CLUSTER - self._partial_bytes, len(view))
            self._add_partial(view[:position])
        whole = position + (len(view) - position) // CLUSTER * CLUSTER
        self._spool.write(
            b"".join([xxh3_128_digest(view[at : at + CLUSTER]) for at in range(position, whole, CLUSTER)])
        )
        self._count += (whole - position) // CLUSTER
        if whole < len(view):
            self._add_partial(view[whole:])

    def finish(self) -> None:
        """The file has ended."""
        if self._partial_bytes:
            self._end_partial()

    def file_bytes(self) -> Iterator[bytes]:
        """The content of the `.blocks` file; any number of times."""
        header = _HEADER.pack(MAGIC, VERSION, CLUSTER_BITS, 0, self._count)
        yield header.ljust(HEADER_BYTES, b"\0")
        after = (self._count - self._before) * DIGEST_BYTES
        self._spool.seek(after)
        yield self._spool.read()
        self._spool.seek(0)
        while piece := self._spool.read(min(1 << 20, after - self._spool.tell())):
            yield piece

    def close(self) -> None:
        """Free the temporary file."""
        self._spool.close()

    def _add_partial(self, view: memoryview) -> None:
        self._partial.update(view)
        self._partial_bytes += len(view)
        if self._partial_bytes == CLUSTER:
            self._end_partial()

    def _end_partial(self) -> None:
        self._spool.write(self._partial.digest())
        self._count += 1
        self._partial = xxh3_128()
        self._partial_bytes = 0


class BlockFile:
    """An open `.blocks` file; `DataCorrupt` if it is not one."""

    def __init__(self, path: Path) -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DataCorrupt(f"{path}: the checksums of the stored file are missing") from error
        try:
            header = os.pread(self._fd, HEADER_BYTES, 0)
            if len(header) < HEADER_BYTES:
                raise DataCorrupt(f"{path}: {len(header)} bytes are no checksum file")
            magic, version, bits, self.data_offset, self.count = _HEADER.unpack_from(header)
            if magic != MAGIC or version != VERSION or bits != CLUSTER_BITS:
                raise DataCorrupt(f"{path}: not a checksum file of version {VERSION}")
            size, expected = os.fstat(self._fd).st_size, HEADER_BYTES + DIGEST_BYTES * self.count
            if size != expected:
                raise DataCorrupt(f"{path}: {size} bytes, but {self.count} checksums take {expected}")
        except BaseException:
            os.close(self._fd)
            raise

    def digests(self, first: int, count: int) -> bytes:
        """The digests of `count` blocks, fewer beyond the end."""
        return os.pread(self._fd, DIGEST_BYTES * count, HEADER_BYTES + DIGEST_BYTES * first)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
