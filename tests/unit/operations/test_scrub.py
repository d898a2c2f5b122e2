"""Scrub: what is chosen, what it may cost, and what follows from what is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from oned_backup import xmldoc
from oned_backup.contract.documents import VerifiedBackup, VerifyReport
from oned_backup.contract.request import Request
from oned_backup.errors import DriverFailed, Unavailable
from oned_backup.model.backup_config import Mode
from oned_backup.model.datastore import Datastore, with_parameters
from oned_backup.model.manifest import dump_manifest, parse_manifest
from oned_backup.model.vm import Vm, with_config
from oned_backup.operations import scrub
from oned_backup.operations.context import Context
from oned_backup.operations.engine import run_operation
from oned_backup.operations.kinds import KINDS
from oned_backup.operations.recovery import recover
from oned_backup.operations.services import Services
from oned_backup.store import BackupState, Operation, OperationState

from .conftest import World

STORE = 100
GB = 10**9
DAY_S = 86_400.0
#: what each backup of the tests takes
SIZE = 2 * GB


@pytest.fixture
def chain(world: World) -> World:
    """A chain of three, and a driver whose `verify` reads all and finds what `damaged` says."""
    world.services.store.change("vm", 0, _incremental)
    for _ in range(3):
        assert world.run("backup", vm_id=0).state is OperationState.DONE
    for number, row in enumerate(world.services.store.backups()):
        _resize(world, row.backup_id, SIZE, stored_at=1000.0 + number)
    world.drivers.answers["verify"] = lambda request: _whole(world, request)
    world.drivers.calls.clear()
    return at(world, 5000.0)


def _incremental(element: xmldoc.Element) -> xmldoc.Element:
    vm = Vm(element)
    return with_config(vm, replace(vm.config, mode=Mode.INCREMENT)).element


def _resize(world: World, backup_id: str, size: int, *, stored_at: float | None = None) -> None:
    """Have a backup one file of that size."""
    store = world.services.store
    row = store.backup(backup_id)
    raw: dict[str, Any] = {**parse_manifest(row.manifest).raw}
    raw["files"] = [{"name": "disk.0.0", "size_bytes": size, "blake3": "0" * 64}]
    manifest = dump_manifest(raw).decode()
    with store.transaction() as tx:
        tx.forget_backup(backup_id)
        tx.add_backup(replace(row, manifest=manifest, stored_at=stored_at or row.stored_at))


def at(world: World, now: float, **settings: float) -> World:
    """The same world at another time, with other settings."""
    changed = world.services.settings.model_copy(update=settings)
    world.services.store._database.now = lambda: now  # the journal's clock
    return World(replace(world.services, clock=lambda: now, settings=changed), world.drivers)


def _whole(world: World, request: Request, damage: Mapping[str, str] | None = None) -> dict[str, str]:
    damage = damage or {}
    wanted = request.options["BACKUP_IDS"]
    size = parse_manifest(world.services.store.backup(wanted).manifest).size_bytes
    failures = (("disk.0.0", damage[wanted]),) if wanted in damage else ()
    read = size * int(request.options.get("PERCENT", "100")) // 100
    return {"REPORT": xmldoc.serialize(VerifyReport((VerifiedBackup(wanted, read, failures),)).to_xml())}


def scrubbed(world: World) -> Operation:
    return world.run("scrub", datastore_id=STORE)


def read(world: World) -> list[str]:
    """The backups that were read again, in order."""
    return [request.options["BACKUP_IDS"] for request in world.drivers.requests("verify")]


def ids(world: World) -> list[str]:
    return [row.backup_id for row in world.services.store.backups()]


def states(services: Services) -> list[str]:
    return [row.state.value for row in services.store.backups()]


def test_what_was_never_proved_is_read_oldest_first(chain):
    ended = scrubbed(chain)
    assert (ended.state, ended.result["read_bytes"]) == (OperationState.DONE, 3 * SIZE)
    assert read(chain) == ids(chain)
    assert [row.verified_at for row in chain.services.store.backups()] == [5000.0] * 3
    assert scrub.due(chain.services) == []


def test_what_is_proved_is_due_again_after_some_days(chain):
    scrubbed(chain)
    later = at(chain, 5000.0 + 31 * DAY_S)
    assert scrub.due(later.services) == [STORE]
    assert scrub.due(at(chain, 5000.0 + 29 * DAY_S).services) == []


def test_the_budget_of_a_day_holds_and_the_next_day_goes_on(chain):
    world = at(chain, 5000.0, scrub_gb_per_day=5)
    assert scrubbed(world).result["read_bytes"] == 2 * SIZE
    assert read(world) == ids(world)[:2]
    assert scrub.due(world.services) == []
    assert scrubbed(world).result["read_bytes"] == 0
    assert scrub.due(at(world, 5000.0 + DAY_S - 1).services) == []
    tomorrow = at(world, 5000.0 + DAY_S + 1)
    assert scrub.due(tomorrow.services) == [STORE]
    scrubbed(tomorrow)
    assert read(world) == ids(world)


def test_of_a_scrub_that_was_cut_off_all_counts_as_read(chain):
    world = at(chain, 5000.0, scrub_gb_per_day=5)

    def die(_request: Request) -> dict[str, str]:
        raise KeyboardInterrupt

    world.drivers.answers["verify"] = die
    operation = scrub.queue(world.services, STORE)
    claimed = world.services.store.journal.claim()
    with pytest.raises(KeyboardInterrupt):
        run_operation(KINDS["scrub"], Context(world.services, claimed))
    (recovered,) = recover(world.services)
    assert (recovered.id, recovered.state) == (operation.id, OperationState.FAILED)
    assert recovered.result["read_bytes"] == 2 * SIZE
    assert scrub.due(world.services) == []


def test_a_datastore_may_have_a_budget_of_its_own(chain):
    def limited(element: xmldoc.Element) -> xmldoc.Element:
        old = Datastore(element)
        return with_parameters(old, {**old.parameters, "SCRUB_GB_PER_DAY": "0"}).element

    chain.services.store.change("datastore", STORE, limited)
    assert scrub.due(chain.services) == []
    off = at(chain, 5000.0, scrub_gb_per_day=0)
    assert scrub.due(off.services) == []


def test_damage_is_entered_with_all_that_depends_on_it(chain):
    _, second, third = ids(chain)
    damage = {second: "checksum does not match"}
    chain.drivers.answers["verify"] = lambda request: _whole(chain, request, damage)
    ended = scrubbed(chain)
    assert ended.state is OperationState.FAILED
    assert second in ended.error
    assert "checksum does not match" in ended.error
    assert states(chain.services) == ["GOOD", "BROKEN", "BROKEN"]
    rows = chain.services.store.backups()
    assert rows[2].failure == f"continues {second}, which is damaged"
    assert not chain.services.vm(0).config.has_chain
    assert ended.result["broken"] == [second, third]
    proof = scrub.view(chain.services, chain.services.datastore(STORE))
    assert (proof["backups"], proof["proved"], proof["broken"]) == (3, 1, 2)


def test_what_is_removed_while_it_is_read_is_not_damaged(chain):
    def gone(request: Request) -> dict[str, str]:
        for backup_id in ids(chain):
            chain.services.store.mark_backup(backup_id, state=BackupState.REMOVING)
        return _whole(chain, request, {request.options["BACKUP_IDS"]: "absent"})

    chain.drivers.answers["verify"] = gone
    assert scrubbed(chain).state is OperationState.DONE
    assert states(chain.services) == ["REMOVING"] * 3


def test_a_store_that_cannot_be_reached_marks_nothing_and_is_left_alone_for_an_hour(chain):
    chain.drivers.script["verify"] = [Unavailable("no route to host")]
    ended = scrubbed(chain)
    assert ended.state is OperationState.FAILED
    assert "no route to host" in ended.error
    assert ended.result["read_bytes"] == 0
    assert states(chain.services) == ["GOOD"] * 3
    assert scrub.due(chain.services) == []
    later = at(chain, 5000.0 + 3601)
    assert scrub.due(later.services) == [STORE]
    assert scrubbed(later).state is OperationState.DONE


def test_a_driver_that_fails_for_one_backup_does_not_stop_the_others(chain):
    chain.drivers.script["verify"] = [DriverFailed("strange")]
    ended = scrubbed(chain)
    assert ended.state is OperationState.DONE
    assert "strange" in ended.result["notes"][0]
    assert [row.verified_at for row in chain.services.store.backups()] == [None, 5000.0, 5000.0]
    assert scrub.due(chain.services) == [], "it is tried once a day"
    assert scrub.due(at(chain, 5000.0 + DAY_S + 1).services) == [STORE]


def test_what_is_larger_than_the_budget_is_sampled_when_nothing_else_is_due(chain):
    full = ids(chain)[0]
    _resize(chain, full, 100 * GB)
    world = at(chain, 5000.0, scrub_gb_per_day=5)
    scrubbed(world)
    assert read(world) == ids(world)[1:]
    tomorrow = at(world, 5000.0 + DAY_S + 1)
    sample = scrubbed(tomorrow)
    (*_, request) = world.drivers.requests("verify")
    assert (request.options["BACKUP_IDS"], request.options["PERCENT"]) == (full, "2")
    assert sample.result["percent"] == 2
    assert sample.result["read_bytes"] <= 5 * GB
    assert world.services.store.backup(full).verified_at is None
    assert scrub.due(tomorrow.services) == []


def test_one_follows_the_other_while_there_is_something_to_read(chain):
    for backup_id in ids(chain):
        _resize(chain, backup_id, 9 * GB)
    scrubbed(chain)
    assert read(chain) == ids(chain)[:1]
    chain.run_queued()
    assert read(chain) == ids(chain)
    assert chain.services.store.journal.claim() is None
    assert [one.state for one in chain.services.store.journal.list(kind="scrub")] == [OperationState.DONE] * 3


def test_a_clock_that_was_ahead_stops_nothing(chain):
    for backup_id in ids(chain):
        chain.services.store.mark_backup(backup_id, verified_at=9e9)
    assert scrub.due(chain.services) == [STORE]
