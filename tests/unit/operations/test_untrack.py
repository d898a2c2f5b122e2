"""Untrack: nothing of ours stays on a VM's disks, and the next backup is a full one."""

from __future__ import annotations

import pytest

from oned_backup.errors import NotFound
from oned_backup.model.vm import DomainState
from oned_backup.store import OperationState


@pytest.mark.parametrize(
    ("state", "action"), [(DomainState.RUNNING, "post_backup_live"), (DomainState.OFF, "post_backup")]
)
def test_no_checkpoint_is_kept_and_the_chain_ends(world, state, action):
    world.run("backup", vm_id=0)
    world.drivers.state = state
    world.drivers.calls.clear()
    ended = world.run("untrack", vm_id=0)
    assert ended.state == OperationState.DONE
    assert world.drivers.actions == ["dump_xml", action]
    (request,) = world.drivers.requests("post_backup")
    assert request.options["KEEP_CHECKPOINT"] == ""
    assert request.backup is None

    assert not world.services.vm(0).config.has_chain
    again = world.run("backup", vm_id=0)
    assert (again.result["type"], again.result["disks"][0]["reason"]) == ("FULL", "chain-ended")
    assert world.services.vm(0).backup_ids == (0, 1)


def test_a_domain_that_is_gone_keeps_its_chain(world):
    world.run("backup", vm_id=0)
    world.drivers.script["dump_xml"] = [NotFound("no such domain")]
    ended = world.run("untrack", vm_id=0)
    assert ended.state == OperationState.FAILED
    assert world.services.vm(0).config.has_chain
