"""A backup's files as a directory: what programs read there, and what they get when it cannot be had."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from blake3 import blake3

from oned_backup.errors import DriverBug, Misconfigured, Unavailable
from oned_backup.sdk import fuse
from oned_backup.sdk.files import BackupFile
from oned_backup.sdk.mounted import mounted

CHUNK = 1 << 20


class Made:
    """Files as `BackupFiles` has them, from chunks in memory."""

    def __init__(self, **contents: list[bytes]) -> None:
        self.contents = {name.replace("_", "."): chunks for name, chunks in contents.items()}
        self.files = [
            BackupFile(name, sum(map(len, chunks)), lambda chunks=chunks: iter(chunks))
            for name, chunks in self.contents.items()
        ]
        self.manifest_bytes = 65 * len(self.files)

    def manifest(self) -> BackupFile:
        assert all(file.blake3 for file in self.files)
        data = b"".join(file.blake3.encode() + b"\n" for file in self.files)
        return BackupFile("manifest.json", len(data), lambda: [data])


def random(*sizes: int) -> list[bytes]:
    return [os.urandom(size) for size in sizes]


@pytest.fixture
def made() -> Made:
    return Made(
        vm_xml=[b"<VM/>"],
        nvram_fd=[],
        disk_0_3=random(CHUNK, 5, 3 * CHUNK, 70_001),
        disk_0_3_blocks=random(4096),
        disk_1_0=random(CHUNK),
    )


def read_by_name(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_reader_that_goes_by_name_gets_every_byte_and_the_checksums_last(made, tmp_path):
    with mounted(made, tmp_path / "m") as directory:
        found = read_by_name(directory)
    for name, chunks in made.contents.items():
        assert found[name] == b"".join(chunks)
    assert found["manifest.json"].split() == [blake3(found[f.name]).hexdigest().encode() for f in made.files]
    assert not (tmp_path / "m").exists()


def test_several_programs_read_at_the_same_time(made, tmp_path):
    with mounted(made, tmp_path / "m") as directory:
        # the last first: manifest.json and the digests wait for what they depend on
        names = sorted(path.name for path in directory.iterdir())
        readers = [
            subprocess.Popen(["cat", directory / name], stdout=subprocess.PIPE) for name in reversed(names)
        ]
        found = {}
        collect = [
            threading.Thread(target=lambda n=name, r=reader: found.update({n: r.communicate()[0]}))
            for name, reader in zip(reversed(names), readers, strict=True)
        ]
        for thread in collect:
            thread.start()
        for thread in collect:
            thread.join(60)
    assert {name: b"".join(chunks) for name, chunks in made.contents.items()}.items() <= found.items()
    assert [reader.returncode for reader in readers] == [0] * len(names)


def test_sizes_and_kinds_are_those_of_files(made, tmp_path):
    with mounted(made, tmp_path / "m") as directory:
        assert (directory / "disk.0.3").stat().st_size == 4 * CHUNK + 5 + 70_001
        assert (directory / "manifest.json").stat().st_size == 65 * 5
        assert (directory / "vm.xml").stat().st_mode & 0o7777 == 0o400
        with pytest.raises(FileNotFoundError):
            (directory / "absent").stat()
        with pytest.raises(OSError, match="Read-only"):
            (directory / "new").touch()
        read_by_name(directory)


def test_two_views_never_look_like_the_same_files(tmp_path):
    seen = []
    for _ in range(2):
        with mounted(Made(vm_xml=[b"<VM/>"]), tmp_path / "m") as directory:
            found = (directory / "vm.xml").stat()
            seen.append((found.st_ino, found.st_mtime_ns))
            read_by_name(directory)
    assert seen[0][0] != seen[1][0]
    assert seen[0][1] != seen[1][1]


def broken(error: Exception) -> Made:
    def produce():
        yield b"x" * CHUNK
        raise error

    made = Made(disk_0_0=[b"x" * CHUNK, b"y" * CHUNK])
    made.files[0]._source = produce
    return made


def test_what_happened_in_a_file_is_raised_and_its_reader_fails(tmp_path):
    with (
        pytest.raises(Unavailable, match="the export has gone") as caught,
        mounted(broken(Unavailable("the export has gone")), tmp_path / "m") as directory,
    ):
        (directory / "disk.0.0").read_bytes()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO
    assert not fuse.is_mounted(tmp_path / "m")


def test_a_reader_that_hides_the_error_changes_nothing(tmp_path):
    with pytest.raises(Unavailable, match="gone"), mounted(broken(Unavailable("gone")), tmp_path / "m") as d:
        assert subprocess.run(["cat", *sorted(d.iterdir())], check=False, capture_output=True).returncode


@pytest.mark.parametrize("change", [-1, 1])
def test_a_source_of_another_length_is_an_error(tmp_path, change):
    made = Made(disk_0_0=random(CHUNK))
    made.files[0].size_bytes += change
    with pytest.raises(Unavailable, match=r"disk\.0\.0"), mounted(made, tmp_path / "m") as directory:
        (directory / "disk.0.0").read_bytes()


def test_what_nobody_read_is_no_backup(made, tmp_path):
    with pytest.raises(DriverBug, match=r"disk\.0\.3: was shown"), mounted(made, tmp_path / "m") as directory:
        (directory / "disk.1.0").read_bytes()


def test_reading_out_of_order_is_refused(made, tmp_path):
    def read(file):
        with mounted(made, tmp_path / "m") as directory, (directory / file).open("rb", buffering=0) as opened:
            os.pread(opened.fileno(), 10, 2 * CHUNK)

    with pytest.raises(DriverBug, match=r"disk\.0\.3: was read out of order"):
        read("disk.0.3")


def test_a_killed_reader_that_waits_for_the_manifest_ends(made, tmp_path):
    with mounted(made, tmp_path / "m") as directory:
        with subprocess.Popen(["cat", directory / "manifest.json"], stdout=subprocess.PIPE) as reader:
            while not _waits(reader.pid, "manifest.json"):
                pass
            reader.kill()
            assert reader.wait(30) == -signal.SIGKILL
        read_by_name(directory)


def _waits(pid: int, name: str) -> bool:
    """Whether the process is in a read of that file."""
    number, descriptor, *_ = [*Path(f"/proc/{pid}/syscall").read_text().split(), "0", "0"]
    if number != "0" or not descriptor.startswith("0x"):
        return False
    return Path(f"/proc/{pid}/fd/{int(descriptor, 16)}").readlink().name == name


def test_a_killed_driver_leaves_no_mount(tmp_path):
    program = (
        "import sys, time; from pathlib import Path; from oned_backup.sdk import fuse\n"
        "mount = fuse.Mount(Path(sys.argv[1]), {})\n"
        "print('there', flush=True); time.sleep(600)"
    )
    (tmp_path / "m").mkdir()
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "m")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    assert fuse.is_mounted(tmp_path / "m")
    process.kill()
    process.communicate()
    while fuse.is_mounted(tmp_path / "m"):  # the helper's turn
        pass


def test_a_dead_mount_at_the_place_is_taken_away(made, tmp_path):
    left = tmp_path / "m"
    left.mkdir()
    old = fuse.Mount(left, {})
    old._helper.kill()  # nobody unmounts now
    with mounted(made, left) as directory:
        assert read_by_name(directory)["vm.xml"] == b"<VM/>"
    old.close()


def test_without_fuse_there_is_a_remedy(made, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Misconfigured, match="fusermount3 is not installed") as caught:
        mounted(made, tmp_path / "m").__enter__()
    assert "fuse3" in (caught.value.hint or "")
