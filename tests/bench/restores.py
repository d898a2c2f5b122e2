"""Rows about restoring a full and its increments: against qemu-img convert and virtnbdrestore."""

from __future__ import annotations

import shutil
from pathlib import Path

from lab import Libvirtd

from tests.bench.machines import Data, Machine, dirty_all
from tests.bench.peers import VirtNbdBackup, convert_chain
from tests.bench.product import Product, RssWatch
from tests.bench.table import Row, compared


def measure(
    directory: Path, libvirtd: Libvirtd, template: Path, data: Data, increments: int, runs: int
) -> list[Row]:
    """One chain of each kind, restored in turns."""
    ours = Machine(libvirtd, directory / "chain", "bench-chain", template)
    other = Machine(libvirtd, directory / "chain-vnb", "bench-chain-vnb", template)
    product = Product(directory / "restoring", libvirtd.uri)
    try:
        vm = product.import_vm(ours.name, FS_FREEZE="NONE", DISK_IDS="1")
        vnb = VirtNbdBackup(other, directory / "vnb-chain")
        image = product.backup(vm)["result"]["image_id"]
        vnb.run(full=True)
        for turn in range(increments):
            dirty_all((ours, other), data, 1, turn)
            product.backup(vm)
            vnb.run(full=False)
    finally:
        for machine in (ours, other):
            machine.remove()
    try:
        chain = sorted(product.store.glob("*/*/disk.1.*[0-9]"), key=lambda path: int(path.suffix[1:]))
        mine, converted, third = [], [], []
        with RssWatch("download") as watch:
            for _ in range(runs):
                target = directory / "restored"
                shutil.rmtree(target, ignore_errors=True)  # as late as the others do with theirs
                mine.append(product.restore(image, target, format="raw", disk_id=1)["seconds"])
                converted.append(convert_chain(chain, directory / "converted.raw"))
                third.append(vnb.restore(directory / "vnb-restored"))
        moved = data.allocated
        rss = watch.peak_mib
        name = f"restore of full + {increments}"
        return [
            compared(f"{name} to raw / qemu-img convert", mine, converted, bar=1.2, moved=moved, rss_mib=rss),
            compared(f"{name} / virtnbdrestore", mine, third, bar=0.5, moved=moved, rss_mib=rss),
        ]
    finally:
        product.close()
