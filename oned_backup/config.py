"""Settings: one TOML file (see `places`), overridden by environment variables, with a default for everything.

A variable `ODB_<KEY>` wins over the file, `ODB_<TABLE>__<KEY>` for the keys of
a table (`ODB_WORKERS=8`, `ODB_RETRY__FOR_S=60`). An unknown key in the file is an
error, not a silent default. `oned-backup config show` shows all keys.

    state_dir   the catalogue and the journal (SQLite), the key, work/ (private to each operation),
                ssh/ (client configuration, accepted host keys)
    run_dir     0711: api/ (0700) with daemon.sock, nbd/ (0711) for QEMU's sockets, c/ (0700), op-<id>.lock
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from oned_backup.errors import Misconfigured
from oned_backup.places import SOCKET, default_run_dir, default_state_dir, settings_file

_DAY_S = 86_400


def _absolute(path: Path) -> Path:
    if not path.is_absolute():
        raise ValueError("a path must be absolute")
    return path


AbsolutePath = Annotated[Path, AfterValidator(_absolute)]
#: an empty text is none
OptionalPath = Annotated[AbsolutePath | None, BeforeValidator(lambda value: None if value == "" else value)]


@cache
def builtin_driver_dirs() -> tuple[Path, ...]:
    """The drivers that came with this program: a checkout's, or those of the installation."""
    checkout = Path(__file__).resolve().parent.parent / "drivers"
    installed = Path(sys.prefix) / "share/oned-backup/drivers"
    return tuple(path for path in (checkout, installed) if path.is_dir())


class Deadlines(BaseModel):
    """Seconds after which a driver's action is ended, whatever it is doing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: actions that answer a question: monitor, dump_xml, ls, stat, restore (the plan)
    query_s: float = Field(default=60, gt=0)
    pre_backup_s: float = Field(default=300, gt=0)
    post_backup_s: float = Field(default=300, gt=0)
    #: actions that move data: backup, download, verify, and rm
    transfer_s: float = Field(default=2 * _DAY_S, gt=0)
    define_s: float = Field(default=60, gt=0)
    #: every action that recovery takes, so that all of it stays under 30 s
    recovery_s: float = Field(default=8, gt=0, le=25)


class Retry(BaseModel):
    """How failures that may pass (Unavailable, Busy) are tried again, with doubling waits."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    for_s: float = Field(default=900, ge=0)
    first_wait_s: float = Field(default=2, gt=0)
    longest_wait_s: float = Field(default=120, gt=0)


class Ssh(BaseModel):
    """How other machines are reached; `<state_dir>/ssh/config` is made of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    #: the private key; '' = those that ssh tries by itself
    identity_file: OptionalPath = None
    #: a file in the syntax of ssh_config, for what is special about a host; it wins
    include: OptionalPath = None
    connect_timeout_s: int = Field(default=10, ge=1, le=120)
    #: a link that is dead for three times this is given up
    keepalive_s: int = Field(default=5, ge=1, le=300)


class Settings(BaseSettings):
    """All keys of the file, with their defaults and bounds; they stay as they are for a daemon's life."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix="ODB_", env_nested_delimiter="__", env_ignore_empty=True
    )

    state_dir: AbsolutePath = Field(default_factory=default_state_dir)
    run_dir: AbsolutePath = Field(default_factory=default_run_dir)
    #: where a pull job keeps what the guest overwrites meanwhile; '' = beside the disk
    scratch_dir: OptionalPath = None
    #: searched before the built-in ones
    driver_dirs: tuple[AbsolutePath, ...] = ()
    #: operations at a time, in all and on one host
    workers: int = Field(default=4, ge=1, le=256)
    workers_per_host: int = Field(default=2, ge=1, le=256)
    #: disks that one restore reads side by side
    disks_at_a_time: int = Field(default=4, ge=1, le=64)
    #: how often stores are pruned whose removals free no space by themselves; 0 = never
    prune_every_h: float = Field(default=24, ge=0)
    #: how much of a datastore is read again in a day to prove it; its SCRUB_GB_PER_DAY wins; 0 = nothing
    scrub_gb_per_day: float = Field(default=100, ge=0)
    #: how often each backup is read again, as far as that suffices
    scrub_every_days: float = Field(default=30, ge=0)
    freeze_timeout_s: float = Field(default=10, gt=0, le=60)
    #: a driver that gives no sign of life for so long is ended
    inactivity_s: float = Field(default=300, gt=0)
    #: how long SIGTERM waits for running operations to end by themselves
    stop_s: float = Field(default=10, ge=0)
    deadlines: Deadlines = Deadlines()
    retry: Retry = Retry()
    ssh: Ssh = Ssh()

    file: ClassVar[Path | None] = None

    @property
    def database(self) -> Path:
        """The catalogue and the journal."""
        return self.state_dir / "oned-backup.sqlite"

    @property
    def work_dir(self) -> Path:
        """Each operation has a directory of its own below this."""
        return self.state_dir / "work"

    @property
    def api_dir(self) -> Path:
        """0700: whoever can enter may talk to the daemon."""
        return self.socket.parent

    @property
    def socket(self) -> Path:
        """The daemon's unix socket."""
        return self.run_dir / SOCKET

    @property
    def ssh_sockets_dir(self) -> Path:
        """Where shared connections have their sockets; its name is short because theirs are long."""
        return self.run_dir / "c"

    @property
    def nbd_dir(self) -> Path:
        """Holds a directory of sockets for each running backup."""
        return self.run_dir / "nbd"

    @property
    def ssh_config(self) -> Path:
        """OpenSSH's client configuration, for all that speaks SSH."""
        return self.state_dir / "ssh" / "config"

    @property
    def all_driver_dirs(self) -> tuple[Path, ...]:
        """Where drivers are looked for, in order."""
        return (*self.driver_dirs, Path("/etc/oned-backup/drivers"), *builtin_driver_dirs())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - fixed by pydantic
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, then environment, then the file."""
        toml = TomlConfigSettingsSource(settings_cls, toml_file=cls.file)
        return init_settings, env_settings, toml


@dataclass(frozen=True)
class Loaded:
    """Settings, and for each key (`retry.for_s`) where its value comes from."""

    settings: Settings
    #: the file that was looked for; `file_exists` says whether it was there
    file: Path
    file_exists: bool
    origins: Mapping[str, str]

    def rows(self) -> Iterator[tuple[str, Any, str]]:
        """(key, value, origin) of every setting, tables flattened."""
        for key, value in _flatten(self.settings.model_dump(mode="json")):
            yield key, value, self.origins[key]


def load_settings(path: Path | None = None) -> Loaded:
    """The settings from `path`, or where they are by default; `Misconfigured` names file, key and fault.

    A file that was named must exist; the default one need not.
    """
    file = settings_file(path)
    exists = file.is_file()
    bound = type("Settings", (Settings,), {"file": file if exists else None, "__doc__": Settings.__doc__})
    try:
        settings: Settings = bound()
        raw = TomlConfigSettingsSource(bound, toml_file=file).toml_data if exists else {}
    except ValidationError as error:
        raise _first_fault(file, error) from error
    except (ValueError, OSError) as error:
        raise Misconfigured(f"{file}: {error}", hint="The file must be TOML.") from error
    in_file = {key for key, _ in _flatten(raw)}
    origins = {}
    for key, _ in _flatten(settings.model_dump(mode="json")):
        variable = f"ODB_{key.replace('.', '__').upper()}"
        if os.environ.get(variable):
            origins[key] = variable
        else:
            origins[key] = str(file) if key in in_file else "default"
    return Loaded(settings, file, exists, origins)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_fault(file: Path, error: ValidationError) -> Misconfigured:
    fault = error.errors()[0]
    key = ".".join(part for part in fault["loc"] if isinstance(part, str))
    variable = f"ODB_{key.replace('.', '__').upper()}"
    where = variable if variable in os.environ else f"{file}: {key}"
    if fault["type"] == "extra_forbidden":
        known = ", ".join(name for name in Settings.model_fields)
        return Misconfigured(f"{where}: no such setting", hint=f"There are: {known}; see `config show`.")
    text = fault["msg"].removeprefix("Value error, ")
    return Misconfigured(
        f"{where}: {text[:1].lower()}{text[1:]}, not {str(fault['input'])[:60]!r}",
        hint=f"Correct or remove {key}; `oned-backup config show` prints all settings.",
    )
