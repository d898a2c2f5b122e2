"""A catalogue from a store that an attacker has prepared: imported in part, never a fault of ours."""

from __future__ import annotations

import json
from typing import Any

import pytest

from oned_backup.store import OperationState
from tests.unit.operations.conftest import World, empty_database, world
from tests.unit.operations.test_import import imported, manifest

__all__ = ["empty_database", "world"]

GOOD = manifest("b0", 0)
OTHER_UUID = "9a1c2b3d-0000-4000-8000-00000000000f"


def of_another_vm(**vm: Any) -> dict[str, Any]:
    return {"vm": {"id": 5, "name": "other", "uuid": OTHER_UUID, **vm}, "chain_id": "x0"}


HOSTILE: dict[str, str] = {
    "date of another age": manifest("x0", 0, date=1 << 62, **of_another_vm()),
    "date before all": manifest("x0", 0, date=-(1 << 62), **of_another_vm()),
    "number of an increment": manifest("x0", (1 << 63) - 1, **of_another_vm()),
    "number of a VM": manifest("x0", 0, **of_another_vm(id=(1 << 63) - 1)),
    "name with controls": manifest("x0", 0, **of_another_vm(name="\x00\x1b[2J\n")),
    "no name": manifest("x0", 0, **of_another_vm(name="")),
    "name that is long": manifest("x0", 0, **of_another_vm(name="x" * 100_000)),
    "name that is XML": manifest("x0", 0, **of_another_vm(name="</NAME><ID>0</ID>&a;")),
    "UUID that is none": manifest("x0", 0, **of_another_vm(uuid="../../etc")),
    "no UUID": manifest("x0", 0, **of_another_vm(uuid="")),
    "continues itself": manifest("x0", 0, "x0", **of_another_vm()),
    "replaces itself": manifest("x0", 0, replaces=["x0"], stands_for=["x0"], **of_another_vm()),
    "replaces another VM's": manifest("x0", 0, replaces=["b0"], stands_for=["b0"], **of_another_vm()),
    "reason of its own": manifest(
        "x0",
        0,
        disks=[
            {
                "disk_id": 0,
                "target": "../../vda",
                "type": "FULL",
                "reason": "because\n",
                "file": "disk.0.0",
                "size_bytes": (1 << 63) - 1,
            }
        ],
        **of_another_vm(),
    ),
    "sizes beyond all": manifest(
        "x0",
        0,
        files=[{"name": f"f{n}", "size_bytes": (1 << 63) - 1, "blake3": ""} for n in range(9)],
        **of_another_vm(),
    ),
    "excluded that is no list": manifest("x0", 0, excluded={"a": 5}, freeze="x", **of_another_vm()),
    "same id": manifest("b0", 0, date=5),
    "no manifest": '{"format": 5}',
}


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.fault("security", "names and numbers of a manifest that lead out")
def test_what_is_good_is_imported_all_the_same(world: World, hostile: str) -> None:
    done = imported(world, GOOD, HOSTILE[hostile])
    assert done.state is OperationState.DONE, json.loads(done.error)
    assert "b0" in {row.backup_id for row in world.services.store.backups()}
    for row in world.services.store.rows("vm"):
        assert row["name"].isprintable()
        assert len(row["name"]) < 300
    for row in world.services.store.rows("image"):
        assert row["name"].isprintable()
    after = world.run("backup", vm_id=0)
    assert after.state is OperationState.DONE, after.error
