"""Start a driver before its request is known, while the step before it still runs.

Most of a short action's time is the start of its interpreter and its imports.
A driver with the feature `ahead` may be started early: with ODB_AHEAD=1 it
does nothing until its standard input brings first its variables (a line with
their number of bytes, then NAME=VALUE entries with a NUL between them) and then
the request. If the input ends before, it was not needed, and it ends without a word.
So nothing happens ahead of the journal, and a killed daemon leaves nothing behind.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen

from oned_backup.errors import OnedBackupError
from oned_backup.model.names import checked_name
from oned_backup.runner.drivers import Driver
from oned_backup.runner.environment import base_environment
from oned_backup.runner.process import kill_and_reap, start_process

FEATURE = "ahead"


@dataclass
class Ahead:
    """A started driver that waits for its request. Hand it to `run_action`, or `discard` it."""

    driver: Driver
    action: str
    directory: Path
    process: Popen[bytes]

    def is_for(self, driver: Driver, action: str) -> bool:
        """Whether it is that action of that driver, and still waits."""
        return (self.driver.folder, self.action) == (driver.folder, action) and self.process.poll() is None

    def discard(self) -> None:
        """End it; it has done nothing."""
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        kill_and_reap(self.process, 1)
        shutil.rmtree(self.directory, ignore_errors=True)


def start_ahead(
    driver: Driver, action: str, *, work_root: Path, operation_id: str, lock_fd: int | None = None
) -> Ahead | None:
    """The waiting driver; None if it cannot wait or cannot be started now: `run_action` starts it then."""
    if FEATURE not in driver.manifest.features:
        return None
    directory = Path(tempfile.mkdtemp(prefix=f"{checked_name(operation_id, 'operation id')}-", dir=work_root))
    try:
        _, executable = driver.executable(action)
        work = directory / "work"
        work.mkdir(mode=0o700)
        process = start_process(
            [str(executable)],
            environment=base_environment() | {"ODB_AHEAD": "1"},
            directory=work,
            pass_fds=() if lock_fd is None else (lock_fd,),
        )
    except (OSError, OnedBackupError):
        shutil.rmtree(directory, ignore_errors=True)
        return None
    return Ahead(driver, action, directory, process)


def late_environment(environment: Mapping[str, str]) -> bytes:
    """The variables in the form that a driver which was started ahead reads."""
    entries = b"\0".join(os.fsencode(f"{name}={value}") for name, value in environment.items())
    return b"%d\n%s" % (len(entries), entries)
