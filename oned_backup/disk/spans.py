"""Sets of clusters as sorted runs, small enough for millions of extents.

A run costs 16 bytes. Everything is counted in clusters of 64 KiB, the unit of
the files this engine writes; bytes are rounded outwards at the border.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterator

CLUSTER_BITS = 16
CLUSTER = 1 << CLUSTER_BITS


class Spans:
    """A set of integers, kept as disjoint runs `[first, end)` in ascending order."""

    def __init__(self) -> None:
        self.starts = array("Q")
        self.ends = array("Q")
        self._ranks: array[int] | None = None

    @classmethod
    def of(cls, *runs: tuple[int, int]) -> Spans:
        """The set of these ascending runs."""
        spans = cls()
        for first, end in runs:
            spans.add(first, end)
        return spans

    def add(self, first: int, end: int) -> None:
        """Append a run that does not begin before the last one; touching runs become one."""
        if first >= end:
            return
        ends = self.ends
        if ends and first <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            self.starts.append(first)
            ends.append(end)
        self._ranks = None

    def add_bytes(self, start: int, end: int) -> None:
        """Append all clusters that the byte range touches."""
        self.add(start >> CLUSTER_BITS, (end + CLUSTER - 1) >> CLUSTER_BITS)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.starts, self.ends, strict=True)

    def __len__(self) -> int:
        """Number of runs, not of members: see `total`."""
        return len(self.starts)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spans):
            return NotImplemented
        return self.starts == other.starts and self.ends == other.ends

    __hash__ = None  # type: ignore[assignment]  # it grows

    @property
    def total(self) -> int:
        """Number of members."""
        return self._before()[-1]

    def rank(self, value: int) -> int:
        """How many members are smaller than `value`."""
        index = bisect_right(self.starts, value) - 1
        if index < 0:
            return 0
        return self._before()[index] + min(value, self.ends[index]) - self.starts[index]

    def select(self, rank: int) -> tuple[int, int]:
        """The member of that rank, and where its run ends; IndexError beyond the last."""
        before = self._before()
        if not 0 <= rank < before[-1]:
            raise IndexError(rank)
        index = bisect_right(before, rank) - 1
        return self.starts[index] + rank - before[index], self.ends[index]

    def within(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """The runs inside `[first, end)`, cut at its borders."""
        starts, ends = self.starts, self.ends
        index = max(0, bisect_right(starts, first) - 1)
        while index < len(starts) and starts[index] < end:
            if ends[index] > first:
                yield max(starts[index], first), min(ends[index], end)
            index += 1

    def scaled(self, factor: int) -> Spans:
        """The numbers of the groups of `factor` members that this set touches."""
        result = Spans()
        for first, end in self:
            result.add(first // factor, -(-end // factor))
        return result

    def union(self, other: Spans) -> Spans:
        """Members of either set."""
        result = Spans()
        mine, theirs = iter(self), iter(other)
        left, right = next(mine, None), next(theirs, None)
        while left and right:
            if left[0] <= right[0]:
                result.add(*left)
                left = next(mine, None)
            else:
                result.add(*right)
                right = next(theirs, None)
        while left:
            result.add(*left)
            left = next(mine, None)
        while right:
            result.add(*right)
            right = next(theirs, None)
        return result

    def intersection(self, other: Spans) -> Spans:
        """Members of both sets."""
        return self._split(other)[0]

    def difference(self, other: Spans) -> Spans:
        """Members of this set that are not in the other."""
        return self._split(other)[1]

    def _split(self, other: Spans) -> tuple[Spans, Spans]:
        common, rest = Spans(), Spans()
        starts, ends = other.starts, other.ends
        index, count = 0, len(starts)
        for first, end in self:
            position = first
            while index < count and ends[index] <= position:
                index += 1
            at = index
            while at < count and starts[at] < end:
                begin, stop = max(starts[at], position), min(ends[at], end)
                rest.add(position, begin)
                common.add(begin, stop)
                position = stop
                at += 1
            rest.add(position, end)
        return common, rest

    def _before(self) -> array[int]:
        """For each run the number of members before it; one more for the total."""
        if self._ranks is None:
            ranks, total = array("Q", [0]), 0
            for first, end in self:
                total += end - first
                ranks.append(total)
            self._ranks = ranks
        return self._ranks
