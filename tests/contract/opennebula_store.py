"""A store as OpenNebula's rsync driver leaves it, for tests."""

from __future__ import annotations

import base64
import os
from pathlib import Path

from stores import Disk, Store, run

UUID = "0b7d7e3c-64d4-4b3f-9a3c-0a1b2c3d4e5f"
VM_XML = f"<VM><ID>7</ID><NAME>web &lt;1&gt;</NAME><TEMPLATE><OS><UUID>{UUID}</UUID></OS></TEMPLATE></VM>"
IDS = ("a78156", "c1a00b", "00ff1e")
BACKING = "nbd+unix:///vda?socket=/var/lib/one/datastores/0/7/backup.socket"


class OpenNebulaStore:
    """Writes backups as OpenNebula's drivers do: a full by convert, increments with a dead backing file."""

    def __init__(self, store: Store, root: Path) -> None:
        self.store = store
        self.root = root
        self.folder = store.base / str(store.vm_id)
        self.disk = Disk.create(root / "guest.qcow2", "8M")
        self.disk.write("write -P 1 0 1M", "write -P 2 6M 64k")
        self.expected: list[bytes] = []
        self.clock = 1_700_000_000

    def add(self, backup_id: str, increment: int, *changes: str) -> Path:
        """The next backup: full for increment 0, else what `changes` do to the guest."""
        target = self.folder / backup_id
        target.mkdir(parents=True)
        (target / "vm.xml").write_bytes(base64.encodebytes(VM_XML.encode()))
        image = target / f"disk.0.{increment}"
        if increment:
            run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", self.disk.path, image)
            Disk(image).write(*changes)
            run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", BACKING, image)
            self.disk.write(*changes)
        else:
            run("qemu-img", "convert", "-f", "qcow2", "-O", "qcow2", self.disk.path, image)
        self.expected.append(self.disk.copy_raw(self.root / "copy").read_bytes())
        self.clock += 3600
        for file in target.iterdir():
            os.utime(file, (self.clock, self.clock))
        self.store.chain.append(backup_id)
        return image
