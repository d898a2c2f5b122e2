"""Identifiers that become file names, arguments or parts of a URL."""

from __future__ import annotations

import re

from oned_backup.errors import InvalidInput

_NAME = re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,63}")
_IN_JOB = re.compile(r"(job_\d{1,9})\.[0-9a-f]{6}(?:[0-9a-f]{2})?", re.ASCII)
_INSTALLATION = re.compile(r"[0-9a-f]{8}")

#: every checkpoint, bitmap and file that we leave on a hypervisor begins with this
CHECKPOINT_PREFIX = "odb-"


def checked_name(value: str, what: str) -> str:
    """`value`, if it can safely be a path component or an argument; else `InvalidInput`."""
    if not _NAME.fullmatch(value) or value in {".", ".."}:
        raise InvalidInput(
            f"{what}: '{value[:80]}' is not a valid name",
            hint="Use 1 to 64 of A-Z a-z 0-9 . _ - and do not begin with a dash.",
        )
    return value


def checkpoint_name(installation: str, backup_id: str) -> str:
    """The name of the libvirt checkpoint, and of the dirty bitmaps, that a backup leaves behind.

    `installation` (8 hex digits, random, made once) keeps two daemons that back
    up one hypervisor from touching each other's checkpoints.
    """
    if not _INSTALLATION.fullmatch(installation):
        raise InvalidInput(f"installation id '{installation[:20]}' is not 8 hex digits")
    return f"{CHECKPOINT_PREFIX}{installation}-{checked_name(backup_id, 'backup id')}"


def is_own_checkpoint(name: str, installation: str) -> bool:
    """Whether a checkpoint or bitmap was made by this installation."""
    return name.startswith(f"{CHECKPOINT_PREFIX}{installation}-")


def job_repository(backup_id: str) -> str:
    """OpenNebula's repository of a backup job (`job_12`) that a backup lies in; empty for all others."""
    found = _IN_JOB.fullmatch(backup_id)
    return found[1] if found else ""
