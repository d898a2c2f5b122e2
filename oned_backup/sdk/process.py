"""Run a program without a shell: an argument list, a deadline, bounded output.

The child stays in the driver's process group, so what kills the driver kills
it too. It is also stopped when the action is cancelled or its time is up.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO

from oned_backup.errors import DriverFailed, Misconfigured, Unavailable

MAX_OUTPUT_BYTES = 16 * 1024 * 1024
_KEPT_STDERR_BYTES = 64 * 1024
_GRACE_S = 2.0
_READ_BYTES = 65536


@dataclass(frozen=True)
class Completed:
    """A program that has ended. `stderr` is its tail."""

    argv: tuple[str, ...]
    returncode: int
    stdout: bytes
    stderr: bytes

    @property
    def last_words(self) -> str:
        """The last line on stderr that is not empty."""
        lines = self.stderr.decode("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


def run(
    argv: Sequence[str],
    *,
    stdin: bytes = b"",
    timeout_s: float = 600.0,
    check: bool = True,
    env: Mapping[str, str] | None = None,
    max_output_bytes: int = MAX_OUTPUT_BYTES,
    hold_stdin: bool = False,
) -> Completed:
    """What the program printed; raises unless it ends with 0 in time (`check=False`: any code).

    `hold_stdin`: its standard input does not end after `stdin`, but when we do, killed or not.

    `DriverFailed` for another exit code or too much output, `Unavailable` after
    `timeout_s`, `Misconfigured` if there is no such program.
    """
    name = os.path.basename(argv[0])  # noqa: PTH119 - a name on PATH, not a path
    with _held_input(stdin) if hold_stdin else _input(stdin) as source:
        try:
            process = subprocess.Popen(
                list(argv), stdin=source, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env
            )
        except FileNotFoundError as error:
            raise Misconfigured(f"{name} is not installed") from error
        source.close()
        try:
            deadline = time.monotonic() + timeout_s
            stdout, stderr = _collect(process, name, deadline, timeout_s, max_output_bytes)
        finally:
            _stop(process)
    completed = Completed(tuple(argv), process.returncode, stdout, stderr)
    if check and completed.returncode != 0:
        code = completed.returncode
        how = f"exit code {code}" if code > 0 else f"killed by signal {-code}"
        raise DriverFailed(f"{name}: {completed.last_words or 'no message'} ({how})")
    return completed


def _input(data: bytes) -> IO[bytes]:
    """A readable file with `data`: no pipe that a program which does not read could block."""
    if not data:
        return open(os.devnull, "rb")  # noqa: PTH123 - closed by the caller
    file = os.fdopen(os.memfd_create("stdin"), "w+b")
    file.write(data)
    file.seek(0)
    return file


@contextlib.contextmanager
def _held_input(data: bytes) -> Iterator[IO[bytes]]:
    """The reading end of a pipe that brings `data` and then stays open until the block ends."""
    reading, writing = os.pipe()
    feeder = threading.Thread(target=_feed, args=(writing, data), daemon=True)
    feeder.start()
    try:
        with os.fdopen(reading, "rb") as source:
            yield source
    finally:
        feeder.join()  # the program has ended, so nobody reads: it does not block any more
        os.close(writing)


def _feed(descriptor: int, data: bytes) -> None:
    rest = memoryview(data)
    with contextlib.suppress(BrokenPipeError):
        while rest:
            rest = rest[os.write(descriptor, rest) :]


def _collect(
    process: subprocess.Popen[bytes], name: str, deadline: float, timeout_s: float, max_bytes: int
) -> tuple[bytes, bytes]:
    """Read both pipes until the program ends; children that it leaves with them are not waited for."""
    assert process.stdout is not None  # noqa: S101 - for the type checker
    assert process.stderr is not None  # noqa: S101
    out, err = process.stdout.fileno(), process.stderr.fileno()
    kept: dict[int, bytearray] = {out: bytearray(), err: bytearray()}
    pidfd = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for fd in (out, err, pidfd):
                if fd != pidfd:
                    os.set_blocking(fd, False)
                selector.register(fd, selectors.EVENT_READ)
            ended = False
            while not ended:
                remaining = deadline - time.monotonic()
                if remaining <= 0:
                    raise Unavailable(f"{name}: no end after {timeout_s:g} s")
                ready = {key.fd for key, _ in selector.select(remaining)}
                ended = pidfd in ready
                for fd in kept if ended else ready:
                    if not _drain(fd, kept[fd], err, until_empty=ended) and not ended:
                        selector.unregister(fd)
                if len(kept[out]) > max_bytes:
                    raise DriverFailed(f"{name}: more than {max_bytes} bytes of output")
    finally:
        os.close(pidfd)
    return bytes(kept[out]), bytes(kept[err])


def _drain(fd: int, kept: bytearray, stderr_fd: int, *, until_empty: bool) -> bool:
    """Take what is there; False at the end of the pipe."""
    for _ in range(256 if until_empty else 1):
        try:
            data = os.read(fd, _READ_BYTES)
        except BlockingIOError:
            return True
        if not data:
            return False
        kept += data
        if fd == stderr_fd and len(kept) > 2 * _KEPT_STDERR_BYTES:
            del kept[:-_KEPT_STDERR_BYTES]
    return True


def _stop(process: subprocess.Popen[bytes]) -> None:
    """See that the program has ended and is reaped."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for pipe in (process.stdout, process.stderr):
        if pipe is not None:
            pipe.close()
