"""What requests may say: the bodies of the API, each with the limits of its values."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from oned_backup.model.host import DEFAULT_URI

_Values = Annotated[dict[str, Annotated[str, Field(max_length=65536)]], Field(max_length=256)]
_Name = Annotated[str, Field(min_length=1, max_length=128)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class HostBody(_Body):
    """A host to add."""

    name: _Name
    uri: str = Field(default=DEFAULT_URI, min_length=1, max_length=1024)
    vmm: _Name = "kvm"
    tm: _Name = "qcow2"
    accept_host_key: str = Field(default="", max_length=64)


class HostChange(_Body):
    """What to change of a host."""

    values: _Values


class KeyBody(_Body):
    """The fingerprint of a machine's host key that somebody has compared."""

    target: _Name
    fingerprint: str = Field(min_length=1, max_length=64)


class ImportBody(_Body):
    """The domains to import."""

    domains: list[_Name] = Field(default=[], max_length=10000)
    all: bool = False


class ConfigBody(_Body):
    """BACKUP_CONFIG values."""

    values: _Values


class BackupBody(_Body):
    """How to back up."""

    datastore_id: int | None = None
    reset: bool = False


class DatastoreBody(_Body):
    """A datastore to create."""

    name: _Name
    driver: _Name
    values: _Values = {}
    accept_host_key: str = Field(default="", max_length=64)


class DatastoreChange(_Body):
    """What to change of a datastore."""

    name: _Name | None = None
    values: _Values = {}


class RestoreBody(_Body):
    """What to restore, and where to."""

    to: str = Field(min_length=1, max_length=4096)
    increment_id: int | None = None
    disk_id: int | None = None
    name: _Name | None = None
    no_nic: bool = False
    no_ip: bool = False
    format: str = "qcow2"
    host_id: int | None = None
    define_host_id: int | None = None
    salvage: bool = False
    check_space: bool = True


class VerifyBody(_Body):
    """What to verify: all, up to an increment, or a share of it."""

    increment_id: int | None = None
    percent: int | None = Field(default=None, ge=1, le=100)


class PinBody(_Body):
    """Which restore point to keep, or no longer."""

    increment_id: int | None = None
    pinned: bool = True


class DownloadBody(_Body):
    """The disk to download, and where to."""

    url: str = Field(min_length=1, max_length=65536)
    target: str = Field(min_length=1, max_length=4096)
    host_id: int | None = None
    format: str = "raw"
    salvage: bool = False
    overwrite: bool = False


def given(body: BaseModel) -> dict[str, Any]:
    """What of the body was given: options that are left out stay out."""
    return body.model_dump(exclude_none=True)
