"""A transfer manager's request, as typed values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from oned_backup.contract.exports import Exports, Reason
from oned_backup.contract.request import Backup, Request
from oned_backup.errors import InvalidInput
from oned_backup.hypervisor.host import Host as Machine
from oned_backup.hypervisor.host import host_for
from oned_backup.model.host import Host
from oned_backup.model.names import CHECKPOINT_PREFIX, checked_name, is_own_checkpoint
from oned_backup.model.vm import Vm

#: for the scratch files of block devices, if no SCRATCH_DIR is set
BLOCK_SCRATCH_DIR = Path("/var/tmp")  # noqa: S108 - the names in it cannot be guessed

_DEFAULT_FREEZE_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Task:
    """What to export or to clean up, and where our own things lie on the hypervisor."""

    vm: Vm
    uri: str
    swtpm_dir: Path
    installation: str
    operation_id: str
    host: Machine
    #: on the host: holds a directory for each operation
    socket_dir: Path
    #: here: sockets that lead to those on the host; on this machine the same as `operation_dir`
    local_dir: Path
    #: None: beside each disk
    scratch_dir: Path | None
    freeze_timeout_s: float
    full_reason: Reason
    backup: Backup | None
    parent: Exports | None
    #: the checkpoint that the next increment needs; empty: none
    keep_checkpoint: str

    @property
    def own_prefix(self) -> str:
        """How the checkpoints and bitmaps of this installation begin."""
        return f"{CHECKPOINT_PREFIX}{self.installation}-"

    @property
    def checkpoint(self) -> str:
        """The name of the checkpoint to make; empty: make none."""
        return self.backup.checkpoint if self.backup else ""

    @property
    def parent_checkpoint(self) -> str:
        """The checkpoint since which changes are wanted; empty: none."""
        return self.parent.checkpoint if self.parent else ""

    @property
    def operation_dir(self) -> Path:
        """Where the sockets of this operation lie on the host."""
        return self.socket_dir / self.operation_id

    @property
    def merged_bitmap(self) -> str:
        """A bitmap of this operation alone, for changes that lie in several images."""
        return f"{self.own_prefix}merged-{self.operation_id}"

    def scratch_path(self, source: str, target: str, *, is_block: bool = False) -> Path:
        """The scratch file for a disk: its name is known before it exists, so it can be found again."""
        beside = BLOCK_SCRATCH_DIR if is_block else Path(source).parent
        return (self.scratch_dir or beside) / f"{self.scratch_prefix}{target}.scratch"

    @property
    def scratch_prefix(self) -> str:
        """How the names of this operation's scratch files begin."""
        return f".oned-backup-{self.operation_id}-"


def task_of(request: Request) -> Task:
    """The typed request; `InvalidInput` names what is absent or wrong."""
    if request.vm is None or request.host is None:
        raise InvalidInput("request: the sections VM and HOST are needed")
    options = request.options
    installation = options.get("INSTALLATION", "")
    if not is_own_checkpoint(f"{CHECKPOINT_PREFIX}{installation}-x", installation) or not installation:
        raise InvalidInput("request: the option INSTALLATION is needed")
    checkpoint = request.backup.checkpoint if request.backup else ""
    if checkpoint and not is_own_checkpoint(checkpoint, installation):
        raise InvalidInput(f"request: checkpoint '{checkpoint}' is not one of installation {installation}")
    host = Host(request.host)
    operation_id = checked_name(request.operation_id, "OPERATION/ID")
    here = _absolute(options.get("SOCKET_DIR", ""), "SOCKET_DIR")
    machine = host_for(host.uri, here / operation_id)
    return Task(
        vm=Vm(request.vm),
        uri=host.uri,
        swtpm_dir=swtpm_dir_of(host),
        installation=installation,
        operation_id=operation_id,
        host=machine,
        socket_dir=socket_dir_on(machine, host, here, installation),
        local_dir=here / operation_id,
        scratch_dir=_absolute(options["SCRATCH_DIR"], "SCRATCH_DIR") if options.get("SCRATCH_DIR") else None,
        freeze_timeout_s=float(options.get("FREEZE_TIMEOUT_S") or _DEFAULT_FREEZE_TIMEOUT_S),
        full_reason=Reason(options.get("FULL_REASON") or Reason.FIRST_BACKUP),
        backup=request.backup,
        parent=request.parent,
        keep_checkpoint=options.get("KEEP_CHECKPOINT", ""),
    )


def swtpm_dir_of(host: Host) -> Path:
    """Where libvirt keeps the state of TPMs on the host: a directory for each domain, named by its UUID."""
    return Path(host.path("SWTPM_DIR"))


def socket_dir_on(machine: Machine, host: Host, here: Path, installation: str) -> Path:
    """Where the operations of this daemon have their directories on the host; `here` is that of its own."""
    if not machine.machine:
        return here
    return Path(host.path("REMOTE_DIR")) / checked_name(installation, "INSTALLATION")


def _absolute(path: str, name: str) -> Path:
    if not path.startswith("/") or ".." in Path(path).parts:
        raise InvalidInput(f"request: {name} '{path}' is not an absolute path")
    return Path(path)
