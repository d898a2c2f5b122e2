"""A few clusters of a disk, by which the next backup tells whether its dirty bitmap has seen every write.

A bitmap sees what QEMU writes. It does not see an image that was shrunk and grown again,
or whose content was replaced in its file, while no QEMU had it open: an increment would leave
that out, and the chain restore to something that never was. So each backup notes the digests of some
clusters, and before the next increment those of them that the bitmap calls clean are read
again. One that has changed convicts the bitmap. None that has changed proves nothing of the rest.

    sample = take(source)                           "0:1f2e3d4c5b6a7988,524288:…": offset and digest
    contradiction(source, sample) -> 524288         clean, and another than it was; None: all as they were
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import nbd
from blake3 import blake3

from oned_backup.disk.nbdsource import NbdSource
from oned_backup.disk.spans import CLUSTER
from oned_backup.errors import InvalidInput

#: the clusters are the last one, those with the first data after each of so many places …
_PLACES = 32
#: … and the last ones with data in so many ranges that begin at the disk's end and double in length
_LAST = 16
#: `block_status` has a 32-bit length
_LONGEST_LOOK = 1 << 31
_DIGEST_BYTES = 8
_SAMPLE = re.compile(r"(?:[0-9]{1,19}:[0-9a-f]{16}(?:,(?!$)|$)){0,64}")
_STATE_ZERO = 2
_STATE_DIRTY = 1


def take(source: NbdSource) -> str:
    """What to note of a disk; empty for one of 0 bytes."""
    return ",".join(f"{offset}:{_digest(source, offset)}" for offset in _offsets(source))


def contradiction(source: NbdSource, sample: str) -> int | None:
    """The offset of a cluster that the source's bitmap calls clean and that is not what it was."""
    for offset, digest in _parse(sample).items():
        if offset >= source.guest_bytes or _flags(source, source.dirty_context, offset, CLUSTER) != {0}:
            continue
        if _digest(source, offset) != digest:
            return offset
    return None


def _parse(sample: str) -> dict[int, str]:
    if not _SAMPLE.fullmatch(sample):
        raise InvalidInput(f"sample '{sample[:40]}' is not a list of OFFSET:DIGEST")
    pairs = (entry.split(":") for entry in sample.split(",") if entry)
    return {int(offset): digest for offset, digest in pairs}


def _offsets(source: NbdSource) -> Sequence[int]:
    clusters = -(-source.guest_bytes // CLUSTER)
    if not clusters:
        return ()
    places = {number * clusters // _PLACES * CLUSTER for number in range(_PLACES)}
    found = {_first_data(source, place) for place in places} | {(clusters - 1) * CLUSTER}
    return sorted(found.union(_last_data(source, clusters * CLUSTER)))


def _first_data(source: NbdSource, place: int) -> int:
    """The first cluster with data from `place` on, as far as one answer tells; `place` if there is none."""
    longest = max(CLUSTER, source.guest_bytes // _PLACES)
    for offset, _, flags in _extents(source, nbd.CONTEXT_BASE_ALLOCATION, place, longest):
        if not flags & _STATE_ZERO:
            return max(place, offset // CLUSTER * CLUSTER)
    return place


def _last_data(source: NbdSource, end: int) -> Iterator[int]:
    """Clusters with data, from the last one of the disk on towards its beginning, ever farther apart.

    Whatever a disk loses that is cut off and grown again, it loses the first of these.
    """
    length, found = CLUSTER, 0
    while end and found < _LAST:
        start = max(0, end - length)
        data = [
            min(offset + size, end) - 1
            for offset, size, flags in _extents(source, nbd.CONTEXT_BASE_ALLOCATION, start, end - start)
            if not flags & _STATE_ZERO
        ]
        if data:
            found += 1
            yield data[-1] // CLUSTER * CLUSTER
        end, length = start, min(2 * length, _LONGEST_LOOK)


def _flags(source: NbdSource, context: str, offset: int, length: int) -> set[int]:
    """The flags of all extents of a range; empty if the server tells nothing."""
    return {flags & _STATE_DIRTY for _, _, flags in _extents(source, context, offset, length)}


def _extents(source: NbdSource, context: str, offset: int, length: int) -> list[tuple[int, int, int]]:
    """(offset, length, flags) of what the server tells in one answer about a range."""
    told: list[tuple[int, int, int]] = []

    def take_extents(name: str, start: int, entries: Sequence[int], _error: object) -> int:
        pairs = iter(entries)
        for size, flags in zip(pairs, pairs, strict=True) if name == context else ():
            told.append((start, size, flags))
            start += size
        return 0

    end = min(source.guest_bytes, offset + min(length, _LONGEST_LOOK))
    try:
        source.handle().block_status(end - offset, offset, take_extents)
    except nbd.Error as error:
        raise source.failed(f"block status at {offset}", error) from error
    return [extent for extent in told if extent[0] < end]


def _digest(source: NbdSource, offset: int) -> str:
    cluster = memoryview(bytearray(CLUSTER))
    source.read_into(offset, cluster)
    return blake3(cluster).hexdigest(_DIGEST_BYTES)
