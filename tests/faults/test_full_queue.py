"""A full queue whose daemon is killed, and its successor stopped: all comes to its end, nothing twice.

With drivers in shell that answer at once; `make bench-scale` does the same with 1,000 operations,
10,000 VMs and real drivers.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from lab import wait_for

from oned_backup.store import OperationState, Store
from tests.bench.instant import CALLS, instant_drivers
from tests.faults.many import ManyVms

VMS = 200
RECOVERY_S = 30


@pytest.fixture
def site() -> Iterator[ManyVms]:
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    made = ManyVms(directory, VMS, driver_dirs=[instant_drivers(directory / "drivers")])
    try:
        made.import_all()
        yield made
    finally:
        made.product.stop()
        shutil.rmtree(directory)


@pytest.mark.fault("daemon", "restart with 1,000 queued operations")
def test_a_full_queue_outlives_its_daemons(site: ManyVms) -> None:
    ids = site.queue(range(VMS))
    for end, left in ((site.product.kill, VMS - 20), (site.product.stop, VMS - 70)):
        wait_for("the middle of the queue", lambda left=left: 0 < site.open_operations() < left, 120)
        end()
        with Store.open(site.product.state_dir / "oned-backup.sqlite") as store:
            assert store.journal.count(OperationState.QUEUED) > 0, "it was not the middle"
        site.product.start()
        wait_for("recovery", lambda: site.open_operations() >= 0, RECOVERY_S)
    wait_for("end of the queue", lambda: site.open_operations() == 0, 240)
    site.assert_each_once(ids)
    stored = Counter((site.store / CALLS).read_text().split())
    assert set(stored.values()) == {1}, "a backup was made twice"
    assert len(stored) >= site.ends(ids)["DONE"]
    assert list((site.product.state_dir / "work").iterdir()) == []
    assert list(site.product.run_dir.glob("op-*.lock")) == []
