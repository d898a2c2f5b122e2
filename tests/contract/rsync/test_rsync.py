"""The rsync driver against a real sshd: what the kit does not ask for."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from opennebula_store import IDS, OpenNebulaStore
from sshd import Sshd
from stores import Chain, Disk, Store, export, exports_of, run

from oned_backup.contract.request import Backup
from oned_backup.errors import DataCorrupt, Misconfigured, NotFound, Unavailable

COPIES = "/var/tmp/restore"  # noqa: S108 - as the guide says
GUIDE = (Path(__file__).parents[3] / "share/doc/restore-by-hand.md").read_text()


def test_a_chain_restores_to_every_point(chain: Chain) -> None:
    store = chain.store
    assert [store.download(store.url(number)) for number in range(3)] == chain.expected
    assert store.failures() == {name: {} for name in store.chain}


def test_opennebulas_own_rules_restore_what_we_store(chain: Chain, tmp_path: Path) -> None:
    """The last commands of the guide: each file is rebased onto the one before."""
    (script,) = re.findall(r"(?:^ {4}.*disk\.0\..*\n)+", GUIDE.partition("## 6.")[2], re.MULTILINE)
    copies = tmp_path / "copies"
    copies.mkdir()
    before = {path: path.read_bytes() for path in chain.store.base.rglob("disk.*")}
    subprocess.run(
        ["sh", "-ec", script.replace(COPIES, str(copies))],
        check=True,
        cwd=chain.store.base / "7",
        timeout=60,
    )
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", copies / "restored.qcow2", tmp_path / "raw")
    assert (tmp_path / "raw").read_bytes() == chain.expected[1]
    assert {path: path.read_bytes() for path in chain.store.base.rglob("disk.*")} == before


def test_opennebulas_stores_are_read_where_they_are(make: Callable[..., Store], tmp_path: Path) -> None:
    foreign = OpenNebulaStore(make(), tmp_path)
    foreign.add(IDS[0], 0)
    foreign.add(IDS[1], 1, "write -P 3 512k 128k", "write -z 6M 64k")
    assert len(foreign.store.catalogue().manifests) == 2
    assert foreign.store.url() == "rsync://100/-/0:a78156,1:c1a00b/7/disk.0"
    assert foreign.store.download(foreign.store.url()) == foreign.expected[1]


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


@pytest.mark.fault("store", "unreachable at the start")
def test_a_server_that_is_down_is_unavailable(made_chain: Chain, sshd: Sshd) -> None:
    sshd.stop()
    try:
        for action in ("monitor", "ls", "rm", "catalogue"):
            with pytest.raises(Unavailable):
                made_chain.store.call(action)
    finally:
        sshd.start()


@pytest.mark.parametrize("action", ["monitor", "ls", "backup_cancel"])
def test_arguments_that_are_refused_are_misconfigured(action: str, made_chain: Chain) -> None:
    store = replace(
        made_chain.store, parameters={**made_chain.store.parameters, "RSYNC_ARGS": "-e 'sh -c id'"}
    )
    with pytest.raises(Misconfigured, match="'-e' is refused: it would have another program run"):
        store.call(action) if action != "backup_cancel" else store.cancel(store.chain[0])


def test_nothing_is_stored_on_top_of_what_is_not_there(chain: Chain) -> None:
    store, disk = chain.store, Disk.create(chain.store.root / "another.qcow2", "20M")
    disk.track("b")
    first, second, third = list(store.chain)
    answer = store.call(
        "increment_flatten",
        {"MERGE_IDS": f"{second},{third}"},
        backup=Backup(id="m", chain_id=first, increment_id=2, date=1, parent_id=first),
    )
    assert answer["BACKUP_ID"] == "m"
    shutil.rmtree(store.path(third))
    with disk.served("b") as socket:
        exports = exports_of(export(disk, socket, 3, "b"), increment=3)
        store.backup("d", exports, parent=third)  # which the merged one stands for
        shutil.rmtree(store.path("m"))
        with pytest.raises(NotFound, match=f"{third} is absent"):
            store.backup("e", exports, parent=third)
    assert store.names() == {first, second, "d"}
    assert store.failures(BACKUP_IDS="d")["d"] == {"manifest.json": f"continues {third}, which is absent"}


def test_a_lost_manifest_is_replaced_by_what_the_daemon_knows(chain: Chain) -> None:
    store, known = chain.store, tuple(chain.store.catalogue().manifests)
    (store.path(store.chain[1]) / "manifest.json").unlink()
    with pytest.raises(DataCorrupt, match="manifest"):
        store.url(2)
    store = replace(store, catalogue_texts=known)
    assert [store.download(store.url(number)) for number in range(3)] == chain.expected
    assert [list(found) for found in store.failures().values()] == [[], ["manifest.json"], []]
