"""A store restores with qemu-img alone, as `share/doc/restore-by-hand.md` says.

Everything below `ByHand` uses the store's files, JSON and qemu-img only; what
`image restore` gives is the judge.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from backed_up_vm import command
from blake3 import blake3
from lab import Guest, data_disk, root_disk
from product import Product

SCRIPT = Path(__file__).parents[2] / "share/restore-by-hand.py"
GUIDE = (Path(__file__).parents[2] / "share/doc/restore-by-hand.md").read_text()


class ByHand:
    """The backups of one VM, in BASE_PATH/<VM id>."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        #: oldest first
        self.names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))

    def manifest(self, name: str) -> Any:
        """What a backup says about itself."""
        document = json.loads((self.folder / name / "manifest.json").read_text())
        assert document["format"] == "oned-backup manifest"
        assert document["version"] == 1
        return document["backup"]

    def files_of_disk(self, name: str, disk_id: int) -> list[str]:
        """The files of a disk at a restore point, newest first, as in section 2."""
        (disk,) = (disk for disk in self.manifest(name)["disks"] if disk["disk_id"] == disk_id)
        own = f"{name}/{disk['file']}"
        if disk["type"] == "FULL":
            return [own]
        return [own, *self.files_of_disk(disk["parent_id"], disk_id)]

    def chain(self, files: list[str]) -> dict[str, Any]:
        """The description of a chain, one `backing` a step, as in section 4."""
        layer: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": files[0]}}
        return layer | ({"backing": self.chain(files[1:])} if files[1:] else {})

    def convert(self, files: list[str], target: Path) -> None:
        """Restore a disk."""
        chain = json.dumps(self.chain(files))
        self.shell(f"qemu-img convert -O qcow2 'json:{chain}' {target}")

    def shell(self, script: str) -> None:
        """Run what the guide says where it says it."""
        subprocess.run(["sh", "-ec", script], check=True, cwd=self.folder, timeout=60)


def section(number: int) -> str:
    """A section of the guide."""
    found = re.search(rf"^## {number}\. .*?(?=^## |\Z)", GUIDE, flags=re.MULTILINE | re.DOTALL)
    assert found
    return found[0]


def commands(text: str) -> list[str]:
    """The indented blocks of a text."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", text, flags=re.MULTILINE)
    return [re.sub(r"^ {4}", "", block, flags=re.MULTILINE).strip() for block in blocks]


@pytest.mark.guest
def test_every_restore_point_of_a_chain(
    make_guest: Callable[..., Guest], product: Product, tmp_path: Path
) -> None:
    guest = make_guest([root_disk(tmp_path), data_disk(tmp_path, 64)])
    store = tmp_path / "store"
    store.mkdir()
    product.run("host", "add", "local", "--uri", guest.uri)
    product.run("vm", "import", "local", guest.name)
    product.run("datastore", "create", "nightly", "--driver", "fs", f"BASE_PATH={store}")
    product.run("vm", "backup", "0")
    guest.shell("head -c 300000 /dev/urandom >/data/vdb/one; head -c 70000 /dev/urandom >/root/one; sync")
    product.run("vm", "backup", "0")
    guest.shell("rm /data/vdb/one; head -c 200000 /dev/urandom >/data/vdb/two; sync; fstrim /data/vdb")
    guest.stop()
    product.run("vm", "backup", "0")
    points = product.ask("image", "show", "0")["increments"]
    assert [point["type"] for point in points] == ["FULL", "INCREMENT", "INCREMENT"]
    for number in range(3):
        product.run("image", "restore", "0", "--increment", str(number), "--to", str(tmp_path / str(number)))
    product.stop()

    by_hand = ByHand(store / "0")
    assert len(by_hand.names) == 3
    checksums_hold(by_hand)
    layout_is_as_told(by_hand)
    for number, name in enumerate(by_hand.names):
        for disk_id in (0, 1):
            files = by_hand.files_of_disk(name, disk_id)
            assert len(files) == number + 1
            target = tmp_path / f"by-hand-{number}-{disk_id}.qcow2"
            by_hand.convert(files, target)
            same(target, tmp_path / str(number) / f"disk.{disk_id}.qcow2")
    for disk_id, disk in enumerate(guest.disks):
        same(tmp_path / f"by-hand-2-{disk_id}.qcow2", disk.path)
    the_guides_own_commands_work(by_hand, tmp_path)
    the_script_does_the_same(by_hand, tmp_path)
    the_domain_can_be_defined(by_hand, guest, tmp_path)


def checksums_hold(by_hand: ByHand) -> None:
    for name in by_hand.names:
        files = by_hand.manifest(name)["files"]
        stored = {path.name for path in (by_hand.folder / name).iterdir()}
        assert {file["name"] for file in files} | {"manifest.json"} == stored
        for file in files:
            content = (by_hand.folder / name / file["name"]).read_bytes()
            assert len(content) == file["size_bytes"]
            assert blake3(content).hexdigest() == file["blake3"]


def layout_is_as_told(by_hand: ByHand) -> None:
    """The files that the guide draws are the files that there are."""
    drawn = re.findall(r"\S+", commands(section(1))[0])
    for number, name in enumerate(by_hand.names[:2]):
        start = next(i for i, word in enumerate(drawn) if word.startswith(guide_ids()[number]))
        inside = drawn[start:][: drawn[start:].index(f"disk.1.{number}.blocks") + 1]
        told = {word for word in inside if "." in word}
        assert told == {path.name for path in (by_hand.folder / name).iterdir()}


def the_guides_own_commands_work(by_hand: ByHand, directory: Path) -> None:
    """The commands of section 4 as they stand, with this store's names."""
    for number, text in enumerate(commands(section(4))):
        script = text.replace("restored.qcow2", str(directory / f"guide-{number}.qcow2"))
        for told, real in zip(guide_ids(), by_hand.names, strict=False):
            script = script.replace(told, real)
        by_hand.shell(script)
        same(directory / f"guide-{number}.qcow2", directory / f"by-hand-{number}-0.qcow2")


def the_script_does_the_same(by_hand: ByHand, directory: Path) -> None:
    """Also when the parent is gone, and a merged backup stands for it."""
    listed = command("python3", str(SCRIPT), str(by_hand.folder)).splitlines()
    assert [line.split()[0] for line in listed] == by_hand.names
    copy = directory / "merged"
    shutil.copytree(by_hand.folder, copy)
    parent = copy / by_hand.names[0]
    document = json.loads((parent / "manifest.json").read_text())
    document["backup"] |= {"id": "20991231-235959-000000", "stands_for": [parent.name]}
    (parent / "manifest.json").write_text(json.dumps(document))
    parent.rename(parent.with_name("20991231-235959-000000"))
    for number, folder in enumerate((by_hand.folder, copy)):
        target = directory / f"script-{number}.qcow2"
        words = [str(folder), by_hand.names[-1], "1", str(target)]
        command("python3", str(SCRIPT), *words)
        same(target, directory / "by-hand-2-1.qcow2")
        again = subprocess.run(["python3", SCRIPT, *words], check=False, capture_output=True, text=True)
        assert again.returncode == 1
        assert "exists already" in again.stderr


def the_domain_can_be_defined(by_hand: ByHand, guest: Guest, directory: Path) -> None:
    """Section 5: other paths, another name, no uuid."""
    text = (by_hand.folder / by_hand.names[-1] / "domain.xml").read_text()
    for disk_id, disk in enumerate(guest.disks):
        assert str(disk.path) in text
        text = text.replace(str(disk.path), str(directory / f"by-hand-2-{disk_id}.qcow2"))
    text = re.sub(r"<uuid>.*?</uuid>", "", text).replace(f"<name>{guest.name}<", "<name>by-hand<")
    document = directory / "by-hand.xml"
    document.write_text(text)
    command("virsh", "-c", guest.uri, "define", str(document))
    Guest.adopt(guest.libvirtd, "by-hand").destroy()


def guide_ids() -> list[str]:
    """The names of the guide's two backups, oldest first."""
    return sorted(set(re.findall(r"\d{8}-\d{6}-[0-9a-f]{6}", GUIDE)))


def same(one: Path, other: Path) -> None:
    """Both have the same content and size."""
    said = command("qemu-img", "compare", "-f", "qcow2", "-F", "qcow2", str(one), str(other))
    assert said == "Images are identical.\n"
