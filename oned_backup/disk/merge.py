"""Layers that follow each other, merged into one backup file that does not exist yet.

    parent        PPPPPPPPPPPP        not read
    layer a       ..DD....ZZ          D data, Z zero cluster, . nothing said, shorter than z
    layer z       ...D..D.....
    increment     ..DD..D.ZZZZ        beyond a's end the parent must not show: zero clusters
    full          ..DD..D.....        what reads as zero is not stored

The merged file says exactly what its layers said together, so whatever was
below them may stay below it, and whatever was above may stay above. Its size
is that of the newest layer.

A cluster of which the layers say only a part must be stored whole. That takes
the bytes that the layers beneath have there; it happens where a disk whose
size is no multiple of 64 KiB grew, and with layers that others wrote with
smaller clusters.
"""

from __future__ import annotations

from collections.abc import Sequence

from oned_backup.disk.chain import ChainReader, Layer
from oned_backup.disk.image import VirtualImage
from oned_backup.disk.spans import CLUSTER, Spans
from oned_backup.errors import InvalidInput


def open_merged(layers: Sequence[Layer], *, full: bool, beneath: Sequence[Layer] = ()) -> VirtualImage:
    """The backup file that takes the place of `layers`, oldest first; close it.

    `full`: they begin with a full backup, and so the result is one. Else it is
    an increment on what the oldest of them continues; `beneath` is that chain,
    which is opened only if a cluster has to be completed from it.
    Every cluster is proved as it is read: `DataCorrupt` names layer and range.
    """
    if full and beneath:
        raise InvalidInput("a full backup has nothing beneath it")
    chain = ChainReader(layers)
    try:
        data = chain.data()
        if full:
            return VirtualImage(chain, data, Spans())
        inside, touched = _clusters(chain.covered(), chain.guest_bytes)
        partial = touched.difference(inside)
        if partial:
            chain.close()
            chain = _completed(layers, beneath, partial)
        return VirtualImage(chain, data.union(partial), inside.difference(data))
    except BaseException:
        chain.close()
        raise


def _clusters(covered: Spans, guest_bytes: int) -> tuple[Spans, Spans]:
    """The clusters that these byte ranges fill, and those that they touch."""
    inside, touched = Spans(), Spans()
    for start, end in covered:
        touched.add_bytes(start, end)
        inside.add(-(-start // CLUSTER), -(-end // CLUSTER) if end == guest_bytes else end // CLUSTER)
    return inside, touched


def _completed(layers: Sequence[Layer], beneath: Sequence[Layer], partial: Spans) -> ChainReader:
    if not beneath:
        first, _ = partial.select(0)
        raise InvalidInput(
            f"{layers[-1].name}: {partial.total} clusters, the first at guest byte {first * CLUSTER}, "
            "cannot be merged without the layers beneath"
        )
    return ChainReader([*beneath, *layers])
