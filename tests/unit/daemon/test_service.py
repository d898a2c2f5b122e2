"""The pool: who runs beside whom, who waits, and how everything ends."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from waiting import wait_for

from oned_backup.contract.request import Request
from oned_backup.daemon import requests
from oned_backup.daemon.service import Service
from oned_backup.errors import Cancelled, Conflict, NoSpace
from oned_backup.model.vm import Vm
from oned_backup.store import OperationState
from tests.unit.operations.conftest import DOMAIN, World

FINAL = {OperationState.DONE, OperationState.FAILED, OperationState.CANCELLED}


class Gate:
    """Holds `backup` actions until it is opened, and counts who is inside."""

    def __init__(self, world: World) -> None:
        self.inside: Counter[int] = Counter()
        self.most = 0
        self._open = threading.Event()
        self._lock = threading.Lock()
        self._usual = world.drivers._backup
        world.drivers.answers["backup"] = self.hold
        world.drivers.answers["dump_xml"] = self._dump_xml

    def hold(self, request: Request) -> dict[str, str]:
        assert request.vm is not None
        vm_id = Vm(request.vm).id
        with self._lock:
            self.inside[vm_id] += 1
            self.most = max(self.most, self.inside.total())
        assert self._open.wait(20)
        with self._lock:
            self.inside[vm_id] -= 1
        return self._usual(request)

    def _dump_xml(self, request: Request) -> dict[str, str]:
        number = request.options["DOMAIN"][-1] if request.options["DOMAIN"][-2] == "1" else ""
        domain = DOMAIN.replace("9a1c2b3d-0000-4000-8000-000000000001", request.options["DOMAIN"])
        domain = domain.replace(">web<", f">web{number}<").replace("\n", " ")
        return {"DOMAIN": domain, "STATE": "RUNNING", "CAPACITY": ""}

    def open(self) -> None:
        self._open.set()


def all_ended(service: Service) -> bool:
    return all(entry.state in FINAL for entry in service.services.store.journal.list())


def test_vms_run_side_by_side_up_to_the_hosts_limit(world: World, service: Service, vms: list[int]) -> None:
    gate = Gate(world)
    queued = [requests.backup(service, vm_id) for vm_id in vms]
    service.start()
    wait_for("two backups", lambda: gate.inside.total() == 2)
    waiting = [service.services.store.journal.get(entry.id) for entry in queued[2:]]
    assert [entry.state for entry in waiting] == [OperationState.QUEUED] * 2
    gate.open()
    wait_for("end of all", lambda: all_ended(service))
    assert gate.most == service.settings.workers_per_host == 2
    states = {entry.state for entry in service.services.store.journal.list(kind="backup")}
    assert states == {OperationState.DONE}


@pytest.mark.fault("concurrency", "two backups of one VM")
@pytest.mark.fault("concurrency", "delete beside a backup of the same chain")
def test_one_operation_a_vm(world: World, service: Service) -> None:
    world.run("backup", vm_id=0)
    gate = Gate(world)
    first = requests.backup(service, 0)
    second = requests.verify(service, 0, {})
    service.start()
    wait_for("backup", lambda: gate.inside[0] == 1)
    blocked = service.services.store.journal.get(second.id)
    assert blocked.state is OperationState.QUEUED
    assert requests.waits_for(service, blocked) is not None
    with pytest.raises(Conflict, match=first.id):
        requests.backup(service, 0)
    with pytest.raises(Conflict, match="active backup"):
        requests.delete(service, 0)
    gate.open()
    wait_for("end of all", lambda: all_ended(service))


def test_cancelling_what_is_queued_and_what_runs(world: World, service: Service, vms: list[int]) -> None:
    gate = Gate(world)
    running, queued = (requests.backup(service, vm_id) for vm_id in vms[:2])
    requests.cancel_backup(service, vms[1])
    assert service.services.store.journal.get(queued.id).state is OperationState.CANCELLED
    service.start()
    wait_for("backup", lambda: gate.inside[0] == 1)
    requests.cancel_backup(service, 0)
    gate.open()
    wait_for("end of all", lambda: all_ended(service))
    assert service.services.store.journal.get(running.id).state is OperationState.CANCELLED
    with pytest.raises(Conflict, match="no backup in progress"):
        requests.cancel_backup(service, 0)


def test_waiting_for_progress(service: Service) -> None:
    operation = requests.backup(service, 0)
    service.start()
    versions, seen = [], 0
    view = service.services.store.journal.get(operation.id)
    while not view.state.is_final:
        view, seen = service.wait_for(operation.id, seen, 5)
        versions.append(seen)
    assert len(versions) > 2
    assert versions == sorted(versions)
    assert service.wait_for(operation.id, seen, 5)[0].state is OperationState.DONE


def test_a_stop_does_not_wait_for_ever(world: World, vms: list[int]) -> None:
    settings = world.services.settings.model_copy(update={"stop_s": 0.2})
    service = Service(replace(world.services, settings=settings))
    gate = Gate(world)
    operation = requests.backup(service, vms[0])
    service.start()
    wait_for("backup", lambda: gate.inside[0] == 1)
    assert service.stop() is False  # though the gate is shut
    assert service.services.store.journal.get(operation.id).state is OperationState.RUNNING
    gate.open()
    wait_for("end", lambda: service.services.store.journal.get(operation.id).state.is_final)


@pytest.mark.fault("daemon", "disk of the catalogue full")
def test_an_end_that_cannot_be_written_is_written_later(
    world: World, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = world.services.store.journal
    finish = type(journal).finish
    broken = threading.Event()
    broken.set()

    def full(*arguments: Any, **values: Any) -> Any:
        if broken.is_set():
            raise NoSpace("database: disk full")
        return finish(*arguments, **values)

    monkeypatch.setattr(type(journal), "finish", full)
    monkeypatch.setattr("oned_backup.daemon.service._LOOK_S", 0.05)
    service.start()
    first = requests.backup(service, 0)
    wait_for("end that cannot be written", lambda: bool(service._unended))
    assert journal.get(first.id).state is OperationState.RUNNING
    broken.clear()
    wait_for("end of the first", lambda: journal.get(first.id).state is OperationState.FAILED)
    second = requests.backup(service, 0)
    wait_for("end of the second", lambda: journal.get(second.id).state is OperationState.DONE)


def test_what_a_stop_interrupts_of_a_removal_is_queued_again(world: World, service: Service) -> None:
    world.run("backup", vm_id=0)
    inside = threading.Event()

    def until_cancelled(_request: Request) -> None:
        inside.set()
        wait_for("cancellation", lambda: any(entry.cancelled for entry in service._running.values()))
        raise Cancelled("rm")

    world.drivers.script["rm"] = [until_cancelled]
    settings = world.services.settings.model_copy(update={"stop_s": 1.0})
    service.services = replace(world.services, settings=settings)
    journal = service.services.store.journal
    kept: list[tuple[str, str]] = []
    service.services.store.close = lambda: kept.extend(  # type: ignore[method-assign]
        (entry.kind, entry.state) for entry in journal.list(kind="delete")
    )
    requests.delete(service, 0)
    service.start()
    assert inside.wait(5)
    assert service.stop() is True
    assert kept == [("delete", OperationState.QUEUED), ("delete", OperationState.CANCELLED)]


def test_what_nobody_foresaw_ends_no_thread(
    world: World, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim = service.services.store.journal.claim
    failed: set[str] = set()

    def first_fails(*given: Any, **named: Any) -> Any:
        thread = threading.current_thread().name
        if thread not in failed:
            failed.add(thread)
            raise RuntimeError("unforeseen")
        return claim(*given, **named)

    def fails(_services: object) -> list[int]:
        raise ValueError("unforeseen")

    monkeypatch.setattr(service.services.store.journal, "claim", first_fails)
    monkeypatch.setattr("oned_backup.operations.prune.due", fails)
    monkeypatch.setattr("oned_backup.daemon.service._UPKEEP_S", 0.01)
    monkeypatch.setattr("oned_backup.daemon.service._KEEP_JOURNAL_S", 0)
    service.start()
    wait_for("failures", lambda: len(failed) == service.settings.workers + 1)
    done = requests.backup(service, 0)
    # which only the upkeep does that comes after what has failed
    wait_for(
        "upkeep", lambda: done.id not in {operation.id for operation in service.services.store.journal.list()}
    )
    assert service.services.vm(0).backup_ids
