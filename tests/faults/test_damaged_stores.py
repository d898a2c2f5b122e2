"""Damage in a store: it is found and named, nothing damaged is given out as good, and what is whole stays so.

What a driver finds in each file is in `tests/contract/fs/test_fs_damage.py`; here it is followed
through the daemon: verify, restore, salvage, the next backup, merges, and the repair.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from oned_backup.model.manifest import FILE_NAME as MANIFEST
from tests.faults.simulation import CLUSTER, Simulation, simulation

MARKER = ".oned-backup-store"
SALVAGED = 79
_names = itertools.count()


@pytest.fixture(scope="module")
def the_site() -> Iterator[Simulation]:
    with simulation() as site:
        yield site


@pytest.fixture
def site(the_site: Simulation) -> Iterator[Simulation]:
    """A chain of three to damage; afterwards its files are what they were, and verification says so."""
    kept = the_site.directory / "kept"
    shutil.copytree(the_site.store, kept, symlinks=True)
    yield the_site
    for path in (the_site.store / MARKER, *the_site.store.glob("0/*")):
        if not (kept / path.relative_to(the_site.store)).exists():
            continue  # made by the test
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    shutil.copytree(kept, the_site.store, symlinks=True, dirs_exist_ok=True)
    shutil.rmtree(kept)
    the_site.done(the_site.submit("images/0/verify"))
    assert {point["state"] for point in the_site.points()} == {"GOOD"}
    the_site.assert_tidy()


def stored(site: Simulation, increment: int) -> Path:
    """The directory of a restore point of the first chain."""
    return site.store / "0" / str(site.points()[increment]["backup_id"])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 2 // 3] ^= 4
    path.write_bytes(data)


def link(path: Path) -> None:
    aside = path.parents[3] / f"aside-{next(_names)}"
    shutil.move(path, aside)
    path.symlink_to(aside)


def of_another(path: Path) -> None:
    """The same file of the backup before."""
    before = min(path.parent.parent.iterdir()) / re.sub(r"(disk\.\d+)\.1", r"\1.0", path.name)
    shutil.copy(before, path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flipped": flip,
    "missing": Path.unlink,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "extended": lambda path: os.truncate(path, path.stat().st_size + 1),
    "link": link,
    "of another backup": of_another,
}


def some(*names: str) -> list[Any]:
    """All kinds of damage; those of `names` always, the others with --whole-matrix."""
    whole = pytest.mark.whole_matrix
    return [name if name in names else pytest.param(name, marks=whole) for name in DAMAGE]


def verified(site: Simulation, image: int = 0) -> dict[str, list[str]]:
    """Which files of which backups a verification finds damaged."""
    ended = site.ended(site.submit(f"images/{image}/verify"))
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "DataCorrupt")
    return {
        backup["backup_id"]: [failure["file"] for failure in backup["failures"]]
        for backup in ended["result"]["backups"]
        if backup["failures"]
    }


def states(site: Simulation) -> list[str]:
    """Of the first chain."""
    return [point["state"] for point in site.points() if point["image_id"] == 0]


def refused(site: Simulation, increment: int, code: str = "DataCorrupt") -> str:
    """Why a restore is not made; nothing is left of it."""
    target = site.directory / f"refused-{next(_names)}"
    body = {"to": str(target), "increment_id": increment, "format": "raw"}
    ended = site.ended(site.submit("images/0/restore", body))
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", code), ended
    assert not target.exists()
    return str(ended["error"]["message"])


def salvaged(site: Simulation, increment: int) -> tuple[str, list[bytes]]:
    """What a restore with --salvage says, and what it gives."""
    target = site.directory / f"salvaged-{next(_names)}"
    words = ("image", "restore", "0", "--increment", str(increment), "--to", str(target), "--format", "raw")
    done = site.product.call(*words, "--salvage")
    assert done.returncode == SALVAGED, done.stderr.decode()
    return done.stderr.decode(), [(target / f"disk.{number}.raw").read_bytes() for number in range(2)]


@pytest.mark.fault("data", "missing file")
@pytest.mark.fault("data", "truncated or extended file")
@pytest.mark.fault("data", "swapped files")
@pytest.mark.fault("data", "file that is no regular file")
@pytest.mark.parametrize("damage", some("flipped", "missing", "of another backup"))
def test_every_file_that_is_damaged_is_named(site: Simulation, damage: str) -> None:
    """All files of a backup but its manifest at once; then only what continues it is broken as well."""
    folder = stored(site, 1)
    names = sorted(path.name for path in folder.iterdir() if path.name != MANIFEST)
    assert names == ["disk.0.1", "disk.0.1.blocks", "disk.1.1", "disk.1.1.blocks", "domain.xml", "vm.xml"]
    if damage == "of another backup":  # vm.xml and domain.xml are the same in both
        names = [name for name in names if name.startswith("disk")]
    for name in names:
        DAMAGE[damage](folder / name)
    assert {name: sorted(files) for name, files in verified(site).items()} == {folder.name: names}
    assert states(site) == ["GOOD", "BROKEN", "BROKEN"]
    assert "disk.0.1: disk.0.1:" not in site.points()[1]["failure"]
    shown = site.points()[2]
    assert shown["failure"] == f"continues {folder.name}, which is damaged"
    assert "does not match" in refused(site, 1) or damage != "flipped"
    refused(site, 2)
    assert site.restore(0, 0) == site.truth[0, 0]


@pytest.mark.parametrize(
    ("name", "damage"), [("disk.0.0", "flipped"), ("disk.1.0", "missing"), ("disk.0.0.blocks", "flipped")]
)
def test_damage_that_a_restore_meets_marks_all_that_need_the_file(
    site: Simulation, name: str, damage: str
) -> None:
    """Also the points that are older than the one that was to be restored."""
    folder = stored(site, 0)
    DAMAGE[damage](folder / name)
    refused(site, 2)
    assert states(site) == ["BROKEN", "BROKEN", "BROKEN"]
    assert f"{folder.name}/{name}" in site.points()[0]["failure"]
    assert site.points()[1]["failure"] == f"continues {folder.name}, which is damaged"


@pytest.mark.parametrize("damage", some("flipped", "missing"))
def test_a_manifest_that_is_damaged(site: Simulation, damage: str) -> None:
    """It is told, but nothing is lost as long as the catalogue has what was in it."""
    folder = stored(site, 1)
    DAMAGE[damage](folder / MANIFEST)
    assert [site.restore(0, number) for number in range(3)] == [site.truth[0, number] for number in range(3)]
    site.client.get("images/0/disks", increment_id=2)
    assert verified(site) == {folder.name: [MANIFEST]}
    assert states(site) == ["GOOD", "BROKEN", "BROKEN"]
    assert "the daemon's catalogue has what was in it" in site.points()[1]["failure"]
    target = site.directory / f"streamed-{next(_names)}"
    url = site.client.get("images/0/disks", increment_id=2)[0]["url"]
    site.done(site.submit("downloads", {"url": url, "target": str(target), "format": "raw"}))
    assert target.read_bytes() == site.truth[0, 2][0]
    flip(folder / "disk.0.1")
    assert verified(site) == {folder.name: [MANIFEST, "disk.0.1"]}
    assert f"{folder.name}/disk.0.1" in refused(site, 2)
    flip(folder / "disk.0.1")
    (folder / MANIFEST).write_bytes(site.product.call("image", "manifest", "0", "--increment", "1").stdout)
    site.done(site.submit("images/0/verify"))
    assert states(site) == ["GOOD", "GOOD", "GOOD"]
    assert site.restore(0, 0) == site.truth[0, 0]


@pytest.mark.whole_matrix
@pytest.mark.fault("data", "swapped backups")
def test_two_backups_that_changed_places(site: Simulation) -> None:
    one, two = stored(site, 1), stored(site, 2)
    aside = one.parent / "aside"
    one.rename(aside)
    two.rename(one)
    aside.rename(two)
    assert verified(site) == {one.name: [MANIFEST], two.name: [MANIFEST]}
    refused(site, 2)
    assert site.restore(0, 0) == site.truth[0, 0]


@pytest.mark.fault("data", "missing file")
@pytest.mark.parametrize("what", [pytest.param("a backup", marks=pytest.mark.whole_matrix), "all of the VM"])
def test_what_is_gone_as_a_whole_is_found(site: Simulation, what: str) -> None:
    """A store that is there, and does not have what it should."""
    gone = [stored(site, 1)] if what == "a backup" else [stored(site, number) for number in range(3)]
    for folder in gone:
        shutil.rmtree(folder)
    if what == "all of the VM":
        gone[0].parent.rmdir()
    assert verified(site) == {folder.name: [MANIFEST] for folder in gone}
    assert states(site) == (["GOOD", "BROKEN", "BROKEN"] if what == "a backup" else ["BROKEN"] * 3)


@pytest.mark.fault("data", "flipped bit in the store's marker")
def test_a_store_whose_marker_is_damaged_is_refused_and_nothing_is_marked(site: Simulation) -> None:
    marker = site.store / MARKER
    marker.write_bytes(marker.read_bytes().replace(b"version 1", b"version 3"))
    ended = site.ended(site.submit("images/0/verify"))
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "Misconfigured")
    assert MARKER in ended["error"]["message"]
    refused(site, 2, "Misconfigured")
    assert states(site) == ["GOOD"] * 3


@pytest.mark.fault("data", "broken increment in mid-chain: restore")
@pytest.mark.parametrize("suffix", ["", ".blocks"])
def test_salvage_gives_what_is_left_and_says_what_is_not(site: Simulation, suffix: str) -> None:
    """Of a disk a cluster is lost; without its digests all of it is still proved by the manifest."""
    path = stored(site, 1) / f"disk.0.1{suffix}"
    if suffix:
        path.unlink()
        refused(site, 1)
        target = site.directory / f"salvaged-{next(_names)}"
        words = ("--increment", "1", "--to", str(target), "--format", "raw", "--salvage")
        site.product.run("image", "restore", "0", *words)
        assert (target / "disk.0.raw").read_bytes() == site.truth[0, 1][0]
        return
    data = bytearray(path.read_bytes())
    data[-CLUSTER] ^= 1  # the last cluster of its data
    path.write_bytes(data)
    assert "disk.0.1" in refused(site, 1)
    said, disks = salvaged(site, 1)
    truth = site.truth[0, 1]
    assert disks[1] == truth[1]
    different = [
        at for at in range(0, len(truth[0]), CLUSTER) if disks[0][at:][:CLUSTER] != truth[0][at:][:CLUSTER]
    ]
    (lost,) = different
    assert disks[0][lost:][:CLUSTER] == bytes(CLUSTER)
    assert f"{lost}+{CLUSTER}" in said
    assert site.restore(0, 0) == site.truth[0, 0]


@pytest.mark.fault("data", "broken increment in mid-chain: restore")
@pytest.mark.parametrize("damage", ["missing", pytest.param("truncated", marks=pytest.mark.whole_matrix)])
def test_salvage_without_a_whole_layer(site: Simulation, damage: str) -> None:
    """What the lost increment said is zero; what the newest says is there."""
    DAMAGE[damage](stored(site, 1) / "disk.0.1")
    refused(site, 2)
    said, disks = salvaged(site, 2)
    assert "zero" in said
    truth = site.truth[0, 2]
    assert disks[1] == truth[1]
    for at in range(0, len(truth[0]), CLUSTER):
        assert disks[0][at:][:CLUSTER] in (truth[0][at:][:CLUSTER], bytes(CLUSTER))


@pytest.mark.fault("data", "flipped bit in domain, VM or firmware documents")
def test_salvage_leaves_out_a_damaged_document(site: Simulation) -> None:
    flip(stored(site, 1) / "vm.xml")
    assert "vm.xml" in refused(site, 1)
    assert states(site) == ["GOOD", "BROKEN", "BROKEN"], "what a restore meets is entered"
    said, disks = salvaged(site, 1)
    assert "vm.xml" in said
    assert disks == site.truth[0, 1]


def test_verify_of_a_store_that_cannot_be_reached_marks_nothing(site: Simulation) -> None:
    site.restart(ODB_RETRY__FOR_S="0.5", ODB_RETRY__FIRST_WAIT_S="0.2")
    aside = site.store.with_name("aside")
    site.store.rename(aside)
    site.store.mkdir()
    ended = site.ended(site.submit("images/0/verify"))
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "Unavailable")
    assert list(site.store.iterdir()) == []
    site.store.rmdir()
    aside.rename(site.store)
    assert states(site) == ["GOOD"] * 3


@pytest.mark.fault("data", "broken increment in mid-chain: next backup")
@pytest.mark.fault("data", "broken increment in mid-chain: flatten")
def test_a_broken_chain_is_not_continued_and_not_merged(site: Simulation) -> None:
    flip(stored(site, 1) / "disk.0.1")
    verified(site)
    with pytest.raises(Exception, match="damaged"):
        site.submit("images/0?increment_id=0", method="delete")
    before = site.newest_image()
    assert site.backup() == "FULL"
    newest = site.images()[-1]
    assert newest["id"] > before
    assert newest["increments"][0]["disks"][0]["reason"] == "chain-damaged"
    assert site.backup() == "INCREMENT"
    site.settle()
    again = [one for one in site.operations("verify") if one["image_id"] == newest["id"]]
    assert [one["state"] for one in again] == ["DONE"], "a store that has lost something is read at once"
    assert states(site) == ["GOOD", "BROKEN", "BROKEN"]


@pytest.mark.whole_matrix
def test_a_store_that_was_brought_back_from_an_older_copy() -> None:
    """An increment on top of what the copy lacks could not be restored, and every later one neither."""
    with simulation() as site:
        older = site.directory / "older"
        shutil.copytree(site.store, older)
        for _ in range(2):
            assert site.backup() == "INCREMENT"
        shutil.rmtree(site.store)
        older.rename(site.store)
        site.set(KEEP_LAST="2")
        assert site.backup() == "FULL"
        notes = site.client.get(f"operations/{site.operations('backup')[0]['id']}")["result"]["notes"]
        assert any("not in the store, and marked as BROKEN" in note for note in notes), notes
        site.settle()
        found = {(point["image_id"], point["increment_id"]): point["state"] for point in site.points()}
        assert found == {(0, 2): "GOOD", (0, 3): "BROKEN", (0, 4): "BROKEN", (1, 0): "GOOD"}
        for key in ((0, 2), (1, 0)):
            assert site.restore(*key) == site.truth[key]
        assert site.backup() == "INCREMENT"


def test_verify_beside_a_merge_and_its_removal(the_site: Simulation) -> None:
    """What the merge replaced is not removed under the verification, nor called damaged."""
    site = the_site
    image = site.newest_image()
    while len(site.chain()) < 3:
        site.backup()
    verify, gate = site.held_at("fs.verify.begun", lambda: site.submit(f"images/{image}/verify"))
    site.done(site.flatten(site.chain()[0]))
    (removal,) = site.operations("remove")[:1]
    assert site.client.get(f"operations/{removal['id']}")["waits_for"]["id"] == verify
    gate.unlink()
    site.done(verify)
    site.settle()
    assert {point["state"] for point in site.points() if point["image_id"] == image} == {"GOOD"}
