"""What the `download` actions of all stores share: which disk is meant, and where it is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from oned_backup.contract.url import DiskUrl, parse_url
from oned_backup.errors import InvalidInput, Salvaged
from oned_backup.sdk.call import Answer, Call
from oned_backup.sdk.failures import SpaceNeeded

if TYPE_CHECKING:
    from oned_backup.disk.chain import Layer


#: ranges that a message lists
_MOST_TOLD = 50


def wanted_disk(call: Call, scheme: str) -> DiskUrl:
    """The disk that the option URL names; `InvalidInput` if that is another store's."""
    url = parse_url(call.option("URL"))
    if url.scheme != scheme or url.datastore_id != call.datastore_id:
        raise InvalidInput(f"{url} does not belong to datastore {call.datastore_id}")
    return url


def salvages(call: Call) -> bool:
    """Whether what cannot be proved is to be filled with zeros, not refused."""
    return call.option("SALVAGE", "NO").upper() == "YES"


def write_disk(call: Call, url: DiskUrl, layers: Sequence[Layer]) -> Answer:
    """The answer of `download`, when the merged `layers` (oldest first) are where they should be.

    That is the option TARGET: a file, a block device or an NBD export; standard output without it.
    What cannot be proved raises `DataCorrupt`, or with the option SALVAGE is zero and raises
    `Salvaged` in the end.
    """
    from oned_backup.disk.restore import restore_chain  # noqa: PLC0415 - loads the data engine
    from oned_backup.disk.target import parse_target  # noqa: PLC0415

    text = call.option("TARGET", "")
    target = parse_target(text) if text else call.stdout
    if isinstance(target, Path):
        stored = sum(layer.path.stat().st_size for layer in layers if layer.path)
        call.space = SpaceNeeded(target.parent, stored)
    restored = restore_chain(
        layers,
        target,
        format=call.option("FORMAT", "raw"),
        progress=call.progress,
        salvage=salvages(call),
    )
    if restored.salvaged:
        raise _salvaged(call, url.disk_id, restored.salvaged, has_answer=bool(text))
    return {"BYTES": restored.bytes_written} if text else {}


def _salvaged(call: Call, disk_id: int, ranges: Sequence[tuple[int, int]], *, has_answer: bool) -> Salvaged:
    """The error that lists what had to be zero-filled: on stderr, and where stdout has no data there too."""
    listed = [f"{offset}+{length}" for offset, length in ranges]
    call.warn(f"disk {disk_id}: zero-filled (offset+length): {','.join(listed)}")
    lost = sum(length for _, length in ranges)
    more = len(listed) - _MOST_TOLD
    error = Salvaged(
        f"disk {disk_id}: {lost} bytes in {len(ranges)} ranges could not be proved and are zero"
        f" (offset+length): {', '.join(listed[:_MOST_TOLD])}"
        + (f" and {more} more, which the log has" if more > 0 else "")
    )
    if has_answer:
        error.answer = {"SALVAGED": ",".join(listed)}
    return error
