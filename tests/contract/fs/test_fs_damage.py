"""Whatever is changed in a store is noticed, named, and never given out as good data."""

from __future__ import annotations

import os
import shutil

import pytest

from oned_backup.errors import DataCorrupt, NotFound, Salvaged
from oned_backup.model.manifest import dump_manifest, parse_manifest

IDS = [f"20260101-00000{number}-aaaaaa" for number in range(3)]
SECRET = b"what the driver's user may read and the store's must not"


def flip(path, offset):
    """Change one bit."""
    with path.open("r+b") as file:
        file.seek(offset if offset >= 0 else path.stat().st_size + offset)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))


def restores(store, number, expected):
    """Whether a restore point gives its bytes; wrong bytes are a failure of the test."""
    try:
        got = store.download(store.url(number))
    except DataCorrupt:
        return False
    assert got == expected, f"increment {number}: wrong data given out as good"
    return True


DOCUMENT = pytest.mark.fault("data", "flipped bit in domain, VM or firmware documents")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("vm.xml", marks=DOCUMENT),
        pytest.param("nvram.fd", marks=DOCUMENT),
        pytest.param("disk.0.1", marks=pytest.mark.fault("data", "flipped bit in a disk")),
        pytest.param("disk.0.1.blocks", marks=pytest.mark.fault("data", "flipped bit in a disk's checksums")),
        pytest.param("manifest.json", marks=pytest.mark.fault("data", "flipped bit in the manifest")),
    ],
)
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_one_flipped_bit_in_any_file(chain, name, share):
    store = chain.store
    path = store.path(IDS[1]) / name
    flip(path, min(int(path.stat().st_size * share), path.stat().st_size - 1))
    failures = store.failures()
    assert (failures[IDS[0]], failures[IDS[2]]) == ({}, {})
    assert list(failures[IDS[1]]) == [name]
    assert restores(store, 0, chain.expected[0]), "a restore point before the damage is lost"
    if name in {"vm.xml", "nvram.fd"}:
        with pytest.raises(DataCorrupt, match=name):
            store.plan(INCREMENT_ID="1")
        assert restores(store, 1, chain.expected[1])
    else:
        good = restores(store, 1, chain.expected[1])
        assert not good or name != "disk.0.1.blocks"


@pytest.mark.parametrize("offset", [*range(0, 104, 7), 65536, 65540, 131072, 131080, 196608, 262144, 262150])
@pytest.mark.fault("data", "flipped bit in a disk")
def test_no_flipped_bit_of_an_image_changes_what_is_restored(chain, offset):
    """Header, refcounts and tables are proved like the data."""
    path = chain.store.path(IDS[1]) / "disk.0.1"
    if offset >= path.stat().st_size:
        pytest.fail("the image is smaller than this test believes")
    flip(path, offset)
    restores(chain.store, 1, chain.expected[1])
    restores(chain.store, 2, chain.expected[2])
    assert "disk.0.1" in chain.store.failures()[IDS[1]]


@pytest.mark.parametrize("name", ["vm.xml", "disk.0.1", "disk.0.1.blocks", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "extended"])
@pytest.mark.fault("data", "missing file")
@pytest.mark.fault("data", "truncated or extended file")
def test_a_file_that_is_missing_or_of_another_size(chain, name, damage):
    store = chain.store
    path = store.path(IDS[1]) / name
    if damage == "missing":
        path.unlink()
    elif damage == "extended":
        with path.open("ab") as file:
            file.write(b"\n\0")
    else:
        os.truncate(path, path.stat().st_size // 2 if damage == "truncated" else 0)
    assert list(store.failures()[IDS[1]]) == [name]
    assert list(store.failures(PERCENT="1")[IDS[1]]) == [name]
    if name == "vm.xml":
        with pytest.raises(DataCorrupt):
            store.plan(INCREMENT_ID="1")
    else:
        assert not restores(store, 1, chain.expected[1])
        assert not restores(store, 2, chain.expected[2])
    assert restores(store, 0, chain.expected[0])


@pytest.mark.fault("data", "swapped files")
def test_swapped_files_and_foreign_files(chain):
    store = chain.store
    one, two = store.path(IDS[0]) / "vm.xml", store.path(IDS[0]) / "nvram.fd"
    for name in ("disk.0.0", "disk.0.0.blocks"):
        shutil.copy(store.path(IDS[0]) / name, store.path(IDS[1]) / name.replace("0.0", "0.1"))
    one.rename(store.path(IDS[0]) / "x")
    two.rename(one)
    (store.path(IDS[0]) / "x").rename(two)
    (store.path(IDS[2]) / "foreign").write_text("?")
    failures = store.failures()
    assert set(failures[IDS[0]]) == {"vm.xml", "nvram.fd"}
    assert {"disk.0.1", "disk.0.1.blocks"} == set(failures[IDS[1]])
    assert failures[IDS[2]] == {"foreign": "not in the manifest"}
    assert not restores(store, 1, chain.expected[1])


@pytest.mark.fault("data", "digests forged to fit a changed image")
def test_digests_that_fit_a_changed_image_are_not_believed(chain):
    """The manifest proves the digests: an old image with its own digests is not the one that was stored."""
    store = chain.store
    for name in ("disk.0.2", "disk.0.2.blocks"):
        shutil.copy(store.path(IDS[1]) / name.replace("0.2", "0.1"), store.path(IDS[2]) / name)
    assert not restores(store, 2, chain.expected[2])
    assert set(store.failures(PERCENT="100")[IDS[2]]) == {"disk.0.2", "disk.0.2.blocks"}


@pytest.mark.fault("data", "flipped bit in a disk")
def test_a_disk_that_was_stored_without_digests_is_proved_as_a_whole(chain):
    store = chain.store
    folder = store.path(IDS[1])
    raw = parse_manifest((folder / "manifest.json").read_bytes()).raw
    files = [file for file in raw["files"] if not file["name"].endswith(".blocks")]
    (folder / "manifest.json").write_bytes(dump_manifest({**raw, "files": files}))
    (folder / "disk.0.1.blocks").unlink()
    assert restores(store, 2, chain.expected[2])
    flip(folder / "disk.0.1", -1)
    assert not restores(store, 1, chain.expected[1])
    assert not restores(store, 2, chain.expected[2])


@pytest.mark.fault("data", "flipped bit in the manifest")
def test_no_flipped_bit_of_a_manifest_goes_unnoticed(chain):
    data = (chain.store.path(IDS[1]) / "manifest.json").read_bytes()
    for bit in range(8 * len(data)):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DataCorrupt):
            parse_manifest(bytes(changed))


@pytest.mark.fault("data", "swapped backups")
def test_swapped_backups(chain):
    store = chain.store
    one, two, aside = store.path(IDS[1]), store.path(IDS[2]), store.path("aside")
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    assert restores(store, 0, chain.expected[0])
    with pytest.raises(DataCorrupt, match=f"manifest.json is that of backup {IDS[2]}"):
        store.ls(INCREMENT_ID="1")
    assert [list(store.failures()[name]) for name in IDS[1:]] == [["manifest.json"]] * 2
    assert len(store.catalogue().unreadable) == 2


def test_a_chain_with_a_gap(chain):
    store = chain.store
    shutil.rmtree(store.path(IDS[1]))
    with pytest.raises(DataCorrupt, match=f"{IDS[2]}/.*: disk 0 continues {IDS[1]}, which is not stored"):
        store.ls(INCREMENT_ID="2")
    with pytest.raises(NotFound):
        store.ls(INCREMENT_ID="1")
    assert restores(store, 0, chain.expected[0])
    assert store.failures()[IDS[1]].keys() == {"manifest.json"}


def test_nothing_is_stored_on_top_of_what_is_not_there(chain, lab):
    store = chain.store
    shutil.rmtree(store.path(IDS[2]))
    disk = lab.Disk(store.root / "disk.qcow2")
    if not disk.path.exists():
        disk = lab.Disk.create(disk.path, "20M")
        disk.track("b2")
    with disk.served("b2") as socket:
        exports = lab.exports_of(lab.export(disk, socket, 3, "b2"), increment=3)
        with pytest.raises(NotFound, match=f"{IDS[2]} is absent"):
            store.backup("d", exports, parent=IDS[2])
        assert store.names() == {*IDS[:2]}
        store.backup("d", exports, parent=IDS[1])
        shutil.rmtree(store.path(IDS[1]))
        store.backup("d", exports, parent=IDS[1])  # asked again
    assert store.failures()["d"] == {"manifest.json": f"continues {IDS[1]}, which is absent"}


def test_salvage_fills_with_zeros_what_cannot_be_proved_and_says_so(chain, tmp_path):
    store = chain.store
    path = store.path(IDS[0]) / "disk.0.0"
    flip(path, -1)  # the last cluster of the disk's data
    target = tmp_path / "salvaged"
    with pytest.raises(DataCorrupt):
        store.download(store.url(0), target)
    assert not target.exists()
    with pytest.raises(Salvaged) as caught:
        store.download(store.url(0), target, SALVAGE="YES")
    (lost,) = caught.value.answer["SALVAGED"].split(",")
    offset, length = map(int, lost.split("+"))
    expected = bytearray(chain.expected[0])
    assert any(expected[offset : offset + length])
    expected[offset : offset + length] = bytes(length)
    assert target.read_bytes() == expected
    assert any(lost in line for line in store.logged)


@pytest.mark.parametrize("name", ["manifest.json", "vm.xml", "disk.0.1", "disk.0.1.blocks"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
@pytest.mark.fault("data", "file that is no regular file")
def test_what_is_no_regular_file_is_not_followed(chain, tmp_path, name, kind):
    store = chain.store
    path = store.path(IDS[1]) / name
    kept = tmp_path / "kept"
    path.rename(kept)
    if kind == "link":
        path.symlink_to(kept)  # even to the right content
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.mkdir()
    assert list(store.failures()[IDS[1]]) == [name]
    if name == "vm.xml":
        with pytest.raises(DataCorrupt):
            store.plan(INCREMENT_ID="1")
    else:
        assert not restores(store, 1, chain.expected[1])


@pytest.fixture
def victim(tmp_path):
    folder = tmp_path / "victim"
    folder.mkdir()
    (folder / "precious").write_bytes(SECRET)
    return folder


def untouched(victim):
    assert [entry.name for entry in victim.iterdir()] == ["precious"]
    return (victim / "precious").read_bytes() == SECRET


def test_a_link_in_the_place_of_a_vm_leads_nowhere(store, disk, lab, victim):
    (store.base / "7").symlink_to(victim)
    with disk.served() as socket, pytest.raises(DataCorrupt):
        store.backup(IDS[0], lab.exports_of(lab.export(disk, socket)))
    store.chain.append(IDS[0])
    for action in ("ls", "rm", "verify"):
        with pytest.raises(DataCorrupt):
            store.call(action)
    assert untouched(victim)


def test_links_in_the_place_of_our_own_leftovers_are_removed_not_followed(store, disk, lab, victim):
    (store.base / "7").mkdir()
    (store.base / "7" / f".partial-{IDS[0]}").symlink_to(victim)
    (store.base / "7" / f".removing-{IDS[0]}").symlink_to(victim)
    with disk.served() as socket:
        store.backup(IDS[0], lab.exports_of(lab.export(disk, socket)))
    assert store.failures() == {IDS[0]: {}}
    store.call("rm")
    assert untouched(victim)


def test_a_link_in_the_place_of_a_backup_is_removed_not_followed(chain, tmp_path, victim):
    store = chain.store
    shutil.rmtree(store.path(IDS[2]))
    store.path(IDS[2]).symlink_to(victim)
    with pytest.raises(DataCorrupt):
        store.ls()
    store.call("rm", {"BACKUP_IDS": IDS[2]})
    assert untouched(victim)
    assert store.names() == set(IDS[:2])


def test_reading_never_writes(chain):
    store = chain.store

    def state():
        return {p: (p.stat().st_mtime_ns, p.stat().st_ctime_ns) for p in sorted(store.base.rglob("*"))}

    before = state()
    store.ls()
    store.plan()
    store.verify()
    store.catalogue()
    store.call("stat")
    store.call("monitor")
    store.download(store.url(2))
    assert state() == before
