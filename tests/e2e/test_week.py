"""A week of a small site: three hypervisors, an rsync and a restic store, retention, every restore point."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from netlab import Netlab
from product import Product
from remote_site import PASSWORD, Site, SiteVm

pytestmark = pytest.mark.guest

DAYS = 7


@pytest.fixture
def site(netlab: Netlab, remote_product: Product) -> Iterator[Site]:
    site = Site(netlab, remote_product)
    yield site
    netlab.calm()
    site.close()


def stored_by_rsync(store: Path) -> set[str]:
    """The backups that lie in the store, finished or not."""
    return {path.name for path in store.glob("*/*") if path.name[:2].isdecimal() or path.name.startswith(".")}


def stored_by_restic(site: Site) -> set[str]:
    """The backups that the repositories have, by their tags; restic itself finds them whole."""
    found = set()
    daemon = site.netlab["daemon"]
    for config in sorted((site.netlab["backup"].root / "srv/restic").glob("*/config")):
        restic = ["restic", "-r", f"sftp:backup:/srv/restic/{config.parent.name}", "--no-cache"]
        environment = {"RESTIC_PASSWORD": PASSWORD}
        daemon.run([*restic, "check"], environment=environment)
        for listed in json.loads(
            daemon.run([*restic, "snapshots", "--json"], environment=environment).stdout
        ):
            found |= {tag.removeprefix("backup=") for tag in listed["tags"] if tag.startswith("backup=")}
    return found


def in_catalogue(site: Site, *vms: SiteVm) -> set[str]:
    """The ids of the backups that the catalogue has."""
    return {point["backup_id"] for vm in vms for point in site.increments(vm)}


@pytest.mark.timeout(900)  # some 80 s on a machine that does nothing else
def test_a_week(site: Site, netlab: Netlab) -> None:
    store = site.add_store("rsync")
    site.add_store("restic")
    site.add_vms(("daemon", "restic"), ("hv1", "rsync"), ("hv2", "rsync"))
    first, second, third = site.vms
    site.configure(first, "KEEP_LAST=4")
    site.configure(second, "KEEP_LAST=3")
    site.configure(third, "KEEP_LAST=3", "CHAIN_LENGTH=4")

    for day in range(DAYS):
        for vm in site.vms:
            if vm.guest.is_active():
                site.write(vm, f"day{day % 3}")
        ended = site.back_up(site.vms)
        wanted = "FULL" if day == 0 else "INCREMENT"
        assert [one["result"]["type"] for one in ended[:2]] == [wanted, wanted]
        if day == 2:
            image, increment = site.points(third)[0]
            site.product.run("image", "pin", str(image), "--increment", str(increment))
        if day == 4:
            second.guest.stop()
        if day == 5:
            second.guest.start()
            second.guest.wait_ready()

    operations = site.settle()
    assert {one["state"] for one in operations} == {"DONE"}, operations
    assert sum(one["kind"] == "flatten" for one in operations) >= 2
    points = {vm.number: site.points(vm) for vm in site.vms}
    assert len(points[0]) == 4
    assert len(points[1]) == 3
    assert len(points[2]) == 4, "the pinned one stays"
    for vm in site.vms:
        assert points[vm.number][-1] == list(vm.truth)[-1]
        for point in points[vm.number]:
            site.assert_restores(vm, point)
    for image in {image for vm in site.vms for image, _ in points[vm.number]}:
        site.product.run("image", "verify", str(image))

    assert stored_by_rsync(store) == in_catalogue(site, second, third)
    assert stored_by_restic(site) == in_catalogue(site, first)
    assert netlab["backup"].processes("rsync", "--server") == {}
    assert PASSWORD not in site.product.log.read_text()
