"""Find drivers on disk and refuse those that somebody else could have changed.

Drivers lie in `<directory>/<kind>/<name>/`. Their code runs with the daemon's
rights, so the folder and everything in it must belong to root or to the
daemon's user, must not be writable by others, and no link in it may lead out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from oned_backup.contract.actions import ACTIONS, Action, Kind, actions_of
from oned_backup.contract.driver_toml import DriverManifest, load_driver_toml
from oned_backup.errors import Misconfigured, NotFound, OnedBackupError, PermissionDenied, Unsupported

#: name, inode and change time (ns) of all entries of a folder
Signature: TypeAlias = tuple[tuple[str, int, int], ...]


@dataclass(frozen=True)
class Driver:
    """A folder with executables, and what its manifest says."""

    folder: Path
    manifest: DriverManifest

    def __str__(self) -> str:
        return f"{self.manifest.kind}/{self.manifest.name}"

    def supports(self, action: str) -> bool:
        """Whether there is an executable for `action`, and the action is in the contract."""
        path = self.folder / action
        return (self.manifest.kind, action) in ACTIONS and path.is_file() and os.access(path, os.X_OK)

    @property
    def actions(self) -> tuple[str, ...]:
        """The actions that it supports, in the order of the specification."""
        return tuple(a.name for a in actions_of(self.manifest.kind) if self.supports(a.name))

    def executable(self, action: str) -> tuple[Action, Path]:
        """The contract of `action` and the program to run; `Unsupported` if there is none."""
        if not self.supports(action):
            raise Unsupported(f"driver {self} has no action {action}")
        path = self.folder / action
        _check_entry(path, self.folder)
        return ACTIONS[self.manifest.kind, action], path


def load_driver(folder: Path) -> Driver:
    """The driver in `folder`; `Misconfigured` or `PermissionDenied` says why it cannot be used."""
    seen = _signature(folder)
    known = _loaded.get(folder)
    if known is not None and seen and known[0] == seen:
        return known[1]
    if not folder.is_dir():
        raise NotFound(f"{folder} is no driver: there is no such directory")
    place = folder.resolve()
    _check_owner(place)
    for entry in place.iterdir():
        _check_entry(entry, place)
    driver = Driver(place, load_driver_toml(place))
    _loaded[folder] = seen, driver
    return driver


#: the drivers that were found good, with what their folder looked like before that
_loaded: dict[Path, tuple[Signature, Driver]] = {}


def _signature(folder: Path) -> Signature:
    """What changes whenever something in the folder is written, replaced or given away; () if unknown.

    The entries' own inodes, and the change time of what they lead to.
    """
    try:
        with os.scandir(folder) as entries:
            found = [(entry.name, entry.inode(), entry.stat().st_ctime_ns) for entry in entries]
        return ("", folder.lstat().st_ino, folder.stat().st_ctime_ns), *sorted(found)
    except OSError:
        return ()


def find_drivers(
    directories: Iterable[Path], *, on_refused: Callable[[Path, OnedBackupError], None] | None = None
) -> tuple[Driver, ...]:
    """All usable drivers below `directories`; of two with one name the first wins.

    `on_refused` is told of each folder that has a driver.toml but cannot be used.
    """
    found: dict[tuple[Kind, str], Driver] = {}
    for directory in directories:
        for kind in Kind:
            for folder in sorted((directory / kind.value).glob("*/")):
                if (kind, folder.name) in found or not (folder / "driver.toml").exists():
                    continue
                try:
                    found[kind, folder.name] = _load_named(folder, kind)
                except OnedBackupError as error:
                    if on_refused is not None:
                        on_refused(folder, error)
    return tuple(found.values())


def find_driver(directories: Iterable[Path], kind: Kind, name: str) -> Driver:
    """The driver of that kind and name; `NotFound` names those that there are."""
    directories = tuple(directories)
    for directory in directories:
        folder = directory / kind.value / name
        if "/" not in name and name not in {"", ".", ".."} and (folder / "driver.toml").exists():
            return _load_named(folder, kind)
    known = ", ".join(d.manifest.name for d in find_drivers(directories) if d.manifest.kind is kind)
    raise NotFound(f"no {kind} driver '{name[:64]}'", hint=f"There is: {known or 'none at all'}.")


def _load_named(folder: Path, kind: Kind) -> Driver:
    driver = load_driver(folder)
    if driver.manifest.kind is not kind or driver.manifest.name != folder.name:
        raise Misconfigured(f"{folder}: driver.toml says it is {driver}, not {kind}/{folder.name}")
    return driver


def _check_entry(path: Path, folder: Path) -> None:
    target = path.resolve()
    if not target.is_relative_to(folder):
        raise PermissionDenied(f"{path} leads out of its driver's folder, to {target}")
    if target.exists():
        _check_owner(target)


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid not in {0, os.geteuid()}:
        raise PermissionDenied(
            f"{path} belongs to uid {status.st_uid}",
            hint="A driver must belong to root or to the user that runs oned-backup.",
        )
    group_may_write = status.st_mode & stat.S_IWGRP and status.st_gid not in {0, os.getegid()}
    if status.st_mode & stat.S_IWOTH or group_may_write:
        raise PermissionDenied(
            f"{path} is writable by others (mode {stat.S_IMODE(status.st_mode):04o})",
            hint=f"Run: chmod go-w {path}.",
        )
