import os
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import op
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from oned_backup.errors import (
    Conflict,
    DataCorrupt,
    Misconfigured,
    PermissionDenied,
    Unavailable,
    Unsupported,
)
from oned_backup.store import BackupState, OperationState, StepState, Store
from oned_backup.store.migrations import versions
from oned_backup.store.schema import metadata

HERE = Path(__file__).parent
FIXTURES = sorted((HERE / "fixtures").glob("*.sql"))


def load(fixture, path):
    path.parent.mkdir(mode=0o700)
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(fixture.read_text())


def child(code, path):
    return subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )


def test_only_its_owner_can_read_it(path, store):
    store.journal.enqueue("k", "l", {})

    assert path.parent.stat().st_mode & 0o777 == 0o700
    files = list(path.parent.iterdir())
    assert {file.name for file in files} >= {"oned.db", "oned.db-wal", "oned.db.lock"}
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_the_umask_does_not_matter(path):
    old = os.umask(0)
    try:
        Store.open(path).close()
    finally:
        os.umask(old)
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_directory_that_others_may_write_is_refused(tmp_path):
    tmp_path.chmod(0o770)

    with pytest.raises(Misconfigured, match="can be written by others") as caught:
        Store.open(tmp_path / "db")
    assert caught.value.hint == f"Run: chmod 700 {tmp_path}"


def test_commits_survive_a_power_cut(path, store):
    with store._database.write() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1  # the log is ours to sync
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_one_daemon_has_it_and_the_next_gets_it_when_that_ends(path, store):
    second = child("import sys; from oned_backup.store import Store; Store.open(sys.argv[1])", path)
    with pytest.raises(Conflict, match="in use by another daemon") as caught:
        Store.open(path)
    installation = store.installation
    store.close()

    assert "in use by another daemon" in second.stderr
    assert "another state directory" in caught.value.hint
    with Store.open(f"sqlite:///{path}") as again:
        assert again.installation == installation
    assert re.fullmatch("[0-9a-f]{8}", installation)


def test_other_databases_are_refused(tmp_path):
    with pytest.raises(Unsupported, match="postgresql: only SQLite"):
        Store.open("postgresql://localhost/x")


def test_a_symbolic_link_is_not_followed(tmp_path):
    (tmp_path / "db").symlink_to("/dev/null")
    with pytest.raises(Unavailable, match="symbolic links"):
        Store.open(tmp_path / "db")


def test_a_file_that_is_no_database_is_left_as_it_is(path):
    path.parent.mkdir(mode=0o700)
    path.write_bytes(b"precious notes" * 100)

    with pytest.raises(DataCorrupt, match="not a database"):
        Store.open(path)
    assert path.read_bytes() == b"precious notes" * 100


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises((Unavailable, PermissionDenied), match="database"):
        Store.open(tmp_path / "file" / "db")


def test_migrations_make_what_the_code_expects(store):
    with store._database.read() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
        indexes = connection.execute(sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'index'"))
        made = {row.name: row.sql for row in indexes if row.sql}
    memory = sa.create_engine("sqlite://")
    metadata.create_all(memory)
    with memory.connect() as connection:
        indexes = connection.execute(sa.text("SELECT name, sql FROM sqlite_master WHERE type = 'index'"))
        assert made == {row.name: row.sql for row in indexes if row.sql}


def test_every_schema_version_has_a_fixture():
    modules = {path.name[:4] for path in Path(versions.__file__).parent.glob("[0-9]*.py")}

    assert {fixture.stem for fixture in FIXTURES} == modules


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda fixture: fixture.stem)
def test_a_database_of_every_older_version_opens_with_all_it_held(fixture, path):
    load(fixture, path)

    with Store.open(path) as store:
        for kind, document_id in (("host", 0), ("datastore", 100), ("vm", 0), ("image", 0)):
            read = store.get(kind, document_id)
            assert read.element.findtext("NAME") == f'{kind} "{document_id}" ü'
            assert read.element.findtext("FUTURE") == "kept"
        assert [b.state for b in store.backups(image_id=0)] == list(BackupState)
        assert store.backup("b1").failure == "why"
        states = [operation.state for operation in store.journal.list()[::-1]]
        assert states == ["CANCELLED", "RUNNING", "DONE", "FAILED", "CANCELLED", "QUEUED"]
        (running,) = store.journal.unfinished()
        assert [step.state for step in store.journal.steps(running.id)] == list(StepState)
        assert store.journal.claim().kind == "queued"
        store.journal.finish(running.id, OperationState.FAILED)
        assert store.installation == re.search(r"'installation','(\w+)'", fixture.read_text())[1]


def test_a_newer_version_s_database_is_not_touched(path):
    Store.open(path).close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        connection.execute("DROP TABLE steps")

    with pytest.raises(Misconfigured, match="schema 9999 was made by a newer version, this one knows 0004"):
        Store.open(path)
    with closing(sqlite3.connect(path)) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    assert "steps" not in tables


def test_a_failed_migration_leaves_nothing_behind(path, monkeypatch):
    create = op.create_table

    def fail(name, *columns, **options):
        if name == "steps":
            raise RuntimeError("power cut")
        return create(name, *columns, **options)

    monkeypatch.setattr(op, "create_table", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        Store.open(path)
    monkeypatch.undo()

    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,)
    with Store.open(path) as store:
        assert store.journal.list() == []


@pytest.mark.parametrize("commits", [1, 3, 7])
def test_what_was_committed_survives_a_kill_and_what_was_not_is_gone(path, commits):
    for kill in range(3):
        with subprocess.Popen(
            [sys.executable, str(HERE / "writer.py"), str(path)], stdout=subprocess.PIPE, text=True
        ) as writer:
            told = [int(writer.stdout.readline()) for _ in range(commits)][-1]
            writer.kill()
            told = max([told, *map(int, writer.stdout.read().split())])
        assert writer.returncode == -9

        with Store.open(path) as store:
            backups = {int(backup.backup_id[1:]) for backup in store.backups()}
            operations = store.journal.list()
            assert backups == set(range(len(backups)))
            assert told in backups
            assert len(backups) <= told + 2, "at most one commit was not told"
            assert len(store.find("image")) == len(operations) == len(backups)
            assert {operation.state for operation in operations} == {OperationState.RUNNING}
            for operation in operations:
                assert [step.state for step in store.journal.steps(operation.id)] == [StepState.DONE]
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",), kill
