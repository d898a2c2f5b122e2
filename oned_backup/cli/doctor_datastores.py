"""What the drivers of the datastores need on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from oned_backup.cli.check import Check
from oned_backup.contract.actions import Kind
from oned_backup.errors import OnedBackupError
from oned_backup.runner.drivers import find_driver
from oned_backup.runner.environment import DRIVER_PATH


def check_datastores(driver_dirs: Iterable[Path], drivers: Iterable[str]) -> Iterator[Check]:
    """A check of each of these datastore drivers: whether there is what its `[needs]` name."""
    directories = list(driver_dirs)
    for name in sorted(set(drivers)):
        label = f"datastores of driver {name}"
        try:
            needs = find_driver(directories, Kind.DATASTORE, name).manifest.needs
        except OnedBackupError as error:
            yield Check(label, "fail", error.message, error.hint or "")
            continue
        missing = [need for need in needs if not _is_there(need)]
        for need in missing:
            yield Check(label, "fail", f"{need} not found", needs[need])
        if not missing:
            yield Check(label, "ok", ", ".join(needs) or "nothing else is needed")


def _is_there(need: str) -> bool:
    if need.startswith("/"):
        return Path(need).exists()
    return shutil.which(need, path=DRIVER_PATH) is not None
