"""The restic driver against a real sshd: what the kit does not ask for."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from lab import wait_for
from opennebula_store import OpenNebulaStore
from sshd import Sshd
from stores import Chain, Disk, Store, copy_chain, export, exports_of, meanwhile, run

from oned_backup.contract.request import Backup
from oned_backup.errors import (
    Conflict,
    DataCorrupt,
    DriverFailed,
    Misconfigured,
    NoSpace,
    PermissionDenied,
    Unavailable,
    Unsupported,
)
from oned_backup.model.manifest import parse_manifest

MIB = 1 << 20
ID, OTHER_ID = "20260101-000000-aaaaaa", "20260102-000000-bbbbbb"


def test_a_chain_restores_to_every_point(made_chain: Chain) -> None:
    store = made_chain.store
    assert [store.download(store.url(number)) for number in range(3)] == made_chain.expected
    assert store.failures() == {name: {} for name in store.chain}


def test_a_backup_is_one_restic_snapshot_with_all_its_files_where_opennebula_looks(
    made_chain: Chain, restic: Callable[..., str]
) -> None:
    store = made_chain.store
    found = json.loads(restic(store, "snapshots", "--json"))
    assert sorted(tag for one in found for tag in one["tags"] if tag.startswith("backup=")) == [
        f"backup={name}" for name in store.chain
    ]
    newest = max(found, key=lambda one: one["time"])
    listed = restic(store, "ls", newest["id"], "/7/backup").splitlines()[1:]
    names = {line.rpartition("/")[2] for line in listed}
    assert {"disk.0.2", "disk.0.2.blocks", "manifest.json", "vm.xml", "nvram.fd"} <= names
    assert all(line.startswith("/7") for line in listed)


def test_an_id_that_is_new_is_not_looked_for_and_any_other_is(
    make: Callable[..., Store], disk: Disk, restic: Callable[..., str]
) -> None:
    store = make()
    with disk.served() as socket:
        exports = exports_of(export(disk, socket))
        for _ in range(2):
            store.backup(ID, exports, options={"NEW_ID": "YES"})
        assert len(json.loads(restic(store, "snapshots", "--json"))) == 2
        store.backup(ID, exports)
    assert len(json.loads(restic(store, "snapshots", "--json"))) == 2
    assert store.failures() == {ID: {}}


@pytest.mark.fault("store", "wrong password")
def test_a_wrong_password_is_denied_and_one_that_was_forgotten_is_misconfigured(made_chain: Chain) -> None:
    with pytest.raises(PermissionDenied, match="RESTIC_PASSWORD does not open"):
        replace(made_chain.store, secrets={"RESTIC_PASSWORD": "wrong"}).ls()
    with pytest.raises(Misconfigured, match="RESTIC_PASSWORD is missing"):
        replace(made_chain.store, secrets={}).ls()


@pytest.mark.fault("store", "wrong password")
def test_a_new_datastore_over_repositories_is_refused_without_their_password(made_chain: Chain) -> None:
    new = replace(made_chain.store, images_known=False)
    assert int(new.call("monitor")["TOTAL_MB"]) > 0
    with pytest.raises(PermissionDenied, match="RESTIC_PASSWORD does not open"):
        replace(new, secrets={"RESTIC_PASSWORD": "wrong"}).call("monitor")


@pytest.mark.fault("data", "flipped bit in the manifest")
def test_a_damaged_manifest_is_replaced_by_what_the_daemon_knows(
    made_chain: Chain, restic: Callable[..., str], tmp_path: Path
) -> None:
    """Its blob alone is damaged; restic then gives an EIO to whoever reads the file."""
    chain = copy_chain(made_chain, tmp_path)
    store, known = chain.store, tuple(chain.store.catalogue().manifests)
    text = restic(store, "dump", "--tag", f"backup={store.chain[1]}", "latest", "/7/backup/manifest.json")
    damage_blob(store, restic, hashlib.sha256(text.encode()).hexdigest())
    with pytest.raises(DataCorrupt):
        store.url(2)
    store = replace(store, catalogue_texts=known)
    assert [store.download(store.url(number)) for number in range(3)] == chain.expected
    assert [list(found) for found in store.failures().values()] == [[], ["manifest.json"], []]


def damage_blob(store: Store, restic: Callable[..., str], blob_id: str) -> None:
    """Change a byte in the middle of one blob of a repository."""
    repository = store.base / str(store.vm_id)
    for index in restic(store, "list", "index").split():
        for pack in json.loads(restic(store, "cat", "index", index))["packs"]:
            for blob in pack["blobs"]:
                if blob["id"] == blob_id:
                    path = repository / "data" / pack["id"][:2] / pack["id"]
                    path.chmod(0o600)
                    with path.open("r+b") as file:
                        file.seek(blob["offset"] + blob["length"] // 2)
                        byte = file.read(1)
                        file.seek(-1, os.SEEK_CUR)
                        file.write(bytes([byte[0] ^ 1]))
                    return
    pytest.fail(f"there is no blob {blob_id}")


@pytest.mark.fault("store", "unreachable at the start")
def test_a_server_that_is_down_is_unavailable(made_chain: Chain, sshd: Sshd, disk: Disk) -> None:
    store = replace(made_chain.store, chain=list(made_chain.store.chain))
    sshd.stop()
    try:
        for action in ("monitor", "ls", "rm", "catalogue"):
            with pytest.raises(Unavailable):
                store.call(action)
        with disk.served() as socket, pytest.raises(Unavailable):
            store.backup(OTHER_ID, exports_of(export(disk, socket)))
    finally:
        sshd.start()


@pytest.mark.fault("store", "host key changed")
def test_a_host_key_that_is_not_known_is_misconfigured(made_chain: Chain, sshd: Sshd) -> None:
    sshd.forget()
    try:
        for action in ("monitor", "ls"):
            with pytest.raises(Misconfigured, match="host key") as caught:
                made_chain.store.call(action)
            assert sshd.fingerprint in str(caught.value)
    finally:
        sshd.accept()


def test_a_directory_that_is_not_there_is_not_made(make: Callable[..., Store], disk: Disk) -> None:
    store = make()
    store.base.rmdir()
    with disk.served() as socket, pytest.raises(Unavailable, match="not found"):
        store.backup(ID, exports_of(export(disk, socket)))
    assert not store.base.exists()


def test_a_parent_stays_and_what_went_is_freed_by_prune(
    make: Callable[..., Store], disk: Disk, restic: Callable[..., str]
) -> None:
    store = make()
    disk.path.with_name("noise").write_bytes(os.urandom(8 * MIB))
    disk.write(f"write -s {disk.path.with_name('noise')} 8M 8M")
    with disk.served() as socket:
        store.backup(ID, exports_of(export(disk, socket)))
    disk.track("b0")
    disk.write("write -P 7 0 64k")
    with disk.served("b0") as socket:
        store.backup(OTHER_ID, exports_of(export(disk, socket, 1, "b0"), increment=1), parent=ID)
    with pytest.raises(Conflict, match=f"{ID} cannot be removed: backup {OTHER_ID} continues it"):
        store.call("rm", {"BACKUP_IDS": ID})
    before = size_of(store)
    store.call("rm")
    left = store.base / "7/data/00" / f"{'0' * 64}-restic-temp-0123456789abcdef"
    left.write_bytes(b"what a restic that died has left")
    store.call("prune")
    assert not left.exists()
    assert json.loads(restic(store, "snapshots", "--json")) == []
    assert size_of(store) < before - 7 * MIB


def stored_by_opennebula(
    store: Store, root: Path, restic: Callable[..., str], repository: str
) -> OpenNebulaStore:
    """A full backup and an increment of a VM; the store's chain gets their short ids."""
    staging = root / "var/lib/one/datastores/0"
    foreign = OpenNebulaStore(replace(store, base=staging, chain=[]), root)
    for number, changes in enumerate([(), ("write -P 3 512k 128k", "write -z 6M 64k")]):
        foreign.add("backup", number, *changes)
        folder = staging / f"{store.vm_id}/backup"
        words = ["backup", "--force", "--json", "--tag", f"one-{store.vm_id}", *sorted(folder.iterdir())]
        said = restic(store, *words, repository=repository).splitlines()
        store.chain.append(json.loads(said[-1])["snapshot_id"][:8])
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    return foreign


def test_opennebulas_repositories_are_read_where_they_are(
    make: Callable[..., Store], tmp_path: Path, restic: Callable[..., str]
) -> None:
    store = make()
    restic(store, "init")
    foreign = stored_by_opennebula(store, tmp_path, restic, "7")
    assert [len(store.catalogue().manifests), store.catalogue().unreadable] == [2, ()]
    assert store.url() == f"restic://100/-/0:{store.chain[0]},1:{store.chain[1]}/7/disk.0"
    path = "/var/lib/one/datastores/0/7/backup/disk.0.1"
    assert store.download(f"restic://100//0:{store.chain[0]},1:{store.chain[1]}{path}") == foreign.expected[1]
    assert store.plan().file("vm.xml").startswith(b"<VM>")


def test_a_repository_of_opennebulas_for_a_job_has_backups_of_several_vms(
    make: Callable[..., Store], tmp_path: Path, restic: Callable[..., str]
) -> None:
    first = make()
    second = replace(first, vm_id=8, chain=[])
    restic(first, "init", repository="job_12")
    expected, short_ids = [], []
    for store in (first, second):
        root = tmp_path / f"of-{store.vm_id}"
        root.mkdir()
        expected.append(stored_by_opennebula(store, root, restic, "job_12").expected)
        short_ids.append(list(store.chain))
        store.chain[:] = [f"job_12.{short}" for short in store.chain]
    listed = [parse_manifest(text) for text in first.catalogue().manifests]
    assert sorted((one.vm_id, one.id) for one in listed) == sorted(
        (store.vm_id, name) for store in (first, second) for name in store.chain
    )
    assert [first.download(first.url(number)) for number in range(2)] == expected[0]
    path = "/var/lib/one/datastores/0/8/backup/disk.0.0"
    typed = f"restic://100/12/0:{short_ids[1][0]},1:{short_ids[1][1]}{path}"
    assert second.download(typed) == expected[1][1]
    assert second.plan().file("vm.xml").startswith(b"<VM>")
    assert first.failures() == {name: {} for name in first.chain}
    merging = Backup(id=ID, chain_id=first.chain[0], increment_id=1, date=1)
    with pytest.raises(Unsupported, match="job_12: what is in OpenNebula's repository"):
        first.call("increment_flatten", {"MERGE_IDS": ",".join(first.chain)}, backup=merging)
    first.call("rm")
    first.call("prune")
    assert [parse_manifest(text).vm_id for text in second.catalogue().manifests] == [8, 8]
    assert second.download(second.url()) == expected[1][1]


def big(tmp_path: Path, store: Store, size: int = 24 * MIB) -> Disk:
    """A disk of noise, that takes a while to send."""
    disk = Disk.create(tmp_path / "big.qcow2", size)
    (tmp_path / "noise").write_bytes(os.urandom(size))
    disk.write(f"write -s {tmp_path / 'noise'} 0 {size}")
    return disk


def size_of(store: Store) -> int:
    return sum(path.stat().st_size for path in store.base.rglob("*") if path.is_file())


@contextmanager
def once_sending(store: Store, action: Callable[[], None]) -> Iterator[None]:
    """Call `action` when the first pack of the block's backup has reached the server."""
    before = size_of(store)
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            if size_of(store) > before + MIB:
                action()
                return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def restic_processes(word: str) -> list[int]:
    """The processes of `restic …`'s that have `word` among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == b"restic" and word.encode() in words:
            found.append(int(path.parent.name))
    return found


@pytest.mark.fault("store", "program (rsync, restic) killed here or there")
def test_a_killed_restic_leaves_a_good_store(make: Callable[..., Store], tmp_path: Path, disk: Disk) -> None:
    store = make(RESTIC_BWLIMIT="2048")
    large = big(tmp_path, store)
    with disk.served() as socket:
        store.backup(ID, exports_of(export(disk, socket)))
    expected = store.download(store.url())

    def kill() -> None:
        for pid in restic_processes(f"backup={OTHER_ID}"):
            os.kill(pid, signal.SIGKILL)

    broken = replace(store, chain=[])
    with large.served() as socket:
        with pytest.raises(DriverFailed), once_sending(store, kill):
            broken.backup(OTHER_ID, exports_of(export(large, socket)))
        assert [json.loads(text)["backup"]["id"] for text in store.catalogue().manifests] == [ID]
        broken.parameters = {**broken.parameters, "RESTIC_BWLIMIT": ""}
        broken.backup(OTHER_ID, exports_of(export(large, socket)))
    assert store.download(store.url()) == expected
    assert broken.download(broken.url()) == (tmp_path / "noise").read_bytes()


@pytest.mark.fault("store", "unreachable in mid-transfer")
def test_a_server_that_goes_away_in_mid_backup_is_unavailable(
    make: Callable[..., Store], tmp_path: Path, sshd: Sshd, disk: Disk
) -> None:
    store = make(RESTIC_BWLIMIT="2048")
    with disk.served() as socket:
        store.backup(ID, exports_of(export(disk, socket)))
    large = big(tmp_path, store)
    try:
        with large.served() as socket, pytest.raises(Unavailable), once_sending(store, sshd.stop):
            replace(store, chain=[]).backup(OTHER_ID, exports_of(export(large, socket)))
    finally:
        sshd.start()
    store.cancel(OTHER_ID)
    assert len(store.catalogue().manifests) == 1


def test_a_server_that_goes_away_while_it_is_read_is_unavailable(
    make: Callable[..., Store], tmp_path: Path, sshd: Sshd
) -> None:
    store = make()
    large = big(tmp_path, store)
    with large.served() as socket:
        store.backup(ID, exports_of(export(large, socket)))
    store.parameters = {**store.parameters, "RESTIC_BWLIMIT": "2048"}
    store.progress.clear()

    def stop_in_the_middle() -> None:
        wait_for("some progress", lambda: any(0 < done < total for done, total in store.progress), 60)
        sshd.stop()

    try:
        with meanwhile(stop_in_the_middle), pytest.raises(Unavailable, match=r"lab-host|sftp"):
            store.download(store.url(), tmp_path / "restored")
    finally:
        sshd.start()
    assert any(line.startswith("restic tries again: ") for line in store.logged)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
@pytest.mark.fault("store", "full in mid-transfer")
def test_a_full_server_is_no_space_and_is_cleaned(
    make: Callable[..., Store], tmp_path: Path, disk: Disk
) -> None:
    store = make()
    run("mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "small", store.base)
    try:
        with disk.served() as socket:
            store.backup(ID, exports_of(export(disk, socket)))
        before = size_of(store)
        large = big(tmp_path, store)
        with large.served() as socket, pytest.raises(NoSpace, match="MB free"):
            replace(store, chain=[]).backup(OTHER_ID, exports_of(export(large, socket)))
        assert any(line.startswith("restic tries again: ") for line in store.logged)
        store.cancel(OTHER_ID)
        assert size_of(store) < before + MIB // 4
        assert not list(store.base.rglob("*-restic-temp-*"))
        assert store.failures() == {ID: {}}
    finally:
        run("umount", "--lazy", store.base)
