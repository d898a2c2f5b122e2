"""Reading real NBD servers, also when they misbehave."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from oned_backup.disk.image import open_export
from oned_backup.disk.restore import restore_chain
from oned_backup.disk.spans import CLUSTER
from oned_backup.errors import NotFound, Unavailable

MIB = 1 << 20


@pytest.mark.parametrize("size", [0, 1, 511, 512, 1000, CLUSTER - 1, CLUSTER + 1, 5 * MIB + 123])
@pytest.mark.parametrize("structured", [True, False])
def test_odd_sizes_come_back_byte_for_byte(qemu, stored, size: int, structured: bool) -> None:
    source = qemu.folder / "source"
    source.write_bytes(os.urandom(size))
    options = [] if structured else ["--no-sr"]  # no structured replies: no extents are told
    with qemu.nbdkit(*options, "file", source) as socket, open_export(socket, "") as view:
        layer = stored(view, qemu.folder / "f")
    assert qemu.img("check", layer.path).startswith("No errors were found")
    restore_chain([layer], qemu.folder / "raw", format="raw")
    assert (qemu.folder / "raw").read_bytes() == source.read_bytes()


def test_holes_and_zeros_take_no_space(qemu) -> None:
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, "1G")
    qemu.io(disk, "write -P 1 100M 3M", "write -z 200M 8M", "write -P 2 300M 1M", "discard 300M 1M")
    with qemu.export(disk) as socket, open_export(socket, "") as view:
        assert view.layout.data.total * CLUSTER == 3 * MIB
        assert list(view.layout.zero) == []


def test_an_increment_hides_what_the_parent_had(qemu) -> None:
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, "64M")
    qemu.io(disk, "write -P 1 0 32M")
    qemu.img("bitmap", "--add", disk, "b")
    # half a cluster written, one cluster zeroed, one discarded, one where zeros are written out
    qemu.io(disk, "write -P 2 32k 4k", "write -z 1M 64k", "discard 2M 64k", "write -P 0 3M 64k")
    with qemu.export(disk, bitmap="b") as socket, open_export(socket, "", dirty_bitmap="b") as view:
        assert list(view.layout.data) == [(0, 1), (48, 49)]
        assert list(view.layout.zero) == [(16, 17), (32, 33)]


def test_many_small_extents_in_order(qemu, stored) -> None:
    disk = qemu.folder / "d.raw"
    disk.touch()
    os.truncate(disk, 256 * MIB)
    with disk.open("r+b") as file:
        for cluster in range(0, 4096, 2):
            file.seek(cluster * CLUSTER)
            file.write(cluster.to_bytes(4, "big") * 1024)
    layer = qemu.back_up(disk, "f", fmt="raw")
    assert layer.path.stat().st_size > 2048 * CLUSTER
    qemu.same(layer.path, "qcow2", disk, "raw")


def test_random_access_equals_the_stream(qemu) -> None:
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, "64M")
    qemu.io(disk, "write -P 1 1M 3M", "write -P 2 10M 70k", "write -P 3 63M 1M")
    with qemu.export(disk) as socket, open_export(socket, "") as view:
        whole = b"".join(bytes(chunk) for chunk in view.chunks())
        for offset, length in [(0, 200), (CLUSTER * 4 + 5, 9 * MIB), (len(whole) - 100, 1000), (6 * MIB, 3)]:
            assert view.pread(offset, length) == whole[offset : offset + length]


def test_a_pass_given_up_in_the_middle_leaves_no_thread_and_can_be_repeated(qemu) -> None:
    disk = qemu.folder / "d.raw"
    disk.write_bytes(os.urandom(64 * MIB))
    threads = threading.active_count()
    with qemu.export(disk, fmt="raw") as socket, open_export(socket, "") as view:
        passing = view.chunks()
        for _ in range(3):
            next(passing)
        with pytest.raises(RuntimeError, match="random access"):
            view.pread(32 * MIB, 10)
        whole = b"".join(bytes(chunk) for chunk in view.chunks())
        assert whole[view.layout.data_offset :] == disk.read_bytes()
        next(view.chunks())
    assert threading.active_count() == threads


def test_no_server(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="cannot connect"):
        open_export(str(tmp_path / "none"), "")


def test_no_such_export(qemu) -> None:
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, "1M")
    with qemu.export(disk) as socket, pytest.raises(Unavailable, match="other"):
        open_export(socket, "other")


def test_no_such_bitmap(qemu) -> None:
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, "1M")
    with qemu.export(disk) as socket, pytest.raises(NotFound, match="no dirty bitmap 'qemu:dirty-bitmap:b7'"):
        open_export(socket, "", dirty_bitmap="b7")


def test_a_read_error_names_the_place(qemu) -> None:
    data = qemu.folder / "data"
    data.write_bytes(os.urandom(8 * MIB))
    trigger = qemu.folder / "trigger"
    filters = [
        "--filter=error",
        "file",
        data,
        "error-pread=EIO",
        "error-pread-rate=100%",
        f"error-file={trigger}",
    ]
    with qemu.nbdkit(*filters) as socket, open_export(socket, "") as view:
        trigger.touch()
        with pytest.raises(Unavailable, match=r"read between \d+ and \d+.*(EIO|Input/output)"):
            list(view.chunks())
        with pytest.raises(Unavailable, match="read of 10 bytes at 7"):
            view.pread(view.layout.data_offset + 7, 10)
        trigger.unlink()
        whole = b"".join(bytes(chunk) for chunk in view.chunks())
    assert whole.endswith(data.read_bytes())


def test_a_server_that_dies_in_the_middle(qemu) -> None:
    disk = qemu.folder / "d.raw"
    disk.write_bytes(os.urandom(96 * MIB))
    with qemu.nbdkit("file", disk) as socket, open_export(socket, "") as view:
        passing = view.chunks()
        next(passing)
        qemu.kill()
        with pytest.raises(Unavailable):
            for _ in passing:
                pass
