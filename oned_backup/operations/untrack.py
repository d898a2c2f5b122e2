"""UNTRACK: take our checkpoints and dirty bitmaps off a VM's disks; its chain ends.

For who wants the domain as it was before its first backup: libvirt does not undefine a domain with
checkpoints unless it is told to, and QEMU ends when it is to revert to an internal snapshot of an
image with a bitmap. Restore points stay. One step, which may be repeated: if it is broken off, the
next backup finds out what is missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oned_backup import xmldoc
from oned_backup.contract.request import Outcome
from oned_backup.model.vm import DomainState, Vm, with_config
from oned_backup.operations.context import Context
from oned_backup.operations.engine import OperationKind
from oned_backup.operations.moving import refreshed
from oned_backup.operations.steps import Step
from oned_backup.store import Transaction


def _clean(context: Context) -> Mapping[str, Any]:
    services = context.services
    vm, state, moved = refreshed(services, context.caller, services.vm(context.integer("vm_id")))
    if moved:
        context.note(moved)
    context.caller.tm(
        "post_backup" if state is DomainState.OFF else "post_backup_live",
        vm.tm_mad,
        outcome=Outcome.SUCCESS,
        host=services.host(vm.host_id).element,
        vm=vm.element,
        options={
            "SOCKET_DIR": str(services.settings.nbd_dir),
            "INSTALLATION": services.store.installation,
            "KEEP_CHECKPOINT": "",
        },
    )
    return {}


def _end_chain(context: Context, tx: Transaction) -> None:
    def ended(element: xmldoc.Element) -> xmldoc.Element:
        vm = Vm(element)
        return with_config(vm, vm.config.without_chain()).element

    tx.change("vm", context.integer("vm_id"), ended)


UNTRACK = OperationKind(name="untrack", steps=(Step("CLEAN", do=_clean, record=_end_chain),))
