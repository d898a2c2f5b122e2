"""BACKUP_CONFIG: how a VM is to be backed up, and where its active chain stands.

The attributes are OpenNebula's. Where OpenNebula turns a wrong value into a
default without a word, `updated` raises `InvalidInput`. Two of its limits do
not exist here: attaching or detaching a disk does not end the chain (the new
disk alone is stored whole), and a raw disk does not forbid MODE=INCREMENT (that
disk is stored whole each time).

    user      MODE FULL|INCREMENT, INCREMENT_MODE CBT|SNAPSHOT, FS_FREEZE NONE|AGENT|SUSPEND,
              KEEP_LAST n (0 or absent: all), BACKUP_VOLATILE, DISK_IDS 0,2,… (absent: all), INTERACTIVE
    ours      KEEP_DAILY n, KEEP_WEEKLY n, KEEP_MONTHLY n, KEEP_YEARLY n (see `model.retention`),
              CHAIN_LENGTH n: after n backups into a chain the next one starts a new one (0: never)
    internal  INCREMENTAL_BACKUP_ID (image of the active chain), LAST_INCREMENT_ID, BACKUP_JOB_ID,
              LAST_DATASTORE_ID, LAST_BACKUP_ID, LAST_BACKUP_SIZE, LAST_BACKUP_FORMAT, LAST_BRIDGE,
              ACTIVE_FLATTEN

What is ours has no place in OpenNebula's schema of BACKUP_CONFIG: it lies in
USER_TEMPLATE/ONED_BACKUP of the VM (`to_own_elements`). To a user it is all one.

A VM without BACKUP_CONFIG means OpenNebula's defaults (MODE=FULL). An imported
libvirt domain is given `imported_config`: MODE=INCREMENT, because that is what
somebody who installs an incremental backup expects, and FS_FREEZE=AGENT where
the domain has the guest agent's channel. KEEP_LAST stays absent: nothing is
deleted that nobody asked to delete.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

from oned_backup import xmldoc
from oned_backup.errors import InvalidInput
from oned_backup.model.document import yes

if TYPE_CHECKING:
    from oned_backup.model.retention import Rules


class Mode(StrEnum):
    """Whether each backup stands alone or continues a chain."""

    FULL = "FULL"
    INCREMENT = "INCREMENT"


class IncrementMode(StrEnum):
    """How changes are tracked; only CBT (dirty bitmaps) is implemented."""

    CBT = "CBT"
    SNAPSHOT = "SNAPSHOT"


class FsFreeze(StrEnum):
    """How the guest is made consistent for the instant of the backup."""

    NONE = "NONE"
    AGENT = "AGENT"
    SUSPEND = "SUSPEND"


@dataclass(frozen=True)
class BackupConfig:
    """A BACKUP_CONFIG element's values. None, -1 and empty mean: not set."""

    mode: Mode = Mode.FULL
    increment_mode: IncrementMode = IncrementMode.CBT
    fs_freeze: FsFreeze = FsFreeze.NONE
    keep_last: int = 0
    backup_volatile: bool = False
    #: empty: all disks
    disk_ids: tuple[int, ...] = ()
    interactive: bool = False
    #: the image that holds the active chain, and the newest increment in it
    incremental_backup_id: int = -1
    last_increment_id: int = -1
    backup_job_id: int | None = None
    last_datastore_id: int | None = None
    last_backup_id: str = ""
    last_backup_size: str = ""
    last_backup_format: str = ""
    last_bridge: str = ""
    active_flatten: bool = False
    keep_daily: int = 0
    keep_weekly: int = 0
    keep_monthly: int = 0
    keep_yearly: int = 0
    chain_length: int = 0
    #: elements this version does not know, as XML
    unknown: tuple[str, ...] = ()

    @property
    def has_chain(self) -> bool:
        """Whether the next backup may continue a chain."""
        return self.mode is Mode.INCREMENT and self.incremental_backup_id >= 0

    @property
    def rules(self) -> Rules:
        """Which restore points retention keeps."""
        from oned_backup.model.retention import Rules  # noqa: PLC0415 - drivers do without

        return Rules(self.keep_last, self.keep_daily, self.keep_weekly, self.keep_monthly, self.keep_yearly)

    def without_chain(self) -> BackupConfig:
        """The same, with the next backup starting a new chain."""
        return replace(self, incremental_backup_id=-1, last_increment_id=-1)

    @classmethod
    def from_element(cls, element: xmldoc.Element | None, own: Iterable[xmldoc.Element] = ()) -> BackupConfig:
        """The values of a BACKUP_CONFIG (None: defaults) and of our `own` elements.

        `InvalidInput` names a wrong one. Elements in `own` that are no settings are left alone.
        """
        values: dict[str, Any] = {}
        unknown = []
        for child in [child for child in own if child.tag in OWN]:
            if child.text and child.text.strip():
                values[str(child.tag).lower()] = _PARSERS[str(child.tag)](str(child.tag), child.text.strip())
        for child in () if element is None else element:
            name = str(child.tag)
            if name not in _PARSERS:
                unknown.append(xmldoc.serialize(child))
            elif child.text and child.text.strip():
                values[name.lower()] = _PARSERS[name](name, child.text.strip())
        return cls(**values, unknown=tuple(unknown))

    def to_element(self) -> xmldoc.Element:
        """The BACKUP_CONFIG element, children sorted by name as OpenNebula writes them."""
        children = [xmldoc.parse(text, what="BACKUP_CONFIG") for text in self.unknown]
        children += self._elements(_PARSERS.keys() - OWN)
        return xmldoc.build("BACKUP_CONFIG", sorted(children, key=lambda child: str(child.tag)))

    def to_own_elements(self) -> list[xmldoc.Element]:
        """The settings that OpenNebula does not have, sorted by name."""
        return sorted(self._elements(OWN), key=lambda child: str(child.tag))

    def _elements(self, names: Collection[str]) -> list[xmldoc.Element]:
        return [
            xmldoc.build(field.name.upper(), _rendered(getattr(self, field.name)))
            for field in fields(self)
            if (name := field.name.upper()) in names
            and (name in _ALWAYS or getattr(self, field.name) != field.default)
        ]


def imported_config(*, has_agent_channel: bool) -> BackupConfig:
    """What a newly imported libvirt domain is configured with; see the module's text."""
    return BackupConfig(mode=Mode.INCREMENT, fs_freeze=FsFreeze.AGENT if has_agent_channel else FsFreeze.NONE)


def updated(config: BackupConfig, values: Mapping[str, str]) -> BackupConfig:
    """`config` with the user's `values`; absent attributes stay, an empty value restores the default.

    The chain ends when MODE, DISK_IDS or BACKUP_VOLATILE change (`selection.configure`
    is finer: it keeps the chain if the same disks are backed up as before).
    `InvalidInput` says what is wrong and what is accepted; then nothing is changed.
    """
    changes: dict[str, Any] = {}
    for name, text in values.items():
        if name not in _SETTABLE:
            raise InvalidInput(
                f"{name[:40]} cannot be set of a VM",
                hint=f"What can: {', '.join(_SETTABLE)}.",
            )
        field = name.lower()
        changes[field] = _PARSERS[name](name, text.strip()) if text.strip() else _DEFAULTS[field]
    new = replace(config, **changes)
    if new.increment_mode is IncrementMode.SNAPSHOT and new.increment_mode != config.increment_mode:
        raise InvalidInput(
            "INCREMENT_MODE=SNAPSHOT is not implemented",
            hint="CBT tracks changes without leaving a snapshot on the running disk.",
        )
    if new.interactive and not config.interactive:
        raise InvalidInput(
            "INTERACTIVE=YES is not implemented", hint="Back up to a datastore with a driver instead."
        )
    same_chain = (new.mode, new.increment_mode, new.disk_ids, new.backup_volatile) == (
        config.mode,
        config.increment_mode,
        config.disk_ids,
        config.backup_volatile,
    )
    return new if same_chain and new.mode is Mode.INCREMENT else new.without_chain()


def _rendered(value: object) -> str:
    if isinstance(value, bool):
        return yes(value)
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return str(value)


_Choice = TypeVar("_Choice", bound=StrEnum)


def _choice(kind: type[_Choice]) -> Callable[[str, str], _Choice]:
    def parse(name: str, text: str) -> _Choice:
        try:
            return kind(text.upper())
        except ValueError as error:
            raise InvalidInput(f"{name}={text[:40]} is not valid", hint=f"Use {', '.join(kind)}.") from error

    return parse


def _boolean(name: str, text: str) -> bool:
    if text.upper() not in {"YES", "NO"}:
        raise InvalidInput(f"{name}={text[:40]} is not valid", hint="Use YES or NO.")
    return text.upper() == "YES"


def _number(minimum: int, maximum: int) -> Callable[[str, str], int]:
    def parse(name: str, text: str) -> int:
        if not re.fullmatch(r"-?[0-9]{1,10}", text) or not minimum <= int(text) <= maximum:
            raise InvalidInput(
                f"{name}={text[:40]} is not valid", hint=f"Use a whole number from {minimum} to {maximum}."
            )
        return int(text)

    return parse


def _disk_ids(name: str, text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]{1,5}(\s*,\s*[0-9]{1,5})*", text):
        raise InvalidInput(
            f"{name}={text[:40]} is not valid",
            hint="Use disk ids separated by commas, such as 0,2; an empty value means all disks.",
        )
    return tuple(sorted({int(item) for item in text.split(",")}))


def _text(_name: str, text: str) -> str:
    return text


_SETTABLE: dict[str, Callable[[str, str], Any]] = {
    "MODE": _choice(Mode),
    "INCREMENT_MODE": _choice(IncrementMode),
    "FS_FREEZE": _choice(FsFreeze),
    "KEEP_LAST": _number(0, 1_000_000),
    "BACKUP_VOLATILE": _boolean,
    "DISK_IDS": _disk_ids,
    "INTERACTIVE": _boolean,
    "KEEP_DAILY": _number(0, 1_000_000),
    "KEEP_WEEKLY": _number(0, 1_000_000),
    "KEEP_MONTHLY": _number(0, 1_000_000),
    "KEEP_YEARLY": _number(0, 1_000_000),
    "CHAIN_LENGTH": _number(0, 1_000_000),
}

#: settings that OpenNebula does not have
OWN = frozenset({"CHAIN_LENGTH", "KEEP_DAILY", "KEEP_MONTHLY", "KEEP_WEEKLY", "KEEP_YEARLY"})

#: what says which restore points are kept
RETENTION = OWN - {"CHAIN_LENGTH"} | {"KEEP_LAST"}

_PARSERS: dict[str, Callable[[str, str], Any]] = {
    **_SETTABLE,
    "INCREMENTAL_BACKUP_ID": _number(-1, 2**31),
    "LAST_INCREMENT_ID": _number(-1, 2**31),
    "BACKUP_JOB_ID": _number(-1, 2**31),
    "LAST_DATASTORE_ID": _number(-1, 2**31),
    "LAST_BACKUP_ID": _text,
    "LAST_BACKUP_SIZE": _text,
    "LAST_BACKUP_FORMAT": _text,
    "LAST_BRIDGE": _text,
    "ACTIVE_FLATTEN": _boolean,
}

#: written even when they have their default value
_ALWAYS = frozenset(
    {"MODE", "FS_FREEZE", "BACKUP_VOLATILE", "INCREMENT_MODE", "INCREMENTAL_BACKUP_ID", "LAST_INCREMENT_ID"}
)

_DEFAULTS = {field.name: field.default for field in fields(BackupConfig)}
