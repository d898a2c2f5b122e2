"""Two datastores with one BASE_PATH: neither harms what the other keeps."""

from __future__ import annotations

import pytest

from tests.faults.simulation import Simulation, simulation


@pytest.mark.whole_matrix
@pytest.mark.fault("concurrency", "two datastores with one BASE_PATH")
def test_two_datastores_in_one_place() -> None:
    with simulation() as site:
        values = {"BASE_PATH": str(site.store)}
        site.client.post("datastores", {"name": "again", "driver": "fs", "values": values})
        first = site.newest_image()
        assert site.backup(datastore_id=101) == "FULL"
        assert site.backup(datastore_id=101) == "INCREMENT"
        second = site.newest_image()
        imported = site.done(site.submit("datastores/101/import"))
        assert (imported["backups"], imported["images"]) == (0, 0), "what the other one keeps stays there"
        for image in (first, second):
            site.done(site.submit(f"images/{image}/verify"))
        site.set(KEEP_LAST="2")
        site.done(site.submit("vms/0/retention"))
        site.settle()
        forget(site)
        site.assert_sound(restore_all=True)

        site.done(site.submit(f"images/{second}", method="delete"))
        forget(site)
        site.assert_sound(restore_all=True)
        assert site.backup(datastore_id=100) == "FULL"
        site.done(site.submit(f"images/{first}", method="delete"))
        forget(site)
        site.assert_sound(restore_all=True)
        assert site.backup() == "INCREMENT"


def forget(site: Simulation) -> None:
    """What was removed as it was asked to."""
    left = {(point["image_id"], point["increment_id"]) for point in site.points()}
    site.truth = {key: content for key, content in site.truth.items() if key in left}
