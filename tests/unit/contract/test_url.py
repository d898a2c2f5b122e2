"""Pseudo-URLs: our form, OpenNebula's forms, and whatever else somebody may type."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oned_backup.contract.url import DiskUrl, parse_url
from oned_backup.errors import InvalidInput, OnedBackupError, Unsupported

#: but no short ids of OpenNebula's restic_snapshots, to which the job belongs
SOURCES = st.from_regex(r"(?![0-9a-f]{8}\Z)[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", fullmatch=True)
NUMBERS = st.integers(0, 999_999_999)


@st.composite
def urls(draw: st.DrawFn) -> DiskUrl:
    increments = sorted(draw(st.sets(NUMBERS, min_size=1, max_size=8)))
    return DiskUrl(
        scheme=draw(st.sampled_from(["fs", "rsync", "restic", "s3like"])),
        datastore_id=draw(NUMBERS),
        chain=tuple((increment, draw(SOURCES)) for increment in increments),
        vm_id=draw(NUMBERS),
        disk_id=draw(NUMBERS),
        job_id=draw(st.none() | NUMBERS),
    )


@given(urls())
def test_what_is_printed_is_read_again(url: DiskUrl) -> None:
    assert parse_url(str(url)) == url
    assert url.backup_id == url.chain[-1][1]


@given(
    urls(),
    st.lists(st.from_regex(r"[^/\n]{1,12}", fullmatch=True), max_size=5),
    st.booleans(),
    st.none() | st.integers(0, 99),
)
def test_a_path_in_front_changes_nothing(
    url: DiskUrl, path: list[str], twice: bool, increment: int | None
) -> None:
    """As OpenNebula writes it: BASE_PATH ends with the datastore's number, then VM, folder and file."""
    own = str(url).split("/")
    listed = "/".join(own[:5]).replace("/-/", "//")
    directory = "".join(f"{'//' if twice else '/'}p{part}" for part in path)
    suffix = "" if increment is None else f".{increment}"
    named = f"{listed}{directory}/{url.datastore_id}/{url.vm_id}/{url.backup_id}/disk.{url.disk_id}{suffix}"
    assert parse_url(named) == url


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "rsync://100//0:a78156,1:c1a00b/var/lib/one/datastores/100/13/c1a00b/disk.0.1",
            DiskUrl("rsync", 100, ((0, "a78156"), (1, "c1a00b")), 13, 0),
        ),
        (  # six hex digits that happen to be a number are no VM
            "rsync://100//0:785916/var/lib/one//datastores/100/13/785916/disk.2.0",
            DiskUrl("rsync", 100, ((0, "785916"),), 13, 2),
        ),
        (
            "restic://100/-/0:25f4b298,1:6968545c/53/backup/disk.0",
            DiskUrl("restic", 100, ((0, "25f4b298"), (1, "6968545c")), 53, 0),
        ),
        (
            "restic://100/12/0:25f4b298/var/lib/one/datastores/0/53/backup/disk.0",
            DiskUrl("restic", 100, ((0, "job_12.25f4b298"),), 53, 0, job_id=12),
        ),
        (
            "restic://100/12/0:job_12.25f4b298/53/disk.0",
            DiskUrl("restic", 100, ((0, "job_12.25f4b298"),), 53, 0, job_id=12),
        ),
        (
            "rsync://100/12/0:a78156/var/lib/one/datastores/100/13/a78156/disk.0.0",
            DiskUrl("rsync", 100, ((0, "a78156"),), 13, 0, job_id=12),
        ),
        (  # OpenNebula names the file of increment 0 though the list goes further
            "rsync://100//0:a78156,1:c1a00b/var/lib/one/datastores/100/13/a78156/disk.0.0",
            DiskUrl("rsync", 100, ((0, "a78156"), (1, "c1a00b")), 13, 0),
        ),
        ("fs://1/-/4:x-y.z/7/disk.0", DiskUrl("fs", 1, ((4, "x-y.z"),), 7, 0)),
    ],
)
def test_known_forms(text: str, expected: DiskUrl) -> None:
    assert parse_url(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "rsync+rbd://100//0:a78156/var/lib/one/datastores/100/13/a78156/disk.0.rbd2",
        "rsync+rbd://100//0:a78156,1:c1a00b/var/lib/one/datastores/100/13/c1a00b/disk.0.1.rbdiff",
        "restic+rbd://100//0:25f4b298/var/lib/one/datastores/0/53/backup/disk.0",
        "rsync://100//0:a78156/var/lib/one/datastores/100/13/a78156/disk.0.rbd2",
    ],
)
def test_rbd_is_refused_by_name(text: str) -> None:
    with pytest.raises(Unsupported, match="not supported yet"):
        parse_url(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fs://100/-/0:a/7/disk.0\n",
        "fs://100/-/0:a/7/disk.0/",
        "fs://100/-/0:../7/disk.0",
        "fs://100/-/0:./7/disk.0",
        "fs://100/-/0:-x/7/disk.0",
        "fs://100/-/0:a b/7/disk.0",
        "fs://100/-/0:a\0/7/disk.0",
        "fs://100/-/1:a,0:b/7/disk.0",
        "fs://100/-/0:a,0:b/7/disk.0",
        "fs://100/-//7/disk.0",
        "fs://100/-/0:a,/7/disk.0",
        "fs://100/0:a/7/disk.0",
        "fs://-1/-/0:a/7/disk.0",
        "fs://١٠٠/-/0:a/7/disk.0",
        "FS://100/-/0:a/7/disk.0",
        "http://example.org/disk.0",
        "/var/lib/one/datastores/100/13/a78156/disk.0",
    ],
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_url(text)


@given(st.text(max_size=60) | st.from_regex(r"[a-z+]{1,8}://[0-9a-z:,/.%\\ -]{0,60}(disk\.[0-9]+)?"))
def test_no_text_makes_it_fall(text: str) -> None:
    """Either refused with a name, or ids that are safe as parts of a path."""
    try:
        url = parse_url(text)
    except OnedBackupError:
        return
    for _, source in url.chain:
        assert source not in {"", ".", ".."}
        assert not set(source) & set("/\0\n\\")
    assert parse_url(str(url)) == url


def test_a_long_text_is_looked_at_in_no_time() -> None:
    """No form takes more than one look: what does not fit is refused, however it begins."""
    for piece in ("/1", "//", "/1/2/disk.0", ",1:a", "/disk.1.1"):
        with pytest.raises(InvalidInput):
            parse_url(f"fs://1/-/0:a{piece * (60_000 // len(piece))}x")
