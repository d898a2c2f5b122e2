"""Where settings, state and the daemon's socket lie; quick to import, for the command line.

/etc/oned-backup/config.toml                       root
$XDG_CONFIG_HOME/oned-backup/config.toml           everybody else
$ODB_CONFIG, or --config                           instead of these
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

from oned_backup.errors import Misconfigured

#: the daemon's socket below run_dir; its directory is 0700
SOCKET = Path("api/daemon.sock")


def settings_file(named: Path | None = None) -> Path:
    """The settings file: `named`, $ODB_CONFIG, or the default one, which alone need not exist."""
    variable = os.environ.get("ODB_CONFIG", "")
    chosen = named or (Path(variable) if variable else None)
    if chosen is None:
        return default_config_file()
    if not chosen.is_file():
        raise Misconfigured(
            f"{chosen}: no such file", hint="Name the settings file with --config or ODB_CONFIG."
        )
    return chosen


def daemon_socket(named: Path | None = None) -> Path:
    """Where the daemon of these settings listens, without reading more of them than that."""
    run_dir = os.environ.get("ODB_RUN_DIR", "")
    file = settings_file(named)
    if not run_dir and file.is_file():
        try:
            run_dir = str(tomllib.loads(file.read_text()).get("run_dir", ""))
        except (OSError, ValueError) as error:
            raise Misconfigured(f"{file}: {error}", hint="The file must be TOML.") from error
    return (Path(run_dir) if run_dir else default_run_dir()) / SOCKET


def default_config_file() -> Path:
    """Where the settings lie if nobody says otherwise."""
    if os.geteuid() == 0:
        return Path("/etc/oned-backup/config.toml")
    return _xdg("XDG_CONFIG_HOME", ".config") / "oned-backup/config.toml"


def default_state_dir() -> Path:
    """Root's is /var/lib/oned-backup."""
    if os.geteuid() == 0:
        return Path("/var/lib/oned-backup")
    return _xdg("XDG_STATE_HOME", ".local/state") / "oned-backup"


def default_run_dir() -> Path:
    """Root's is /run/oned-backup; without XDG_RUNTIME_DIR a user's lies in the state directory."""
    if os.geteuid() == 0:
        return Path("/run/oned-backup")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "oned-backup" if runtime else default_state_dir() / "run"


def _xdg(variable: str, default: str) -> Path:
    value = os.environ.get(variable, "")
    return Path(value) if value.startswith("/") else Path.home() / default
