"""What is written arrives, whichever way it takes."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oned_backup.disk import filewriter
from oned_backup.disk.filewriter import FileWriter

_LONG = 512 << 10
_MEMORY = memoryview(mmap.mmap(-1, 2 << 20))
_MEMORY[:] = random.Random(1).randbytes(len(_MEMORY))

_LENGTHS = st.one_of(
    st.sampled_from([1, 511, 4096, 65536, _LONG - 1, _LONG, _LONG + 1, _LONG + 4096, 2 << 20]),
    st.integers(1, 2 << 20),
)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)


@given(begin=st.sampled_from([0, 512, 65536]), lengths=st.lists(_LENGTHS, max_size=6), constant=st.booleans())
def test_pieces_of_all_lengths(
    tmp_path_factory: pytest.TempPathFactory, begin: int, lengths: list[int], *, constant: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "pieces"
    fd = _open(path)
    try:
        writer, offset, expected = FileWriter(fd), begin, bytes(begin)
        for length in lengths:
            piece = _MEMORY[:length]
            writer.write(offset, bytes(piece) if constant else piece)
            expected += piece
            offset += length
        if lengths and begin:  # the head of a file is often known last
            writer.write(0, b"head")
            expected = b"head" + expected[4:]
        writer.sync()
    finally:
        os.close(fd)
    assert path.read_bytes() == (expected if lengths else b"")


def _is_direct(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


def test_long_pieces_go_past_the_page_cache_of_a_disk(tmp_path: Path) -> None:
    fd = _open(tmp_path / "file")
    if not filewriter.is_local(fd):
        pytest.skip(f"{tmp_path} is neither on ext4 nor on xfs")
    writer = FileWriter(fd)
    writer.write(0, _MEMORY)
    assert _is_direct(fd)
    writer.write(len(_MEMORY), _MEMORY[:100])
    assert not _is_direct(fd)
    os.close(fd)


def test_elsewhere_nothing_goes_past_it() -> None:
    fd = os.memfd_create("elsewhere")
    assert not filewriter.is_local(fd)
    FileWriter(fd).write(0, _MEMORY)
    assert not _is_direct(fd)
    assert os.pread(fd, len(_MEMORY), 0) == _MEMORY
    os.close(fd)


def test_a_file_system_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that does not lie as the disk wants it is refused by the kernel with EINVAL."""
    monkeypatch.setattr(filewriter, "_ALIGNED", 1)
    fd = _open(tmp_path / "file")
    writer = FileWriter(fd)
    writer.write(0, b"x")
    writer.write(1, _MEMORY)
    writer.write(1 + len(_MEMORY), _MEMORY)
    assert not _is_direct(fd)
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"x" + bytes(_MEMORY) * 2
