"""One call of a driver, as its author sees it: typed, and read only when it is asked for.

`call.request` is the document on stdin; everything else comes from the
environment and costs nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from oned_backup import xmldoc
from oned_backup.contract.request import Backup, Request
from oned_backup.errors import DriverFailed, InvalidInput, Misconfigured
from oned_backup.model.names import checked_name
from oned_backup.sdk import failures, log

if TYPE_CHECKING:
    from oned_backup.sdk.files import BackupFiles

#: what an action prints: keys of its page in the specification
Answer: TypeAlias = "Mapping[str, str | int | xmldoc.Element]"

_DATASTORE_PREFIX = "ODB_DS_"
#: zstd's own default, and QEMU's
_ZSTD_LEVEL = 3
_ZSTD = re.compile(r"zstd(?::(1[0-9]|[1-9]))?")


class Call:
    """The action, its request, and the means to answer.

    `stdout` is the descriptor that a streaming download writes to. Anything
    that is printed otherwise goes to stderr.
    """

    def __init__(self, action: str, *, stdin: int = 0, stdout: int, environ: Mapping[str, str]) -> None:
        self.action = action
        self.stdout = stdout
        self.progress = log.ProgressLines()
        self.space: failures.SpaceNeeded | None = None
        self._stdin = stdin
        self._environ = environ

    @cached_property
    def request(self) -> Request:
        """The request on stdin, typed."""
        chunks = []
        size = 0
        while data := os.read(self._stdin, 1 << 16):
            size += len(data)
            if size > xmldoc.MAX_DOCUMENT_BYTES:
                raise InvalidInput(f"request: more than {xmldoc.MAX_DOCUMENT_BYTES} bytes")
            chunks.append(data)
        return Request.from_xml(xmldoc.parse(b"".join(chunks), what="request"))

    @property
    def backup(self) -> Backup:
        """The place of the backup at hand in its chain."""
        if self.request.backup is None:
            raise InvalidInput(f"request: {self.action} needs the section BACKUP")
        return self.request.backup

    @property
    def operation_id(self) -> str:
        """The daemon's operation, for names of things that belong to it."""
        return checked_name(self._variable("ODB_OPERATION_ID"), "ODB_OPERATION_ID")

    @property
    def backup_id(self) -> str:
        """The id that the daemon chose for the backup."""
        return checked_name(self._variable("ODB_BACKUP_ID"), "ODB_BACKUP_ID")

    @property
    def is_new_id(self) -> bool:
        """Whether nothing of the backup's id can be there: no driver was called with it before."""
        return self.option("NEW_ID", "NO").upper() == "YES"

    @property
    def vm_id(self) -> int:
        """The VM that the call is about: ODB_VM_ID, or the one that IMAGE was made of."""
        if not self._environ.get("ODB_VM_ID") and self.request.image is not None:
            return xmldoc.integer(self.request.image, "VMS/ID")
        return self._number("ODB_VM_ID")

    @property
    def datastore_id(self) -> int:
        """The datastore that the call is about."""
        return self._number("ODB_DS_ID")

    @property
    def base_path(self) -> Path:
        """The datastore's BASE_PATH; `Misconfigured` unless it is absolute."""
        path = Path(self._variable("ODB_DS_BASE_PATH"))
        if not path.is_absolute():
            raise Misconfigured(f"BASE_PATH '{path}' is not an absolute path")
        return path

    @property
    def source_dir(self) -> Path:
        """The directory that holds the backup's small and staged files."""
        return Path(self._variable("ODB_SOURCE_DIR"))

    @property
    def transfer(self) -> str:
        """`stream` or `staged`."""
        return self._environ.get("ODB_TRANSFER", "stream")

    @property
    def zstd_level(self) -> int | None:
        """How hard to compress, by the datastore's COMPRESSION (`zstd` or `zstd:LEVEL`); None: not at all."""
        wanted = self.parameters.get("COMPRESSION", "none")
        if wanted == "none":
            return None
        found = _ZSTD.fullmatch(wanted)
        if found is None:
            raise Misconfigured(f"COMPRESSION '{wanted[:40]}' is none of none, zstd, zstd:1 to zstd:19")
        return int(found[1] or _ZSTD_LEVEL)

    @property
    def deadline(self) -> int | None:
        """Unix time at which the daemon will end the action; None if it set none."""
        value = self._environ.get("ODB_DEADLINE", "")
        return int(float(value)) if value else None

    @cached_property
    def parameters(self) -> Mapping[str, str]:
        """The datastore's parameters that are not secret, by their names in driver.toml."""
        return {
            name.removeprefix(_DATASTORE_PREFIX): value
            for name, value in self._environ.items()
            if name.startswith(_DATASTORE_PREFIX) and name != "ODB_DS_ID"
        }

    @cached_property
    def secrets(self) -> Mapping[str, log.Secret]:
        """The datastore's secret parameters; read from files that only this driver can open."""
        directory = self._environ.get("ODB_SECRETS_DIR", "")
        if not directory:
            return {}
        return {
            path.name: log.Secret(path.read_text().removesuffix("\n"))
            for path in sorted(Path(directory).iterdir())
        }

    def secret(self, name: str) -> log.Secret:
        """One secret parameter; `Misconfigured` if it was not given."""
        if name not in self.secrets:
            raise Misconfigured(f"parameter {name} is missing")
        return self.secrets[name]

    def secret_path(self, name: str) -> Path:
        """The file with a secret parameter, for programs that read it from there; it is ours alone."""
        self.secret(name)  # so that the value never appears in a line of ours
        return Path(self._variable("ODB_SECRETS_DIR")) / checked_name(name, "secret parameter")

    def option(self, name: str, default: str | None = None) -> str:
        """What the caller set in TEMPLATE; without a default, `InvalidInput` if it is absent."""
        value = self.request.options.get(name, "").strip() or default
        if value is None:
            raise InvalidInput(f"request: {self.action} needs the option {name}")
        return value

    def integer_option(self, name: str) -> int | None:
        """A whole number in TEMPLATE; None for an absent one and for OpenNebula's -1."""
        value = self.option(name, "-1")
        try:
            number = int(value)
        except ValueError as error:
            raise InvalidInput(f"option {name}: '{value[:40]}' is not a whole number") from error
        return number if number >= 0 else None

    def files(self) -> BackupFiles:
        """The backup's files in the order to store them; use it as a context manager."""
        from oned_backup.sdk.files import BackupFiles  # noqa: PLC0415 - loads the data engine

        return BackupFiles(self)

    def require_space(self, path: Path, needed_bytes: int, least_bytes: int | None = None) -> None:
        """Raise `NoSpace` unless `needed_bytes` are free at `path`; a later ENOSPC tells the same numbers.

        `least_bytes`: what is asked for where that is an upper bound, so that nothing is refused that fits.
        """
        self.space = failures.SpaceNeeded(path, needed_bytes)
        free = self.space.free_bytes()
        if free < (needed_bytes if least_bytes is None else least_bytes):
            raise failures.no_space(self.space, free)

    def log(self, text: str, level: log.Level = log.Level.INFO) -> None:
        """A line in the operation's log."""
        log.write(level, text)

    def warn(self, text: str) -> None:
        """A line that people should see although the action succeeds."""
        log.write(log.Level.WARNING, text)

    def _variable(self, name: str) -> str:
        value = self._environ.get(name, "")
        if not value:
            raise DriverFailed(f"{self.action}: the environment lacks {name}")
        return value

    def _number(self, name: str) -> int:
        value = self._variable(name)
        if not value.isdecimal():
            raise InvalidInput(f"{name}: '{value[:40]}' is not a whole number")
        return int(value)
