"""DELETE and RETAIN: (CHOOSE →) MARK → REMOVE → FORGET.

    CHOOSE   (retain) the images that KEEP_LAST lets go
    MARK     one transaction: images in state DELETE, their restore points REMOVING,
             the VM's active chain ended if it is among them
    REMOVE   the datastore's driver removes the backups; what is absent is removed already
    FORGET   one transaction: the documents and restore points go

From MARK on nothing can be restored from the images, so there is no way back:
what fails is marked and stays in state DELETE until a further delete succeeds.
After a restart of the daemon it is queued again. With `force` what the store does not
remove is forgotten nevertheless, and named in the notes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from oned_backup.errors import Cancelled, OnedBackupError
from oned_backup.model.datastore import Datastore, without_image
from oned_backup.model.image import Image, ImageState, with_state
from oned_backup.model.increments import expired_images
from oned_backup.model.vm import Vm, without_backup
from oned_backup.operations import stored
from oned_backup.operations.context import Context
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.steps import Step
from oned_backup.store import BackupState, Transaction


def _choose_one(context: Context) -> Mapping[str, Any]:
    # No backup of the VM runs: it would hold the VM's lock, which is ours.
    return {"image_ids": [context.services.image(context.integer("image_id")).id]}


def _choose_expired(context: Context) -> Mapping[str, Any]:
    services = context.services
    vm = services.vm(context.integer("vm_id"))
    images = [services.image(image_id) for image_id in vm.backup_ids]
    active = vm.config.incremental_backup_id if vm.config.has_chain else -1
    good = {row.image_id for row in services.store.backups(vm_id=vm.id, state=BackupState.GOOD)}
    broken = {image.id for image in images} - good
    expired = expired_images(images, vm.config.keep_last, active, broken)
    return {"image_ids": [image.id for image in expired], "keep_last": vm.config.keep_last}


def _images(context: Context) -> Iterable[Image]:
    """The images at hand, oldest first; those that have gone meanwhile are left out."""
    known = {Image(entry.element).id for entry in context.services.store.find("image")}
    return (context.services.image(image_id) for image_id in context.facts["image_ids"] if image_id in known)


def _mark(context: Context, tx: Transaction) -> Mapping[str, Any]:
    ended = []
    for image_id in context.facts["image_ids"]:
        tx.change("image", image_id, lambda element: with_state(Image(element), ImageState.DELETE).element)
        image = Image(tx.get("image", image_id).element)
        for row in tx.backups(image_id=image_id):
            tx.mark_backup(row.backup_id, state=BackupState.REMOVING)
        if Vm(tx.get("vm", image.vm_id).element).config.incremental_backup_id == image_id:
            ended.append(image_id)
        tx.change("vm", image.vm_id, lambda element: without_backup(Vm(element), image_id).element)  # noqa: B023
    return {"chains_ended": ended}


def _remove(context: Context) -> Mapping[str, Any]:
    for image_id in context.facts["chains_ended"]:
        context.note(f"image {image_id} held the active chain: the next backup of its VM is a full one")
    removed = []
    for image in _images(context):
        context.check_cancelled()
        rows = context.services.store.backups(image_id=image.id)
        ids = [row.backup_id for row in rows]
        try:
            stored.call_image(context.services, context.caller, "rm", image, {"BACKUP_IDS": ",".join(ids)})
        except Cancelled:
            raise
        except OnedBackupError as error:
            if not context.arguments.get("force"):
                raise
            context.note(f"forgotten, but left in datastore {image.datastore_id}: {', '.join(ids)}: {error}")
            continue
        removed += ids
    return {"removed": removed}


def _forget(context: Context, tx: Transaction) -> None:
    known = {Image(entry.element).id for entry in tx.find("image")}
    for image_id in context.facts["image_ids"]:
        if image_id not in known:
            continue
        image = Image(tx.get("image", image_id).element)
        for row in tx.backups(image_id=image_id):
            tx.forget_backup(row.backup_id)
        tx.change(
            "datastore",
            image.datastore_id,
            lambda element: without_image(Datastore(element), image_id).element,  # noqa: B023
        )
        tx.delete("image", image_id)


def _result(context: Context) -> Mapping[str, Any]:
    return {name: context.facts[name] for name in ("image_ids", "removed") if name in context.facts}


_REMOVAL = (
    Step("MARK", record=_mark),
    Step("REMOVE", do=_remove),
    Step("FORGET", record=_forget, commits=True),
)

DELETE = OperationKind(
    name="delete", steps=(Step("CHOOSE", do=_choose_one), *_REMOVAL), result=_result, requeue=True
)
RETAIN = OperationKind(
    name="retain", steps=(Step("CHOOSE", do=_choose_expired), *_REMOVAL), result=_result, requeue=True
)
