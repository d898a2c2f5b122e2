"""A VM that has moved to another host is found there, and its chain goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from oned_backup.contract.request import Request
from oned_backup.errors import NotFound, Unavailable
from oned_backup.model.host import Host
from oned_backup.operations.inventory import add_host
from oned_backup.store import OperationState

from .conftest import World

UUID = "9a1c2b3d-0000-4000-8000-000000000001"


@pytest.fixture
def states(world: World) -> dict[str, str | Exception]:
    """What each host says of the domain, by the host's name; absent: it has none."""
    said: dict[str, str | Exception] = {"local": "RUNNING"}
    dump: Callable[[Request], dict[str, str]] = world.drivers._dump_xml
    measure: Callable[[Request], dict[str, str]] = world.drivers._monitor

    def state(request: Request) -> str | None:
        assert request.host is not None
        found = said.get(Host(request.host).name)
        if isinstance(found, Exception):
            raise found
        return found

    def dump_xml(request: Request) -> dict[str, str]:
        found = state(request)
        if found is None:
            raise NotFound("domain web is not defined on the host")
        return {**dump(request), "STATE": found}

    def monitor(request: Request) -> dict[str, str]:
        if request.host is None:
            return measure(request)
        found = state(request)
        uuid = world.services.vm(0).uuid
        domain = f"<DOMAIN><NAME>web</NAME><UUID>{uuid}</UUID><STATE>{found}</STATE></DOMAIN>"
        return {"DOMAINS": f"<DOMAINS>{domain if found else ''}</DOMAINS>"}

    world.drivers.answers["dump_xml"] = dump_xml
    world.drivers.answers["monitor"] = monitor
    assert world.run("backup", vm_id=0).state is OperationState.DONE
    for name in ("other", "third"):
        add_host(world.services, name, uri=f"qemu+ssh://root@{name}/system", vm_mad="kvm", tm_mad="qcow2")
    return said


def notes(operation: Any) -> list[str]:
    return list(operation.result["notes"])


@pytest.mark.parametrize(
    ("here", "there"),
    [
        (None, "RUNNING"),
        (None, "OFF"),
        ("OFF", "RUNNING"),  # its definition stayed behind
        ("OFF", "PAUSED"),
        (Unavailable("the host is away"), "RUNNING"),
    ],
)
def test_it_is_found_and_goes_on(
    world: World, states: dict[str, Any], here: str | Exception | None, there: str
) -> None:
    states |= {"local": here, "third": there}
    before = world.services.vm(0)
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.DONE, done.error
    assert "the VM has moved from host local to third" in notes(done)
    vm = world.services.vm(0)
    third = Host(world.services.store.find("host", name="third")[0].element)
    assert (vm.host_id, vm.host_name, third.vm_ids) == (third.id, "third", (0,))
    assert world.services.host(0).vm_ids == ()
    assert vm.config.last_increment_id == before.config.last_increment_id + 1
    assert vm.backup_ids == before.backup_ids == (0,)
    assert len(vm.element.findall("HISTORY_RECORDS/HISTORY")) == 2
    told = world.drivers.requests("pre_backup")[-1]
    assert told.host is not None
    assert Host(told.host).name == "third"
    assert told.parent is not None


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("OFF", "OFF"),
        ("OFF", None),
        ("OFF", Unavailable("away")),
        ("RUNNING", "RUNNING"),  # its own host has the first word
    ],
)
def test_it_stays_where_it_is(
    world: World, states: dict[str, Any], here: str, there: str | Exception | None
) -> None:
    states |= {"local": here, "third": there}
    done = world.run("backup", vm_id=0)
    assert done.state is OperationState.DONE, done.error
    assert world.services.vm(0).host_name == "local"


@pytest.mark.parametrize("there", ["OFF", None])
def test_what_is_unknown_is_not_absent(world: World, states: dict[str, Any], there: str | None) -> None:
    states |= {"local": Unavailable("the host is away"), "third": there}
    failed = world.run("backup", vm_id=0)
    assert failed.state is OperationState.FAILED
    assert "the host is away" in failed.error
    assert world.services.vm(0).host_name == "local"
