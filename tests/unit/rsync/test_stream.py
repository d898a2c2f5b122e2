"""What is sent without rsync: the rest of a file, its digest, its pace."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import pytest

from oned_backup.errors import Unavailable
from oned_backup.rsync.failures import NotTheLink
from oned_backup.rsync.stream import Pace, Rest, bytes_per_second
from oned_backup.sdk.files import BackupFile

CHUNKS = (b"abc", b"", b"defgh", b"i" * (1 << 18))
DATA = b"".join(CHUNKS)
FREE = Pace(None)


def file_of(chunks: Sequence[bytes], *, head_bytes: int = 0, size: int | None = None) -> BackupFile:
    total = head_bytes + sum(map(len, chunks)) if size is None else size
    return BackupFile("disk.0.0", total, lambda: chunks, head_bytes=head_bytes)


@pytest.mark.parametrize("begin", [0, 1, 3, 4, 8, 100_000, len(DATA) - 1, len(DATA)])
def test_the_rest_of_a_file_and_the_digest_of_all_of_it(begin: int) -> None:
    rest = Rest(file_of(CHUNKS), begin, FREE)
    assert b"".join(map(bytes, rest)) == DATA[begin:]
    rest.require_whole()
    assert rest.digest == hashlib.sha256(DATA).hexdigest()


def test_zeros_stand_for_the_head() -> None:
    rest = Rest(file_of(CHUNKS, head_bytes=3_000_000), 3_000_002, FREE)
    assert b"".join(map(bytes, rest)) == DATA[2:]
    assert rest.digest == hashlib.sha256(bytes(3_000_000) + DATA).hexdigest()


def test_who_stops_before_the_end_has_not_got_it() -> None:
    rest = Rest(file_of(CHUNKS), 0, FREE)
    assert bytes(next(iter(rest))) == b"abc"
    with pytest.raises(Unavailable, match="stopped receiving"):
        rest.require_whole()


def test_a_source_that_breaks_off_is_not_the_servers_fault() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"abc"
        raise Unavailable("the NBD server has gone")

    broken = BackupFile("disk.0.0", 10, chunks)
    with pytest.raises(NotTheLink, match="NBD server has gone"):
        list(Rest(broken, 0, FREE))


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ([], None),
        (["--compress"], None),
        (["--bwlimit=0"], None),
        (["--bwlimit=500"], 512_000),
        (["--bwlimit=1.5m", "--bwlimit=2M"], 2 << 20),
        (["--bwlimit=1.5m"], 1.5 * (1 << 20)),
    ],
)
def test_the_limit_is_that_of_rsync(options: list[str], limit: float | None) -> None:
    assert bytes_per_second(options) == limit


def test_the_pace_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda s: now.__setitem__(0, now[0] + s))
    pace = Pace(1000)
    for _ in range(10):
        pace.wait(500)
    assert now[0] == pytest.approx(105)
    now[0] = 200  # what was not used is not made up for
    pace.wait(500)
    assert now[0] == pytest.approx(200.5)
