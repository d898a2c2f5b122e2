"""Transfer manager for the dummy hypervisor: disks are copied into staged files.

No libvirt, QEMU or NBD: many backups a second, for tests and simulation. What an action does
not need is not loaded for it: most of its time is the start of the interpreter.
"""

from __future__ import annotations

from pathlib import Path

from oned_backup.errors import InvalidInput
from oned_backup.hypervisor.dummy import DummyHost, checkpoint_path
from oned_backup.model.host import Host
from oned_backup.model.names import CHECKPOINT_PREFIX
from oned_backup.model.vm import Vm
from oned_backup.sdk import Answer, Call
from oned_backup.transfer.files_driver import FilesDriver


class Dummy(FilesDriver):
    """Increments where the parent's checkpoint is there, else full backups."""

    def pre_backup_live(self, call: Call) -> Answer:
        """The disks of a domain that runs."""
        from oned_backup.transfer.dummy import export  # noqa: PLC0415 - loads the data engine

        return export(call, *_place(call), running=True)

    def pre_backup(self, call: Call) -> Answer:
        """The disks of a domain that is off."""
        from oned_backup.transfer.dummy import export  # noqa: PLC0415 - loads the data engine

        return export(call, *_place(call), running=False)

    def post_backup(self, call: Call) -> None:
        """The domain is not frozen, and has the checkpoint that is kept; staged files are the daemon's."""
        host, vm = _place(call)
        domain = host.find(vm.uuid)
        host.update(domain, frozen=False)
        prefix = f"{CHECKPOINT_PREFIX}{call.option('INSTALLATION', '')}"
        keep = call.option("KEEP_CHECKPOINT", "")
        for disk in domain.disks:
            source = Path(disk.source)
            for path in source.parent.glob(f"{source.name}.{prefix}*"):
                if path != checkpoint_path(disk.source, keep):
                    path.unlink()

    post_backup_live = post_backup


def _place(call: Call) -> tuple[DummyHost, Vm]:
    request = call.request
    if request.host is None or request.vm is None:
        raise InvalidInput("request: the sections HOST and VM are needed")
    return DummyHost(Host(request.host).uri), Vm(request.vm)


DRIVER = Dummy()
