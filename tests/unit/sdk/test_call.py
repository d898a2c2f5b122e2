"""What a driver is told, typed."""

from __future__ import annotations

import os
import time

import pytest

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Backup, Request
from oned_backup.errors import DriverFailed, InvalidInput, Misconfigured
from oned_backup.sdk import Call, Secret, log


@pytest.fixture
def call(tmp_path):
    """A call with a given request and environment."""

    def make(request=None, **environ):
        path = tmp_path / "stdin"
        path.write_text("" if request is None else xmldoc.serialize(request.to_xml()))
        stdin = os.open(path, os.O_RDONLY)
        opened.append(stdin)
        return Call("backup", stdin=stdin, stdout=1, environ=environ)

    opened = []
    yield make
    for descriptor in opened:
        os.close(descriptor)


def test_the_request_and_its_options(call):
    request = Request(
        Kind.DATASTORE,
        "op-1",
        "backup",
        backup=Backup("b1", "b0", 3, 17),
        options={"INCREMENT_ID": "-1", "DISK_ID": "4", "NAME": " x ", "BAD": "one"},
    )
    made = call(request)
    assert made.backup == request.backup
    assert (made.integer_option("INCREMENT_ID"), made.integer_option("DISK_ID")) == (None, 4)
    assert (made.option("NAME"), made.option("NONE", "default")) == ("x", "default")
    with pytest.raises(InvalidInput, match="needs the option NONE"):
        made.option("NONE")
    with pytest.raises(InvalidInput, match="not a whole number"):
        made.integer_option("BAD")


def test_a_request_that_lacks_a_section_says_which(call):
    with pytest.raises(InvalidInput, match="needs the section BACKUP"):
        _ = call(Request(Kind.DATASTORE, "op-1", "backup")).backup


@pytest.mark.parametrize("document", ["", "<X/>", "<!DOCTYPE a><DS_DRIVER_ACTION_DATA/>", "<DS_DRIVER_"])
def test_what_is_no_request_is_refused(call, tmp_path, document):
    made = call()
    (tmp_path / "stdin").write_text(document)
    with pytest.raises(InvalidInput):
        _ = made.request


def test_the_environment(call, tmp_path):
    made = call(
        ODB_OPERATION_ID="op-1",
        ODB_BACKUP_ID="b1",
        ODB_VM_ID="7",
        ODB_DS_ID="100",
        ODB_DS_BASE_PATH="/srv/b",
        ODB_DS_COLOUR="green",
        ODB_DEADLINE="1800000000",
        ODB_SOURCE_DIR=str(tmp_path),
        ODB_UNKNOWN="x",
    )
    assert (made.operation_id, made.backup_id, made.vm_id, made.datastore_id) == ("op-1", "b1", 7, 100)
    assert (str(made.base_path), made.source_dir, made.transfer) == ("/srv/b", tmp_path, "stream")
    assert made.parameters == {"BASE_PATH": "/srv/b", "COLOUR": "green"}
    assert made.deadline == 1_800_000_000
    assert call().deadline is None


@pytest.mark.parametrize("name", ["operation_id", "backup_id", "datastore_id", "base_path", "source_dir"])
def test_a_variable_that_is_missing_is_named(call, name):
    with pytest.raises(DriverFailed, match="lacks ODB_"):
        getattr(call(), name)


def test_values_that_could_become_paths_are_checked(call):
    with pytest.raises(InvalidInput):
        _ = call(ODB_BACKUP_ID="../x").backup_id
    with pytest.raises(InvalidInput):
        _ = call(ODB_DS_ID="-1").datastore_id
    with pytest.raises(Misconfigured):
        _ = call(ODB_DS_BASE_PATH="relative").base_path


def test_the_vm_is_known_from_the_image_too(call):
    image = xmldoc.build("IMAGE", {"ID": 1, "VMS": {"ID": 9}})
    assert call(Request(Kind.DATASTORE, "op-1", "ls", image=image)).vm_id == 9


def test_secrets_are_read_from_files_and_never_shown(call, tmp_path, capfd):
    folder = tmp_path / "secrets"
    folder.mkdir()
    (folder / "PASSWORD").write_text("correct horse\n")
    made = call(ODB_SECRETS_DIR=str(folder))
    secret = made.secret("PASSWORD")
    assert secret.reveal() == "correct horse"
    assert (str(secret), repr(secret), f"{secret}") == ("***", "***", "***")
    assert secret == Secret("correct horse")
    made.log("tried 'correct horse' twice")
    made.warn("and again:\ncorrect horse")
    assert capfd.readouterr().err == "<6>tried '***' twice\n<4>and again:\n<4>***\n"
    with pytest.raises(Misconfigured, match="KEY is missing"):
        made.secret("KEY")
    assert call().secrets == {}


def test_progress_is_told_once_a_second(capfd, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    progress = log.ProgressLines()
    for done in range(10):
        progress(done, 100)
        now += 0.3
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["PROGRESS 0 100", "PROGRESS 4 100", "PROGRESS 8 100"]


def test_a_long_line_is_cut_and_stays_one_line(capfd):
    log.write(log.Level.ERROR, "é" * 10_000)
    printed = capfd.readouterr().err
    assert printed.count("\n") == 1
    assert len(printed.encode(errors="surrogateescape")) < 4200
