"""A store that compresses: it keeps the contract, takes less room, and QEMU reads what is in it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from stores import Chain, Disk, Store, copy_chain, export, exports_of, make_chain, make_store, run

from oned_backup.contract.request import Backup
from oned_backup.errors import DataCorrupt, Misconfigured, NoSpace
from oned_backup.runner.kit.check import check_driver
from oned_backup.runner.kit.clause import Status

DRIVER = Path(__file__).parents[3] / "drivers/datastore/fs"
#: the clauses that look at what is in the files
CONTENT = {f"DS-{number}" for number in ("02", "03", "04", "06", "20", "28")}
IDS = [f"20260101-00000{number}-aaaaaa" for number in range(3)]
MERGED = "20260102-000000-bbbbbb"


@pytest.mark.timeout(600)
def test_a_store_that_compresses_keeps_the_contract():
    report = check_driver(DRIVER, parameters={"COMPRESSION": "zstd:1"}, only=CONTENT)
    assert [f"{clause.clause_id}: {clause.detail}" for clause in report.having(Status.FAILED)] == []
    assert {clause.clause_id for clause in report.having(Status.PASSED)} >= CONTENT


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(make_store(tmp_path_factory.mktemp("packed"), DRIVER, {"COMPRESSION": "zstd"}))


def test_what_is_stored(packed: Chain) -> None:
    store = packed.store
    for number, backup_id in enumerate(IDS):
        manifest = store.manifest(backup_id)
        image = manifest.file(f"disk.0.{number}")
        assert image.hash_from == 5 << 16  # what comes before is known last
        assert image.size_bytes == (store.path(backup_id) / image.name).stat().st_size
        assert image.size_bytes <= image.uncompressed_bytes
        assert [file.hash_from for file in manifest.files if file.name != image.name] == [0, 0, 0]
        path = store.path(backup_id) / image.name
        said = json.loads(
            subprocess.run(
                ["qemu-img", "info", "--output=json", path], check=True, capture_output=True
            ).stdout
        )
        assert said["format-specific"]["data"]["compression-type"] == "zstd"
        subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)
        assert store.download(store.url(number)) == packed.expected[number]
    full = store.manifest(IDS[0]).file("disk.0.0")
    assert full.uncompressed_bytes > 3 << 20 > 10 * full.size_bytes - (60 << 16)
    assert store.failures() == {backup_id: {} for backup_id in IDS}
    assert store.failures(PERCENT="30") == {backup_id: {} for backup_id in IDS}
    done, total = store.progress[-1]
    assert done <= total


@pytest.mark.fault("data", "flipped bit in a compressed disk")
def test_damage_in_the_head_and_in_the_data(packed: Chain, tmp_path: Path) -> None:
    for place in (3, (4 << 16) + 3, (5 << 16) + 20):
        root = tmp_path / str(place)
        root.mkdir()
        store = copy_chain(packed, root).store
        path = store.path(IDS[1]) / "disk.0.1"
        data = bytearray(path.read_bytes())
        data[place] ^= 8
        path.write_bytes(data)
        assert store.failures()[IDS[1]] == {"disk.0.1": "disk.0.1: checksum does not match the manifest"}
        with pytest.raises(DataCorrupt):
            store.download(store.url(1))
        assert store.download(store.url(0)) == packed.expected[0]


def test_plain_and_compressed_backups_form_one_chain_and_are_merged(packed: Chain, tmp_path: Path) -> None:
    chain = copy_chain(packed, tmp_path)
    for parameters, merged, size in (({}, IDS[:2], 3 << 20), ({"COMPRESSION": "zstd"}, [MERGED, IDS[2]], 0)):
        store = replace(chain.store, parameters=parameters)
        store.chain = [*merged, *IDS[2:][: 3 - len(merged) - (MERGED in merged)]]
        new = MERGED if merged[0] != MERGED else "20260103-000000-cccccc"
        place = Backup(new, IDS[0], store.chain.index(merged[-1]), 1_800_000_000)
        store.call("increment_flatten", {"MERGE_IDS": ",".join(merged)}, backup=place)
        image = next(file for file in store.manifest(new).files if file.name in {"disk.0.1", "disk.0.2"})
        assert image.size_bytes > size
        assert bool(image.hash_from) == bool(parameters)
        store.chain = [new, *store.chain[store.chain.index(merged[-1]) + 1 :]]
        assert store.download(store.url(-1)) == packed.expected[2]
        assert store.failures() == {backup_id: {} for backup_id in store.chain}


@pytest.mark.parametrize("wanted", ["gzip", "zstd:0", "zstd:20", "zstd:"])
def test_other_methods_are_refused(tmp_path: Path, wanted: str) -> None:
    with pytest.raises(Misconfigured, match="COMPRESSION"):
        make_chain(make_store(tmp_path, DRIVER, {"COMPRESSION": wanted}))


@pytest.fixture
def small_store(tmp_path: Path) -> Iterator[Store]:
    """A compressing store with 16 MB."""
    store = make_store(tmp_path, DRIVER, {"COMPRESSION": "zstd:1"})
    run("mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "small", store.base)
    yield store
    run("umount", "--lazy", store.base)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_what_fits_when_compressed_is_not_refused(small_store: Store) -> None:
    disk = Disk.create(small_store.root / "disk.qcow2", "40M")
    disk.write("write -P 7 0 40M")
    with disk.served() as socket:
        small_store.backup(IDS[0], exports_of(export(disk, socket)))
    copy = disk.copy_raw(small_store.root / "copy").read_bytes()
    assert small_store.download(small_store.url(), small_store.root / "restored") == copy


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")
def test_what_does_not_get_smaller_fills_the_store_and_leaves_nothing(small_store: Store) -> None:
    noise = small_store.root / "noise"
    noise.write_bytes(os.urandom(40 << 20))
    disk = Disk.create(small_store.root / "disk.qcow2", "40M")
    disk.write(f"write -s {noise} 0 40M")
    with disk.served() as socket, pytest.raises(NoSpace, match=r"4\d MB needed, 1\d MB free"):
        small_store.backup(IDS[0], exports_of(export(disk, socket)))
    assert small_store.names() == set()
