"""A daemon that died at any step: what its successor does, from the journal alone."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import subprocess
from pathlib import Path

import pytest

from oned_backup.contract.request import Outcome, Request
from oned_backup.errors import DriverFailed, Unavailable
from oned_backup.model.pruning import to_remove
from oned_backup.operations import recovery
from oned_backup.operations.context import Context
from oned_backup.operations.engine import run_operation
from oned_backup.operations.kinds import KINDS
from oned_backup.operations.locks import end_old_drivers, held, lock_path
from oned_backup.operations.recovery import recover
from oned_backup.store import OperationState

from .conftest import World


class Died(BaseException):
    """The daemon is killed: nothing catches this, so nothing is cleaned up."""


def die(_request: Request) -> None:
    raise Died


def killed_in(world: World, action: str, kind: str = "backup", **arguments: int) -> str:
    """The id of an operation whose daemon died inside `action`; the world is as its successor finds it."""
    world.drivers.script[action] = [die]
    journal = world.services.store.journal
    queued = journal.enqueue(kind, f"test:{secrets.token_hex(4)}", arguments, vm_id=0)
    operation = journal.claim(lambda entry: entry.id == queued.id)
    assert operation is not None
    with pytest.raises(Died):
        run_operation(KINDS[kind], Context(world.services, operation))
    world.drivers.calls.clear()
    return operation.id


def test_nothing_to_do(world: World) -> None:
    world.services.store.journal.enqueue("backup", "vm:0", {"vm_id": 0}, vm_id=0)
    assert recover(world.services) == ()
    assert world.services.store.journal.list()[0].state is OperationState.QUEUED


def test_killed_in_prepare_thaws_aborts_and_cleans(world: World) -> None:
    killed_in(world, "pre_backup_live", vm_id=0)
    assert world.services.vm(0).state_name == "BACKUP"
    (ended,) = recover(world.services)
    assert ended.state is OperationState.FAILED
    assert "daemon restarted in step PREPARE" in json.loads(ended.error)["message"]
    assert world.drivers.actions == ["thaw", "abort_backup", "post_backup_live"]
    assert world.services.vm(0).state_name == "RUNNING"
    assert world.run("backup", vm_id=0).state is OperationState.DONE


def test_killed_in_store_discards_too(world: World) -> None:
    killed_in(world, "backup", vm_id=0)
    (ended,) = recover(world.services)
    assert world.drivers.actions == ["thaw", "abort_backup", "post_backup_live", "backup_cancel", "rm"]
    (clean,) = world.drivers.requests("post_backup")
    assert clean.outcome is Outcome.FAILURE
    assert clean.exports is not None
    assert clean.backup is not None
    assert clean.backup.id == world.services.store.journal.steps(ended.id)[0].result["plan"]["backup_id"]


def test_killed_after_record_goes_forward(world: World) -> None:
    killed_in(world, "post_backup_live", vm_id=0)
    (ended,) = recover(world.services)
    assert ended.state is OperationState.DONE
    assert ended.result["image_id"] == 0
    assert world.drivers.actions == ["post_backup_live"]
    (clean,) = world.drivers.requests("post_backup")
    assert clean.outcome is Outcome.SUCCESS
    assert world.run("backup", vm_id=0).result["increment_id"] == 1


def test_a_removal_is_taken_up_again(world: World) -> None:
    world.run("backup", vm_id=0)
    killed_in(world, "rm", "delete", image_id=0)
    assert world.services.image(0).state_name == "DELETE"
    (ended,) = recover(world.services)
    assert ended.state is OperationState.FAILED
    next_one = world.services.store.journal.claim()
    assert next_one is not None
    assert next_one.kind == "delete"
    run_operation(KINDS["delete"], Context(world.services, next_one))
    assert world.services.store.find("image") == []


@pytest.mark.fault("host", "hypervisor unreachable at the clean-up")
def test_a_host_out_of_reach_does_not_hold_up_the_end(world: World) -> None:
    killed_in(world, "pre_backup_live", vm_id=0)
    for action in ("thaw", "abort_backup", "post_backup_live"):
        world.drivers.script[action] = [Unavailable("no route to host")] * 5
    before = len(world.drivers.actions)
    (ended,) = recover(world.services)
    assert world.drivers.actions[before:] == ["thaw", "abort_backup", "post_backup_live"]  # each but once
    assert ended.state is OperationState.FAILED
    assert any("no route to host" in note for note in ended.result["notes"])


def old_driver(path: Path, *, stubborn: bool) -> subprocess.Popen[bytes]:
    """A process in a group of its own that holds the operation's lock, as a driver of a dead daemon does."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    code = "import signal,sys\n"
    code += "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if stubborn else ""
    code += "print('ready', flush=True)\nsignal.pause()"
    process = subprocess.Popen(
        ["/usr/bin/python3", "-c", code],
        pass_fds=[descriptor],
        start_new_session=True,
        stdout=subprocess.PIPE,
    )
    os.close(descriptor)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("stubborn", [False, True])
@pytest.mark.fault("daemon", "old driver lives on when the daemon comes back")
def test_the_old_daemons_driver_is_ended_first(world: World, stubborn: bool) -> None:
    operation_id = killed_in(world, "backup", vm_id=0)
    path = lock_path(world.services.settings.run_dir, operation_id)
    process = old_driver(path, stubborn=stubborn)
    alive: list[bool] = []
    world.drivers.script["backup_cancel"] = [lambda _request: alive.append(process.poll() is None)]
    try:
        (ended,) = recover(world.services)
        assert alive == [False]
        assert process.wait(5) != 0
    finally:
        process.kill()
        process.communicate()
    assert ended.state is OperationState.FAILED
    assert not path.exists()


def test_a_driver_that_cannot_be_ended_holds_up_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.run("backup", vm_id=0)
    operation_id = killed_in(world, "backup", vm_id=0)
    backup_id = world.services.store.journal.steps(operation_id)[0].result["plan"]["backup_id"]
    process = old_driver(lock_path(world.services.settings.run_dir, operation_id), stubborn=True)
    monkeypatch.setattr(recovery, "end_old_drivers", lambda *_args, **_options: False)
    try:
        (ended,) = recover(world.services)
    finally:
        process.kill()
        process.communicate()
    assert world.drivers.actions == ["thaw", "abort_backup", "post_backup_live", "backup_cancel", "rm"]
    assert ended.state is OperationState.FAILED
    # the kernel may give the backup its name yet
    assert to_remove(world.services.image(0)) == (backup_id,)
    assert world.run("backup", vm_id=0).result["increment_id"] == 1


def test_what_a_first_backup_may_leave_is_noted_by_the_next(world: World) -> None:
    world.drivers.script["backup"] = [DriverFailed("killed")]
    world.drivers.script["backup_cancel"] = [DriverFailed("the store is gone")] * 3
    failed = world.run("backup", vm_id=0)
    assert failed.state is OperationState.FAILED
    lost = world.services.store.journal.steps(failed.id)[0].result["plan"]["backup_id"]
    assert world.run("backup", vm_id=0).state is OperationState.DONE
    assert to_remove(world.services.image(0)) == (lost,)


def test_a_lock_that_nobody_holds_is_no_driver(tmp_path: Path) -> None:
    with held(tmp_path, "op-1"):
        assert lock_path(tmp_path, "op-1").exists()
    assert end_old_drivers(tmp_path, "op-1", grace_s=0.1)
    lock_path(tmp_path, "op-1").touch()
    assert end_old_drivers(tmp_path, "op-1", grace_s=0.1)


def test_a_removal_that_is_over_is_told_as_done(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.run("backup", vm_id=0)
    journal = world.services.store.journal
    with monkeypatch.context() as patched:
        patched.setattr(type(journal), "finish", lambda *_args, **_kwargs: die(None))  # type: ignore[arg-type]
        journal.enqueue("delete", "vm:0", {"image_id": 0}, vm_id=0)
        operation = journal.claim()
        assert operation is not None
        with pytest.raises(Died):
            run_operation(KINDS["delete"], Context(world.services, operation))
    (ended,) = recover(world.services)
    assert ended.state is OperationState.DONE
    assert journal.claim() is None


def test_a_removal_that_was_to_be_cancelled_is_not_taken_up_again(world: World) -> None:
    world.run("backup", vm_id=0)
    operation_id = killed_in(world, "rm", "delete", image_id=0)
    world.services.store.journal.request_cancel(operation_id)
    (ended,) = recover(world.services)
    assert ended.state is OperationState.CANCELLED
    assert world.services.store.journal.claim() is None


def test_no_vm_stays_in_backup_without_an_operation(world: World) -> None:
    operation_id = killed_in(world, "pre_backup_live", vm_id=0)
    world.services.store.journal.finish(operation_id, OperationState.FAILED)
    assert world.services.vm(0).state_name == "BACKUP"
    assert recover(world.services) == ()
    assert world.services.vm(0).state_name == "RUNNING"
