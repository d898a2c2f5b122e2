"""What lists show is kept beside the documents, and always says what they say."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from oned_backup import xmldoc
from oned_backup.model import rows
from oned_backup.store import BackupState, RestorePoint, Store
from oned_backup.store.backups import NewestGood, Points


def vm(new_id: int, name: str = "web", error: str = "") -> xmldoc.Element:
    return xmldoc.build(
        "VM",
        {
            "ID": new_id,
            "NAME": name,
            "STATE": 8,
            "LCM_STATE": 0,
            "TEMPLATE": {"OS": {"UUID": "u-1"}},
            "BACKUPS": {"BACKUP_CONFIG": {"MODE": "INCREMENT"}},
            "HISTORY_RECORDS": {"HISTORY": {"HID": 3, "HOSTNAME": "h"}},
            "USER_TEMPLATE": {"ERROR": error},
        },
    )


def test_a_row_is_written_with_its_document(store: Store) -> None:
    store.create("vm", vm)
    expected = {
        "id": 0,
        "name": "web",
        "uuid": "u-1",
        "state": "POWEROFF",
        "host_id": 3,
        "host": "h",
        "mode": "INCREMENT",
        "error": "",
    }
    assert store.rows("vm") == [expected]
    store.change("vm", 0, lambda _old: vm(0, "db", "no room"))
    assert store.rows("vm") == [{**expected, "name": "db", "error": "no room"}]
    store.update("vm", 0, store.get("vm", 0).version, vm(0, "ü"))
    assert store.rows("vm", name="ü") == [{**expected, "name": "ü"}]
    store.delete("vm", 0)
    assert store.rows("vm") == []


def test_rows_of_another_version_are_made_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(path) as store:
        store.create("vm", vm)
        made = store.rows("vm")
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE documents SET row = '{}'")
    with Store.open(path) as store:
        assert store.rows("vm") == [{}]
    monkeypatch.setattr(rows, "VERSION", rows.VERSION + 1)
    with Store.open(path) as store:
        assert store.rows("vm") == made


def test_restore_points_are_counted_without_their_manifests(store: Store) -> None:
    def add(
        image_id: int, increment_id: int, at: float, state: str = "GOOD", proved: float | None = None
    ) -> None:
        backup_id = f"b{image_id}{increment_id}"
        store.add_backup(
            RestorePoint(
                backup_id, image_id, increment_id, image_id // 10, 100, "{}", at, proved, BackupState(state)
            )
        )

    add(10, 0, 5.0, proved=6.0)
    add(10, 1, 7.0)
    add(11, 0, 9.0, "BROKEN", proved=9.5)
    add(20, 0, 3.0)
    assert store.points_of_vms() == {1: Points(3, 1, 1, 7.0, 6.0), 2: Points(1, 0, 1, 3.0, None)}
    assert store.points_of_vms(2) == {2: Points(1, 0, 1, 3.0, None)}
    assert store.points_of_images(1) == {10: Points(2, 0, 1, 7.0, 6.0), 11: Points(1, 1, 0, None, None)}
    assert set(store.points_of_images()) == {10, 11, 20}
    assert store.newest_good() == {
        1: NewestGood("b101", 10, 1, 7.0, None),
        2: NewestGood("b200", 20, 0, 3.0, None),
    }
    assert store.newest_good(3) == {}


@pytest.mark.parametrize("columns", ["vm_id", "vm_id, image_id"])
def test_counting_reads_nothing_but_the_index(store: Store, columns: str) -> None:
    asked = f"SELECT {columns}, count(*), max(stored_at), max(verified_at), backup_id, increment_id, state"
    with store._database.read() as connection:
        plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {asked} FROM backups GROUP BY {columns}").all()
    assert [row.detail for row in plan] == ["SCAN backups USING COVERING INDEX backups_by_vm"]
