"""A store that an attacker has prepared: nothing outside of it is read, changed or removed, nothing hangs.

The attacker can write to the store, and make manifests whose checksums are right. What is
tried is everything that a driver does with what it finds there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from sshd import Sshd
from stores import LIMITS, Chain, Store, copy_chain, make_chain, make_store

from oned_backup.contract.request import Backup
from oned_backup.errors import OnedBackupError
from oned_backup.model.manifest import dump_manifest
from oned_backup.runner.run import Limits

DRIVERS = Path(__file__).parents[2] / "drivers/datastore"
SECRET = "TOP-SECRET-OF-THE-HOST"  # noqa: S105 - made for this test
#: the longest that any action may take
LONGEST_S = 30.0


@dataclass
class Site:
    """The chain in the store to attack, and what lies beside it."""

    chain: Chain
    outside: Path

    @property
    def store(self) -> Store:
        return self.chain.store

    @property
    def vm(self) -> Path:
        """The folder of the VM's backups."""
        return self.store.base / str(self.store.vm_id)

    @property
    def newest(self) -> Path:
        """The folder of the newest backup."""
        return self.vm / self.store.chain[-1]

    def seal(self, **changes: Any) -> None:
        """Give the newest backup another manifest, with a checksum that is right."""
        old = json.loads((self.newest / "manifest.json").read_text())["backup"]
        (self.newest / "manifest.json").write_bytes(dump_manifest({**old, **changes}))

    def files(self, **changes: Any) -> list[dict[str, Any]]:
        """The manifest's files; the first one is another."""
        old = json.loads((self.newest / "manifest.json").read_text())["backup"]["files"]
        return [{**old[0], **changes}, *old[1:]]

    def disks(self, **changes: Any) -> list[dict[str, Any]]:
        old = json.loads((self.newest / "manifest.json").read_text())["backup"]["disks"]
        return [{**old[0], **changes}]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with Sshd(tmp_path_factory.mktemp("sshd") / "server") as server:
        yield server


@pytest.fixture(scope="module")
def chains(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Chain]:
    """A chain in a store of each driver; what both store is the same."""
    made = make_chain(make_store(tmp_path_factory.mktemp("chain"), DRIVERS / "fs"))
    user, _, host = sshd.target.partition("@")
    over_ssh = replace(
        made.store,
        driver=DRIVERS / "rsync",
        parameters={"RSYNC_USER": user, "RSYNC_HOST": host},
        environment={"ODB_SSH_CONFIG": str(sshd.config)},
    )
    return {"fs": made, "rsync": Chain(over_ssh, made.expected)}


@pytest.fixture
def site(driver: str, chains: dict[str, Chain], tmp_path: Path) -> Site:
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "secret").write_text(SECRET)
    (outside / "folder" / "precious").write_text(SECRET)
    (tmp_path / "root").mkdir()
    chain = copy_chain(chains[driver], tmp_path / "root")
    chain.store.limits = Limits(deadline_s=LONGEST_S, inactivity_s=LONGEST_S, grace_s=LIMITS.grace_s)
    return Site(chain, outside)


def use_everything(site: Site) -> list[str]:
    """Call every action; what all of them said. Only our errors, soon, and nothing outside is touched."""
    store = site.store
    before = state_of(site.outside)
    said: list[str] = []
    newest = store.chain[-1]
    url = f"{store.driver.name}://100/-/" + ",".join(f"{n}:{name}" for n, name in enumerate(store.chain))
    place = Backup(id="20260101-000009-bbbbbb", chain_id=store.chain[0], increment_id=3, date=1)
    calls: list[tuple[str, dict[str, str], Backup | None]] = [
        ("catalogue", {}, None),
        ("restore", {}, None),
        ("verify", {}, None),
        ("download", {"URL": f"{url}/{store.vm_id}/disk.0", "TARGET": str(store.root / "got")}, None),
        ("increment_flatten", {"MERGE_IDS": ",".join(store.chain[-2:])}, place),
        ("backup_cancel", {}, replace(place, id=newest)),
        ("rm", {"BACKUP_IDS": newest}, None),
    ]
    for action, options, backup in calls:
        began = time.monotonic()
        try:
            said += store.call(action, options, backup=backup).values()
        except OnedBackupError as error:
            said.append(f"{action}: {type(error).__name__}: {error}")
        assert time.monotonic() - began < LONGEST_S - 1, f"{action} hung"
        got = store.root / "got"
        if got.exists():
            said.append(got.read_bytes().decode("latin-1"))
            got.unlink()
    assert state_of(site.outside) == before
    assert not any(SECRET in text for text in (*said, *store.logged))
    assert not any(": DriverBug: " in text for text in said), said
    assert not any("Traceback" in line for line in store.logged), store.logged
    return said


def state_of(folder: Path) -> dict[str, tuple[int, ...]]:
    return {
        str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.lstat().st_size)
        for path in (folder, *sorted(folder.rglob("*")))
    }


# --- what an attacker does: each entry changes the store


def link_a_file(site: Site) -> None:
    (site.newest / "vm.xml").unlink()
    (site.newest / "vm.xml").symlink_to(site.outside / "secret")


def link_a_disk(site: Site) -> None:
    (site.newest / "disk.0.2").unlink()
    (site.newest / "disk.0.2").symlink_to(site.outside / "secret")


def link_the_manifest(site: Site) -> None:
    (site.newest / "manifest.json").unlink()
    (site.newest / "manifest.json").symlink_to(site.outside / "secret")


def link_the_backup(site: Site) -> None:
    shutil.rmtree(site.newest)
    site.newest.symlink_to(site.outside / "folder")


def link_the_vm(site: Site) -> None:
    site.vm.rename(site.outside / "taken")
    site.vm.symlink_to(site.outside / "taken")


def link_the_marker(site: Site) -> None:
    (site.store.base / ".oned-backup-store").unlink()
    (site.store.base / ".oned-backup-store").symlink_to(site.outside / "secret")


def link_what_is_unfinished(site: Site) -> None:
    for name in (
        f".partial-{site.newest.name}",
        f".removing-{site.newest.name}",
        ".partial-20260101-000009-bbbbbb",
    ):
        (site.vm / name).symlink_to(site.outside / "folder")


def link_inside_what_is_unfinished(site: Site) -> None:
    partial = site.vm / f".partial-{site.newest.name}"
    partial.mkdir()
    (partial / "folder").symlink_to(site.outside / "folder")
    (site.newest / "folder").symlink_to(site.outside / "folder")


def pipes(site: Site) -> None:
    for name in ("vm.xml", "disk.0.2", "disk.0.2.blocks"):
        (site.newest / name).unlink()
        os.mkfifo(site.newest / name)


def a_pipe_as_manifest(site: Site) -> None:
    (site.newest / "manifest.json").unlink()
    os.mkfifo(site.newest / "manifest.json")


def devices(site: Site) -> None:
    for name, number in (("vm.xml", 5), ("disk.0.2", 8), ("manifest.json", 5)):  # zero, random
        (site.newest / name).unlink()
        os.mknod(site.newest / name, 0o020666, os.makedev(1, number))


def sockets(site: Site) -> None:
    (site.newest / "vm.xml").unlink()
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(site.newest):
        listener.bind("vm.xml")


def huge_and_sparse(site: Site) -> None:
    os.truncate(site.newest / "vm.xml", 1 << 40)
    os.truncate(site.newest / "disk.0.2.blocks", 1 << 40)
    site.seal(files=site.files(size_bytes=1 << 40))


def a_huge_manifest(site: Site) -> None:
    os.truncate(site.newest / "manifest.json", 1 << 40)


def hard_links(site: Site) -> None:
    for name in ("disk.0.2", "manifest.json"):
        (site.outside / name).hardlink_to(site.newest / name)


def names_with_dots(site: Site) -> None:
    site.seal(files=site.files(name="../../../outside/secret"))


def absolute_names(site: Site) -> None:
    site.seal(files=site.files(name=str(site.outside / "secret")), disks=site.disks(file="/etc/passwd"))


def ids_with_dots(site: Site) -> None:
    site.seal(id="../../../outside/folder", parent_id="../../outside")


def a_parent_with_dots(site: Site) -> None:
    site.seal(parent_id="../../outside/folder", disks=site.disks(parent_id="../../outside/folder"))


def a_parent_that_is_itself(site: Site) -> None:
    site.seal(parent_id=site.newest.name, disks=site.disks(parent_id=site.newest.name))


def replaces_with_dots(site: Site) -> None:
    site.seal(replaces=["../../../outside/folder"], stands_for=["/", ".."])


def numbers_out_of_range(site: Site) -> None:
    site.seal(increment_id=-1, date=float("inf"), disks=site.disks(size_bytes=-(1 << 70)))


def another_vm(site: Site) -> None:
    site.seal(vm={"id": 8, "name": "<&>\n'; rm -rf /", "uuid": "../x"})


def odd_names(site: Site) -> None:
    for name in ("-rf", "a\nb", "x" * 200, "\x1b[2J", "٧", "..."):
        (site.vm / name).mkdir()
        (site.store.base / name).mkdir()
        (site.newest / name).write_text(SECRET[:3])


def deep_json(site: Site) -> None:
    (site.newest / "manifest.json").write_text("[" * 500_000)


def no_unicode(site: Site) -> None:
    (site.newest / "manifest.json").write_bytes(b"\xff\xfe{}\0" * 100)
    (site.vm / "\udcff\udcfe").mkdir()


ATTACKS: list[Callable[[Site], None]] = [
    link_a_file,
    link_a_disk,
    link_the_manifest,
    link_the_backup,
    link_the_vm,
    link_the_marker,
    link_what_is_unfinished,
    link_inside_what_is_unfinished,
    pipes,
    a_pipe_as_manifest,
    devices,
    sockets,
    huge_and_sparse,
    a_huge_manifest,
    hard_links,
    names_with_dots,
    absolute_names,
    ids_with_dots,
    a_parent_with_dots,
    a_parent_that_is_itself,
    replaces_with_dots,
    numbers_out_of_range,
    another_vm,
    odd_names,
    deep_json,
    no_unicode,
]
#: what differs where the store is read through sshfs and changed by a script on the server
BY_SSH = {link_the_vm, link_what_is_unfinished, pipes}


@pytest.mark.fault("security", "links, devices and FIFOs in a store")
@pytest.mark.fault("security", "names and numbers of a manifest that lead out")
@pytest.mark.parametrize(
    ("driver", "attack"),
    [
        pytest.param(
            driver,
            attack,
            id=f"{driver}-{attack.__name__}",
            marks=[pytest.mark.whole_matrix] if driver == "rsync" and attack not in BY_SSH else [],
        )
        for driver in ("fs", "rsync")
        for attack in ATTACKS
    ],
)
def test_a_prepared_store_harms_nothing(site: Site, attack: Callable[[Site], None]) -> None:
    attack(site)
    use_everything(site)


@pytest.mark.fault("security", "names and numbers of a manifest that lead out")
@pytest.mark.parametrize("driver", ["fs"])
@pytest.mark.parametrize("attack", [absolute_names, deep_json, pipes, devices])
def test_good_backups_beside_a_prepared_one_are_still_found(
    site: Site, attack: Callable[[Site], None]
) -> None:
    attack(site)
    found = site.store.catalogue()
    ids = [json.loads(text)["backup"]["id"] for text in found.manifests]
    assert ids[:2] == site.store.chain[:2]
    assert site.store.failures(BACKUP_IDS=",".join(site.store.chain[:2])) == {
        name: {} for name in site.store.chain[:2]
    }
