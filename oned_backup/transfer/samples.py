"""Whether the bitmaps of the disks that are served now have seen every write; see `disk.sample`.

A disk whose bitmap is convicted needs no other export: it is read whole through the one that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing

from oned_backup.disk import sample
from oned_backup.disk.nbdsource import NbdSource
from oned_backup.model.increments import BackupType
from oned_backup.transfer.decide import Current, Decision, changed_unseen
from oned_backup.transfer.task import Task


def check(
    task: Task,
    disks: Iterable[Current],
    decisions: dict[str, Decision],
    served: Mapping[str, tuple[str, str, str]],
) -> dict[str, str]:
    """A sample of each disk that has a bitmap, by target; what must be full becomes so in `decisions`."""
    before = {disk.disk_id: disk.sample for disk in task.parent.disks} if task.parent else {}
    samples = {}
    for disk in disks if task.checkpoint else ():
        if disk.untracked:
            continue
        socket, export, bitmap = served[disk.target]
        with closing(NbdSource(socket, export, dirty_bitmap=bitmap)) as source:
            if decisions[disk.target].type is BackupType.INCREMENT:
                offset = sample.contradiction(source, before.get(disk.disk_id, ""))
                if offset is not None:
                    decisions[disk.target] = changed_unseen(disk, offset)
            samples[disk.target] = sample.take(source)
    return samples
