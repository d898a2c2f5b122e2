"""A hypervisor on another machine, which needs sshd, coreutils and QEMU's tools, and nothing of ours.

Commands go through one connection of paramiko; sockets are forwarded by OpenSSH,
which is fast, by processes that outlive us and are found again by the names of
their control sockets. Both read the same client configuration: OpenSSH is asked
what it says for the host.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import paramiko

from oned_backup.errors import DriverFailed, Misconfigured, NotFound, Unavailable
from oned_backup.hypervisor.host import Completed, packed, unpacked
from oned_backup.hypervisor.ssh_connection import connect
from oned_backup.ssh.command import quoted, ssh_argv, watched
from oned_backup.ssh.host_keys import explained

MAX_OUTPUT_BYTES = 64 << 20

_STOP_GRACE_S = 10.0
_POLL_S = 0.05
_CONTROL = ".ctl"
_READ_BYTES = 1 << 16


class SshHost:
    """The machine at an ssh target. `tunnel_dir`: where the sockets that are forwarded from it lie here."""

    def __init__(self, target: str, machine: str, tunnel_dir: Path) -> None:
        self.target = target
        self.machine = machine
        self.tunnel_dir = tunnel_dir

    def run(
        self, argv: Sequence[str], *, stdin: bytes = b"", timeout_s: float = 60, check: bool = True
    ) -> Completed:
        """What a program there answered; it ends with us. Errors as `LocalHost.run`."""
        try:
            completed = self._run(argv, stdin, time.monotonic() + timeout_s, timeout_s)
        except (paramiko.SSHException, EOFError, OSError) as error:
            self.__dict__.pop("_client", None)
            raise Unavailable(f"{argv[0]} on {self.machine}: {error or 'the connection ended'}") from error
        if completed.returncode == 127 and f"{argv[0]}: not found" in completed.stderr:
            raise Misconfigured(f"{argv[0]} is not installed on {self.machine}")
        if check and completed.returncode != 0:
            words = completed.last_words
            raise DriverFailed(f"{argv[0]} on {self.machine}: {words} (exit code {completed.returncode})")
        return completed

    def _run(self, argv: Sequence[str], stdin: bytes, deadline: float, timeout_s: float) -> Completed:
        transport = self._client.get_transport()
        if transport is None:
            raise EOFError
        channel = transport.open_session(timeout=timeout_s)
        out, err = bytearray(), bytearray()
        try:
            channel.fileno()  # made now, it tells of all that comes; made after the end, it tells nothing
            channel.exec_command(quoted(watched(argv, timeout_s=timeout_s, stdin_bytes=len(stdin))))
            channel.sendall(stdin)
            while True:
                taken = _drain(channel, out, err)
                if channel.exit_status_ready() and not taken and (channel.eof_received or channel.closed):
                    break
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise Unavailable(f"{argv[0]} on {self.machine}: no end after {timeout_s:g} s")
                if len(out) > MAX_OUTPUT_BYTES:
                    raise DriverFailed(
                        f"{argv[0]} on {self.machine}: more than {MAX_OUTPUT_BYTES} bytes of output"
                    )
                if not taken:
                    select.select([channel], [], [], min(remaining, 1.0))
            code = channel.recv_exit_status()
        finally:
            channel.close()
        if code == -1:
            raise EOFError
        return Completed(code, bytes(out), err.decode("utf-8", "replace"))

    @cached_property
    def _client(self) -> paramiko.SSHClient:
        return connect(self.target, self.machine)

    # --- files

    def file_id(self, path: str) -> str:
        """As `LocalHost.file_id`, with the machine: `device:inode@machine`."""
        done = self.run(["stat", "-L", "-c", "%F|%d:%i", "--", path], check=False)
        if done.returncode != 0:
            raise NotFound(f"{path} on {self.machine}: {done.last_words}")
        kind, _, name = done.stdout.decode().strip().rpartition("|")
        return "block:" if kind == "block special file" else f"{name}@{self.machine}"

    def read_file(self, path: str, *, max_bytes: int) -> bytes | None:
        """The content of a small file, None if it is absent; `DriverFailed` if it is larger."""
        done = self.run(["head", "-c", str(max_bytes + 1), "--", path], check=False)
        if done.returncode != 0:
            if "No such file" in done.stderr:
                return None
            raise DriverFailed(f"{path} on {self.machine}: {done.last_words}")
        if len(done.stdout) > max_bytes:
            raise DriverFailed(f"{path} has more than {max_bytes} bytes")
        return done.stdout

    def read_start(self, path: str, count: int) -> bytes:
        """As `LocalHost.read_start`."""
        return self.run(["head", "-c", str(count), "--", path], check=False).stdout

    def write_file(self, path: Path, data: bytes) -> None:
        """A file (0600) with this content, whatever was there."""
        self.run(["install", "-m", "0600", "-T", "--", "/dev/stdin", str(path)], stdin=data)

    def read_tree(self, directory: Path, *, max_bytes: int) -> dict[str, bytes] | None:
        """The regular files beneath a directory, by their relative names; None if it is absent."""
        argv = ["tar", "-c", "-f", "-", "--exclude=.lock", "-C", str(directory), "--", "."]
        done = self.run(argv, check=False)
        if done.returncode > 1:  # 1: a file changed meanwhile; swtpm replaces them
            if "No such file" in done.stderr:
                return None
            raise DriverFailed(f"{directory} on {self.machine}: {done.last_words}")
        return unpacked(done.stdout, max_bytes=max_bytes)

    def write_tree(self, directory: Path, files: Mapping[str, bytes]) -> None:
        """As `LocalHost.write_tree`."""
        self.make_dir(directory.parent)
        self.run(["mkdir", "-m", "0711", "--", str(directory)])
        self.run(["tar", "-x", "-f", "-", "--no-same-owner", "-C", str(directory)], stdin=packed(files))

    def make_dir(self, path: Path) -> None:
        """A directory that others may pass through (0711), if it is not there yet; its parents too."""
        self.run(["mkdir", "-p", "-m", "0711", "--", *map(str, reversed(path.parents)), str(path)])

    def make_private_dir(self, path: Path) -> None:
        """An empty directory (0700) of our own; what was there under that name goes."""
        self.make_dir(path.parent)
        self.remove(path)
        self.run(["mkdir", "-m", "0700", "--", str(path)])

    def lend_dir(self, path: Path, uid: int) -> None:
        """As `LocalHost.lend_dir`."""
        self.run(["chmod", "0711", "--", str(path.parent)])
        self.run(["mkdir", "-m", "0700", "--", str(path)])
        if uid >= 0:
            self.run(["chown", "-h", str(uid), "--", str(path)])

    def give(self, path: Path, uid: int) -> None:
        """Have a file belong to `uid`."""
        self.run(["chown", "-h", str(uid), "--", str(path)])

    def remove(self, path: Path) -> None:
        """Remove a file or a whole directory; nothing happens if it is absent."""
        self.run(["rm", "-rf", "--one-file-system", "--", str(path)])

    def names(self, directory: Path) -> list[str]:
        """The names in a directory; none if it is absent."""
        argv = ["find", f"{directory}/", "-mindepth", "1", "-maxdepth", "1", "-printf", "%f\\0"]
        done = self.run(argv, check=False)
        if (
            done.returncode != 0
            and "No such file" not in done.stderr
            and "Not a directory" not in done.stderr
        ):
            raise DriverFailed(f"{directory} on {self.machine}: {done.last_words}")
        return sorted(filter(None, done.stdout.decode("utf-8", "surrogateescape").split("\0")))

    def free_bytes(self, directory: Path) -> int:
        """How much an unprivileged program can still write there."""
        done = self.run(["stat", "-f", "-c", "%a %S", "--", str(directory)])
        blocks, size = done.stdout.split()
        return int(blocks) * int(size)

    # --- processes

    def stop_process(self, pid_file: Path) -> None:
        """As `LocalHost.stop_process`: the kernel's list of locks says whether its holder lives."""
        pid = self._locked_by(pid_file)
        deadline = time.monotonic() + _STOP_GRACE_S
        for name in ("TERM", "KILL"):
            if pid is None:
                return
            self.run(["kill", f"-{name}", str(pid)], check=False)
            while (pid := self._locked_by(pid_file)) is not None and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            deadline += _STOP_GRACE_S
        if pid is not None:
            raise Unavailable(f"process {pid} of {pid_file} on {self.machine} does not end")

    def _locked_by(self, pid_file: Path) -> int | None:
        """The process in the file, if that one holds the file's lock."""
        found = self.run(["stat", "-c", "%d:%i", "--", str(pid_file)], check=False)
        if found.returncode != 0:
            return None
        text = (self.read_file(str(pid_file), max_bytes=32) or b"").decode("ascii", "replace").strip()
        device, _, inode = found.stdout.decode().strip().partition(":")
        name = f"{os.major(int(device)):02x}:{os.minor(int(device)):02x}:{inode}"
        for line in self.run(["cat", "/proc/locks"]).stdout.decode().splitlines():
            fields = line.split()
            if len(fields) > 5 and fields[1] in {"POSIX", "OFDLCK"} and fields[5] == name:
                owner = fields[4]
                return int(text) if text.isdecimal() and owner in {text, "-1"} else None
        return None

    # --- sockets

    def forward(self, remote: Path) -> Path:
        """The socket here that leads to the socket `remote` there, until `end_forwards`."""
        self.tunnel_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        local = self.tunnel_dir / remote.name
        control = local.with_suffix(_CONTROL)
        options = ["-f", "-N", "-M", "-S", str(control), "-L", f"{local}:{remote}"]
        options += ["-o", "ExitOnForwardFailure=yes", "-o", "StreamLocalBindUnlink=yes"]
        options += ["-o", "StreamLocalBindMask=0177", "-o", "ControlPersist=no"]
        argv = ssh_argv(self.target, options=options)
        log = local.with_suffix(".log")
        with log.open("wb") as stderr:
            # stderr is a file, not a pipe: the process lives on with it. Until it has its sockets
            # and leaves for a session of its own, it ends with our process group.
            done = subprocess.run(
                argv,
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        if done.returncode != 0:
            raise explained(self.target, log.read_text(errors="replace"))
        return local

    def end_forwards(self) -> None:
        """End all that `forward` has begun, whoever has called it; returns when the processes are gone."""
        if not self.tunnel_dir.is_dir():
            return
        for control in sorted(self.tunnel_dir.glob(f"*{_CONTROL}")):
            argv = ssh_argv(self.target, options=["-S", str(control), "-O", "exit"])
            with contextlib.suppress(subprocess.TimeoutExpired):  # below it is seen that it still answers
                subprocess.run(
                    argv, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=_STOP_GRACE_S
                )
            deadline = time.monotonic() + _STOP_GRACE_S
            while _answers(control):
                if time.monotonic() > deadline:
                    raise Unavailable(f"the ssh of {control} does not end")
                time.sleep(_POLL_S)
            for suffix in (_CONTROL, ".sock", ".log"):
                control.with_suffix(suffix).unlink(missing_ok=True)


def _answers(control: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(control)) == 0


def _drain(channel: paramiko.Channel, out: bytearray, err: bytearray) -> bool:
    """Take what has come; whether it was anything."""
    taken = False
    if channel.recv_ready():
        out += channel.recv(_READ_BYTES)
        taken = True
    if channel.recv_stderr_ready():
        err += channel.recv_stderr(_READ_BYTES)
        taken = True
    return taken
