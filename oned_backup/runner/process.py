"""Run one program that may misbehave in any way, in bounded time and memory.

The program gets its own session (and so its own process group), a request on
stdin that it may leave unread, and pipes that are drained all the time by the
calling thread. What holds, whatever the program does:

- it is ended (TERM to the group, KILL after `grace_s`) when it is cancelled, is
  past its deadline, was silent for `inactivity_s`, or printed more than
  `stdout_bytes`. A sign of life is any byte on stdout or stderr; where stdout is
  the caller's own descriptor, only stderr is seen;
- what it leaves in its process group is killed once it has exited. A process
  that has left the group on purpose (setsid, as `qemu-nbd --fork` does) lives
  on; if it holds the pipes they are drained for `drain_s` at most;
- a process that even KILL does not end (it waits for a dead file server inside
  the kernel) is left behind after another `grace_s`, not waited for.

The exit is awaited on a pidfd, and the process is reaped only after its group
was killed: until then nobody else can have its number.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Self

_CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True)
class Limits:
    """What a program may take. None for `deadline_s` or `inactivity_s`: no limit.

    It is told to end by `stop_signal`, and killed `grace_s` later.
    """

    deadline_s: float | None
    inactivity_s: float | None = None
    grace_s: float = 10
    drain_s: float = 2
    stdout_bytes: int = 64 * 1024 * 1024
    stop_signal: signal.Signals = signal.SIGTERM


class Cancellation:
    """A flag that any thread may set once, and that wakes whoever waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._event = threading.Event()
        self._wakers: list[Callable[[], None]] = []

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._event.is_set()

    def cancel(self) -> None:
        """Set the flag; running programs are told to stop. May be called again."""
        with self._lock:
            self._event.set()
            for wake in self._wakers:
                wake()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether the flag was set within `timeout_s`."""
        return self._event.wait(timeout_s)

    @contextlib.contextmanager
    def waking(self, wake: Callable[[], None]) -> Iterator[None]:
        """While inside, `cancel` calls `wake` (at once if it was called before)."""
        with self._lock:
            self._wakers.append(wake)
            if self._event.is_set():
                wake()
        try:
            yield
        finally:
            with self._lock:
                self._wakers.remove(wake)


class Ending(Enum):
    """Why a program ended: by itself, or because we ended it."""

    EXITED = "exited"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    SILENT = "silent"
    FLOODED = "flooded"


@dataclass(frozen=True)
class Ended:
    """How a program ended. `exit_code`: negative for a signal, None if it could not even be killed."""

    ending: Ending
    exit_code: int | None
    stdout: bytes


def start_process(
    argv: Sequence[str],
    *,
    environment: Mapping[str, str],
    directory: Path,
    stdout_fd: int | None = None,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """`argv` started, for `run_process`; `OSError` if it cannot be started.

    With `stdout_fd` the program writes there and `Ended.stdout` will be empty.
    """
    return subprocess.Popen(
        list(argv),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if stdout_fd is None else stdout_fd,
        stderr=subprocess.PIPE,
        env=dict(environment),
        cwd=directory,
        start_new_session=True,
        pass_fds=tuple(pass_fds),
        bufsize=0,
    )


def run_process(
    process: subprocess.Popen[bytes],
    *,
    stdin: bytes,
    limits: Limits,
    on_stderr: Callable[[bytes], None],
    cancellation: Cancellation | None = None,
) -> Ended:
    """Serve a started program to its end. Its deadlines begin now.

    `on_stderr` is called with pieces of at most 64 KiB, in this thread; if it raises, the
    program is killed.
    """
    with contextlib.ExitStack() as stack:
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                stack.callback(pipe.close)
        stack.callback(kill_and_reap, process, limits.grace_s)
        wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, wake_fd)
        if cancellation is not None:
            stack.enter_context(cancellation.waking(lambda: os.eventfd_write(wake_fd, 1)))
        watch = stack.enter_context(_Watch(process, stdin, limits, on_stderr, wake_fd))
        ending = watch.until_end()
        return Ended(ending, kill_and_reap(process, 1), bytes(watch.stdout))


class _Watch:
    """The loop around one running program; all deadlines are of the monotonic clock."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        stdin: bytes,
        limits: Limits,
        on_stderr: Callable[[bytes], None],
        wake_fd: int,
    ) -> None:
        now = time.monotonic()
        self.stdout = bytearray()
        self.exited = False
        self._process = process
        self._limits = limits
        self._on_stderr = on_stderr
        self._wake_fd = wake_fd
        self._unwritten = memoryview(stdin)
        self._ending = Ending.EXITED
        self._killed = False
        self._deadline = None if limits.deadline_s is None else now + limits.deadline_s
        self._last_sign = now
        self._next_step: float | None = None  # after TERM: when to kill; after KILL: when to give up
        self._pipes = 0
        self._selector = selectors.DefaultSelector()
        self._pidfd = os.pidfd_open(process.pid)

    def __enter__(self) -> Self:
        process = self._process
        self._selector.register(self._pidfd, selectors.EVENT_READ, self._on_exit)
        self._selector.register(self._wake_fd, selectors.EVENT_READ, self._on_cancel)
        if process.stdin is not None:
            os.set_blocking(process.stdin.fileno(), False)
            self._selector.register(process.stdin, selectors.EVENT_WRITE, self._write_stdin)
        for pipe, take in ((process.stdout, self._take_stdout), (process.stderr, self._on_stderr)):
            if pipe is not None:
                os.set_blocking(pipe.fileno(), False)
                self._selector.register(pipe, selectors.EVENT_READ, lambda p=pipe, t=take: self._read(p, t))
                self._pipes += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        os.close(self._pidfd)

    def until_end(self) -> Ending:
        """Serve the pipes until the program has exited and they are empty, or patience ends."""
        while not (self.exited and self._pipes == 0):
            now = time.monotonic()
            due = self._due()
            if due is not None and now >= due:
                if not self._time_is_up(now):
                    break
                continue
            for key, _ in self._selector.select(None if due is None else due - now):
                key.data()
        return self._ending

    def _due(self) -> float | None:
        if self._next_step is not None:
            return self._next_step
        limits = [self._deadline] if self._deadline is not None else []
        if self._limits.inactivity_s is not None:
            limits.append(self._last_sign + self._limits.inactivity_s)
        return min(limits, default=None)

    def _time_is_up(self, now: float) -> bool:
        """Take the next harsher step; False if there is none."""
        if self.exited or self._killed:
            return False
        if self._next_step is not None:
            _signal_group(self._process, signal.SIGKILL)
            self._killed = True
            self._next_step = now + max(self._limits.grace_s, 1)
        else:
            is_late = self._deadline is not None and now >= self._deadline
            self._end(Ending.DEADLINE if is_late else Ending.SILENT)
        return True

    def _end(self, why: Ending) -> None:
        if self._ending is Ending.EXITED and not self.exited:
            self._ending = why
            _signal_group(self._process, self._limits.stop_signal)
            self._next_step = time.monotonic() + self._limits.grace_s

    def _on_cancel(self) -> None:
        self._selector.unregister(self._wake_fd)
        self._end(Ending.CANCELLED)

    def _on_exit(self) -> None:
        self.exited = True
        self._selector.unregister(self._pidfd)
        _signal_group(self._process, signal.SIGKILL)
        self._close_stdin()
        self._next_step = time.monotonic() + self._limits.drain_s

    def _write_stdin(self) -> None:
        stdin = self._process.stdin
        if stdin is None or stdin.closed:
            return
        try:
            written = os.write(stdin.fileno(), self._unwritten[: 4 * _CHUNK_BYTES]) if self._unwritten else 0
        except BlockingIOError:
            return
        except OSError:  # it has closed its end: it may
            written = len(self._unwritten)
        self._unwritten = self._unwritten[written:]
        if not self._unwritten:
            self._close_stdin()

    def _close_stdin(self) -> None:
        stdin = self._process.stdin
        if stdin is not None and not stdin.closed:
            self._selector.unregister(stdin)
            stdin.close()

    def _read(self, pipe: object, take: Callable[[bytes], None]) -> None:
        fd: int = pipe.fileno()  # type: ignore[attr-defined]
        try:
            piece = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return
        if not piece:
            self._selector.unregister(fd)
            self._pipes -= 1
            return
        self._last_sign = time.monotonic()
        take(piece)

    def _take_stdout(self, piece: bytes) -> None:
        if self._ending is Ending.FLOODED:
            return
        room = self._limits.stdout_bytes - len(self.stdout)
        self.stdout += piece[:room]
        if len(piece) > room:
            self.stdout.clear()
            self._end(Ending.FLOODED)


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the program's process group; only while it is not reaped, so that the number is its own."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def kill_and_reap(process: subprocess.Popen[bytes], patience_s: float) -> int | None:
    """The exit code, after KILL to the group; None if it does not end within `patience_s`.

    What is left behind then is reaped by the subprocess module when it starts the next program.
    """
    _signal_group(process, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    return process.returncode
