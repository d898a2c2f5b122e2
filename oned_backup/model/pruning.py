"""What retention changes of a backup image: increments merged or cut off, and points that are pinned.

OpenNebula has no place for these, so they lie in IMAGE/TEMPLATE/ONED_BACKUP:

    PINNED/ID*          increments that retention keeps whatever the settings are (0: a backup of MODE=FULL)
    TO_REMOVE/BACKUP*   backups that the catalogue does not need any more and that are still in the store

An increment that others were merged into keeps its id, date and place; SOURCE becomes
the merged backup. Ids are not used again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from oned_backup import xmldoc
from oned_backup.errors import Conflict, NotFound
from oned_backup.model.document import id_list, ids, section
from oned_backup.model.image import Image, with_chain
from oned_backup.model.increments import Increment

_OURS = "TEMPLATE/ONED_BACKUP"


def pinned(image: Image) -> tuple[int, ...]:
    """The ids of the increments that are kept."""
    return ids(image.element, f"{_OURS}/PINNED")


def with_pin(image: Image, increment_id: int, *, pin: bool) -> Image:
    """`image` with that increment pinned or not; `NotFound` if it does not have it."""
    known = [increment.id for increment in image.increments] or [0]
    if increment_id not in known:
        raise NotFound(
            f"image {image.id} has no increment {increment_id}", hint=f"It has {', '.join(map(str, known))}."
        )
    wanted = {*pinned(image), increment_id} if pin else {*pinned(image)} - {increment_id}
    return _with_own(image, "PINNED", id_list(wanted) if wanted else None)


def to_remove(image: Image) -> tuple[str, ...]:
    """The ids of the backups that are to go from the store."""
    return tuple(entry.text or "" for entry in image.element.iterfind(f"{_OURS}/TO_REMOVE/BACKUP"))


def with_to_remove(image: Image, backup_ids: Iterable[str]) -> Image:
    """`image` with further backups that are to go from the store."""
    return _with_to_remove(image, dict.fromkeys([*to_remove(image), *backup_ids]))


def without_to_remove(image: Image, backup_ids: Iterable[str]) -> Image:
    """`image` without those, which have gone from the store."""
    gone = set(backup_ids)
    return _with_to_remove(image, [name for name in to_remove(image) if name not in gone])


def run_of(image: Image, increment_ids: Sequence[int]) -> tuple[Increment, ...]:
    """The increments to merge, oldest first; `Conflict` unless they follow each other in the chain."""
    chain = image.increments
    numbers = [increment.id for increment in chain]
    if len(increment_ids) > 1 and increment_ids[0] in numbers:
        start = numbers.index(increment_ids[0])
        if numbers[start : start + len(increment_ids)] == list(increment_ids):
            return chain[start : start + len(increment_ids)]
    listed = ", ".join(map(str, increment_ids))
    raise Conflict(f"image {image.id}: increments {listed} do not follow each other: it has {numbers}")


def with_merged(image: Image, increment_ids: Sequence[int], *, source: str, size_mb: int) -> Image:
    """`image` with a run of increments merged into its newest; what was merged is to be removed."""
    run = run_of(image, increment_ids)
    merged = replace(run[-1], parent_id=run[0].parent_id, type=run[0].type, size_mb=size_mb, source=source)
    kept = {run[-1].id: merged}
    chain = [
        kept.get(increment.id, increment)
        for increment in image.increments
        if increment.id not in increment_ids[:-1]
    ]
    return with_to_remove(with_chain(image, chain), [increment.source for increment in run])


def with_cut(image: Image, increment_ids: Sequence[int]) -> Image:
    """`image` without the increments at its end; `Conflict` if they are not its end, or all of it."""
    chain = image.increments
    end = chain[-len(increment_ids) :]
    if not increment_ids or [entry.id for entry in end] != list(increment_ids) or len(end) == len(chain):
        listed = ", ".join(map(str, increment_ids))
        raise Conflict(f"image {image.id}: increments {listed} are not the end of its chain")
    return with_to_remove(with_chain(image, chain[: -len(end)]), [increment.source for increment in end])


def _with_to_remove(image: Image, backup_ids: Iterable[str]) -> Image:
    entries = [xmldoc.build("BACKUP", name) for name in backup_ids]
    return _with_own(image, "TO_REMOVE", {"BACKUP": entries} if entries else None)


def _with_own(image: Image, tag: str, content: xmldoc.Content) -> Image:
    element = xmldoc.copy(image.element)
    ours = section(section(element, "TEMPLATE"), "ONED_BACKUP")
    if content is not None:
        xmldoc.put(ours, tag, content)
    elif (old := ours.find(tag)) is not None:
        ours.remove(old)
    return Image(element)
