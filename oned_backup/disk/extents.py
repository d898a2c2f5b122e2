"""One pass over `block_status`: which clusters hold data, and which are dirty.

Both contexts come with one request; a server may tell less of one than of the
other, or more than was asked, so each context has its own position. The
callback runs inside libnbd, where an exception would be lost: it only adds.
"""

from __future__ import annotations

from collections.abc import Sequence

from oned_backup.disk.spans import CLUSTER, Spans

#: `block_status` has a 32-bit length; stay aligned below it
_LONGEST_REQUEST = (4 << 30) - CLUSTER
_STATE_ZERO = 2
_STATE_DIRTY = 1


class ExtentPass:
    """Collects extents. `contexts`: those that the server offers; `dirty_context` may be empty."""

    def __init__(self, guest_bytes: int, contexts: Sequence[str], dirty_context: str) -> None:
        self._guest_bytes = guest_bytes
        self._dirty_context = dirty_context
        self._position = dict.fromkeys(contexts, 0)
        self._found = {context: Spans() for context in contexts}

    def next_request(self) -> tuple[int, int] | None:
        """Offset and length of the next `block_status`; None when all is known."""
        offset = min(self._position.values(), default=self._guest_bytes)
        if offset >= self._guest_bytes:
            return None
        return offset, min(_LONGEST_REQUEST, self._guest_bytes - offset)

    def advanced_beyond(self, offset: int) -> bool:
        """Whether the server told anything in reply to the request at `offset`."""
        return min(self._position.values()) > offset

    def take(self, context: str, offset: int, entries: Sequence[int], _error: object) -> int:
        """The extent callback of libnbd: pairs of length and flags, beginning at `offset`."""
        position = self._position.get(context)
        if position is None or offset > position:
            return 0  # not asked for, or a gap: the pass will see that it did not advance
        found = self._found[context]
        if context == self._dirty_context:
            wanted, mask = _STATE_DIRTY, _STATE_DIRTY
        else:
            wanted, mask = 0, _STATE_ZERO
        pairs = iter(entries)
        for length, flags in zip(pairs, pairs, strict=True):
            end = offset + length
            if flags & mask == wanted and end > position:
                found.add_bytes(max(offset, position), min(end, self._guest_bytes))
            offset = end
        self._position[context] = max(position, min(offset, self._guest_bytes))
        return 0

    def result(self) -> tuple[Spans, Spans]:
        """Data and zero clusters; see `nbdsource.NbdSource.extents`."""
        everything = Spans()
        everything.add_bytes(0, self._guest_bytes)
        filled = [spans for context, spans in self._found.items() if context != self._dirty_context]
        data = filled[0] if filled else everything
        if not self._dirty_context:
            return data, Spans()
        dirty = self._found[self._dirty_context]
        return dirty.intersection(data), dirty.difference(data)
