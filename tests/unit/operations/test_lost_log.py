"""The disk of the catalogue fails between a commit and its sync: nobody knows yet what will be true."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oned_backup.errors import Unavailable
from oned_backup.operations.recovery import recover
from oned_backup.store import OperationState, Store, durable

from .conftest import World
from .test_flatten import merged


def lose_commit(world: World, monkeypatch: pytest.MonkeyPatch, kind: str, **arguments: Any) -> None:
    """The commit that names a new backup is written, but cannot be synced; then the daemon starts anew."""
    known = {row.backup_id for row in world.services.store.backups()}
    sync = durable.sync_file

    def failing(path: Path) -> None:
        if {row.backup_id for row in world.services.store.backups()} - known:
            raise OSError(errno.EIO, "Input/output error")
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(durable, "sync_file", failing)
        with pytest.raises(Unavailable, match="could not be synced"):
            world.run(kind, vm_id=0, **arguments)
    world.services.store.close()
    world.services = replace(world.services, store=Store.open(world.services.settings.database))


def test_a_merge_that_the_catalogue_may_name_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.drivers.answers["increment_flatten"] = merged(world)
    for _ in range(3):
        world.run("backup", vm_id=0)
    world.drivers.calls.clear()
    lose_commit(world, monkeypatch, "flatten", image_id=0, increment_ids=[0, 1, 2])
    assert world.drivers.cleaning() == []
    (ended,) = recover(world.services)
    assert (ended.kind, ended.state) == ("flatten", OperationState.DONE)
    (increment,) = world.services.image(0).increments
    assert increment.source == ended.result["backup_id"]
    assert world.drivers.cleaning() == []
    world.services.store.close()


def test_a_backup_that_the_catalogue_may_name_stays(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lose_commit(world, monkeypatch, "backup")
    assert {"backup_cancel", "rm"}.isdisjoint(world.drivers.actions)
    (ended,) = recover(world.services)
    assert ended.state is OperationState.DONE
    assert [row.backup_id for row in world.services.store.backups()] == [ended.result["backup_id"]]
    assert {"backup_cancel", "rm"}.isdisjoint(world.drivers.actions)
    world.services.store.close()
