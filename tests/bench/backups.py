"""Rows about backups of a running VM: against libvirt's push mode, virtnbdbackup, nbdcopy, cp."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from lab import Libvirtd

from tests.bench.machines import Data, Machine, dirty_all
from tests.bench.peers import Push, VirtNbdBackup, copy_file, nbdcopy
from tests.bench.product import Product, RssWatch, SpaceWatch
from tests.bench.table import Row, compared


def measure(
    directory: Path, libvirtd: Libvirtd, template: Path, data: Data, percents: Sequence[float], runs: int
) -> list[Row]:
    """Three guests with the same disk, one for each way, measured in turns."""
    ours, pushed, third = (
        Machine(libvirtd, directory / name, f"bench-{name}", template) for name in ("ours", "push", "vnb")
    )
    product = Product(directory / "product", libvirtd.uri)
    try:
        vm = product.import_vm(ours.name, FS_FREEZE="NONE", DISK_IDS="1")
        push = Push(pushed, directory / "pushed")
        vnb = VirtNbdBackup(third, directory / "vnb-store")
        rows = _fulls(product, vm, push, vnb, template, runs)
        for percent in percents:
            rows += _increments(product, vm, (ours, pushed, third), push, vnb, data, percent, runs)
        return [*rows, *_freezes(product, vm, ours, data, runs)]
    finally:
        product.close()
        for machine in (ours, pushed, third):
            machine.remove()


def _fulls(product: Product, vm: int, push: Push, vnb: VirtNbdBackup, template: Path, runs: int) -> list[Row]:
    ours, peer, third = [], [], []
    copied, raw = [], []
    moved = 0
    with RssWatch("backup") as watch:
        for _ in range(runs):
            result = product.backup(vm, reset=True)
            ours.append(result["seconds"])
            moved = result["result"]["size_mb"] << 20
            peer.append(push.run(full=True)[0])
            third.append(vnb.run(full=True))
            copied.append(copy_file(template, push.directory / "copy"))
            raw.append(nbdcopy(template, push.directory / "nbdcopy.raw"))
            for image in product.ask("GET", "/v1/images")[:-1]:
                product.delete(image["id"])
    rss = watch.peak_mib
    return [
        compared("full / libvirt push", ours, peer, bar=1.2, moved=moved, rss_mib=rss),
        compared("full / virtnbdbackup", ours, third, bar=0.35, moved=moved, rss_mib=rss),
        compared("full / nbdcopy to raw", ours, raw, moved=moved),
        compared("full / cp of the image", ours, copied, moved=moved),
    ]


def _freezes(product: Product, vm: int, machine: Machine, data: Data, runs: int) -> list[Row]:
    """The freeze window of an idle guest, and what a backup needs on the hypervisor's disk meanwhile."""
    product.configure(vm, FS_FREEZE="AGENT")
    windows = []
    with SpaceWatch(machine.directory) as space:
        for turn in range(runs):
            machine.dirty(data, 1, seed=100 + turn)
            windows.append(product.backup(vm)["result"]["freeze"]["window_ms"] / 1000)
    return [
        Row("freeze window by the agent, idle guest", round(median(windows), 3), bar=0.3),
        Row("temporary space on the hypervisor", round(space.peak_bytes / (1 << 20), 1), unit="MiB"),
    ]


def _increments(
    product: Product,
    vm: int,
    machines: tuple[Machine, Machine, Machine],
    push: Push,
    vnb: VirtNbdBackup,
    data: Data,
    percent: float,
    runs: int,
) -> list[Row]:
    ours, peer, third = [], [], []
    moved = 0
    with RssWatch("backup") as watch:
        for turn in range(runs):
            dirty_all(machines, data, percent, turn)
            result = product.backup(vm)
            if result["result"]["type"] != "INCREMENT":
                raise RuntimeError(f"not an increment: {result['result']}")
            ours.append(result["seconds"])
            moved = result["result"]["size_mb"] << 20
            peer.append(push.run(full=False)[0])
            third.append(vnb.run(full=False))
    name = f"increment, {percent:g} % dirty"
    rss = watch.peak_mib
    return [
        compared(
            f"{name} / libvirt push (+0.3 s)", ours, peer, bar=1.2, allowance_s=0.3, moved=moved, rss_mib=rss
        ),
        compared(f"{name} / virtnbdbackup", ours, third, bar=0.5, moved=moved, rss_mib=rss),
    ]
