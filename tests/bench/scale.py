"""Many VMs on the dummy hypervisor, through the real daemon and command line; `make bench-scale`.

    python -m tests.bench.scale --vms 10000 --backups 500 --queued 1000

Lists, the import, and how many backups a second the daemon dispatches (claims from a full queue, enters
into the journal and hands to their first driver), and how many it brings to their end: with the dummy
drivers, which are Python programs as all of ours are, and with shell programs in their place that answer at
once, which leaves what the daemon itself takes. What the start of a driver takes is measured by itself
(`starts`). Then a full queue, the daemon killed in the middle of it, and how long until its
successor has recovered.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from lab import wait_for

from oned_backup.config import load_settings
from oned_backup.daemon import requests
from oned_backup.daemon.service import Service
from tests.bench.instant import instant_drivers, waiting_drivers
from tests.bench.product import ROOT
from tests.bench.starts import starts
from tests.bench.table import Row, publish
from tests.faults.many import ManyVms

_RUNS = 3
_DISPATCHED = 200
_CLOCK_HZ = os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    started = time.monotonic()
    work()
    return time.monotonic() - started


def lists(site: ManyVms, vms: int, when: str) -> list[Row]:
    """What a command takes until its last line is out, and the CPU time of command and daemon together."""
    rows = []
    for words in (("vm", "list"), ("image", "list"), ("operation", "list"), ("vm", "show", str(vms // 2))):
        before = cpu(site.product.pid)[0] + cpu(os.getpid())[1]
        seconds = [timed(lambda words=words: site.product.run(*words)) for _ in range(_RUNS)]
        spent = cpu(site.product.pid)[0] + cpu(os.getpid())[1] - before
        name = f"{' '.join(words[:2])}, {vms} VMs {when}"
        rows.append(Row(name, round(median(seconds), 3), bar=1.0 if words == ("vm", "list") else None))
        rows.append(Row("  CPU time", round(spent / _RUNS, 3)))
    return rows


def dispatched(directory: Path) -> list[Row]:
    """How many backups a second are handed to their first driver, which keeps them all waiting."""
    begun, barrier = directory / "begun", directory / "barrier"
    drivers = waiting_drivers(directory / "drivers", begun, barrier)
    site = ManyVms(directory, _DISPATCHED, driver_dirs=[drivers], workers=_DISPATCHED)
    try:
        site.import_all()
        site.product.stop()
        service = Service.open(load_settings(site.product.config).settings)
        ids = [requests.backup(service, vm).id for vm in range(_DISPATCHED)]
        service.stop()
        with barrier.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            site.product.start()
            wait_for(
                "the last dispatch",
                lambda: begun.exists() and begun.read_text().count("\n") == _DISPATCHED,
                120,
            )
        times = sorted(map(float, begun.read_text().split()))
        wait_for("end of all backups", lambda: site.open_operations() == 0, 600)
        if site.ends(ids) != {"DONE": _DISPATCHED}:
            raise RuntimeError(f"dispatched: {site.ends(ids)}")
    finally:
        site.product.stop()
    rate = (_DISPATCHED - 1) / (times[-1] - times[0])
    return [Row("backups dispatched/s", round(rate, 1), unit="/s", bar=50, at_least=True)]


def carried_out(site: ManyVms, backups: int, name: str) -> list[Row]:
    """How many backups a second, of as many VMs, and the CPU time that each takes."""
    daemon = site.product.pid
    before, began = cpu(daemon), time.monotonic()
    ids = site.queue(range(backups))
    queued_s = time.monotonic() - began
    wait_for("end of all backups", lambda: site.open_operations() == 0, 600)
    seconds = time.monotonic() - began
    own, drivers = (now - then for now, then in zip(cpu(daemon), before, strict=True))
    ends = site.ends(ids)
    if ends != {"DONE": backups}:
        raise RuntimeError(f"{name}: {ends}")
    print(f"{name}: {backups} backups in {seconds:.1f} s, queued in {queued_s:.1f} s", flush=True)
    return [
        Row(f"backups/s, {name}", round(backups / seconds, 1), unit="/s"),
        Row("  daemon's CPU time for one", round(own / backups * 1000, 1), unit="ms"),
        Row("  drivers' CPU time for one", round(drivers / backups * 1000, 1), unit="ms"),
    ]


def interrupted(site: ManyVms, first: int, queued: int) -> list[Row]:
    """A full queue whose daemon is killed: how long its successor takes to recover; all end, none twice."""
    ids = site.queue(range(first, first + queued))
    wait_for("the middle of the queue", lambda: 0 <= site.open_operations() < queued - 20, 600)
    site.product.kill()
    began = time.monotonic()
    site.product.start()
    wait_for("recovery", lambda: bool(site.client.get("status")["recovered"]), 60)
    recovered_s = time.monotonic() - began
    wait_for("end of the queue", lambda: site.open_operations() == 0, 1800)
    site.assert_each_once(ids)
    print(f"{queued} queued, killed in the middle: {dict(site.ends(ids))}", flush=True)
    return [Row(f"recovery, {queued} queued", round(recovered_s, 2), bar=30)]


def cpu(pid: int) -> tuple[float, float]:
    """CPU seconds of a process, and of its children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
    user, system, child_user, child_system = (int(field) / _CLOCK_HZ for field in fields[11:15])
    return user + system, child_user + child_system


def main() -> int:
    """Measure and print; 0 whatever the numbers are: a benchmark reports, it does not judge."""
    parser = argparse.ArgumentParser(prog="make bench-scale", description=__doc__)
    parser.add_argument("--vms", type=int, default=10_000)
    parser.add_argument("--backups", type=int, default=500)
    parser.add_argument("--queued", type=int, default=1000)
    wanted = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    sites: list[ManyVms] = []

    def site(name: str, vms: int, **options: Any) -> ManyVms:
        (directory / name).mkdir()
        sites.append(ManyVms(directory / name, vms, **options))
        return sites[-1]

    try:
        (directory / "waiting").mkdir()
        rows = dispatched(directory / "waiting")
        instant = site("instant", wanted.backups, driver_dirs=[instant_drivers(directory / "drivers")])
        instant.import_all()
        rows += carried_out(instant, wanted.backups, "drivers that answer at once")
        instant.product.stop()
        rows += starts()
        dummy = site("dummy", wanted.vms)
        rows.append(Row(f"import of {wanted.vms} VMs", round(timed(dummy.import_all), 1)))
        rows += lists(dummy, wanted.vms, "without backups")
        rows += carried_out(dummy, wanted.backups, "dummy drivers")
        rows += lists(dummy, wanted.vms, "with backups")
        rows += interrupted(dummy, wanted.backups, wanted.queued)
    finally:
        for made in sites:
            made.product.stop()
        shutil.rmtree(directory, ignore_errors=True)
    title = f"scale: {wanted.vms} VMs; {os.cpu_count()} cores"
    publish(rows, ROOT / "build" / "bench-scale.json", title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
