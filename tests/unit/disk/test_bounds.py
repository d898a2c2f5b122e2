"""Memory stays small whatever the disk's size, and no case takes minutes: each has its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20

_MEASURE = """
import json
def report(**found):
    status = open("/proc/self/status").read()
    peak_kb = int(status.split("VmHWM:")[1].split()[0])
    print(json.dumps({"rss_mb": peak_kb >> 10, **found}))
"""


def measured(script: str, *arguments: str | Path) -> dict[str, float]:
    argv = [sys.executable, "-c", _MEASURE + script, *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


_FULL = """
import sys
from oned_backup.disk.image import open_export
with open_export(sys.argv[1], "") as view:
    written = 0
    for chunk in view.chunks():
        written += len(chunk)
    assert written == view.size_bytes
    report(size=written)
"""


@pytest.mark.fault("odd inputs", "disk of 8 TiB")
def test_an_empty_disk_of_8_tib(qemu) -> None:
    disk = qemu.folder / "d"
    qemu.img("create", "-q", "-f", "qcow2", disk, "8T")
    with qemu.export(disk) as socket:
        found = measured(_FULL, socket)
    assert found["size"] < MIB
    assert found["rss_mb"] < 96


def test_memory_does_not_follow_the_data(qemu) -> None:
    with qemu.nbdkit("pattern", "size=1G") as socket:
        found = measured(_FULL, socket)
    assert found["size"] > 1 << 30
    assert found["rss_mb"] < 96


_COMPRESSED = """
import sys
from oned_backup.disk.image import open_export
with open_export(sys.argv[1], "") as view, view.compressed(1) as image:
    written = sum(len(chunk) for chunk in image.chunks()) + sum(len(piece) for piece in image.head())
    assert written == image.size_bytes
    report(size=written)
"""


def test_nor_does_it_when_compressing(qemu) -> None:
    with qemu.nbdkit("pattern", "size=1G") as socket:
        found = measured(_COMPRESSED, socket)
    assert found["size"] < 1 << 30
    assert found["rss_mb"] < 96


_PASSES = """
import gc, sys
from oned_backup.disk.image import open_export
gc.disable()
with open_export(sys.argv[1], "") as view:
    for _ in range(6):
        for chunk in view.chunks():
            pass
    report()
"""


def test_each_pass_gives_its_buffers_back(qemu) -> None:
    with qemu.nbdkit("pattern", "size=64M") as socket:
        assert measured(_PASSES, socket)["rss_mb"] < 96


_PLAN = """
from oned_backup.disk.extents import ExtentPass
from oned_backup.disk.layout import Layout
# a dirty cluster each 8 MiB on 8 TiB, allocation in other places: as a server tells it
size, step = 8 << 40, 8 << 20
survey = ExtentPass(size, ["base:allocation", "dirty"], "dirty")
while (request := survey.next_request()) is not None:
    offset, length = request
    count = length // step + 1
    survey.take("dirty", offset, [65536, 1, step - 65536, 0] * count, None)
    survey.take("base:allocation", offset, [3 << 20, 0, step - (3 << 20), 3] * count, None)
data, zero = survey.result()
layout = Layout(size, data, zero)
assert len(data) == 1 << 20
for index in range(0, layout.metadata_clusters, 97):
    layout.metadata_cluster(index)
report(tables=layout.metadata_clusters)
"""


def test_a_million_extents() -> None:
    found = measured(_PLAN)
    assert found["rss_mb"] < 512
    assert found["tables"] > 16384


_RESTORE = """
import sys
from pathlib import Path
from oned_backup.disk.restore import Layer, restore_chain
layers = [Layer(Path(path), None, path) for path in sys.argv[2:]]
restore_chain(layers, Path(sys.argv[1]), format="qcow2")
report()
"""


@pytest.mark.fault("odd inputs", "disk of 8 TiB")
def test_restoring_a_chain_of_8_tib_that_is_mostly_empty(qemu) -> None:
    layers = []
    for number in range(4):
        layer = qemu.folder / f"f{number}"
        qemu.img("create", "-q", "-f", "qcow2", layer, "8T")
        qemu.io(layer, f"write -P {number + 1} {number}T 64M")
        layers.append(layer)
    found = measured(_RESTORE, qemu.folder / "restored", *layers)
    assert found["rss_mb"] < 96
