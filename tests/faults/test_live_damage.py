"""A bit flips in the chain of a real guest: what is lost is known, the rest stays, and the backups go on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from backed_up_vm import command
from lab import Libvirtd

from oned_backup.disk.spans import CLUSTER
from oned_backup.errors import DataCorrupt, OnedBackupError, Salvaged
from tests.faults.live import LiveSite, live_site

pytestmark = [pytest.mark.guest, pytest.mark.whole_matrix]

LOST = re.compile(r"(\d+)\+(\d+)")

Restored = tuple[str, Path]
Error = type[OnedBackupError]


@pytest.fixture
def libvirtd() -> Iterator[Libvirtd]:
    with Libvirtd() as server:
        yield server


@pytest.fixture
def site(libvirtd: Libvirtd) -> Iterator[LiveSite]:
    with live_site(libvirtd) as site:
        yield site


def restored(site: LiveSite, increment: int, *words: str, error: Error | None = None) -> Restored:
    """What a restore of the first chain to raw images says, and its directory."""
    target = site.directory / f"restored-{increment}{''.join(words)}"
    place = ("--increment", str(increment), "--to", str(target), "--format", "raw")
    done = site.product.call("image", "restore", "0", *place, *words)
    assert done.returncode == (error.exit_code if error else 0), done.stderr.decode()
    return done.stderr.decode(), target


@pytest.mark.fault("data", "broken increment in mid-chain: restore")
@pytest.mark.fault("data", "broken increment in mid-chain: next backup")
def test_the_middle_of_a_chain(site: LiveSite) -> None:
    site.done(site.submit("vms/0/backup"))  # the guest has written next to nothing
    site.learn()
    first, middle, last = (point["increment_id"] for point in site.points())
    truth = {number: restored(site, number)[1] for number in (middle, last)}
    backup_id = site.points()[1]["backup_id"]
    path = site.store / "0" / backup_id / f"disk.1.{middle}"
    data = bytearray(path.read_bytes())
    data[-CLUSTER] ^= 1  # the last cluster of what the guest has written to its second disk
    path.write_bytes(data)

    ended = site.ended(site.submit("images/0/verify"))
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "DataCorrupt")
    failures = {one["backup_id"]: one["failures"] for one in ended["result"]["backups"] if one["failures"]}
    assert failures.keys() == {backup_id}
    assert [failure["file"] for failure in failures[backup_id]] == [path.name]
    assert [point["state"] for point in site.points()] == ["GOOD", "BROKEN", "BROKEN"]

    site.assert_known((0, first))
    for number in (middle, last):
        said, target = restored(site, number, "--no-space-check", error=DataCorrupt)
        assert path.name in said
        assert not target.exists()
        said, target = restored(site, number, "--salvage", error=Salvaged)
        ((start, length),) = LOST.findall(said)
        assert int(length) == CLUSTER
        expected = bytearray((truth[number] / "disk.1.raw").read_bytes())
        assert any(expected[int(start) :][:CLUSTER])
        expected[int(start) : int(start) + CLUSTER] = bytes(CLUSTER)
        assert (target / "disk.1.raw").read_bytes() == expected
        assert command("cmp", str(target / "disk.0.raw"), str(truth[number] / "disk.0.raw")) == ""

    assert site.backup_and_compare() == "FULL"
    reasons = {disk["reason"] for disk in site.images()[-1]["increments"][0]["disks"]}
    assert reasons == {"chain-damaged"}
    assert site.backup_and_compare() == "INCREMENT"
    site.assert_sound()
