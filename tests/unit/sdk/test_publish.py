"""Names that appear at once, durably, and never over or beside something else."""

from __future__ import annotations

import errno
import os

import pytest

from oned_backup.errors import Conflict, DataCorrupt, InvalidInput, NotFound
from oned_backup.sdk.publish import Folder


@pytest.fixture
def folder(tmp_path):
    with Folder.open(tmp_path) as opened:
        yield opened


def test_files_are_written_published_and_read(folder, tmp_path):
    assert folder.write_file("data", [b"ab", memoryview(b"cd")]) == 4
    folder.publish_file("manifest", b"text")
    assert folder.read_file("data", 10) == b"abcd"
    assert folder.names() == ["data", "manifest"]
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o600


def test_a_name_that_is_taken_is_never_replaced(folder):
    folder.publish_file("manifest", b"one")
    with pytest.raises(Conflict):
        folder.publish_file("manifest", b"two")
    with pytest.raises(FileExistsError):
        folder.write_file("manifest", [b"two"])
    assert (folder.names(), folder.read_file("manifest", 9)) == (["manifest"], b"one")
    for name in ("a", "b"):
        folder.make_folder(name).write_file("x", [b"y"])
    with pytest.raises(Conflict):
        folder.rename_folder("a", "b")


def test_a_file_system_without_hard_links(folder, monkeypatch):
    def no_links(*_args, **_settings):
        raise OSError(errno.EPERM, "not here")

    monkeypatch.setattr(os, "link", no_links)
    folder.publish_file("manifest", b"one")
    with pytest.raises(Conflict):
        folder.publish_file("manifest", b"two")
    assert (folder.names(), folder.read_file("manifest", 9)) == (["manifest"], b"one")


def test_links_are_not_followed(folder, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"x")
    (tmp_path / "link").symlink_to(outside)
    (tmp_path / "file").symlink_to(outside / "secret")
    with pytest.raises(DataCorrupt):
        folder.folder("link")
    with pytest.raises(DataCorrupt):
        folder.make_folder("link", exist_ok=True)
    with pytest.raises(DataCorrupt):
        folder.read_file("file", 10)
    with pytest.raises(FileExistsError):
        folder.write_file("file", [b"y"])
    folder.remove("link")
    folder.remove("file")
    assert (outside / "secret").read_bytes() == b"x"
    assert folder.names() == ["outside"]


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "a\0b"])
def test_a_name_is_one_component(folder, name):
    for use in (folder.folder, folder.has, folder.remove, folder.make_folder, folder.open_file):
        with pytest.raises(InvalidInput):
            use(name)


def test_what_is_absent(folder):
    with pytest.raises(NotFound):
        folder.folder("x")
    with pytest.raises(NotFound):
        folder.read_file("x", 1)
    folder.remove("x")
    folder.remove_if_empty("x")
    assert not folder.has("x")


def test_a_file_that_is_too_large(folder):
    folder.write_file("x", [b"12345"])
    with pytest.raises(DataCorrupt, match="more than 4 bytes"):
        folder.read_file("x", 4)


def test_a_folder_that_is_not_empty_stays(folder):
    folder.make_folder("x").write_file("y", [b""])
    folder.remove_if_empty("x")
    assert folder.has("x")
    folder.remove("x")
    assert not folder.has("x")


def test_a_failed_fsync_is_final(folder, monkeypatch):
    calls = []

    def broken(descriptor):
        calls.append(descriptor)
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="lost"):
        folder.publish_file("manifest", b"one")
    assert len(calls) == 1
    assert folder.names() == []


def test_what_cannot_be_written_is_named_with_its_path(folder, monkeypatch):
    def refused(*_args, **_kwargs):
        raise PermissionError(errno.EPERM, "Operation not permitted", "data")

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "mkdir", refused)
    for write in (lambda: folder.write_file("data", [b""]), lambda: folder.make_folder("data")):
        with pytest.raises(PermissionError) as failed:
            write()
        assert failed.value.filename == str(folder.path / "data")
