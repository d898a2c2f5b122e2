"""Reading a stored file so that every byte is proved before it is used."""

from __future__ import annotations

import os
from pathlib import Path

from xxhash import xxh3_128_digest

from oned_backup.disk.blocks import DIGEST_BYTES, BlockFile
from oned_backup.disk.spans import CLUSTER
from oned_backup.errors import NotFound, PermissionDenied, Unavailable


def open_stored(path: Path) -> int:
    """A descriptor for reading; `NotFound`, `PermissionDenied` or `Unavailable`."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"{path}: no such file") from error
    except PermissionError as error:
        raise PermissionDenied(f"{path}: {error.strerror}") from error
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}") from error


class OpenedFile:
    """A file opened for reading, with or without its `.blocks`."""

    def __init__(self, path: Path, blocks: Path | None) -> None:
        self.path = path
        self._fd = open_stored(path)
        try:
            status = os.fstat(self._fd)
            self.identity = (status.st_dev, status.st_ino)
            self.size_bytes = status.st_size
            self._blocks = BlockFile(blocks) if blocks is not None else None
        except BaseException:
            os.close(self._fd)
            raise

    def read_into(self, offset: int, view: memoryview) -> list[tuple[int, int]]:
        """Fill `view` from `offset`; the ranges (offset, length) that cannot be proved, zero-filled.

        With checksums each whole block that the range touches is read and
        compared, and a bad range ends where its block ends, which may be beyond
        the view; without them only what the file system fails to read is bad.
        """
        available = max(0, min(len(view), self.size_bytes - offset))
        bad = self._beyond(offset + available, view[available:])
        if available:
            bad += self._read_within(offset, view[:available])
        return bad

    def _beyond(self, offset: int, view: memoryview) -> list[tuple[int, int]]:
        """Zeros, as QEMU reads beyond the end; bad where the checksums say that there was more."""
        view[:] = bytes(len(view))
        if self._blocks is None or not view:
            return []
        start = max(offset, -(-self.size_bytes // CLUSTER) * CLUSTER)
        stop = min(offset + len(view), self._blocks.data_offset + self._blocks.count * CLUSTER)
        return [(start, stop - start)] if start < stop else []

    def _read_within(self, offset: int, view: memoryview) -> list[tuple[int, int]]:
        if self._blocks is None:
            return self._read_plain(offset, view)
        shift = (offset - self._blocks.data_offset) % CLUSTER
        whole = (shift + len(view)) % CLUSTER == 0 or offset + len(view) == self.size_bytes
        if shift == 0 and whole:
            return self._read_proved(self._blocks, offset, view)
        start = offset - shift
        length = min(-(-(shift + len(view)) // CLUSTER) * CLUSTER, self.size_bytes - start)
        around = memoryview(bytearray(length))
        bad = self._read_proved(self._blocks, start, around)
        view[:] = around[shift : shift + len(view)]
        cut = [(max(at, offset), at + count) for at, count in bad if at < offset + len(view)]
        return [(at, stop - at) for at, stop in cut if at < stop]

    def close(self) -> None:
        """Close the file and its checksums."""
        os.close(self._fd)
        if self._blocks is not None:
            self._blocks.close()

    def _read_proved(self, blocks: BlockFile, offset: int, view: memoryview) -> list[tuple[int, int]]:
        bad = self._read_plain(offset, view)
        first = (offset - blocks.data_offset) // CLUSTER
        count = -(-len(view) // CLUSTER)
        expected = blocks.digests(first, count) if first >= 0 else b""
        found = b"".join([xxh3_128_digest(view[at : at + CLUSTER]) for at in range(0, len(view), CLUSTER)])
        if found == expected:
            return bad
        for index in range(count):
            digest = slice(index * DIGEST_BYTES, (index + 1) * DIGEST_BYTES)
            if found[digest] != expected[digest]:
                start = index * CLUSTER
                stop = min(start + CLUSTER, len(view))
                view[start:stop] = bytes(stop - start)
                bad = [*bad, (offset + start, CLUSTER)]
        return bad

    def _read_plain(self, offset: int, view: memoryview) -> list[tuple[int, int]]:
        done = 0
        try:
            while done < len(view):
                count = os.preadv(self._fd, [view[done:]], offset + done)
                if count == 0:
                    break
                done += count
        except OSError:
            return self._read_piecewise(offset, view)
        if done == len(view):
            return []
        view[done:] = bytes(len(view) - done)
        return [(offset + done, len(view) - done)]

    def _read_piecewise(self, offset: int, view: memoryview) -> list[tuple[int, int]]:
        """After an I/O error: cluster by cluster, so that only the bad ones are lost."""
        bad = []
        for start in range(0, len(view), CLUSTER):
            piece = view[start : start + CLUSTER]
            try:
                count = os.preadv(self._fd, [piece], offset + start)
            except OSError:
                count = 0
            if count < len(piece):
                piece[:] = bytes(len(piece))
                bad.append((offset + start, len(piece)))
        return bad
