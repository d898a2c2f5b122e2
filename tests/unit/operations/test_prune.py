"""Prune: what is due, what it calls, and stores that need none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oned_backup.model.datastore import new_datastore
from oned_backup.operations.prune import due
from oned_backup.store import OperationState

from .conftest import World

DAY_S = 86_400


@pytest.fixture
def restic(world: World) -> int:
    """A datastore whose driver can prune; its id."""
    parameters = {"BASE_PATH": "/srv/restic", "RESTIC_SFTP_SERVER": "backup"}
    element = world.services.store.create(
        "datastore",
        lambda number: new_datastore(number, name="r", ds_mad="restic", parameters=parameters).element,
    )
    return int(element.findtext("ID", ""))


def test_a_store_is_pruned_by_its_driver(world, restic):
    world.drivers.answers["prune"] = lambda _request: {"FREED_MB": "17"}
    ended = world.run("prune", datastore_id=restic)
    assert (ended.state, ended.result) == (OperationState.DONE, {"freed_mb": 17})
    assert world.drivers.actions == ["prune"]


@pytest.mark.parametrize("freed", ["many", "-1", "9" * 5000])
def test_a_driver_that_frees_no_number_breaks_its_contract(world, restic, freed):
    world.drivers.answers["prune"] = lambda _request: {"FREED_MB": freed}
    ended = world.run("prune", datastore_id=restic)
    assert ended.state == OperationState.FAILED
    assert "DriverBug" in ended.error


def test_a_store_whose_removals_free_space_at_once_has_nothing_to_prune(world):
    ended = world.run("prune", datastore_id=100)
    assert ended.state == OperationState.FAILED
    assert "nothing to prune" in ended.error
    assert world.drivers.actions == []


@pytest.mark.fault("odd inputs", "clock that goes backwards")
def test_only_stores_that_need_it_are_due_and_once_a_day(world, restic):
    services = world.services
    now = services.clock()
    assert due(services) == [restic]
    world.run("prune", datastore_id=restic)
    assert due(services) == []
    assert due(replace(services, clock=lambda: now + DAY_S - 60)) == []
    assert due(replace(services, clock=lambda: now + DAY_S + 60)) == [restic]
    assert due(replace(services, clock=lambda: now - DAY_S - 60)) == [restic], "the clock was ahead"


def test_what_is_queued_is_not_queued_again(world, restic):
    world.services.store.journal.enqueue("prune", "prune:0", {"datastore_id": restic}, datastore_id=restic)
    assert due(replace(world.services, clock=lambda: 4e9)) == []


def test_it_can_be_switched_off(world, restic):
    settings = world.services.settings.model_copy(update={"prune_every_h": 0})
    assert due(world.services) == [restic]
    assert due(replace(world.services, settings=settings)) == []
