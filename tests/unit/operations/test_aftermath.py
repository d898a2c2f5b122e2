"""What is told of operations that failed: the step, what was undone, what is left, what to do."""

from __future__ import annotations

import pytest

from oned_backup import errors
from oned_backup.errors import DriverFailed, NoSpace, OnedBackupError, Unavailable
from oned_backup.operations.aftermath import _NEXT, aftermath_of
from oned_backup.runner.run import Cancellation
from oned_backup.store import OperationState

from .conftest import World


def test_a_store_that_fails_leaves_nothing_and_says_so(world: World) -> None:
    world.drivers.script["backup"] = [NoSpace("store /b: 12 GB needed, 3 GB free")]
    failed = world.run("backup", vm_id=0)
    found = aftermath_of(failed, world.services.store.journal.steps(failed.id))
    assert found is not None
    assert found.step == "STORE"
    assert found.undone == (
        "STORE: nothing of it is in the store",
        "PREPARE: the guest runs as before, nothing of ours is left on its host",
    )
    assert found.left == ()
    assert found.next == "Make room there, then start it again."


def test_what_could_not_be_undone_is_left_and_named(world: World) -> None:
    world.drivers.script["backup"] = [DriverFailed("boom")]
    world.drivers.script["backup_cancel"] = [DriverFailed("the vault is shut")] * 3
    failed = world.run("backup", vm_id=0)
    found = aftermath_of(failed, world.services.store.journal.steps(failed.id))
    assert found is not None
    assert found.left == ("DISCARD: the vault is shut",)
    assert [text.partition(":")[0] for text in found.undone] == ["PREPARE"]


def test_only_the_last_attempt_counts(world: World) -> None:
    world.drivers.script["backup"] = [Unavailable("away")]
    world.drivers.script["pre_backup_live"] = [None, DriverFailed("no")]
    failed = world.run("backup", vm_id=0)
    if failed.state is OperationState.QUEUED:
        pytest.fail("the wait was not short")
    found = aftermath_of(failed, world.services.store.journal.steps(failed.id))
    assert found is not None
    assert found.step == "PREPARE"
    assert len(found.undone) == 1


def test_a_hint_of_the_error_comes_first_and_success_has_nothing_to_tell(world: World) -> None:
    done = world.run("backup", vm_id=0)
    assert aftermath_of(done, world.services.store.journal.steps(done.id)) is None
    world.drivers.script["dump_xml"] = [DriverFailed("odd", hint="Turn it round.")]
    failed = world.run("backup", vm_id=0)
    found = aftermath_of(failed, world.services.store.journal.steps(failed.id))
    assert found is not None
    assert (found.step, found.undone, found.next) == ("PLAN", (), "Turn it round.")


def test_a_cancelled_one_tells_what_was_undone(world: World) -> None:
    cancellation = Cancellation()
    world.drivers.script["backup"] = [lambda _request: cancellation.cancel()]
    world.drivers.script["post_backup_live"] = [None]
    ended = world.run("backup", cancellation=cancellation, vm_id=0)
    found = aftermath_of(ended, world.services.store.journal.steps(ended.id))
    assert ended.state is OperationState.CANCELLED
    assert found is not None
    assert len(found.undone) == 2
    assert found.next == "Start it again if it is still wanted."


def test_every_error_that_can_end_an_operation_has_a_next_action() -> None:
    known = {
        name
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, OnedBackupError)
    }
    assert known - _NEXT.keys() == {
        "OnedBackupError",  # no cause is known: the log has it
        "DriverFailed",
        "DaemonUnreachable",  # of the command line alone
        "Salvaged",  # ends DONE
    }
