"""The files of a backup, as a datastore driver reads them."""

from __future__ import annotations

import os

import pytest
from blake3 import blake3

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.exports import DiskExport, Exports, Reason
from oned_backup.contract.request import Backup, Request
from oned_backup.errors import DataCorrupt, DriverBug, DriverFailed, InvalidInput, Unavailable
from oned_backup.model.increments import BackupType
from oned_backup.model.manifest import StoredFile, parse_manifest
from oned_backup.sdk import Call
from oned_backup.sdk.files import BackupFile
from oned_backup.sdk.publish import Folder
from oned_backup.sdk.stored import prove_file

CONTENT = {"vm.xml": b"<VM/>", "nvram.fd": b"", "tpm.tar": os.urandom(3 << 20)}


@pytest.fixture
def call(tmp_path):
    """A `backup` of three small files and one staged disk."""
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "disk.0.2").write_bytes(b"image")

    def make(exports=None, **backup):
        disk = DiskExport(
            disk_id=0,
            target="vda",
            file="disk.0.2",
            type=BackupType.INCREMENT,
            reason=Reason.INCREMENT,
            size_bytes=10,
            format="qcow2",
            source="/a",
            path=str(tmp_path / "disk.0.2"),
        )
        request = Request(
            Kind.DATASTORE,
            "op-1",
            "backup",
            backup=Backup(
                **{"id": "b2", "chain_id": "b0", "increment_id": 2, "date": 5, "parent_id": "b1", **backup}
            ),
            vm=xmldoc.build("VM", {"ID": 7, "NAME": "web"}),
            exports=exports or Exports((disk,), 2, "odb-0badcafe-b2", files=tuple(CONTENT)),
        )
        (tmp_path / "stdin").write_text(xmldoc.serialize(request.to_xml()))
        stdin = os.open(tmp_path / "stdin", os.O_RDONLY)
        opened.append(stdin)
        return Call("backup", stdin=stdin, stdout=1, environ={"ODB_SOURCE_DIR": str(tmp_path)})

    opened = []
    yield make
    for descriptor in opened:
        os.close(descriptor)


def read_all(files):
    return {file.name: (file.size_bytes, b"".join(map(bytes, file.chunks()))) for file in files}


def test_all_files_in_order_and_the_manifest_of_what_was_read_last(call):
    with call().files() as files:
        read = read_all(files)
    assert list(read) == [*CONTENT, "disk.0.2", "manifest.json"]
    assert all(size == len(data) for size, data in read.values())
    manifest = parse_manifest(read["manifest.json"][1])
    assert {file.name: file.blake3 for file in manifest.files} == {
        name: blake3(data).hexdigest() for name, (_, data) in read.items() if name != "manifest.json"
    }
    assert (manifest.parent_id, manifest.chain_id, manifest.disks[0].parent_id) == ("b1", "b0", "b1")
    assert files.total_bytes == manifest.size_bytes


def test_a_file_that_was_not_read_is_not_in_a_backup(call):
    with call().files() as files:
        each = iter(files)
        next(each)
        with pytest.raises(DriverBug, match=r"vm\.xml: the driver did not read it"):
            next(each)


def test_a_file_that_became_shorter_is_noticed(call, tmp_path):
    with call().files() as files:
        os.truncate(tmp_path / "tpm.tar", 5)
        with pytest.raises(Unavailable, match=r"tpm\.tar: 5 bytes could be read, 3145728 were announced"):
            read_all(files)


def test_what_cannot_be_opened_is_named(call, tmp_path):
    (tmp_path / "nvram.fd").unlink()
    with pytest.raises(DriverFailed, match=r"nvram\.fd was announced"):
        call().files()
    (tmp_path / "nvram.fd").symlink_to("/etc/passwd")
    with pytest.raises(OSError, match="symbolic links"):
        call().files()


def test_no_descriptor_is_left_open(call):
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    made = call()
    with made.files():
        assert len(os.listdir("/proc/self/fd")) > before  # noqa: PTH208
    assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208 - the request


def test_an_increment_without_a_parent_is_refused(call):
    with call(parent_id="").files() as files, pytest.raises(InvalidInput, match="needs BACKUP/PARENT_ID"):
        read_all(files)


def test_a_file_whose_head_and_size_are_known_last(tmp_path):
    advanced = []
    file = BackupFile(
        "disk.0.0",
        100,
        lambda: [b"data", b"more"],
        "",
        lambda: "ab" * 32,
        advanced.append,
        head_bytes=6,
        uncompressed_bytes=100,
        _head=lambda: [b"he", b"ad.."],
        _size_of=lambda: 14,
    )
    with Folder.open(tmp_path) as folder:
        assert folder.write_file("disk.0.0", file.chunks(), begin=file.head_bytes, head=file.head) == 14
    assert (tmp_path / "disk.0.0").read_bytes() == b"head..datamore"
    assert file.stored() == StoredFile("disk.0.0", 14, "ab" * 32, 6, 100)
    assert sum(advanced) == 100  # what was announced, so that progress comes to its end


def test_the_checksum_of_a_file_that_begins_in_the_middle(tmp_path):
    (tmp_path / "disk.0.0").write_bytes(b"head..data")
    digest = blake3(b"datahead..").hexdigest()
    with Folder.open(tmp_path) as folder:
        seen = []
        prove_file(folder, StoredFile("disk.0.0", 10, digest, 6), seen.append)
        assert sum(seen) == 10
        for begin in (0, 5, 10, 11):
            with pytest.raises(DataCorrupt, match="checksum"):
                prove_file(folder, StoredFile("disk.0.0", 10, digest, begin))
