"""Merging backups of an fs store: beside the old ones, chains that name what was merged, and removal."""

from __future__ import annotations

import json
import re
import resource
import shutil
import subprocess
from pathlib import Path

import pytest

from oned_backup.contract.request import Backup
from oned_backup.errors import Conflict, DataCorrupt, DriverFailed, NotFound
from oned_backup.model.manifest import dump_manifest

GUIDE = (Path(__file__).parents[3] / "share/doc/restore-by-hand.md").read_text()
IDS = [f"20260101-00000{number}-aaaaaa" for number in range(3)]
NEW = "20260102-000000-bbbbbb"


def flatten(store, merged, new=NEW, **options):
    place = Backup(new, IDS[0], store.chain.index(merged[-1]), 1_800_000_000)
    return store.call("increment_flatten", {"MERGE_IDS": ",".join(merged), **options}, backup=place)


def switch(store, merged, new=NEW):
    """The catalogue after a merge; ids count from 0 in these tests' IMAGE."""
    store.chain = [new if name == merged[-1] else name for name in store.chain if name not in merged[:-1]]


def test_the_oldest_become_a_full_backup(chain):
    store = chain.store
    before = store.names()
    answer = flatten(store, IDS[:2])
    assert answer["BACKUP_ID"] == NEW
    assert answer["CHAIN"] == f"1:{NEW},2:{IDS[2]}"
    manifest = store.manifest(NEW)
    assert json.loads(answer["MANIFEST"])["backup"] == manifest.raw
    assert answer["SIZE_MB"] == str(-(-manifest.size_bytes >> 20))
    assert (manifest.type, manifest.increment_id, manifest.parent_id) == ("FULL", 1, "")
    assert manifest.chain_id == IDS[0], "the chain goes on"
    assert manifest.replaces == tuple(IDS[:2])
    assert manifest.stands_for == (IDS[1],)
    assert manifest.disks[0].type == "FULL"
    assert manifest.disks[0].parent_id == ""
    assert manifest.raw["checkpoint"] == store.manifest(IDS[1]).raw["checkpoint"]
    assert store.names() == before | {NEW}
    assert store.download(store.url(2)) == chain.expected[2], "the old chain is as it was"
    old_url = store.url(2)
    switch(store, IDS[:2])
    assert store.download(old_url) == chain.expected[2], "a URL of before is as good"
    assert NEW in store.url(1)
    assert store.download(store.url(0)) == chain.expected[1]
    assert store.download(store.url(1)) == chain.expected[2]
    assert store.failures() == {NEW: {}, IDS[2]: {}}
    store.call("rm", {"BACKUP_IDS": ",".join(IDS[:2])})
    assert store.names() == {NEW, IDS[2]}
    assert store.download(store.url(1)) == chain.expected[2]
    with pytest.raises(NotFound, match=f"{IDS[0]} is absent"):
        store.download(old_url)


def test_a_catalogue_of_before_the_merge_still_leads_to_what_is_stored(chain):
    store = chain.store
    flatten(store, IDS[:2])
    store.call("rm", {"BACKUP_IDS": ",".join(IDS[:2])})
    assert store.download(store.url(2)) == chain.expected[2]
    (store.path(NEW) / "manifest.json").write_text("{}")
    with pytest.raises(DataCorrupt, match=f"{IDS[2]}/.*: disk 0 continues {IDS[1]}, which is not stored"):
        store.url(2)


def test_an_increment_goes_by_being_merged_into_the_next(chain):
    store = chain.store
    answer = flatten(store, IDS[1:])
    manifest = store.manifest(NEW)
    assert (manifest.type, manifest.increment_id, manifest.parent_id) == ("INCREMENT", 2, IDS[0])
    assert manifest.disks[0].parent_id == IDS[0]
    assert answer["CHAIN"] == f"0:{IDS[0]},2:{NEW}"
    switch(store, IDS[1:])
    assert store.download(store.url(1)) == chain.expected[2]
    store.call("rm", {"BACKUP_IDS": ",".join(IDS[1:])})
    assert store.names() == {IDS[0], NEW}
    assert store.download(store.url(1)) == chain.expected[2]
    assert store.download(store.url(0)) == chain.expected[0]
    subprocess.run(["qemu-img", "check", "-q", store.path(NEW) / "disk.0.2"], check=True)


def test_what_stands_for_a_parent_is_found_through_several_merges(chain):
    store = chain.store
    first, second = "20260102-000001-cccccc", "20260102-000002-dddddd"
    flatten(store, IDS[:2], first)
    switch(store, IDS[:2], first)
    flatten(store, [first, IDS[2]], second)
    manifest = store.manifest(second)
    assert manifest.replaces == (IDS[0], IDS[1], first, IDS[2])
    assert manifest.stands_for == (IDS[2],)
    switch(store, [first, IDS[2]], second)
    store.call("rm", {"BACKUP_IDS": ",".join([*IDS, first])})
    assert store.names() == {second}
    assert store.download(store.url(0)) == chain.expected[2]


def test_asking_again_answers_again_even_when_what_was_merged_is_gone(chain):
    store = chain.store
    first = flatten(store, IDS[:2])
    files = {path: path.stat().st_mtime_ns for path in store.path(NEW).iterdir()}
    assert flatten(store, IDS[:2]) == first
    store.call("rm", {"BACKUP_IDS": ",".join(IDS[:2])}, image=None)
    assert flatten(store, IDS[:2]) == first
    assert {path: path.stat().st_mtime_ns for path in store.path(NEW).iterdir()} == files
    with pytest.raises(Conflict, match="was not merged from"):
        flatten(store, IDS[1:])


@pytest.mark.parametrize(
    "ids",
    [IDS[:1], [IDS[0], IDS[2]], [IDS[1], IDS[0]], [IDS[0], "20260101-000009-ffffff"], [IDS[0], "../x"]],
)
def test_only_what_follows_each_other_is_merged(chain, ids):
    before = chain.store.names()
    place = Backup(NEW, IDS[0], 1, 1_800_000_000)
    with pytest.raises(DriverFailed, match="MERGE_IDS"):
        chain.store.call("increment_flatten", {"MERGE_IDS": ",".join(ids)}, backup=place)
    assert chain.store.names() == before


def test_an_absent_backup_is_not_found_and_damage_is_never_merged(chain):
    store = chain.store
    image = store.path(IDS[1]) / "disk.0.1"
    data = bytearray(image.read_bytes())
    data[-70_000] ^= 1
    image.write_bytes(data)
    with pytest.raises(DataCorrupt, match=r"disk\.0\.1"):
        flatten(store, IDS[:2])
    assert store.names() == set(IDS)
    store.path(IDS[1]).rename(store.path(IDS[1]).with_name(".away"))
    with pytest.raises(NotFound):
        flatten(store, IDS[:2])
    assert store.names() == {IDS[0], IDS[2], ".away"}


def test_no_parent_is_removed_while_it_is_needed(chain):
    store = chain.store
    with pytest.raises(Conflict, match=f"{IDS[1]} cannot be removed: backup {IDS[2]} continues it"):
        store.call("rm", {"BACKUP_IDS": ",".join(IDS[:2])})
    flatten(store, IDS[:2])
    with pytest.raises(Conflict, match=f"{IDS[0]} cannot be removed: backup {IDS[1]} continues it"):
        store.call("rm", {"BACKUP_IDS": IDS[0]})
    store.call("rm", {"BACKUP_IDS": NEW})
    flatten(store, IDS[:2])
    store.call("rm", {"BACKUP_IDS": ",".join(IDS[:2])})
    with pytest.raises(Conflict, match=f"{NEW} cannot be removed: backup {IDS[2]} continues it"):
        store.call("rm", {"BACKUP_IDS": NEW})
    assert store.names() == {NEW, IDS[2]}


def test_a_parent_that_was_merged_is_found_by_hand(chain, tmp_path):
    store = chain.store
    flatten(store, IDS[:2])
    store.call("rm", {"BACKUP_IDS": ",".join(IDS[:2])})
    folder = store.path(NEW).parent
    parent_id = store.manifest(IDS[2]).disks[0].parent_id
    (told,) = re.findall(r"^ {4}(jq -r .*stands_for.*)$", GUIDE, flags=re.MULTILINE)
    script = re.sub(r"\d{8}-\d{6}-[0-9a-f]{6}", parent_id, told)
    found = subprocess.run(["sh", "-ec", script], cwd=folder, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [NEW]
    layers = [{"driver": "file", "filename": f"{name}/disk.0.{n}"} for name, n in ((IDS[2], 2), (NEW, 1))]
    image = {"driver": "qcow2", "file": layers[0], "backing": {"driver": "qcow2", "file": layers[1]}}
    target = tmp_path / "by-hand.raw"
    argv = ["qemu-img", "convert", "-O", "raw", f"json:{json.dumps(image)}", target]
    subprocess.run(argv, cwd=folder, check=True)
    assert target.read_bytes() == chain.expected[2]


@pytest.mark.fault("odd inputs", "a chain of 100 increments")
def test_a_chain_of_a_hundred_is_read_and_merged_whatever_the_limit_of_open_files(chain):
    store = chain.store
    raw = store.manifest(IDS[2]).raw
    for number in range(3, 100):
        copied = {**raw, "id": f"20260101-{number:06}-aaaaaa", "increment_id": number}
        copied["parent_id"] = store.chain[-1]
        copied["disks"] = [{**raw["disks"][0], "parent_id": store.chain[-1]}]
        folder = store.path(copied["id"])
        shutil.copytree(store.path(IDS[2]), folder)
        (folder / "manifest.json").write_bytes(dump_manifest(copied))
        store.chain.append(copied["id"])
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    try:
        assert store.download(store.url(99)) == chain.expected[2]
        merged = list(store.chain)
        flatten(store, merged)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    switch(store, merged)
    assert store.download(store.url(0)) == chain.expected[2]
