"""What has to happen on the machine where QEMU runs: files, programs, processes.

Everything that touches the hypervisor outside of libvirt's API goes through
this one seam. `LocalHost` is this machine; `ssh_host.SshHost`, another one, is
loaded only for a host that is reached by SSH.
"""

from __future__ import annotations

import fcntl
import io
import os
import select
import signal
import stat
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from oned_backup.errors import DriverFailed, Misconfigured, PermissionDenied, Unavailable
from oned_backup.ssh.libvirt_uri import parse_uri

_STOP_GRACE_S = 10.0


@dataclass(frozen=True)
class Completed:
    """A program that has ended."""

    returncode: int
    stdout: bytes
    stderr: str

    @property
    def last_words(self) -> str:
        """The last line on stderr that is not empty."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        return lines[-1] if lines else "no message"


class Host(Protocol):
    """The machine where QEMU runs. `machine`: its name; empty if it is this one."""

    machine: str

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60, check: bool = True
    ) -> Completed:
        """A program's answer; it does not outlive us."""
        ...

    def file_id(self, path: str) -> str:
        """What tells two files of one path apart."""
        ...

    def read_file(self, path: str, *, max_bytes: int) -> bytes | None:
        """A small file; None: absent."""
        ...

    def read_start(self, path: str, count: int) -> bytes:
        """The first bytes of a file."""
        ...

    def write_file(self, path: Path, data: bytes) -> None:
        """A file (0600)."""
        ...

    def read_tree(self, directory: Path, *, max_bytes: int) -> dict[str, bytes] | None:
        """The regular files beneath a directory; None: absent."""
        ...

    def write_tree(self, directory: Path, files: Mapping[str, bytes]) -> None:
        """A new directory with files."""
        ...

    def make_dir(self, path: Path) -> None:
        """A directory (0711), if absent."""
        ...

    def make_private_dir(self, path: Path) -> None:
        """An empty directory (0700)."""
        ...

    def lend_dir(self, path: Path, uid: int) -> None:
        """A new directory (0700) of another user."""
        ...

    def give(self, path: Path, uid: int) -> None:
        """A file of another user."""
        ...

    def remove(self, path: Path) -> None:
        """A file or directory that is gone."""
        ...

    def names(self, directory: Path) -> list[str]:
        """What is in a directory."""
        ...

    def free_bytes(self, directory: Path) -> int:
        """Room."""
        ...

    def stop_process(self, pid_file: Path) -> None:
        """The end of the process that locks its pid file."""
        ...

    def forward(self, remote: Path) -> Path:
        """Where a socket of the host is reached here."""
        ...

    def end_forwards(self) -> None:
        """The end of all that `forward` began."""
        ...


def host_for(uri: str, tunnel_dir: Path) -> Host:
    """The machine whose libvirt is at `uri`.

    `tunnel_dir`: a directory here, of the operation alone, for the sockets that are forwarded
    from another machine.
    """
    place = parse_uri(uri)
    if not place.is_remote:
        return LocalHost()
    from oned_backup.hypervisor.ssh_host import SshHost  # noqa: PLC0415 - paramiko takes 150 ms to load

    return SshHost(place.target, place.machine, tunnel_dir)


class LocalHost:
    """The machine that we run on."""

    machine = ""

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60, check: bool = True
    ) -> Completed:
        """What a program answered; `DriverFailed` if it fails (unless `check` is false).

        `Unavailable` if it takes longer than `timeout_s`, `Misconfigured` if it is not installed.
        """
        try:
            done = subprocess.run(
                list(argv), check=False, capture_output=True, input=stdin, timeout=timeout_s
            )
        except FileNotFoundError as error:
            raise Misconfigured(f"{argv[0]} is not installed") from error
        except subprocess.TimeoutExpired as error:
            raise Unavailable(f"{argv[0]}: no end after {timeout_s:g} s") from error
        completed = Completed(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))
        if check and completed.returncode != 0:
            raise DriverFailed(f"{argv[0]}: {completed.last_words} (exit code {completed.returncode})")
        return completed

    def file_id(self, path: str) -> str:
        """`device:inode` of the file that `path` names; `block:` for a block device, whose name counts."""
        status = os.stat(path)  # noqa: PTH116 - links are followed: the file counts, not its name
        if stat.S_ISBLK(status.st_mode):
            return "block:"
        return f"{status.st_dev}:{status.st_ino}"

    def read_file(self, path: str, *, max_bytes: int) -> bytes | None:
        """The content of a small file, None if it is absent; `DriverFailed` if it is larger."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(max_bytes + 1)
        except FileNotFoundError:
            return None
        if len(data) > max_bytes:
            raise DriverFailed(f"{path} has more than {max_bytes} bytes")
        return data

    def read_start(self, path: str, count: int) -> bytes:
        """The first bytes of a file or device; none if it cannot be read."""
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - as it is named, whatever it is
                return file.read(count)
        except OSError:
            return b""

    def write_file(self, path: Path, data: bytes) -> None:
        """A file (0600) with this content, whatever was there."""
        path.unlink(missing_ok=True)
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)

    def read_tree(self, directory: Path, *, max_bytes: int) -> dict[str, bytes] | None:
        """The regular files beneath a directory, by their relative names; None if it is absent.

        Each is read whole: swtpm replaces its files by rename.
        """
        if not directory.is_dir():
            return None
        files = {}
        for path in sorted(directory.rglob("*")):
            if path.is_file() and not path.is_symlink() and path.name != ".lock":
                data = self.read_file(str(path), max_bytes=max_bytes)
                if data is not None:
                    files[str(path.relative_to(directory))] = data
        return files

    def write_tree(self, directory: Path, files: Mapping[str, bytes]) -> None:
        """A new directory (0711: swtpm has a user of its own) with these files (0600)."""
        self.make_dir(directory.parent)
        directory.mkdir()
        directory.chmod(0o711)
        for name, data in files.items():
            path = directory / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.write_file(path, data)

    def make_dir(self, path: Path) -> None:
        """A directory that others may pass through (0711), if it is not there yet; its parents too."""
        for directory in (*reversed(path.parents), path):
            if not directory.exists():
                directory.mkdir(exist_ok=True)
                directory.chmod(0o711)  # whatever the umask

    def make_private_dir(self, path: Path) -> None:
        """An empty directory (0700) of our own; what was there under that name goes."""
        self.make_dir(path.parent)
        self.remove(path)
        path.mkdir(mode=0o700)

    def lend_dir(self, path: Path, uid: int) -> None:
        """A new directory (0700) that belongs to `uid`, in one of ours that others may pass but not read.

        Whatever we believe or write stays outside of it: a QEMU that was taken over could put
        links, or pid files of processes that are not its own, where it may write.
        """
        path.parent.chmod(0o711)
        path.mkdir(mode=0o700)
        if uid != os.geteuid():
            os.chown(path, uid, -1)

    def give(self, path: Path, uid: int) -> None:
        """Have a file belong to `uid`; `PermissionDenied` where that is not ours to do."""
        try:
            os.chown(path, uid, -1, follow_symlinks=False)
        except PermissionError as error:
            raise PermissionDenied(f"owner of {path}: {error.strerror}") from error

    def remove(self, path: Path) -> None:
        """Remove a file or a whole directory; nothing happens if it is absent."""
        try:
            if path.is_dir() and not path.is_symlink():
                import shutil  # noqa: PLC0415 - brings archive formats along

                shutil.rmtree(path)
            else:
                path.unlink()
        except FileNotFoundError:
            return

    def names(self, directory: Path) -> list[str]:
        """The names in a directory; none if it is absent."""
        try:
            return sorted(os.listdir(directory))  # noqa: PTH208 - names, not paths
        except (FileNotFoundError, NotADirectoryError):
            return []

    def free_bytes(self, directory: Path) -> int:
        """How much an unprivileged program can still write there."""
        status = os.statvfs(directory)
        return status.f_bavail * status.f_frsize

    def forward(self, remote: Path) -> Path:
        """The socket itself: it is here."""
        return remote

    def end_forwards(self) -> None:
        """Nothing."""

    def stop_process(self, pid_file: Path) -> None:
        """End the process that holds the lock on `pid_file`; nothing happens if none does.

        QEMU's tools lock their pid file for as long as they live, so a number
        in it that nobody vouches for is never signalled.
        """
        pid = _locked_by(pid_file)
        if pid is None:
            return
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            if _locked_by(pid_file) != pid:  # the number was given to another one meanwhile
                return
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    signal.pidfd_send_signal(pidfd, number)
                except ProcessLookupError:
                    return
                if select.select([pidfd], [], [], _STOP_GRACE_S)[0]:
                    return
            raise Unavailable(f"process {pid} of {pid_file} does not end")
        finally:
            os.close(pidfd)


def packed(files: Mapping[str, bytes]) -> bytes:
    """The files as a tar archive."""
    import tarfile  # noqa: PLC0415 - few VMs have what is packed

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o600
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def unpacked(archive: bytes, *, max_bytes: int) -> dict[str, bytes]:
    """The regular files of a tar archive, by their names; `DriverFailed` if one is larger."""
    import tarfile  # noqa: PLC0415

    files = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as tar:
        for entry in tar:
            content = tar.extractfile(entry) if entry.isreg() else None
            if content is None:
                continue
            if entry.size > max_bytes:
                raise DriverFailed(f"{entry.name} has more than {max_bytes} bytes")
            files[entry.name.removeprefix("./")] = content.read()
    return files


def _locked_by(pid_file: Path) -> int | None:
    """The process in the file, if somebody holds the file's lock."""
    try:
        descriptor = os.open(pid_file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        text = os.read(descriptor, 32).decode("ascii", "replace").strip()
        return int(text) if text.isdecimal() else None
    else:
        return None
    finally:
        os.close(descriptor)
