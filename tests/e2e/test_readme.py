"""The README is true: its session is replayed on a real guest, and shows what the commands print."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from backed_up_vm import command
from lab import Guest, Libvirtd, cdrom, data_disk, root_disk
from product import Product

from oned_backup.cli.main import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
_BACKUP_URL = re.compile(r"fs://\S+/disk\.\d+")


@dataclass(frozen=True)
class Line:
    """A command of the session, and what the README shows of its output."""

    command: str
    shown: tuple[str, ...]


def session() -> list[Line]:
    """The commands of the console blocks that follow a `session` mark."""
    lines: list[Line] = []
    for block in re.findall(r"<!-- session -->\n```console\n(.*?)```", README, flags=re.DOTALL):
        for entry in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            first, *shown = entry.rstrip().split("\n")
            lines.append(Line(first, tuple(filter(None, shown))))
    return lines


def shape(line: str) -> str:
    """A line of output without what differs from run to run: numbers, units, spacing, rules."""
    line = re.sub(r"\d{8}-\d{6}-[0-9a-f]{6}", "#", line)
    line = re.sub(r"[\d.:]+", "#", line)
    line = re.sub(r"\b[KMG]iB\b|\bB\b", "U", line)
    return " ".join(re.sub(r"─+", "─", line).split())


class Replay:
    """Runs the session's lines; the README's places are replaced by the lab's."""

    def __init__(self, product: Product, libvirtd: Libvirtd, srv: Path) -> None:
        self.srv = srv
        self.downloads = srv / "here"
        self.downloads.mkdir()
        self._product = product
        self._uri = libvirtd.uri

    def run(self, line: Line) -> None:
        """Run it, and see that what the README shows is what it prints."""
        text = line.command.replace("qemu:///system", shlex.quote(self._uri))
        text = text.replace("/srv/", f"{self.srv}/")
        program, *words = shlex.split(text)
        if program == "mkdir":
            command(program, *words)
            return
        assert program == "oned-backup"
        target = None
        if ">" in words:
            target = self.downloads / words.pop()
            words.remove(">")
        done = self._product.call(*(self._real_url(word) for word in words))
        said = done.stdout.decode(errors="replace") if target is None else ""
        print(f"$ {line.command}\n{said}{done.stderr.decode(errors='replace')}")
        assert done.returncode == 0, (line.command, done.stderr)
        if target is not None:
            target.write_bytes(done.stdout)
        printed = [shape(real.replace(str(self.srv), "/srv")) for real in said.splitlines()]
        missing = [shown for shown in line.shown if shape(shown) not in [*printed, "…"]]
        assert not missing, (line.command, said)

    def _real_url(self, word: str) -> str:
        """Where the README downloads a disk, the same one of this store."""
        if not _BACKUP_URL.fullmatch(word):
            return word
        urls = [disk["url"] for disk in self._product.ask("image", "ls", "0")]
        return next(url for url in urls if shape(url) == shape(word) and url[-1] == word[-1])


@pytest.fixture
def guest(libvirtd: Libvirtd, make_guest: Callable[..., Guest], tmp_path: Path) -> Iterator[Guest]:
    """The VM of the README, as after the session; the VM that the session defines goes with it."""
    yield make_guest([root_disk(tmp_path), data_disk(tmp_path, 64), cdrom()], name="web")
    if "web-restored" in [domain.name() for domain in libvirtd.connection.listAllDomains()]:
        Guest.adopt(libvirtd, "web-restored").destroy()


@pytest.mark.guest
def test_the_session(guest: Guest, product: Product, tmp_path: Path) -> None:
    srv = tmp_path / "srv"
    srv.mkdir()
    replay = Replay(product, guest.libvirtd, srv)
    backups = 0
    for line in session():
        if "vm backup " in line.command:
            guest_goes_on(guest, backups)
            backups += 1
        replay.run(line)
    assert backups == 2

    points = product.ask("image", "show", "0")["increments"]
    assert [point["type"] for point in points] == ["FULL", "INCREMENT"]
    assert points[0]["freeze"]["method"] == "AGENT"
    assert {disk["type"] for disk in points[1]["disks"]} == {"INCREMENT"}
    assert all(point["verified_at"] and point["state"] == "GOOD" for point in points)

    first, last = srv / "restore" / "first", srv / "restore" / "last"
    assert file_in(first / "disk.1.qcow2", "before", tmp_path) == b"before the full\n"
    assert file_in(first / "disk.1.qcow2", "after", tmp_path) == b""
    for disk_id, disk in enumerate(guest.disks[:2]):
        assert is_identical(last / f"disk.{disk_id}.qcow2", "qcow2", disk.path, "qcow2")
    assert is_identical(replay.downloads / "disk.raw", "raw", guest.disks[0].path, "qcow2")

    # Doctor looks at the hosts that are known, and at no other libvirt.
    looked = [check for check in product.ask("doctor") if "libvirt at " in check["text"]]
    assert [(check["name"], check["status"]) for check in looked] == [("host local", "ok")]

    twin = guest.libvirtd.connection.lookupByName("web-restored")
    assert str(last / "disk.0.qcow2") in twin.XMLDesc()
    assert twin.UUIDString() != guest.uuid


def guest_goes_on(guest: Guest, backups: int) -> None:
    """What happens on the VM before each backup: it writes; before the second it writes and shuts down."""
    if backups == 0:
        guest.write_file("/data/vdb/before", b"before the full\n")
    else:
        guest.write_file("/data/vdb/after", b"after the full\n")
        guest.stop()


def file_in(disk: Path, name: str, directory: Path) -> bytes:
    """A file of the ext4 file system on a disk; empty if it is not there."""
    raw = directory / "looked-at.raw"
    command("qemu-img", "convert", "-O", "raw", str(disk), str(raw))
    return subprocess.run(["debugfs", "-R", f"cat /{name}", raw], check=True, capture_output=True).stdout


def is_identical(one: Path, one_format: str, other: Path, other_format: str) -> bool:
    """Whether QEMU finds two disks equal."""
    said = command("qemu-img", "compare", "-f", one_format, "-F", other_format, str(one), str(other))
    return said == "Images are identical.\n"


def test_make_help_lists_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert phony
    helped = command("make", "--no-print-directory", "-C", str(ROOT), "help")
    assert re.findall(r"^ +make ([\w-]+)", helped, flags=re.MULTILINE) == phony[1].split()
    assert set(re.findall(r"\bmake (\w+)", README)) <= set(phony[1].split())


def mentioned() -> list[list[str]]:
    """The words after each `oned-backup` in the README's code."""
    blocks = re.findall(r"```console\n(.*?)```", README, flags=re.DOTALL)
    indented = re.findall(r"^ {4,}(.*)$", README, flags=re.MULTILINE)
    spans = re.findall(r"`(oned-backup [^`]+)`", README)
    code = "\n".join([*blocks, *indented, *spans])
    return [
        shlex.split(words) for words in re.findall(r"^(?:\$ )?oned-backup (.+)$", code, flags=re.MULTILINE)
    ]


def test_the_readme_mentions_only_commands_that_exist() -> None:
    assert len(mentioned()) > 10
    for words in mentioned():
        found: Any = typer.main.get_command(app)
        rest = list(words)
        while hasattr(found, "commands"):
            assert rest, words
            assert rest[0] in found.commands, words
            found = found.commands[rest.pop(0)]
        known = {name for parameter in found.params for name in parameter.opts}
        assert {word for word in rest if re.match(r"--?\w", word)} <= known, words
