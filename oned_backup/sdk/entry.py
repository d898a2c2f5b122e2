"""The entry point of every action: `main(DRIVER)`.

The action is the executable's file name. Standard output belongs to the
answer alone: its descriptor is put aside at once and 1 becomes a copy of 2, so
that neither a stray `print` nor a child can corrupt it. SIGTERM raises
`Cancelled` in the main thread, once: `finally` blocks clean up undisturbed,
and the process then ends with 128 + 15.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

from oned_backup import failpoints
from oned_backup.contract.actions import ACTIONS, SPEC_VERSION
from oned_backup.contract.result import format_result
from oned_backup.errors import Cancelled, DriverBug, OnedBackupError, Salvaged, Unsupported
from oned_backup.sdk import failures, log
from oned_backup.sdk.call import Answer, Call

_ACTION_NAMES = frozenset(name for _, name in ACTIONS)
#: each layer of each disk has five: a long chain has more than the customary 1024
_OPEN_FILES = 65536


class Driver:
    """Base of a driver: give it a method for each action that it supports.

    A method is named as its action, takes the `Call` and returns what to print
    (see the action's page in `share/doc/driver-spec.md`), or None for nothing.
    """

    def perform(self, call: Call) -> Answer:
        """The answer of the method that `call.action` names; `Unsupported` if there is none."""
        method = getattr(self, call.action, None) if call.action in _ACTION_NAMES else None
        if method is None:
            raise Unsupported(f"this driver has no action '{call.action}'")
        answer: Answer | None = method(call)
        return {} if answer is None else answer

    def warm_up(self, action: str) -> None:
        """Import what `action` will need. Called while a driver that was started ahead waits."""


class _Termination:
    """Turns the first SIGTERM or SIGINT into `Cancelled` and remembers it."""

    def __init__(self) -> None:
        self.signal = 0
        self._armed = True
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._armed and not self.signal:
            self.signal = number
            self.raise_if_received()

    def raise_if_received(self) -> None:
        """`Cancelled` if a signal came and whoever it interrupted went on: half-done is not done."""
        if self.signal:
            raise Cancelled(f"ended by {signal.Signals(self.signal).name}")

    def disarm(self) -> None:
        """Too late to cancel: the answer is about to be given."""
        self._armed = False


def main(driver: Driver) -> NoReturn:
    """Perform the action that this executable is named after, and end the process."""
    termination = _Termination()
    stdout = os.dup(1)
    os.dup2(2, 1)
    _allow_open_files()
    action = Path(sys.argv[0]).name
    environ: Mapping[str, str] | None = os.environ
    if os.environ.get("ODB_AHEAD") == "1":
        environ = _wait_for_environment(driver, action)
    code = 0 if environ is None else _run(driver, action, stdout, environ, termination)
    _flush_python_streams()
    # Not sys.exit: a thread that hangs in a dead NBD server must not hold the process.
    os._exit(code)


def _allow_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for limit in (max(hard, _OPEN_FILES), hard):  # the first is for root
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(limit, _OPEN_FILES)), limit))
            return


def _wait_for_environment(driver: Driver, action: str) -> Mapping[str, str] | None:
    """The variables that come before the request; None if the input ends: the call is not wanted."""
    with contextlib.suppress(Exception):  # the action itself will say what is wrong
        driver.warm_up(action)
    with open(0, "rb", buffering=0, closefd=False) as stdin:  # what follows is the request's
        length = stdin.readline(16)
        if not length:
            return None
        block = b""
        while len(block) < int(length):
            block += stdin.read(int(length) - len(block)) or b"\0"
    for entry in filter(None, block.split(b"\0")):
        name, _, value = os.fsdecode(entry).partition("=")
        os.environ[name] = value
    return os.environ


def _run(
    driver: Driver, action: str, stdout: int, environ: Mapping[str, str], termination: _Termination
) -> int:
    call = Call(action, stdout=stdout, environ=environ)
    try:
        spec = environ.get("ODB_SPEC", str(SPEC_VERSION))
        if spec != str(SPEC_VERSION):
            raise Unsupported(f"the daemon speaks version {spec} of the contract, not {SPEC_VERSION}")
        failpoints.enter(f"{Path(sys.argv[0]).absolute().parent.name}.{action}")
        termination.raise_if_received()
        failpoints.reach("begun")
        answer = driver.perform(call)
        failpoints.reach("acted")
        termination.raise_if_received()
        termination.disarm()
        _print(stdout, answer)
    except BaseException as caught:  # noqa: BLE001 - the one place that catches everything
        termination.disarm()
        return _report(caught, call, termination)
    return 0


def _report(caught: BaseException, call: Call, termination: _Termination) -> int:
    """Tell people what happened, the message last, and return the exit code."""
    if isinstance(caught, SystemExit):
        caught = DriverBug(f"{call.action}: the driver called sys.exit({caught.code!r})")
    error: OnedBackupError = failures.explain(caught, call.space)
    if isinstance(error, DriverBug):
        import traceback  # noqa: PLC0415 - only a driver that fails needs it

        log.write(log.Level.ERROR, "".join(traceback.format_exception(caught)))
    if isinstance(error, Salvaged):
        try:
            _print(call.stdout, error.answer)
        except OSError as lost:
            log.write(log.Level.WARNING, f"nobody reads the answer: {lost}")
    _flush_python_streams()
    message = error.message or type(error).__name__
    log.write_raw(f"{message.rstrip('.')}. {error.hint}" if error.hint else message)
    return 128 + termination.signal if termination.signal else error.exit_code


def _flush_python_streams() -> None:
    """What the driver printed comes before our last line, which is the message."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()


def _print(stdout: int, answer: Answer) -> None:
    data = memoryview(format_result(answer).encode())
    while data:
        data = data[os.write(stdout, data) :]
