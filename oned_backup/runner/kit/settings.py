"""What a check was told about the datastore: the table [kit] of driver.toml, a file, and the command line.

A store in a directory of the kit's own needs nothing. Of one that is elsewhere the kit can hide,
fill or damage nothing by itself; a file (`driver check --store FILE`) says how:

    timeout_s = 120                            for one call
    ssh_config = "/root/lab/ssh_config"        for OpenSSH
    parameters = { RSYNC_HOST = "backup", BASE_PATH = "/srv/kit/{store}" }
    secrets = { PASSWORD = "/root/password" }  files with the values of secret parameters
    path = "/mnt/backup/kit/{store}"           where the kit sees the files of a store, to damage them
    unreachable = { RSYNC_HOST = "192.0.2.1" } with these parameters, the store cannot be reached

    [commands]                                 lists of words; each is optional
    create = ["ssh", "backup", "mkdir", "-p", "{BASE_PATH}"]
    remove = ["ssh", "backup", "rm", "-rf", "{BASE_PATH}"]
    block = [...]                              the store cannot be reached until unblock
    unblock = [...]
    fill = [...]                               less than 16 MiB are free until unfill
    unfill = [...]

`{store}` stands for a name that the kit makes up for each store: with it in a parameter, every
clause gets an empty store of its own. `{PARAMETER}` stands for that parameter.
"""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oned_backup.errors import InvalidInput, Misconfigured
from oned_backup.runner.kit.catalogue import Store
from oned_backup.runner.kit.clause import NotApplicable

_COMMANDS = ("create", "remove", "block", "unblock", "fill", "unfill")
_COMMAND_TIMEOUT_S = 120


@dataclass(frozen=True)
class Settings:
    """What a check was told; see the module's text."""

    parameters: Mapping[str, str] = field(default_factory=dict)
    unreachable: Mapping[str, str] = field(default_factory=dict)
    commands: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    path: str = ""
    ssh_config: Path | None = None
    timeout_s: float = 120

    def makes_stores(self) -> bool:
        """Whether each clause can have a store of its own, elsewhere."""
        return any("{store}" in value for value in self.parameters.values())

    def new_store(self, name: str, parameters: Mapping[str, str]) -> Store:
        """The store `name`, made by the command `create` if there is one."""
        values = {key: value.replace("{store}", name) for key, value in parameters.items()}
        store = Store(values, None, name)
        if "create" in self.commands:
            self.run("create", store)
        if self.path:
            store.own_path = Path(self._filled(self.path, store))
        return store

    def run(self, name: str, store: Store) -> None:
        """Run the command `name`; `Misconfigured` if it fails, `NotApplicable` if there is none."""
        if name not in self.commands:
            raise NotApplicable(f"there is no command '{name}' for this store")
        argv = [self._filled(word, store) for word in self.commands[name]]
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_TIMEOUT_S, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Misconfigured(f"the command '{name}': {error}") from error
        if done.returncode != 0:
            said = done.stderr.decode("utf-8", "replace").strip()[-500:]
            raise Misconfigured(f"the command '{name}' ended with exit code {done.returncode}: {said}")

    @contextmanager
    def between(self, before: str, after: str, store: Store) -> Iterator[None]:
        """Run `before`, and `after` whatever happens meanwhile."""
        if after not in self.commands:
            raise NotApplicable(f"there is no command '{after}' for this store")
        self.run(before, store)
        try:
            yield
        finally:
            self.run(after, store)

    def _filled(self, word: str, store: Store) -> str:
        for name, value in ({"store": store.name} | store.parameters).items():
            word = word.replace(f"{{{name}}}", value)
        return word


def load_settings(
    folder: Path,
    *,
    parameters: Mapping[str, str] | None = None,
    store_file: Path | None = None,
    ssh_config: Path | None = None,
) -> Settings:
    """All of it: what stands in `store_file` wins over driver.toml, and what is given wins over both."""
    with (folder / "driver.toml").open("rb") as file:
        tables = [("driver.toml: [kit]", tomllib.load(file).get("kit", {}))]
    if store_file is not None:
        tables.append((str(store_file), _read(store_file)))
    merged: dict[str, Any] = {}
    for what, table in tables:
        _check(what, table)
        for name, value in table.items():
            merged[name] = {**merged.get(name, {}), **value} if isinstance(value, dict) else value
    secrets = {name: read_secret(Path(path)) for name, path in merged.get("secrets", {}).items()}
    named = merged.get("ssh_config", "")
    return Settings(
        parameters={**merged.get("parameters", {}), **secrets, **(parameters or {})},
        unreachable=merged.get("unreachable", {}),
        commands={name: tuple(argv) for name, argv in merged.get("commands", {}).items()},
        path=merged.get("path", ""),
        ssh_config=Path(named) if named else ssh_config,
        timeout_s=float(merged.get("timeout_s", Settings.timeout_s)),
    )


def read_secret(path: Path) -> str:
    """The secret in a file, without the newline at its end."""
    try:
        return path.read_text().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_secret(path))
    except tomllib.TOMLDecodeError as error:
        raise InvalidInput(f"{path}: {error}") from error


def _check(what: str, table: Mapping[str, Any]) -> None:
    """`InvalidInput` for a key that nobody knows, or a value of another type than it has."""
    kinds: dict[str, type | tuple[type, ...]] = {"timeout_s": (int, float), "ssh_config": str, "path": str}
    kinds |= dict.fromkeys(("parameters", "secrets", "unreachable", "commands"), dict)
    for name, value in table.items():
        if name not in kinds or not isinstance(value, kinds[name]):
            raise InvalidInput(f"{what}: '{name}' is unknown or of the wrong type")
    for name, argv in table.get("commands", {}).items():
        if name not in _COMMANDS or not isinstance(argv, list) or not all(isinstance(w, str) for w in argv):
            raise InvalidInput(
                f"{what}: the command '{name}' is unknown, or no list of words",
                hint=f"There are {', '.join(_COMMANDS)}.",
            )
    for name in ("parameters", "secrets", "unreachable"):
        if not all(isinstance(value, str) for value in table.get(name, {}).values()):
            raise InvalidInput(f"{what}: a value in '{name}' is no text")
