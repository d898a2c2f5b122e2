"""Files and processes on the hypervisor."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from oned_backup.errors import DriverFailed, Misconfigured, Unavailable
from oned_backup.hypervisor import offline, qemu_img
from oned_backup.hypervisor.host import LocalHost

HOST = LocalHost()


def make_image(path: Path, *, backing: Path | None = None) -> Path:
    options = ["-F", "qcow2", "-b", str(backing)] if backing else []
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), "4M"], check=True)
    return path


def test_programs_fail_with_names(tmp_path: Path) -> None:
    with pytest.raises(DriverFailed, match=r"qemu-img: .*nothing.* \(exit code 1\)"):
        HOST.run(["qemu-img", "info", "--", str(tmp_path / "nothing")])
    with pytest.raises(Misconfigured, match="is not installed"):
        HOST.run(["no-such-program"])
    with pytest.raises(Unavailable, match=r"no end after 0.1 s"):
        HOST.run(["sleep", "60"], timeout_s=0.1)


def test_server_is_found_by_its_locked_pid_file_and_ended(tmp_path: Path) -> None:
    image = make_image(tmp_path / "-a b.qcow2")
    server = offline.serve(HOST, str(image), "qcow2", directory=tmp_path, export="vda")
    pid = int(server.pid_file.read_text())
    assert server.socket.is_socket()
    assert is_alive(pid)
    for _ in range(2):
        offline.stop_servers(HOST, tmp_path)
        assert not is_alive(pid)


def test_process_whose_pid_file_nobody_holds_is_left_alone(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as bystander:
        (tmp_path / "x.pid").write_text(f"{bystander.pid}\n")
        offline.stop_servers(HOST, tmp_path)
        assert bystander.poll() is None
        bystander.kill()


def test_bitmaps_of_several_layers_are_merged_for_one_increment(tmp_path: Path) -> None:
    base = make_image(tmp_path / "base")
    qemu_img.add_bitmap(HOST, str(base), "c0")
    subprocess.run(["qemu-io", "-c", "write 0 64k", str(base)], check=True, capture_output=True)
    top = make_image(tmp_path / "top", backing=base)
    qemu_img.add_bitmap(HOST, str(top), "c0")
    subprocess.run(["qemu-io", "-c", "write 1M 64k", str(top)], check=True, capture_output=True)

    chain = qemu_img.backing_chain(HOST, str(top), "qcow2")
    layers = offline.tracking_layers(chain, "c0")
    assert [layer.path for layer in layers] == [str(top), str(base)]
    assert offline.gather_changes(HOST, layers, "c0", "merged") == "merged"
    server = offline.serve(HOST, str(top), "qcow2", directory=tmp_path, export="vda", bitmap="merged")
    try:
        dirty = dirty_ranges(server.socket, "merged")
    finally:
        offline.stop_servers(HOST, tmp_path)
    assert dirty == [(0, 64 << 10), (1 << 20, 64 << 10)]


def test_bitmap_only_below_the_top_tracks_nothing(tmp_path: Path) -> None:
    base = make_image(tmp_path / "base")
    qemu_img.add_bitmap(HOST, str(base), "c0")
    top = make_image(tmp_path / "top", backing=base)
    chain = qemu_img.backing_chain(HOST, str(top), "qcow2")
    assert offline.tracking_layers(chain, "c0") == ()


def test_removing_what_is_absent_and_private_directories(tmp_path: Path) -> None:
    HOST.remove(tmp_path / "absent")
    assert HOST.names(tmp_path / "absent") == []
    directory = tmp_path / "sockets" / "op-1"
    for _ in range(2):
        HOST.make_private_dir(directory)
        assert directory.stat().st_mode & 0o777 == 0o700
        assert list(directory.iterdir()) == []
        (directory / "left").touch()


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def dirty_ranges(socket: Path, bitmap: str) -> list[tuple[int, int]]:
    """What `qemu-nbd` offers as dirty, by another NBD client."""
    out = subprocess.run(
        ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{bitmap}", f"nbd+unix:///vda?socket={socket}"],
        check=True,
        capture_output=True,
        timeout=60,
    ).stdout
    return [(entry["offset"], entry["length"]) for entry in json.loads(out) if entry["type"] & 1]
