"""Into which chain a backup goes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from oned_backup.contract.exports import Reason
from oned_backup.errors import InvalidInput
from oned_backup.model.backup_config import BackupConfig, Mode
from oned_backup.model.image import Image, ImageState, with_state
from oned_backup.operations.chain import ChainPlan, last_good_parent, plan_chain, space_needed_mb
from oned_backup.operations.damage import broken_with
from oned_backup.operations.stored import manifest_of

from .conftest import World

FRESH = BackupConfig(mode=Mode.INCREMENT)
STORES = [100, 101]


@pytest.fixture
def images(world: World) -> dict[int, Image]:
    """An image 0 with increments 0 and 1 in datastore 100."""
    world.run("backup", vm_id=0)
    world.run("backup", vm_id=0)
    return {0: world.services.image(0)}


@pytest.fixture
def config() -> BackupConfig:
    """That of a VM whose chain is image 0."""
    return replace(FRESH, incremental_backup_id=0, last_increment_id=1)


def good(images: dict[int, Image]) -> set[str]:
    return {entry.source for image in images.values() for entry in image.increments}


def test_a_first_backup_needs_to_know_where() -> None:
    assert plan_chain(FRESH, {}, (), enabled_datastores=[100]) == ChainPlan(
        100, full_reason=Reason.FIRST_BACKUP
    )
    assert plan_chain(FRESH, {}, (), enabled_datastores=STORES, requested_datastore=101).datastore_id == 101
    with pytest.raises(InvalidInput, match="more than one datastore"):
        plan_chain(FRESH, {}, (), enabled_datastores=STORES)
    with pytest.raises(InvalidInput, match="no enabled backup datastore"):
        plan_chain(FRESH, {}, (), enabled_datastores=[])


def test_an_active_chain_is_continued_where_it_is(images: dict[int, Image], config: BackupConfig) -> None:
    plan = plan_chain(config, images, good(images), enabled_datastores=STORES)
    assert plan == ChainPlan(100, 0, images[0].increments[-1].source, 2)
    assert last_good_parent(config, images) == plan.parent_id


def test_another_datastore_begins_a_chain_there(images: dict[int, Image], config: BackupConfig) -> None:
    plan = plan_chain(config, images, good(images), enabled_datastores=STORES, requested_datastore=101)
    assert (plan.datastore_id, plan.image_id, plan.full_reason) == (101, None, Reason.OTHER_DATASTORE)
    assert "datastore 101 was asked for" in plan.explanation


def test_reset_begins_a_chain_and_keeps_the_old_parent(
    images: dict[int, Image], config: BackupConfig
) -> None:
    plan = plan_chain(config, images, good(images), enabled_datastores=STORES, reset=True)
    assert (plan.image_id, plan.full_reason) == (None, Reason.RESET)
    assert last_good_parent(config, images) == images[0].increments[-1].source


def test_a_damaged_chain_is_not_continued(images: dict[int, Image], config: BackupConfig) -> None:
    first = images[0].increments[0].source
    plan = plan_chain(config, images, good(images) - {first}, enabled_datastores=STORES)
    assert (plan.image_id, plan.full_reason) == (None, Reason.CHAIN_DAMAGED)
    assert f"backup {first}" in plan.explanation
    assert "damaged" in plan.explanation


def test_without_an_active_chain_the_newest_image_tells_why(images: dict[int, Image]) -> None:
    ended = plan_chain(FRESH, images, good(images), enabled_datastores=[100])
    assert (ended.image_id, ended.full_reason) == (None, Reason.CHAIN_ENDED)
    damaged = plan_chain(FRESH, images, (), enabled_datastores=[100])
    assert (damaged.image_id, damaged.full_reason) == (None, Reason.CHAIN_DAMAGED)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"last_increment_id": 0}, "the VM's last one is 0"),
        ({"incremental_backup_id": 7}, "image 7 of the active chain is gone"),
    ],
)
def test_pointers_that_do_not_fit_begin_a_chain(
    images: dict[int, Image], config: BackupConfig, changed: dict[str, int], text: str
) -> None:
    plan = plan_chain(replace(config, **changed), images, good(images), enabled_datastores=[100])
    assert (plan.image_id, plan.full_reason) == (None, Reason.CHAIN_LOST)
    assert text in plan.explanation


def test_an_image_that_is_being_deleted_is_not_continued(
    images: dict[int, Image], config: BackupConfig
) -> None:
    leaving = {0: with_state(images[0], ImageState.DELETE)}
    plan = plan_chain(config, leaving, good(images), enabled_datastores=[100])
    assert (plan.image_id, plan.full_reason) == (None, Reason.CHAIN_LOST)
    assert "DELETE" in plan.explanation


def test_mode_full_stands_alone(images: dict[int, Image]) -> None:
    plan = plan_chain(BackupConfig(), images, good(images), enabled_datastores=STORES)
    assert plan == ChainPlan(100, full_reason=Reason.FULL_MODE)


def test_the_estimate_comes_from_earlier_backups() -> None:
    history = {"FULL": 500, "INCREMENT": 20}
    assert space_needed_mb(history, continues=True, sizes_mb=[1000]) == 20
    assert space_needed_mb(history, continues=False, sizes_mb=[1000]) == 500
    assert space_needed_mb(history, continues=False, sizes_mb=[100]) == 100
    assert space_needed_mb({}, continues=False, sizes_mb=[8_000_000]) == 1


def test_damage_spreads_to_what_continues_it(world: World) -> None:
    for _ in range(3):
        world.run("backup", vm_id=0)
    manifests = [manifest_of(world.services, row.backup_id) for row in world.services.store.backups()]
    ids = [manifest.id for manifest in manifests]
    assert broken_with([ids[1]], manifests) == (ids[1], ids[2])
    assert broken_with([ids[2]], manifests) == (ids[2],)
    assert broken_with([], manifests) == ()
