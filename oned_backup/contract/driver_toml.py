"""`driver.toml`: what a driver says about itself.

    spec = 1
    kind = "datastore"
    name = "fs"
    summary = "a directory: a local disk or a mounted network file system"
    features = ["stream", "verify"]

    [parameters.BASE_PATH]
    required = true
    help = "absolute path of the directory that holds the backups"

    [parameters.PASSWORD]
    secret = true

    [needs]
    rsync = "Run: apt-get install rsync"

The daemon checks a datastore's template against `[parameters]`, so that no
driver contains argument checking. Keys: required, secret (booleans), default,
help, pattern (a regular expression that the whole value must match) (texts).
`[needs]` names programs, and files by their absolute paths, without which the driver cannot
work, each with its remedy: `doctor` looks for them on the daemon's machine.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from oned_backup.contract.actions import SPEC_VERSION, Kind
from oned_backup.errors import InvalidInput, Misconfigured
from oned_backup.model.names import checked_name

#: what `features` may name, and what the daemon does with it
FEATURES = {
    "stream": "reads the exports itself: no staged files are made for it",
    "verify": "can re-read and compare checksums",
    "flatten": "can merge increments",
    "catalogue": "can list all backups of the store, for `datastore import`",
    "compress": "can compress what it stores",
    "nbd": "downloads into an NBD export, so that a disk can be restored to another host",
    "libvirt": "the hosts of this hypervisor driver have libvirt's URIs",
    "ahead": "may be started before its request is there, and does nothing until then",
}

_PARAMETER_NAME = re.compile(r"[A-Z][A-Z0-9_]{0,63}")


@dataclass(frozen=True)
class Parameter:
    """One setting of a datastore, as its driver wants it."""

    name: str
    required: bool = False
    secret: bool = False
    default: str = ""
    help: str = ""
    pattern: str = ""


#: a setting that every datastore has, whatever its driver: the daemon goes by it, drivers do not
SCRUB_BUDGET = "SCRUB_GB_PER_DAY"
_COMMON = Parameter(
    SCRUB_BUDGET,
    pattern=r"\d{1,9}(\.\d{1,9})?",
    help="GB that the daemon may read a day to prove what is stored, 0: nothing; default: scrub_gb_per_day",
)


@dataclass(frozen=True)
class DriverManifest:
    """The content of a driver.toml, checked."""

    kind: Kind
    name: str
    summary: str
    features: frozenset[str]
    parameters: Mapping[str, Parameter]
    #: programs and absolute paths, and what to do where one is missing
    needs: Mapping[str, str]

    def checked_parameters(self, values: Mapping[str, str]) -> dict[str, str]:
        """`values` with defaults, paths without a slash at their end; `InvalidInput` names what is wrong."""
        unknown = sorted(set(values) - set(self.parameters))
        if unknown:
            known = ", ".join(self.parameters) or "none"
            raise InvalidInput(
                f"driver {self.name} has no parameter {unknown[0]}", hint=f"It knows: {known}."
            )
        checked = {}
        for parameter in self.parameters.values():
            value = values.get(parameter.name, "") or parameter.default
            if value.startswith("/") and not parameter.secret:  # a path as completion leaves it
                value = value.rstrip("/") or "/"
            if not value:
                if parameter.required:
                    raise InvalidInput(
                        f"driver {self.name}: {parameter.name} is missing",
                        hint=f"{parameter.name}: {parameter.help}.",
                    )
                continue
            if parameter.pattern and not re.fullmatch(parameter.pattern, value):
                shown = "***" if parameter.secret else value[:80]
                raise InvalidInput(
                    f"driver {self.name}: {parameter.name}='{shown}' does not fit {parameter.pattern}",
                    hint=f"{parameter.name}: {parameter.help}.",
                )
            checked[parameter.name] = value
        return checked


def load_driver_toml(folder: Path) -> DriverManifest:
    """The manifest of the driver in `folder`; `Misconfigured` names the file and the fault."""
    path = folder / "driver.toml"
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except FileNotFoundError as error:
        raise Misconfigured(f"{folder} is no driver: it has no driver.toml") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured(f"{path}: {error}") from error
    if raw.get("spec") != SPEC_VERSION:
        raise Misconfigured(f"{path}: spec is {raw.get('spec')!r}, this version knows {SPEC_VERSION}")
    try:
        kind = Kind(raw.get("kind", ""))
    except ValueError as error:
        raise Misconfigured(f"{path}: kind {raw.get('kind')!r} is none of {', '.join(Kind)}") from error
    features = raw.get("features", [])
    if not isinstance(features, list) or not set(features) <= set(FEATURES):
        raise Misconfigured(f"{path}: features {features!r} are not among {', '.join(FEATURES)}")
    parameters = _parameters(path, raw.get("parameters", {}))
    if kind is Kind.DATASTORE:
        parameters.setdefault(_COMMON.name, _COMMON)
    return DriverManifest(
        kind=kind,
        name=checked_name(str(raw.get("name", "")), f"{path}: name"),
        summary=str(raw.get("summary", "")),
        features=frozenset(features),
        parameters=parameters,
        needs=_needs(path, raw.get("needs", {})),
    )


def _needs(path: Path, raw: object) -> dict[str, str]:
    if not isinstance(raw, dict) or not all(isinstance(remedy, str) for remedy in raw.values()):
        raise Misconfigured(f"{path}: [needs] is not a table of texts")
    return raw


def _parameters(path: Path, raw: object) -> dict[str, Parameter]:
    if not isinstance(raw, dict):
        raise Misconfigured(f"{path}: [parameters] is not a table")
    parameters = {}
    for name, settings in raw.items():
        if not _PARAMETER_NAME.fullmatch(name) or not isinstance(settings, dict):
            raise Misconfigured(f"{path}: [parameters.{name}] is not a table with an upper-case name")
        if name == "ID":
            raise Misconfigured(f"{path}: [parameters.ID]: ODB_DS_ID is the number of the datastore")
        try:
            parameter = Parameter(name=name, **settings)
            re.compile(parameter.pattern)
        except (TypeError, re.error) as error:
            raise Misconfigured(f"{path}: [parameters.{name}]: {error}") from error
        parameters[name] = parameter
    return parameters
