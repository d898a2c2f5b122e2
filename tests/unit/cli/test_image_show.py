"""What `image show` tells of chains, short and long."""

from __future__ import annotations

import time
from typing import Any

import pytest

from oned_backup.cli import output
from oned_backup.cli.image import SHORT_CHAIN, disks_shown
from oned_backup.errors import NotFound


def point(number: int, *, reason: str = "increment") -> dict[str, Any]:
    kind = "INCREMENT" if reason == "increment" else "FULL"
    disk = {"disk_id": 0, "target": "vda", "type": kind, "reason": reason}
    sizes = {"size_bytes": 1, "stored_bytes": 1, "uncompressed_bytes": 0}
    return {"increment_id": number, "disks": [disk | sizes], "excluded": []}


def test_the_year_is_told_of_what_is_old() -> None:
    now = time.time()
    assert output.minute(now) == time.strftime("%m-%d %H:%M", time.localtime(now))
    last_year = now - 365 * 86_400
    assert output.minute(last_year) == time.strftime("%Y-%m-%d %H:%M", time.localtime(last_year))
    assert output.minute(None) == "never"


def test_a_long_chain_shows_the_newest_and_what_fell_back() -> None:
    reasons = {0: "first-backup", 7: "bitmap-missing"}
    chain = [point(number, reason=reasons.get(number, "increment")) for number in range(300)]
    shown = [(row[0], row[4]) for row in disks_shown(chain, None)]
    assert shown == [(0, "first-backup"), (7, "bitmap-missing"), (299, "increment")]
    assert [row[0] for row in disks_shown(chain, 100)] == [100]
    with pytest.raises(NotFound, match="no increment 300"):
        disks_shown(chain, 300)
    assert len(disks_shown(chain[:SHORT_CHAIN], None)) == SHORT_CHAIN
