"""What has to happen on the machine where QEMU runs: files, programs, processes.

Everything that touches the hypervisor outside of libvirt's API goes through
this one seam. `LocalHost` is this machine.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oned_backup.errors import DriverFailed, Misconfigured, Unavailable

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


class LocalHost:
    """The machine that we run on."""

    def run(self, argv: Sequence[str], *, timeout_s: float = 60, check: bool = True) -> Completed:
        """What a program answered; `DriverFailed` if it fails (unless `check` is false).

        `Unavailable` if it takes longer than `timeout_s`, `Misconfigured` if it is not installed.
        """
        try:
            done = subprocess.run(
                list(argv), check=False, capture_output=True, stdin=subprocess.DEVNULL, timeout=timeout_s
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

    def read_file(self, path: str, *, max_bytes: int) -> bytes:
        """The content of a small file; `DriverFailed` if it is larger."""
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise DriverFailed(f"{path} has more than {max_bytes} bytes")
        return data

    def make_private_dir(self, path: Path) -> None:
        """An empty directory (0700) of our own; what was there under that name goes."""
        path.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
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

    def remove(self, path: Path) -> None:
        """Remove a file or a whole directory; nothing happens if it is absent."""
        try:
            if path.is_dir() and not path.is_symlink():
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
