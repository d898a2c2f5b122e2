"""Where a backup goes: into which chain, after which backup, and if into a new chain, why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from oned_backup.contract.exports import Reason
from oned_backup.errors import InvalidInput
from oned_backup.model.backup_config import BackupConfig, Mode
from oned_backup.model.image import Image


@dataclass(frozen=True)
class ChainPlan:
    """The place of the next backup. Without `image_id` it begins a new image, for `full_reason`.

    `explanation` is for the user where the new chain is not what the configuration promised.
    """

    datastore_id: int
    image_id: int | None = None
    parent_id: str = ""
    increment_id: int = 0
    full_reason: Reason | None = None
    explanation: str = ""


def plan_chain(
    config: BackupConfig,
    images: Mapping[int, Image],
    good_backups: Collection[str],
    *,
    enabled_datastores: Collection[int],
    requested_datastore: int | None = None,
    reset: bool = False,
) -> ChainPlan:
    """Continue the active chain where that is sound, else begin a new one and say why.

    `images`: the VM's images by id. `good_backups`: the ids of all restore points of the
    active chain that are good. An active chain fixes the datastore; asking for
    another one begins a new chain there. `InvalidInput` if no datastore can be chosen.
    """
    active = images.get(config.incremental_backup_id) if config.has_chain else None
    chain_store = None if active is None else active.datastore_id
    fixed = requested_datastore if requested_datastore is not None else chain_store
    datastore_id = _usual_datastore(config, images, enabled_datastores) if fixed is None else fixed
    if config.mode is Mode.FULL:
        return ChainPlan(datastore_id, full_reason=Reason.FULL_MODE)
    if not config.has_chain and not any(image.increments for image in images.values()):
        return ChainPlan(datastore_id, full_reason=Reason.FIRST_BACKUP)
    reason, why = _fault(config, images, good_backups)
    if reset:
        reason, why = Reason.RESET, "it was asked for"
    elif reason is None and datastore_id != chain_store:
        reason = Reason.OTHER_DATASTORE
        why = f"the chain is in datastore {chain_store}, datastore {datastore_id} was asked for"
    if reason is not None or active is None:
        return ChainPlan(datastore_id, full_reason=reason, explanation=f"new chain ({reason}): {why}")
    last = active.increments[-1]
    if 0 < config.chain_length <= last.id + 1:  # ids are not used again: also those merged meanwhile count
        return ChainPlan(datastore_id, full_reason=Reason.CHAIN_LENGTH)
    return ChainPlan(datastore_id, active.id, last.source, last.id + 1)


def last_good_parent(config: BackupConfig, images: Mapping[int, Image]) -> str:
    """The backup whose checkpoint must outlive a failed backup, so that the chain can go on; or ''.

    The checkpoint's name is in its record: a backup that others were merged into has another id.
    """
    active = images.get(config.incremental_backup_id) if config.has_chain else None
    return active.increments[-1].source if active is not None and active.increments else ""


def _fault(
    config: BackupConfig, images: Mapping[int, Image], good_backups: Collection[str]
) -> tuple[Reason | None, str]:
    """Why the chain that would be due cannot be continued: code and words; None if it can.

    Damage closes a chain. So if there is no active one, the newest image tells why.
    """
    if not config.has_chain:
        newest = images[max(images)]
        broken = _broken(newest, good_backups) if newest.is_ready else None
        return (Reason.CHAIN_ENDED, "the last one was ended") if broken is None else broken
    image = images.get(config.incremental_backup_id)
    if image is None:
        return Reason.CHAIN_LOST, f"image {config.incremental_backup_id} of the active chain is gone"
    if not image.is_ready:
        return Reason.CHAIN_LOST, f"image {image.id} is in state {image.state_name}"
    if not image.increments:
        return Reason.CHAIN_LOST, f"image {image.id} holds no chain"
    last = image.increments[-1].id
    if last != config.last_increment_id:
        text = f"image {image.id} ends with increment {last}, the VM's last one is {config.last_increment_id}"
        return Reason.CHAIN_LOST, text
    return _broken(image, good_backups) or (None, "")


def _broken(image: Image, good_backups: Collection[str]) -> tuple[Reason, str] | None:
    """The first damaged restore point of a chain, None if all are good."""
    for entry in image.increments:
        if entry.source not in good_backups:
            return Reason.CHAIN_DAMAGED, f"backup {entry.source} of image {image.id} is damaged"
    return None


def _usual_datastore(
    config: BackupConfig, images: Mapping[int, Image], enabled_datastores: Collection[int]
) -> int:
    """Where the last backup went, else what holds the newest image, which may be an imported one."""
    used = [images[image_id].datastore_id for image_id in sorted(images, reverse=True)]
    for candidate in (config.last_datastore_id, *used):
        if candidate is not None and candidate in enabled_datastores:
            return candidate
    if len(enabled_datastores) == 1:
        return next(iter(enabled_datastores))
    if not enabled_datastores:
        raise InvalidInput(
            "there is no enabled backup datastore",
            hint="Make one with `oned-backup datastore create NAME --driver fs BASE_PATH=/…`.",
        )
    known = ", ".join(str(entry) for entry in sorted(enabled_datastores))
    raise InvalidInput(
        "the VM has no backup yet and there is more than one datastore",
        hint=f"Choose with -d: there are {known}.",
    )


def space_needed_mb(history: Mapping[str, int], *, continues: bool, sizes_mb: Collection[int]) -> int:
    """About what the backup will take in the store, from what earlier ones took; at least 1.

    `history`: size of the VM's stored backups by type, the largest of each; `sizes_mb`: the
    virtual sizes of the disks, an upper bound. A first backup's size is unknown (thin
    disks hold less than they promise): its driver finds out before it writes.
    """
    kind = "INCREMENT" if continues else "FULL"
    return max(1, min(history.get(kind, 1), sum(sizes_mb) or 1))
