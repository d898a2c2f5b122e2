"""Prints a database of the current schema as SQL: the fixture for that schema, made once.

Run as: python tests/unit/store/make_fixture.py > tests/unit/store/fixtures/NNNN.sql
"""

import itertools
import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.store import BackupState, OperationState, RestorePoint, StepState, Store


def fill(store: Store) -> None:
    """A document of each kind, restore points in each state, operations in each state."""
    for kind in ("host", "datastore", "vm", "image", "image"):
        store.create(
            kind,
            lambda new_id, kind=kind: xmldoc.build(
                kind.upper(),
                {
                    "ID": new_id,
                    "NAME": f'{kind} "{new_id}" ü',
                    "STATE": 1,
                    "DATASTORE_ID": 100,
                    "VMS": {"ID": 0},
                    "TEMPLATE": {"OS": {"UUID": "u-1"}},
                    "HISTORY_RECORDS": {"HISTORY": {"HID": 0}},
                    "FUTURE": "kept",
                },
            ),
        )
    store.delete("image", 1)
    for number, proved in enumerate(BackupState):
        store.add_backup(RestorePoint(f"b{number}", 0, number, 0, 100, '{"n": 1}', 5.0, 6.0, proved, "why"))
    for state in OperationState:
        operation = store.journal.enqueue(state.lower(), f"vm:{state}", {"a": [1]}, vm_id=0)
        if state is OperationState.QUEUED:
            store.journal.request_cancel(operation.id)
            continue
        store.journal.claim()
        for step_state in StepState:
            number = store.journal.begin_step(operation.id, step_state.lower(), {"x": 1})
            if step_state is not StepState.INTENT:
                store.journal.end_step(operation.id, number, step_state, {"y": 2})
        if state.is_final:
            store.journal.finish(operation.id, state, result={"z": 3}, error="e")
    store.journal.enqueue("queued", "vm:later", {})


def main() -> None:
    ticks = itertools.count(1_700_000_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "db"
        with Store.open(path, now=lambda: float(next(ticks))) as store:
            fill(store)
        with closing(sqlite3.connect(path)) as connection:
            sys.stdout.write("\n".join(connection.iterdump()) + "\n")


if __name__ == "__main__":
    main()
