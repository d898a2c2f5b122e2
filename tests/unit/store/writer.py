"""Writes transactions for ever and tells each that is committed; the test kills it.

Run as: python writer.py DATABASE
"""

import sys

from oned_backup import xmldoc
from oned_backup.store import RestorePoint, StepState, Store


def main(path: str) -> None:
    with Store.open(path) as store:
        start = len(store.backups())
        for number in range(start, start + 100_000):
            with store.transaction() as tx:
                operation = tx.journal.enqueue("backup", f"vm:{number}", {"number": number})
                tx.create(
                    "image",
                    lambda new_id: xmldoc.build(
                        "IMAGE",
                        {"ID": new_id, "NAME": "x", "STATE": 1, "DATASTORE_ID": 1, "BULK": "x" * 20_000},
                    ),
                )
                claimed = tx.journal.claim()
                assert claimed is not None
                step = tx.journal.begin_step(claimed.id, "record")
                tx.add_backup(RestorePoint(f"b{number}", number, 0, 1, 1, "{}", 0.0))
                tx.journal.end_step(claimed.id, step, StepState.DONE, {"operation": operation.id})
            print(number, flush=True)


main(sys.argv[1])
