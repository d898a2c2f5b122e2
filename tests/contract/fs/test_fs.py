"""The fs driver does what the specification says: store, list, plan, give back, prove, remove."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading

import pytest

from oned_backup import xmldoc
from oned_backup.contract.exports import ExcludedDisk, Exports, Reason
from oned_backup.contract.request import Backup
from oned_backup.contract.url import parse_url
from oned_backup.errors import Conflict, DriverFailed, NotFound, Unavailable
from oned_backup.model.manifest import parse_manifest
from oned_backup.sdk.folder_store import MARKER_TEXT

IDS = [f"20260101-00000{number}-aaaaaa" for number in range(3)]


def test_every_increment_restores_to_its_bytes(chain, tmp_path):
    for number, expected in enumerate(chain.expected):
        url = chain.store.url(number)
        assert chain.store.download(url) == expected
        assert chain.store.download(url, tmp_path / f"raw.{number}", FORMAT="raw") == expected
        chain.store.download(url, tmp_path / f"qcow2.{number}", FORMAT="qcow2")
        subprocess.run(["qemu-img", "check", "-q", tmp_path / f"qcow2.{number}"], check=True)
        subprocess.run(
            [
                *("qemu-img", "compare", "-q", "-f", "qcow2", "-F", "raw"),
                *(tmp_path / f"qcow2.{number}", tmp_path / f"raw.{number}"),
            ],
            check=True,
        )


def test_a_download_replaces_the_content_of_an_existing_file(chain, tmp_path):
    target = tmp_path / "existing"
    target.write_bytes(b"\xff" * (30 << 20))
    inode = target.stat().st_ino
    assert chain.store.download(chain.store.url(1), target) == chain.expected[1]
    assert target.stat().st_ino == inode


def test_a_backup_is_a_directory_of_files_and_a_manifest(chain):
    path = chain.store.path(IDS[1])
    assert {entry.name for entry in path.iterdir()} == {
        "vm.xml",
        "nvram.fd",
        "disk.0.1",
        "disk.0.1.blocks",
        "manifest.json",
    }
    manifest = chain.store.manifest(IDS[1])
    assert (manifest.vm_name, manifest.vm_uuid) == ("web '1' <&>", "c0ffee00-0000")
    assert (manifest.chain_id, manifest.parent_id, manifest.increment_id) == (IDS[0], IDS[0], 1)
    assert manifest.raw["installation"] == "0badcafe"
    assert manifest.disks[0].parent_id == IDS[0]
    assert {file.name: file.size_bytes for file in manifest.files} == {
        entry.name: entry.stat().st_size for entry in path.iterdir() if entry.name != "manifest.json"
    }
    assert chain.store.names() == set(IDS)


def test_the_answer_of_a_backup_and_asking_again(store, disk, lab):
    with disk.served() as socket:
        exports = lab.exports_of(lab.export(disk, socket))
        first = store.backup(IDS[0], exports)
    before = {entry: entry.stat().st_mtime_ns for entry in store.path(IDS[0]).iterdir()}
    # the export is gone: a second run that read it again would fail
    assert store.backup(IDS[0], exports) == first
    assert {entry: entry.stat().st_mtime_ns for entry in store.path(IDS[0]).iterdir()} == before
    stored = sum(entry.stat().st_size for entry in before)
    assert first["SIZE_MB"] == str(-(-stored >> 20))
    assert (first["BACKUP_ID"], first["FORMAT"]) == (IDS[0], "raw")
    assert parse_manifest(first["MANIFEST"]) == store.manifest(IDS[0])


def test_all_disks_full_start_a_chain_whatever_was_planned(store, disk, lab):
    with disk.served() as socket:
        store.backup(IDS[0], lab.exports_of(lab.export(disk, socket)))
        store.backup(IDS[1], lab.exports_of(lab.export(disk, socket)), parent=IDS[0])
    manifest = store.manifest(IDS[1])
    assert (manifest.chain_id, manifest.parent_id, manifest.increment_id) == (IDS[1], "", 0)


def test_a_disk_that_came_out_full_restarts_its_own_chain_only(store, tmp_path, lab):
    disks = [lab.Disk.create(tmp_path / f"d{number}", "1M", number) for number in range(2)]
    disks[0].track("b0")
    disks[1].write("write -P 7 0 64k")
    with disks[0].served() as one, disks[1].served() as two:
        store.backup(IDS[0], lab.exports_of(lab.export(disks[0], one), lab.export(disks[1], two)))
    disks[0].write("write -P 5 0 64k")
    with disks[0].served("b0") as one, disks[1].served() as two:
        exports = lab.exports_of(
            lab.export(disks[0], one, 1, "b0"), lab.export(disks[1], two, 1), increment=1
        )
        store.backup(IDS[1], exports, parent=IDS[0])
    chains = {disk.disk_id: parse_url(disk.url).chain for disk in store.ls().disks}
    assert chains == {0: ((0, IDS[0]), (1, IDS[1])), 1: ((1, IDS[1]),)}
    assert store.download(store.url(1, 0))[:65536] == b"\x05" * 65536
    assert store.download(store.url(1, 1))[:65536] == b"\x07" * 65536


def test_listing_and_size(chain):
    (listed,) = chain.store.ls(INCREMENT_ID="1").disks
    url = parse_url(listed.url)
    assert (url.scheme, url.datastore_id, url.vm_id, url.disk_id) == ("fs", 100, 7, 0)
    assert url.chain == ((0, IDS[0]), (1, IDS[1]))
    assert listed.size_bytes == 20 << 20
    assert listed.blake3 == chain.store.manifest(IDS[1]).file("disk.0.1").blake3
    assert (
        chain.store.ls().disks
        == chain.store.ls(INCREMENT_ID="2").disks
        == chain.store.ls(INCREMENT_ID="-1").disks
    )
    assert chain.store.call("stat", {"DISK_ID": "0"}) == {"SIZE_MB": "20"}


def test_a_plan_brings_the_documents_along(chain):
    plan = chain.store.plan(INCREMENT_ID="1")
    assert (plan.backup_id, plan.increment_id) == (IDS[1], 1)
    assert plan.disks == chain.store.ls(INCREMENT_ID="1").disks
    assert plan.file("vm.xml") == (chain.store.source / "vm.xml").read_bytes()
    assert plan.file("nvram.fd") == (chain.store.source / "nvram.fd").read_bytes()
    assert plan.file("disk.0.1") is None


@pytest.mark.parametrize(
    ("action", "options"),
    [
        ("ls", {"INCREMENT_ID": "3"}),
        ("ls", {"DISK_ID": "1"}),
        ("stat", {"DISK_ID": "1"}),
        ("restore", {"INCREMENT_ID": "9"}),
        ("download", {"URL": "fs://100/-/0:20260101-000000-ffffff/7/disk.0"}),
        ("download", {"URL": "fs://100/-/0:20260101-000000-aaaaaa/7/disk.1"}),
        ("download", {"URL": "fs://100/-/0:20260101-000000-aaaaaa/8/disk.0"}),
        # left out the increment in the middle: such a disk never existed
        ("download", {"URL": "fs://100/-/0:20260101-000000-aaaaaa,2:20260101-000002-aaaaaa/7/disk.0"}),
    ],
)
def test_what_is_not_there_is_not_found(chain, action, options):
    with pytest.raises(NotFound):
        chain.store.call(action, options)


@pytest.mark.parametrize(
    "url", ["restic://100/-/0:a/7/disk.0", "fs://101/-/0:a/7/disk.0", "fs://100/-/0:../7/disk.0", "x"]
)
def test_a_foreign_url_is_refused(chain, url):
    with pytest.raises(DriverFailed):
        chain.store.call("download", {"URL": url})


def test_full_mode_has_no_increments(store, disk, lab):
    with disk.served() as socket:
        store.backup(IDS[0], lab.exports_of(lab.export(disk, socket)))
    image = xmldoc.build("IMAGE", {"ID": 1, "SOURCE": IDS[0], "VMS": {"ID": 7}, "BACKUP_INCREMENTS": None})
    assert "LISTING" in store.call("ls", image=image)
    assert store.call("verify", image=image)["REPORT"].count("<FAILURE>") == 0
    with pytest.raises(NotFound):
        store.call("ls", {"INCREMENT_ID": "1"}, image=image)


@pytest.mark.fault("odd inputs", "disk of 0 bytes")
@pytest.mark.fault("odd inputs", "disk of an unaligned size")
def test_small_disks_and_none_at_all(store, tmp_path, lab):
    empty = lab.Disk.create(tmp_path / "empty", 0, 3)
    odd = lab.Disk.create(tmp_path / "odd", 70_144, 4)
    odd.write("write -P 6 65k 512")
    with empty.served() as one, odd.served() as two:
        store.backup(IDS[0], lab.exports_of(lab.export(empty, one), lab.export(odd, two)))
    assert store.call("stat") == {"SIZE_MB": "1"}
    assert store.download(store.url(0, 3)) == b""
    assert store.download(store.url(0, 4)) == odd.copy_raw(tmp_path / "raw").read_bytes()
    nothing = Exports(disks=(), excluded=(ExcludedDisk("sda", Reason.CDROM),), files=("vm.xml",))
    store.backup(IDS[1], nothing)
    assert store.manifest(IDS[1]).raw["excluded"][0]["reason"] == "cdrom"
    assert store.failures(BACKUP_IDS=",".join(IDS[:2])) == {IDS[0]: {}, IDS[1]: {}}


def test_staged_disks_are_stored_with_their_digests_if_there_are_any(store, disk, lab):
    staged = store.source / "staged"
    staged.write_bytes(b"image" * 1000)
    one = lab.staged(lab.export(disk, ""), staged)
    store.backup(IDS[0], lab.exports_of(one))
    assert (store.path(IDS[0]) / "disk.0.0").read_bytes() == staged.read_bytes()
    assert store.manifest(IDS[0]).file("disk.0.0.blocks") is None
    (store.source / "staged.blocks").write_bytes(b"digests")
    store.backup(IDS[1], lab.exports_of(one))
    assert (store.path(IDS[1]) / "disk.0.0.blocks").read_bytes() == b"digests"


def test_verify_reads_everything_or_a_share(chain):
    assert chain.store.failures() == {name: {} for name in IDS}
    whole = {backup.backup_id: backup.read_bytes for backup in chain.store.verify().backups}
    assert whole == {name: chain.store.manifest(name).size_bytes for name in IDS}
    (sampled,) = chain.store.verify(PERCENT="10", BACKUP_IDS=IDS[0]).backups
    assert sampled.failures == ()
    assert 0 < sampled.read_bytes < whole[IDS[0]]
    with pytest.raises(DriverFailed):
        chain.store.verify(PERCENT="101")


def test_removal_is_idempotent_and_never_takes_a_parent(chain):
    with pytest.raises(Conflict, match=f"{IDS[0]} cannot be removed: backup {IDS[1]} continues it"):
        chain.store.call("rm", {"BACKUP_IDS": IDS[0]})
    assert chain.store.names() == set(IDS)
    for _ in range(2):
        chain.store.call("rm", {"BACKUP_IDS": IDS[2]})
        assert chain.store.names() == set(IDS[:2])
    assert chain.store.download(chain.store.url(1)) == chain.expected[1]
    chain.store.call("rm")
    chain.store.call("rm")
    assert [entry.name for entry in chain.store.base.iterdir()] == [".oned-backup-store"]


def test_an_interrupted_removal_is_finished_by_the_next(chain):
    folder = chain.store.path(IDS[2]).parent
    chain.store.path(IDS[2]).rename(folder / f".removing-{IDS[2]}")
    (folder / f".partial-{IDS[2]}").mkdir()
    assert {
        text for text in chain.store.catalogue().manifests if IDS[2] in json.loads(text)["backup"]["id"]
    } == set()
    chain.store.call("rm", {"BACKUP_IDS": IDS[2]})
    assert chain.store.names() == set(IDS[:2])


def test_monitor_tells_what_the_file_system_has(chain):
    answer = {key: int(value) for key, value in chain.store.call("monitor").items()}
    found = os.statvfs(chain.store.base)
    assert answer["TOTAL_MB"] == found.f_blocks * found.f_frsize >> 20
    assert 0 < answer["FREE_MB"] <= answer["TOTAL_MB"] - answer["USED_MB"]


def test_the_catalogue_holds_all_that_is_finished(chain):
    (chain.store.path(IDS[0]).parent / ".partial-x").mkdir()
    (chain.store.base / "9").mkdir()
    (chain.store.base / "9" / "foreign").mkdir()
    (chain.store.base / "lost+found").mkdir()
    found = chain.store.catalogue()
    assert [parse_manifest(text) for text in found.manifests] == [chain.store.manifest(name) for name in IDS]
    assert [name for name, _ in found.unreadable] == ["9/foreign"]
    (chain.store.base / "0").write_text("no folder")
    shutil.copytree(chain.store.path(IDS[0]).parent, chain.store.base / "8")  # nobody would look there
    found = chain.store.catalogue()
    assert len(found.manifests) == 3
    assert [name for name, _ in found.unreadable] == ["0", *(f"8/{name}" for name in IDS), "9/foreign"]


def test_a_first_backup_that_died_while_it_made_the_marker(store, disk, lab):
    (store.base / ".oned-backup-store").touch()
    store.call("monitor")
    with disk.served() as socket:
        store.backup(IDS[0], lab.exports_of(lab.export(disk, socket)))
    assert (store.base / ".oned-backup-store").read_bytes().startswith(MARKER_TEXT)
    (store.base / ".oned-backup-store").write_bytes(b"")
    assert store.failures() == {IDS[0]: {}}
    shutil.rmtree(store.base / "7")
    with pytest.raises(Unavailable, match="mounted"):
        store.failures()


def test_first_backups_of_several_vms_at_once(store, disk, lab):
    stores = [lab.Store(store.base, store.root, vm_id=number) for number in range(1, 5)]
    failed = []

    def back_up(one, socket):
        try:
            one.backup(IDS[0], lab.exports_of(lab.export(disk, socket)))
        except Exception as error:  # noqa: BLE001 - shown below
            failed.append(error)

    with disk.served() as socket:
        threads = [threading.Thread(target=back_up, args=(one, socket)) for one in stores]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failed == []
    assert {one.vm_id: one.failures() for one in stores} == {n: {IDS[0]: {}} for n in range(1, 5)}
    assert sorted(entry.name for entry in store.base.iterdir()) == [".oned-backup-store", "1", "2", "3", "4"]


@pytest.mark.parametrize("backup_id", ["../x", "a b", "-x", ".hidden", "$(id)", "a'b", "x" * 65, "a/b", "é"])
@pytest.mark.fault("odd inputs", "backup ids that are no names")
def test_an_id_that_is_no_name_is_refused(store, backup_id):
    with pytest.raises(DriverFailed):
        store.backup(backup_id, Exports(disks=(), files=("vm.xml",)))
    assert not store.names()


@pytest.mark.parametrize("backup_id", ["0", "a.b-c_D", "x" * 64, "partial-1"])
def test_an_unusual_id_that_is_a_name_works(store, backup_id):
    store.backup(backup_id, Exports(disks=(), files=("vm.xml",)))
    assert store.failures() == {backup_id: {}}
    store.call("rm")
    assert not store.names()


def test_a_source_file_that_is_missing_is_no_backup(store):
    with pytest.raises(DriverFailed) as caught:
        store.call(
            "backup",
            backup=Backup(id=IDS[0], chain_id=IDS[0], increment_id=0, date=1),
            exports=Exports(disks=(), files=("tpm.tar",)),
        )
    assert "tpm.tar" in caught.value.message
    assert not store.names()
