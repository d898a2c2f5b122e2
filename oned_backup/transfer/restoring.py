"""What a restore makes on the machine where it is wanted: new files that get their names when all are proved.

    BASE/.oned-backup-<operation>/     0700; BASE is DIRECTORY, or the nearest one above it that exists
        disk.0.qcow2  domain.xml  …    under the names that they will have
        .placing                       written before the first is moved: what each is known by, and its name
        .made                          the directories that are going to be made, outermost first
    DIRECTORY/disk.0.qcow2  …          at the end

Everything is a coreutils or QEMU command through `host.run`, so that it is the same
on this machine and on one that has nothing of ours. What is there is found by the names
above: each function may be called again after any of them died anywhere.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from oned_backup.contract.request import Outcome, Request
from oned_backup.contract.targets import FORMATS, DiskTarget, NewDisk, parse_disks
from oned_backup.errors import (
    Conflict,
    DriverFailed,
    InvalidInput,
    NoSpace,
    NotFound,
    OnedBackupError,
    PermissionDenied,
)
from oned_backup.hypervisor import offline
from oned_backup.hypervisor.host import Completed, LocalHost, host_for
from oned_backup.hypervisor.host import Host as Machine
from oned_backup.model.host import Host
from oned_backup.model.names import checked_name
from oned_backup.transfer import deadman, guard
from oned_backup.transfer.task import socket_dir_on, swtpm_dir_of

_PLACING = ".placing"
_MADE = ".made"
#: device, inode and birth, by which a file is known whatever its name is
_IDENTITY = "--printf=%d:%i:%w\\t%n\\n"
_SYNC_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Restoring:
    """One restore on one host.

    `servers`: where the sockets of its NBD servers lie, on the host; `tunnels`: where those lie
    here that lead to them, the same on this machine.
    """

    host: Machine
    uri: str
    operation_id: str
    directory: Path
    servers: Path
    tunnels: Path

    @property
    def work_name(self) -> str:
        """The name of the directory in which everything is made."""
        return f".oned-backup-{self.operation_id}"


def pre_restore(request: Request, source_dir: Path) -> tuple[DiskTarget, ...]:
    """Make room for the option DISKS, and bring the files of `source_dir`; where to write each disk."""
    disk_format = request.options.get("FORMAT", FORMATS[0])
    if disk_format not in FORMATS:
        raise InvalidInput(f"option FORMAT: '{disk_format[:20]}' is none of {', '.join(FORMATS)}")
    files = {path.name: path.read_bytes() for path in sorted(source_dir.iterdir())}
    room = request.options.get("ROOM_BYTES", "")
    return prepare(
        _restoring(request),
        parse_disks(request.options.get("DISKS", "")),
        files,
        disk_format,
        room_bytes=int(room) if room.isdecimal() else 0,
    )


def restore(request: Request) -> None:
    """Give the files of the option NAMES their names."""
    names = [name for name in request.options.get("NAMES", "").split(",") if name]
    place(_restoring(request), [checked_name(name, "option NAMES") for name in names])


def post_restore(request: Request) -> None:
    """End the servers; unless the outcome is SUCCESS, remove all that was made.

    That is also the state of the TPM of the domain DOMAIN_UUID, which is not defined.
    """
    task = _restoring(request)
    clean(task, made=request.outcome is not Outcome.SUCCESS)
    uuid = request.options.get("DOMAIN_UUID", "")
    if uuid and request.host is not None and request.outcome is not Outcome.SUCCESS:
        task.host.remove(swtpm_dir_of(Host(request.host)) / checked_name(uuid, "option DOMAIN_UUID"))


def _restoring(request: Request) -> Restoring:
    text = request.options.get("DIRECTORY", "")
    directory = Path(text)
    if not directory.is_absolute() or ".." in directory.parts or not text.isprintable():
        raise InvalidInput(f"option DIRECTORY: '{text[:200]}' is not an absolute path")
    sockets = Path(request.options.get("SOCKET_DIR", ""))
    if not sockets.is_absolute():
        raise InvalidInput("request: the option SOCKET_DIR is needed")
    tunnels = sockets / request.operation_id
    if request.host is None:
        return Restoring(LocalHost(), "", request.operation_id, directory, tunnels, tunnels)
    host = Host(request.host)
    machine = host_for(host.uri, tunnels)
    there = socket_dir_on(machine, host, sockets, request.options.get("INSTALLATION", ""))
    servers = there / request.operation_id
    return Restoring(machine, host.uri, request.operation_id, directory, servers, tunnels)


def prepare(
    task: Restoring,
    disks: Sequence[NewDisk],
    files: Mapping[str, bytes],
    disk_format: str,
    *,
    room_bytes: int = 0,
) -> tuple[DiskTarget, ...]:
    """Room for the `disks`, and the small `files`; where to write each disk.

    `Conflict` if one of the names is taken; `NoSpace` if less than `room_bytes` are free.
    """
    clean(task, made=True)  # of an attempt before this one
    base = _base(task)
    names = [*(disk.name for disk in disks), *files]
    taken = _existing(task, [task.directory / name for name in names])
    if taken:
        raise Conflict(f"{taken[0]} exists already")
    _require_room(task, base, room_bytes)
    work = base / task.work_name
    _run(task, ["mkdir", "-m", "0700", "--", str(work)])
    for name, data in files.items():
        _write(task, work / name, data)
    if not task.host.machine or _is_here(task, work):
        return tuple(DiskTarget(disk.disk_id, str(work / disk.name), disk_format) for disk in disks)
    task.host.make_private_dir(task.servers)
    deadman.start_for_servers(task.host, task.servers, work)
    task.tunnels.mkdir(mode=0o700, parents=True, exist_ok=True)
    guard.start_for_servers(task.uri, task.servers, task.tunnels)
    return tuple(_serve(task, work / disk.name, disk, disk_format) for disk in disks)


def place(task: Restoring, names: Sequence[str]) -> None:
    """Make all that was restored durable and give it its names, replacing nothing: `Conflict`.

    `names` are those that must be there.
    """
    offline.stop_servers(task.host, task.servers)
    if _placed(task) >= set(names):  # asked again
        return
    work = _work(task)
    base = work.parent
    above = (task.directory, *task.directory.parents)
    missing = [directory for directory in above if base in directory.parents]
    paths = [str(work / name) for name in names]
    _run(task, ["chmod", "0600", "--", *paths])
    _run(task, ["sync", "--", *paths], timeout_s=_SYNC_TIMEOUT_S)
    identities = _run(task, ["stat", _IDENTITY, "--", *paths])
    _write(task, work / _MADE, "".join(f"{path}\n" for path in reversed(missing)).encode())
    _write(task, work / _PLACING, identities.stdout)
    for directory in reversed(missing):
        _run(task, ["mkdir", "-m", "0755", "--", str(directory)])  # QEMU runs as another user
    _run(task, ["mv", "-n", "-t", str(task.directory), "--", *paths])
    left = _existing(task, [Path(path) for path in paths])
    if left:
        raise Conflict(f"{task.directory / left[0].name} exists already")
    _run(task, ["sync", "--", str(task.directory), *map(str, missing), str(base)])


def clean(task: Restoring, *, made: bool) -> None:
    """End the servers and remove what has no name yet; with `made` also what `place` has given one."""
    task.host.end_forwards()
    guard.stop(task.tunnels)
    LocalHost().remove(task.tunnels)  # what is here goes first: the host may be out of reach
    offline.stop_servers(task.host, task.servers)
    task.host.remove(task.servers)
    for work in _works(task):
        if made:  # only what is ours, whoever has put other things there
            placed = sorted(str(task.directory / name) for name in _placed(task))
            if placed:
                _run(task, ["rm", "-f", "--", *placed])
            for directory in reversed(_lines(task, work / _MADE)):
                _run(task, ["rmdir", "--", directory], check=False)
        _run(task, ["rm", "-rf", "--", str(work)], timeout_s=_SYNC_TIMEOUT_S)


def _placed(task: Restoring) -> set[str]:
    """The names in DIRECTORY whose files are the ones that `place` has moved there."""
    for work in _works(task):
        made = dict(_identity(line) for line in _lines(task, work / _PLACING))
        if made:
            paths = [str(task.directory / name) for name in made]
            there = _run(task, ["stat", _IDENTITY, "--", *paths], check=False)
            found = dict(_identity(line) for line in there.stdout.decode().splitlines())
            return {name for name, identity in found.items() if made.get(name) == identity}
    return set()


def _identity(line: str) -> tuple[str, str]:
    """The name of a file and what it is known by, from a line that `stat` printed."""
    identity, _, path = line.partition("\t")
    return Path(path).name, identity


def _base(task: Restoring) -> Path:
    """DIRECTORY, or the nearest directory above it that exists."""
    directories = [task.directory, *task.directory.parents]
    argv = ["stat", "-L", "--printf=%F\\t%n\\n", "--", *map(str, directories)]
    found = _run(task, argv, check=False).stdout.decode().splitlines()
    if not found:
        raise DriverFailed(f"{task.directory}: cannot be looked at")
    kind, _, name = found[0].partition("\t")
    if kind != "directory":
        raise Conflict(f"{name} is not a directory")
    return Path(name)


def _require_room(task: Restoring, base: Path, room_bytes: int) -> None:
    free_bytes = task.host.free_bytes(base)
    if free_bytes < room_bytes:
        place = f"{task.host.machine}:{task.directory}" if task.host.machine else str(task.directory)
        raise NoSpace(
            f"{place}: at least {-(-room_bytes >> 20)} MB needed, {free_bytes >> 20} MB free",
            hint="Make room there, use another directory, or try it all the same with --no-space-check.",
        )


def _work(task: Restoring) -> Path:
    found = _works(task)
    if not found:
        raise NotFound(f"nothing of operation {task.operation_id} is above {task.directory}")
    return found[0]


def _works(task: Restoring) -> list[Path]:
    """The directories in which this operation has made something: one, or none."""
    directories = (task.directory, *task.directory.parents)
    return _existing(task, [directory / task.work_name for directory in directories])


def _existing(task: Restoring, paths: Sequence[Path]) -> list[Path]:
    """Those of the paths at which there is something."""
    done = _run(task, ["stat", "--printf=%n\\n", "--", *map(str, paths)], check=False)
    return [Path(line) for line in done.stdout.decode().splitlines()]


def _is_here(task: Restoring, work: Path) -> bool:
    """Whether the host's directory is also one of ours, at the same path, and we may write to it.

    A name that cannot be guessed proves it: then disks need not go through a tunnel.
    """
    token = work / f".here-{secrets.token_hex(16)}"
    _write(task, token, b"")
    try:
        descriptor = os.open(token, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    os.close(descriptor)
    return True


def _serve(task: Restoring, path: Path, disk: NewDisk, disk_format: str) -> DiskTarget:
    """A new image on the host, and where we reach the server that writes to it."""
    _run(task, ["qemu-img", "create", "-q", "-f", disk_format, "--", str(path), str(disk.size_bytes)])
    _run(task, ["chmod", "0600", "--", str(path)])
    export = f"disk-{disk.disk_id}"
    server = offline.serve_new(task.host, str(path), disk_format, directory=task.servers, export=export)
    here = quote(str(task.host.forward(server.socket)))
    return DiskTarget(disk.disk_id, f"nbd+unix:///{export}?socket={here}", "raw")


def _write(task: Restoring, path: Path, data: bytes) -> None:
    _run(task, ["install", "-m", "0600", "-T", "--", "/dev/stdin", str(path)], stdin=data)


def _lines(task: Restoring, path: Path) -> list[str]:
    """The lines of a file of ours; none if it is absent."""
    return _run(task, ["cat", "--", str(path)], check=False).stdout.decode().splitlines()


def _run(
    task: Restoring, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60, check: bool = True
) -> Completed:
    done = task.host.run(argv, stdin=stdin, timeout_s=timeout_s, check=False)
    if check and done.returncode != 0:
        raise _failure(done)
    return done


_KINDS: tuple[tuple[str, type[OnedBackupError]], ...] = (
    ("No space left", NoSpace),
    ("quota exceeded", NoSpace),
    ("Permission denied", PermissionDenied),
    ("Operation not permitted", PermissionDenied),
    ("Read-only file system", PermissionDenied),
    ("File exists", Conflict),
    ("No such file", NotFound),
)


def _failure(done: Completed) -> OnedBackupError:
    kind = next((kind for words, kind in _KINDS if words in done.stderr), DriverFailed)
    return kind(done.last_words)
