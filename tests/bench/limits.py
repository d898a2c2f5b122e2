"""Rows without a peer: an empty disk of 8 TiB, a million dirty extents. Each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from tests.bench.table import Row

TIB = 1 << 40

_EMPTY = """
import json, resource, sys, time
from oned_backup.disk.image import open_export
started = time.monotonic()
with open_export(sys.argv[1], "") as image:
    size = sum(len(chunk) for chunk in image.chunks())
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([time.monotonic() - started, usage.ru_maxrss / 1024, size]))
"""

_EXTENTS = """
import json, resource, sys, time
from oned_backup.disk.layout import Layout
from oned_backup.disk.spans import CLUSTER, Spans
data = Spans()
for number in range(1_000_000):
    data.add(3 * number, 3 * number + 1)
layout = Layout(3_000_000 * CLUSTER, data, Spans())
size = sum(len(layout.metadata_cluster(index)) for index in range(layout.metadata_clusters))
usage = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, size]))
"""


def measure(directory: Path, *, full: bool) -> list[Row]:
    """Both rows; the 8 TiB disk is served by qemu-nbd."""
    virtual = 8 * TIB if full else TIB
    disk = directory / "empty.qcow2"
    socket = directory / "empty.sock"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, str(virtual)], check=True)
    server = subprocess.Popen(["qemu-nbd", "-r", "-f", "qcow2", "-k", socket, disk])
    try:
        deadline = time.monotonic() + 10
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        seconds, rss, size = _child(_EMPTY, str(socket))
    finally:
        server.terminate()
        server.wait()
    planning, planning_rss, _ = _child(_EXTENTS)
    return [
        Row(
            f"empty {virtual // TIB} TiB disk, full",
            round(seconds, 2),
            bar=15,
            bytes=int(size),
            rss_mib=round(rss, 1),
        ),
        Row("10^6 extents, planning (CPU)", round(planning, 2), bar=10, rss_mib=round(planning_rss, 1)),
    ]


def _child(code: str, *arguments: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, capture_output=True, text=True
    )
    return [float(value) for value in json.loads(done.stdout)]
