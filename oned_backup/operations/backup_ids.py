"""Ids of the backups that are made: by a backup, or by a merge of several."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import UTC, datetime

#: option for a driver: none was called with this backup id before
NEW_ID: Mapping[str, str] = {"NEW_ID": "YES"}


def new_backup_id(now: float) -> str:
    """A fresh backup id: the time in UTC, and six random hex digits."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
