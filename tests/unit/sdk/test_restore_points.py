"""Chains through merged backups: who stands for a parent, who does not, and who may be removed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from oned_backup.contract.url import DiskUrl
from oned_backup.errors import Conflict, DataCorrupt, NotFound
from oned_backup.model.manifest import Manifest, dump_manifest, parse_manifest
from oned_backup.sdk.restore_points import disk_chain, refuse_parents, url_chain


def stored(backup_id: str, parent_id: str = "", *, replaces: str = "", stands_for: str = "") -> Manifest:
    disk = {
        "disk_id": 0,
        "target": "vda",
        "type": "INCREMENT" if parent_id else "FULL",
        "reason": "increment",
        "file": "disk.0.0",
        "parent_id": parent_id,
        "size_bytes": 1024,
    }
    backup = {
        "id": backup_id,
        "chain_id": "a",
        "parent_id": parent_id,
        "increment_id": 0,
        "type": disk["type"],
        "date": 1,
        "vm": {"id": 7, "name": "web", "uuid": ""},
        "disks": [disk],
        "files": [],
        "replaces": replaces.split(),
        "stands_for": stands_for.split(),
    }
    return parse_manifest(dump_manifest(backup))


def load_from(*manifests: Manifest) -> Callable[[str], Manifest]:
    known = {manifest.id: manifest for manifest in manifests}

    def load(backup_id: str) -> Manifest:
        if backup_id not in known:
            raise NotFound(f"{backup_id} is absent")
        return known[backup_id]

    return load


A, B, C, D = stored("a"), stored("b", "a"), stored("c", "b"), stored("d", "c")
M = stored("m", replaces="a b c", stands_for="c")


def ids(chain: tuple[Manifest, ...]) -> str:
    return " ".join(manifest.id for manifest in chain)


@pytest.mark.parametrize(
    ("known", "expected"), [("", "a b c d"), ("a b c d", "a b c d"), ("m d", "m d"), ("a b c m d", "a b c d")]
)
def test_of_two_chains_that_counts_which_is_asked_for(known: str, expected: str) -> None:
    assert ids(disk_chain(load_from(A, B, C, D, M), "d", 0, known.split())) == expected


def test_what_only_went_into_a_merge_is_not_stood_for() -> None:
    other = stored("x", "b")  # continues what was in the middle: on top of m it would give wrong bytes
    with pytest.raises(DataCorrupt, match=r"x/manifest\.json: disk 0 continues b, which is not stored"):
        disk_chain(load_from(M, other), "x", 0, ["m", "x"])


@pytest.mark.parametrize("parent_id", ["m", "z"])
def test_a_backup_that_continues_itself_is_damage(parent_id: str) -> None:
    odd = stored("m", parent_id, replaces="y z", stands_for="z")
    with pytest.raises(DataCorrupt, match=r"m/manifest\.json: disk 0 continues itself"):
        disk_chain(load_from(odd, stored("n", "z")), "n", 0, ["m", "n"])


def test_a_url_is_good_before_and_after_a_merge_until_its_backups_are_gone() -> None:
    def url(*backup_ids: str) -> DiskUrl:
        chain = tuple(enumerate(backup_ids))
        return DiskUrl(scheme="fs", datastore_id=1, chain=chain, vm_id=7, disk_id=0)

    both, after = load_from(A, B, C, D, M), load_from(D, M)
    assert ids(url_chain(both, url("a", "b", "c", "d"))) == "a b c d"
    assert ids(url_chain(both, url("m", "d"))) == "m d"
    assert ids(url_chain(after, url("m", "d"))) == "m d"
    with pytest.raises(NotFound, match="a is absent"):
        url_chain(after, url("a", "b", "c", "d"))
    with pytest.raises(NotFound, match="this chain is not in the store"):
        url_chain(both, url("a", "c", "d"))


@pytest.mark.parametrize("going", ["a b c", "m", "d", "c d m a b", "d m"])
def test_what_nobody_needs_may_go(going: str) -> None:
    refuse_parents([A, B, C, D, M], going.split())


@pytest.mark.parametrize(
    ("there", "going", "needed", "by"),
    [
        ((A, B, C, D), "c", "c", "d"),
        ((A, B, C, D, M), "a", "a", "b"),
        ((A, B, C, D, M), "a b c m", "(c|m)", "d"),
        ((D, M), "m", "m", "d"),
    ],
)
def test_what_is_needed_stays(there: tuple[Manifest, ...], going: str, needed: str, by: str) -> None:
    with pytest.raises(Conflict, match=f"backup {needed} cannot be removed: backup {by} continues it"):
        refuse_parents(there, going.split())
