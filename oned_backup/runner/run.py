"""Run one action of one driver: request in, result or a named error out.

This is the daemon's half of `share/doc/driver-spec.md`: it builds the
environment and the request, hands secrets over as files, watches the process
(`process.py`), and turns exit codes and output into values and errors.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.contract.actions import SPEC_VERSION, Action
from oned_backup.contract.request import Request
from oned_backup.contract.result import parse_result
from oned_backup.errors import (
    Cancelled,
    DriverBug,
    DriverFailed,
    InvalidInput,
    OnedBackupError,
    Unavailable,
    error_for_exit_code,
)
from oned_backup.model.names import checked_name
from oned_backup.runner.drivers import Driver
from oned_backup.runner.process import Cancellation, Ended, Ending, Limits, run_process
from oned_backup.runner.stderr import Log, Progress, StderrReader

__all__ = ["Cancellation", "Invocation", "Limits", "Log", "Progress", "run_action"]

_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Invocation:
    """The surroundings of a call.

    `work_root`: an existing directory of the daemon's own, for the call's private directory.
    `source_dir`: holds the files of the backup. `secrets`: values of the secret parameters.
    `lock_fd`: a descriptor with a lock that the driver inherits and so holds as long as it lives.
    `environment`: further variables, named ODB_….
    """

    work_root: Path
    source_dir: Path | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)
    transfer: str = "stream"
    lock_fd: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


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
) -> dict[str, str]:
    """What the driver printed, by key. With `stdout_fd` its output goes there and {} is returned.

    Raises the error of the driver's exit code, its last line as the message; `Cancelled`;
    `Unavailable` for a driver that fell silent; `DriverFailed` past the deadline, on death
    by a signal and for unknown codes; `DriverBug` where the output breaks the contract.
    `progress(done, total)` and `log(level, line)` are called in this thread.
    """
    contract, executable = driver.executable(action)
    if cancellation is not None and cancellation.cancelled:
        raise Cancelled(f"{driver} {action}: cancelled before it began")
    stderr = StderrReader(secrets=invocation.secrets.values(), log=log, progress=progress)
    with private_directory(invocation.work_root, request.operation_id) as directory:
        environment = action_environment(driver, request, invocation, directory, limits)
        work = directory / "work"
        work.mkdir(mode=0o700)
        try:
            ended = run_process(
                [str(executable)],
                environment=environment,
                directory=work,
                stdin=xmldoc.serialize(request.to_xml()).encode() + b"\n",
                limits=limits,
                on_stderr=stderr.feed,
                cancellation=cancellation,
                stdout_fd=stdout_fd,
                pass_fds=() if invocation.lock_fd is None else (invocation.lock_fd,),
            )
        except OSError as error:
            raise _cannot_start(driver, action, error) from error
    stderr.close()
    _raise_for(ended, f"{driver} {action}", stderr.message, limits)
    return _result(contract, ended, stderr.message) if stdout_fd is None else {}


@contextlib.contextmanager
def private_directory(root: Path, name: str) -> Iterator[Path]:
    """A new directory (0700) below `root`, gone afterwards with all that is in it."""
    directory = Path(tempfile.mkdtemp(prefix=f"{checked_name(name, 'operation id')}-", dir=root))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def action_environment(
    driver: Driver, request: Request, invocation: Invocation, directory: Path, limits: Limits
) -> dict[str, str]:
    """All variables of a call; writes the secrets into `directory`/secrets."""
    environment = {
        "PATH": f"{Path(sys.executable).parent}:{_SYSTEM_PATH}",
        "HOME": os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir,
        "LC_ALL": "C.UTF-8",
        "ODB_SPEC": str(SPEC_VERSION),
        "ODB_OPERATION_ID": request.operation_id,
        "ODB_TRANSFER": invocation.transfer,
        "ODB_SECRETS_DIR": str(_write_secrets(directory / "secrets", invocation.secrets)),
    }
    if request.backup is not None:
        environment["ODB_BACKUP_ID"] = request.backup.id
    if request.vm is not None:
        environment["ODB_VM_ID"] = xmldoc.text(request.vm, "ID")
    if request.datastore is not None:
        environment |= _datastore_environment(driver, request.datastore)
    if invocation.source_dir is not None:
        environment["ODB_SOURCE_DIR"] = str(invocation.source_dir)
    if limits.deadline_s is not None:
        environment["ODB_DEADLINE"] = str(int(time.time() + limits.deadline_s))
    environment |= invocation.environment
    for name, value in environment.items():
        if "\0" in value or len(value.encode()) > 65536:
            raise InvalidInput(f"{name}: {len(value)} characters, or one that no variable can hold")
    return environment


def _datastore_environment(driver: Driver, datastore: xmldoc.Element) -> dict[str, str]:
    base_path = xmldoc.text(datastore, "TEMPLATE/BASE_PATH") or xmldoc.text(datastore, "BASE_PATH")
    environment = {"ODB_DS_ID": xmldoc.text(datastore, "ID"), "ODB_DS_BASE_PATH": base_path}
    for parameter in driver.manifest.parameters.values():
        value = xmldoc.text(datastore, f"TEMPLATE/{parameter.name}") or parameter.default
        if value and not parameter.secret and parameter.name not in {"ID", "BASE_PATH"}:
            environment[f"ODB_DS_{parameter.name}"] = value
    return environment


def _write_secrets(directory: Path, secrets: Mapping[str, str]) -> Path:
    directory.mkdir(mode=0o700)
    for name, value in secrets.items():
        path = directory / checked_name(name, "secret parameter")
        with open(path, "x", opener=lambda file, flags: os.open(file, flags, 0o600)) as file:
            file.write(value)
    return directory


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
