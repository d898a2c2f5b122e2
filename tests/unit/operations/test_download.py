"""DOWNLOAD into a FIFO; the rest is proved with real drivers."""

from __future__ import annotations

from pathlib import Path

import pytest

from oned_backup.errors import Unavailable
from oned_backup.operations import download
from oned_backup.operations.context import Context

from .conftest import World


def test_a_fifo_that_is_gone_is_not_waited_for(world: World, tmp_path: Path) -> None:
    world.services.store.journal.enqueue("download", "vm:0", {})
    operation = world.services.store.journal.claim()
    assert operation is not None
    with pytest.raises(Unavailable, match="No such file"):
        download._open_fifo(Context(world.services, operation), str(tmp_path / "gone"))
