"""DELETE, CUT and REMOVE: restore points that go.

    delete    an image with all its restore points:
      CHOOSE    the image is there, and nothing in it is pinned
      MARK      one transaction: image in state DELETE, its restore points REMOVING,
                the VM's active chain ended if it is among them
      REMOVE    the datastore's driver removes the backups; what is absent is removed already
      FORGET    one transaction: the documents and restore points go
    cut       the newest increments of a chain:
      CUT       one transaction: they leave the chain; it is ended if it was the active one, since
                the checkpoint that it would go on from is that of what went. `remove` is queued
    remove    what the catalogue does not need any more: images in state DELETE, and backups that
              were merged or cut off:
      REMOVE    as above
      FORGET    as above

From MARK and CUT on nothing can be restored from what goes, so there is no way back: what
fails is marked and stays until a further attempt succeeds. After a restart of the daemon it
is queued again. With `force`, `delete` forgets what the store does not remove, and names it in
the notes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from oned_backup.errors import Cancelled, Conflict, NotFound, OnedBackupError, Unavailable
from oned_backup.model.datastore import Datastore, without_image
from oned_backup.model.image import Image, ImageState, with_state
from oned_backup.model.pruning import pinned, to_remove, with_cut, with_to_remove, without_to_remove
from oned_backup.model.vm import Vm, VmState, with_config, without_backup
from oned_backup.operations import stored
from oned_backup.operations.context import Context
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.exclusion import removal_lock
from oned_backup.operations.services import Services
from oned_backup.operations.steps import Step
from oned_backup.store import BackupState, Operation, OperationState, Transaction

#: what could not be removed is tried again so much later, without being asked
_AGAIN_S = 86_400
_REMOVING = frozenset({"delete", "remove", "retention"})


def refuse_pinned(image: Image, increment_ids: Iterable[int]) -> None:
    """`Conflict` if one of these increments is pinned."""
    held = sorted(set(pinned(image)) & set(increment_ids))
    if held:
        raise Conflict(
            f"increment {held[0]} of image {image.id} is pinned",
            hint=f"Unpin it with `oned-backup image unpin {image.id} --increment {held[0]}`.",
        )


def mark_image(tx: Transaction, image_id: int) -> bool:
    """Put an image out of use, to be removed; whether it held the VM's active chain."""
    image = Image(tx.get("image", image_id).element)
    tx.change("image", image_id, lambda element: with_state(Image(element), ImageState.DELETE).element)
    for row in tx.backups(image_id=image_id):
        tx.mark_backup(row.backup_id, state=BackupState.REMOVING)
    active = Vm(tx.get("vm", image.vm_id).element).config.incremental_backup_id == image_id
    tx.change("vm", image.vm_id, lambda element: without_backup(Vm(element), image_id).element)
    return active


def cut_off(tx: Transaction, image_id: int, increment_ids: Sequence[int]) -> bool:
    """Take the newest increments off a chain; whether it was the VM's active one, which ends by it."""
    image = Image(tx.get("image", image_id).element)
    refuse_pinned(image, increment_ids)
    sources = [entry.source for entry in image.increments if entry.id in increment_ids]
    cut = with_cut(image, increment_ids)
    tx.change("image", image_id, lambda _old: cut.element)
    for backup_id in sources:
        tx.forget_backup(backup_id)
    vm = Vm(tx.get("vm", image.vm_id).element)
    active = vm.config.incremental_backup_id == image_id
    if active:
        tx.change("vm", vm.id, lambda element: with_config(Vm(element), vm.config.without_chain()).element)
    return active


def queue_removal(tx: Transaction, vm_id: int, image_ids: Sequence[int]) -> Operation:
    """Queue the removal of what the images of a VM do not need any more."""
    arguments = {"vm_id": vm_id, "image_ids": list(image_ids)}
    image_id = image_ids[0] if len(image_ids) == 1 else None
    return tx.journal.enqueue("remove", removal_lock(vm_id), arguments, vm_id=vm_id, image_id=image_id)


def owes(services: Services, vm_id: int) -> bool:
    """Whether something of a VM is to go from a store that could not remove it when it was asked."""
    return any(owing(Image(entry.element)) for entry in services.store.find("image", vm_id=vm_id))


def owing(image: Image) -> bool:
    """Whether something of an image is to go from its store."""
    return image.state == ImageState.DELETE or bool(to_remove(image))


def overdue(services: Services) -> list[tuple[int, list[int]]]:
    """VMs and their images, by datastore, of which something is still to go a day after that failed.

    Retention looks after those that are backed up; this after the others.
    """
    journal, now = services.store.journal, services.clock()
    tried: dict[int, float] = {}
    for kind in ("remove", "delete"):
        for operation in journal.list(kind=kind, state=OperationState.FAILED):
            for image_id in operation.arguments.get("image_ids", [operation.image_id]):
                tried[image_id] = max(tried.get(image_id, 0.0), operation.ended_at or 0.0)
    found: dict[tuple[int, int], list[int]] = {}
    for image_id in (number for number, when in sorted(tried.items()) if abs(now - when) >= _AGAIN_S):
        with suppress(NotFound):
            image = services.image(image_id)
            under_way = (one for one in journal.list(vm_id=image.vm_id) if not one.state.is_final)
            if owing(image) and not any(one.kind in _REMOVING for one in under_way):
                found.setdefault((image.vm_id, image.datastore_id), []).append(image_id)
    return [(vm_id, image_ids) for (vm_id, _), image_ids in found.items()]


def queue_overdue(services: Services) -> int:
    """Queue the removal of what is overdue; how many operations that makes."""
    late = overdue(services)
    with services.store.transaction() as tx:
        for vm_id, image_ids in late:
            queue_removal(tx, vm_id, image_ids)
    return len(late)


@contextmanager
def removed_later(context: Context, beside: Callable[[], int | None], backup_id: str) -> Iterator[None]:
    """Inside, a backup of no use is discarded. If that is not certain, it is removed with what else is to go.

    What is left in a store would keep its parent there, too. `beside` finds the image that has it noted.
    """
    _refuse_recorded(context.services, backup_id)
    try:
        yield
        if context.driver_hangs:
            raise Unavailable(f"a driver that hangs in the kernel may still finish backup {backup_id}")
    except Exception:
        with suppress(NotFound):
            if (image_id := beside()) is not None:
                context.services.store.change(
                    "image", image_id, lambda element: with_to_remove(Image(element), [backup_id]).element
                )
        raise


def _refuse_recorded(services: Services, backup_id: str) -> None:
    """`Conflict` if the catalogue names it: it was committed, though nobody could say that this is durable.

    Whoever starts next finds out which of the two is true, and goes forward or discards it then.
    """
    with suppress(NotFound):
        services.store.backup(backup_id)
        raise Conflict(f"backup {backup_id} is in the catalogue: it is not discarded")


def _choose(context: Context) -> Mapping[str, Any]:
    # No backup of the VM runs: it would hold the VM's lock, which is ours.
    image = context.services.image(context.integer("image_id"))
    if image.is_ready:
        refuse_pinned(image, pinned(image))
    return {"image_ids": [image.id]}


def _mark(context: Context, tx: Transaction) -> Mapping[str, Any]:
    return {"chains_ended": [image_id for image_id in context.facts["image_ids"] if mark_image(tx, image_id)]}


def _cut(context: Context, tx: Transaction) -> Mapping[str, Any]:
    image_id, increment_ids = context.integer("image_id"), context.arguments["increment_ids"]
    active = cut_off(tx, image_id, increment_ids)
    if active:
        context.note(f"image {image_id} held the active chain: the next backup of its VM is a full one")
    queued = queue_removal(tx, context.integer("vm_id"), [image_id])
    return {"image_id": image_id, "cut": list(increment_ids), "remove": queued.id}


def _named(context: Context) -> Mapping[str, Any]:
    """The images that `remove` was asked to look after, and what is to go of them now.

    Whoever reads what a merge replaces later has begun after us, and so we did not wait for it.
    """
    facts = {"image_ids": list(context.arguments["image_ids"]), "chains_ended": []}
    context.facts |= facts
    return {**facts, "going": {str(image.id): _going(context.services, image) for image in _images(context)}}


def _images(context: Context) -> Iterator[Image]:
    """The images at hand, oldest first; those that have gone meanwhile are left out."""
    for image_id in context.facts["image_ids"]:
        try:
            image = context.services.image(image_id)
        except NotFound:
            continue
        yield image


def _going(services: Services, image: Image) -> list[str]:
    """The ids of all backups of the image that are to go from its store."""
    rows = services.store.backups(image_id=image.id) if image.state == ImageState.DELETE else []
    return [*to_remove(image), *(row.backup_id for row in rows)]


def _remove(context: Context) -> Mapping[str, Any]:
    for image_id in context.facts["chains_ended"]:
        context.note(f"image {image_id} held the active chain: the next backup of its VM is a full one")
    removed: list[str] = []
    for image in _images(context):
        context.check_cancelled()
        chosen = context.facts.get("going")
        ids = _going(context.services, image) if chosen is None else chosen.get(str(image.id))
        if not ids:
            continue
        try:
            stored.call_image(context.services, context.caller, "rm", image, {"BACKUP_IDS": ",".join(ids)})
        except Cancelled:
            raise
        except OnedBackupError as error:
            if not context.arguments.get("force"):
                raise
            context.note(f"forgotten, but left in datastore {image.datastore_id}: {', '.join(ids)}: {error}")
            continue
        finally:
            context.services.measured_at.pop(image.datastore_id, None)  # there may be more room now
        removed += ids
    return {"removed": removed}


def _forget(context: Context, tx: Transaction) -> None:
    for image_id in context.facts["image_ids"]:
        try:
            image = Image(tx.get("image", image_id).element)
        except NotFound:
            continue
        _forget_of(context, tx, image)


def _forget_of(context: Context, tx: Transaction, image: Image) -> None:
    """Forget of one image what was removed; the image too, if it is out of use and nothing of it is left."""
    rows = tx.backups(image_id=image.id)
    removed = context.facts["removed"]
    owed = {*(row.backup_id for row in rows), *to_remove(image)}  # more may have been noted meanwhile
    gone = context.arguments.get("force") or owed <= set(removed)
    if image.state != ImageState.DELETE or not gone:  # perhaps it was put out of use meanwhile
        tx.change("image", image.id, lambda old: without_to_remove(Image(old), removed).element)
        return
    for row in rows:
        tx.forget_backup(row.backup_id)
    tx.change(
        "datastore",
        image.datastore_id,
        lambda element: without_image(Datastore(element), image.id).element,
    )
    tx.delete("image", image.id)
    vm = Vm(tx.get("vm", image.vm_id).element)
    if vm.state == VmState.DONE and not tx.find("image", vm_id=vm.id):  # it was there for its images only
        tx.delete("vm", vm.id)


def _result(context: Context) -> Mapping[str, Any]:
    wanted = ("image_ids", "removed", "image_id", "cut", "remove")
    return {name: context.facts[name] for name in wanted if name in context.facts}


_REMOVAL = (Step("REMOVE", do=_remove), Step("FORGET", record=_forget, commits=True))

DELETE = OperationKind(
    name="delete",
    steps=(Step("CHOOSE", do=_choose), Step("MARK", record=_mark), *_REMOVAL),
    result=_result,
    requeue=True,
)
CUT = OperationKind(name="cut", steps=(Step("CUT", record=_cut, commits=True),), result=_result)
REMOVE = OperationKind(
    name="remove", steps=(Step("CHOOSE", do=_named), *_REMOVAL), result=_result, requeue=True
)
