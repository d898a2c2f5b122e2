"""Run one action of one driver: request in, result or a named error out.

This is the daemon's half of `share/doc/driver-spec.md`: it hands over the
request (`environment.py` has the variables and the secrets), watches the
process (`process.py`), and turns exit codes and output into values and errors.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.contract.actions import Action
from oned_backup.contract.request import Request
from oned_backup.contract.result import parse_result
from oned_backup.errors import (
    Cancelled,
    DriverBug,
    DriverFailed,
    OnedBackupError,
    Salvaged,
    Unavailable,
    error_for_exit_code,
)
from oned_backup.model.names import checked_name
from oned_backup.runner.ahead import Ahead, late_environment
from oned_backup.runner.drivers import Driver
from oned_backup.runner.environment import Invocation, action_environment
from oned_backup.runner.process import Cancellation, Ended, Ending, Limits, run_process, start_process
from oned_backup.runner.stderr import Log, Progress, StderrReader

__all__ = ["Cancellation", "Invocation", "Limits", "Log", "Progress", "run_action"]


def run_action(
    driver: Driver,
    action: str,
    request: Request,
    invocation: Invocation,
    *,
    limits: Limits,
    cancellation: Cancellation | None = None,
    progress: Progress | None = None,
    log: Log | None = None,
    stdout_fd: int | None = None,
    ahead: Ahead | None = None,
) -> dict[str, str]:
    """What the driver printed, by key. With `stdout_fd` its output goes there and {} is returned.

    `ahead`: the same action, started beforehand; it is used up, or discarded if it does not fit.

    Raises the error of the driver's exit code, its last line as the message; `Cancelled`;
    `Unavailable` for a driver that fell silent; `DriverFailed` past the deadline, on death
    by a signal and for unknown codes; `DriverBug` where the output breaks the contract.
    `progress(done, total)` and `log(level, line)` are called in this thread.
    """
    contract, executable = driver.executable(action)
    if cancellation is not None and cancellation.cancelled:
        if ahead is not None:
            ahead.discard()
        raise Cancelled(f"{driver} {action}: cancelled before it began")
    stderr = StderrReader(secrets=invocation.secrets.values(), log=log, progress=progress)
    stdin = xmldoc.serialize(request.to_xml()).encode() + b"\n"
    with contextlib.ExitStack() as stack:
        if ahead is not None:
            stack.callback(ahead.discard)
        if ahead is not None and stdout_fd is None and ahead.is_for(driver, action):
            environment = action_environment(driver, request, invocation, ahead.directory, limits)
            process, stdin = ahead.process, late_environment(environment) + stdin
        else:
            directory = stack.enter_context(private_directory(invocation.work_root, request.operation_id))
            environment = action_environment(driver, request, invocation, directory, limits)
            work = directory / "work"
            work.mkdir(mode=0o700)
            try:
                process = start_process(
                    [str(executable)],
                    environment=environment,
                    directory=work,
                    stdout_fd=stdout_fd,
                    pass_fds=() if invocation.lock_fd is None else (invocation.lock_fd,),
                )
            except OSError as error:
                raise _cannot_start(driver, action, error) from error
        ended = run_process(
            process, stdin=stdin, limits=limits, on_stderr=stderr.feed, cancellation=cancellation
        )
    stderr.close()
    try:
        _raise_for(ended, f"{driver} {action}", stderr.message, limits)
    except Salvaged as error:
        error.answer = parse_result(contract, ended.stdout)
        raise
    return _result(contract, ended, stderr.message) if stdout_fd is None else {}


@contextlib.contextmanager
def private_directory(root: Path, name: str) -> Iterator[Path]:
    """A new directory (0700) below `root`, gone afterwards with all that is in it."""
    directory = Path(tempfile.mkdtemp(prefix=f"{checked_name(name, 'operation id')}-", dir=root))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _raise_for(ended: Ended, call: str, message: str, limits: Limits) -> None:
    """Nothing for success; else the error that says what became of the driver."""
    said = f": {message}" if message else ""
    if ended.ending is Ending.CANCELLED:
        raise Cancelled(f"{call}: cancelled")
    if ended.exit_code is None:
        raise Unavailable(f"{call}: stuck in the kernel, not even KILL ended it{said}")
    if ended.ending is Ending.DEADLINE:
        raise DriverFailed(f"{call}: not finished after {limits.deadline_s:g} s{said}")
    if ended.ending is Ending.SILENT:
        raise Unavailable(f"{call}: no sign of life for {limits.inactivity_s:g} s{said}")
    if ended.ending is Ending.FLOODED:
        raise DriverBug(f"{call}: printed more than {limits.stdout_bytes} bytes")
    if ended.exit_code < 0:
        raise DriverFailed(f"{call}: killed by {_signal_name(-ended.exit_code)}{said}")
    if ended.exit_code > 0:
        error: type[OnedBackupError] = error_for_exit_code(ended.exit_code)
        raise error(message or f"{call}: exit code {ended.exit_code} without a message")


def _result(contract: Action, ended: Ended, message: str) -> dict[str, str]:
    try:
        return parse_result(contract, ended.stdout)
    except DriverBug as error:
        raise DriverBug(f"{error.message}{f': {message}' if message else ''}", hint=error.hint) from error


def _cannot_start(driver: Driver, action: str, error: OSError) -> OnedBackupError:
    text = f"{driver} {action} cannot be started: {error.strerror}"
    if error.errno in {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}:
        return Unavailable(text)
    return DriverBug(text, hint="Look at its first line: the interpreter may be absent.")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
