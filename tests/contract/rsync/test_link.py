"""The cable to the server is pulled: the backup goes on later, or the store stays good without it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from lab import wait_for
from netlab import Netlab
from stores import Disk, Store, export, exports_of, make_chain, make_disk, make_store, meanwhile

from oned_backup.contract.actions import Kind, actions_of
from oned_backup.errors import Unavailable
from oned_backup.runner.run import Limits
from oned_backup.ssh.config_file import config_text, write_config

DRIVER = Path(__file__).parents[3] / "drivers/datastore/rsync"
ID = "20260102-000000-bbbbbb"
SLOW = "3000"
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="machines in namespaces need root")


@pytest.fixture(scope="module")
def netlab() -> Iterator[Netlab]:
    with Netlab(["daemon", "backup"]) as lab:
        yield lab


@pytest.fixture
def store(netlab: Netlab, tmp_path: Path) -> Iterator[Store]:
    """A store on the machine `backup`; the driver runs with the network of the machine `daemon`."""
    folder = tmp_path / "drivers" / "rsync"
    folder.mkdir(parents=True)
    shutil.copy(DRIVER / "driver.toml", folder)
    for action in actions_of(Kind.DATASTORE):
        if (DRIVER / action.name).exists():
            enter = f"nsenter --target={netlab['daemon'].pid} --net"
            (folder / action.name).write_text(f'#!/bin/sh\nexec {enter} -- {DRIVER}/{action.name} "$@"\n')
            (folder / action.name).chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text(
        f"Host *\n  ServerAliveInterval 1\n  ServerAliveCountMax 2\nInclude {netlab.ssh_config}\n"
    )
    config = write_config(tmp_path / "ssh", config_text(tmp_path / "ssh", include=hosts))
    parameters = {"RSYNC_HOST": netlab["backup"].address, "RSYNC_USER": "root"}
    yield replace(make_store(tmp_path, folder, parameters), environment={"ODB_SSH_CONFIG": str(config)})
    netlab.calm()


def partial(store: Store, name: str) -> Path:
    return store.base / "7" / f".partial-{ID}" / name


def more_than(size: int) -> Callable[[Store], bool]:
    return lambda store: (file := partial(store, "disk.0.0")).exists() and file.stat().st_size > size


#: when the cable is pulled
MOMENTS = {
    "in the middle": more_than(1 << 20),
    "before the last file": lambda store: partial(store, "disk.0.0.blocks").exists(),
}


def pull(netlab: Netlab, store: Store, moment: Callable[[Store], bool]) -> None:
    wait_for("the moment to pull the cable", lambda: moment(store))
    netlab["backup"].link(up=False)


def back_up(store: Store, disk: Disk) -> None:
    with disk.served() as socket:
        store.backup(ID, exports_of(export(disk, socket)))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_cable_that_is_put_back_is_all_it_takes(
    moment: str, netlab: Netlab, store: Store, tmp_path: Path
) -> None:
    store = replace(store, parameters={**store.parameters, "RSYNC_BWLIMIT": SLOW})
    disk = make_disk(tmp_path)
    there: list[os.stat_result] = []

    def pull_and_put_back() -> None:
        pull(netlab, store, MOMENTS[moment])
        there.append(partial(store, "disk.0.0").stat())
        wait_for("a word about it", lambda: any("the next attempt" in line for line in store.logged))
        netlab["backup"].link(up=True)

    with meanwhile(pull_and_put_back):
        back_up(store, disk)
    assert (store.path(ID) / "disk.0.0").stat().st_ino == there[0].st_ino
    assert store.download(store.url()) == disk.copy_raw(tmp_path / "raw").read_bytes()
    assert store.failures() == {ID: {}}


@pytest.mark.whole_matrix
def test_a_cable_that_stays_away_leaves_the_store_good(netlab: Netlab, store: Store) -> None:
    chain = make_chain(store)
    disk = Disk(store.root / "disk.qcow2")
    slow = replace(
        store,
        parameters={**store.parameters, "RSYNC_BWLIMIT": SLOW},
        limits=Limits(deadline_s=25, inactivity_s=60, grace_s=5),
        chain=[],
    )
    with meanwhile(lambda: pull(netlab, slow, more_than(1 << 20))), pytest.raises(Unavailable):
        back_up(slow, disk)
    with pytest.raises(Unavailable):
        slow.cancel(ID)
    netlab["backup"].link(up=True)
    assert [store.download(store.url(number)) for number in range(3)] == chain.expected
    slow.cancel(ID)
    assert store.names() == set(store.chain)
    back_up(store, disk)
    assert store.failures(BACKUP_IDS=ID) == {ID: {}}
