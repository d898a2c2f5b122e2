"""`make bench`: every row's two sides are measured in turns in one run; medians are compared."""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab import Libvirtd

from tests.bench import backups, files, limits, remote, restores
from tests.bench.machines import build_disk, spread
from tests.bench.product import ROOT
from tests.bench.table import Row, publish

GIB = 1 << 30
MIB = 1 << 20


@contextmanager
def _workplace(where: str | None) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="odb-bench-", dir=where))
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _machine() -> str:
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    cores = len(
        [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("processor")]
    )
    return f"{cores} × {model}, guests under software emulation"


def main() -> int:
    """Measure and print; 0 whatever the numbers are: a benchmark reports, it does not judge."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller disk")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--directory", help="where the disks and stores of the run lie")
    arguments = parser.parse_args()
    virtual, allocated = (2 * GIB, 256 * MIB) if arguments.quick else (8 * GIB, 2 * GIB)
    percents, increments = ((1,), 3) if arguments.quick else ((1, 5, 20), 10)
    started = time.monotonic()
    rows: list[Row] = []
    with _workplace(arguments.directory) as directory, Libvirtd() as libvirtd:
        data = spread(virtual, allocated, seed=1)
        template = directory / "template.qcow2"
        build_disk(template, data, seed=1)
        rows += backups.measure(directory, libvirtd, template, data, percents, arguments.runs)
        rows += restores.measure(directory, libvirtd, template, data, increments, arguments.runs)
        rows += files.measure(directory, template, data, increments, arguments.runs)
        rows += limits.measure(directory, full=not arguments.quick)
    rows += remote.measure(data, percents, arguments.runs)
    size = f"{virtual // GIB} GiB disk, {data.allocated >> 20} MiB of data"
    publish(rows, ROOT / "build" / "bench.json", f"{size}; medians of {arguments.runs}; {_machine()}")
    print(f"{time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
