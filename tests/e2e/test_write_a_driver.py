"""The guide for writing a driver is followed word by word, and ends with two drivers that pass the check."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from oned_backup.runner.kit.settings import load_settings

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "share/doc/write-a-driver.md").read_text()
BIN = Path(sys.executable).parent
#: the skeleton's lines that the guide's imports take the place of
IMPORTS = "from oned_backup.errors import Unsupported\nfrom oned_backup.sdk import Answer, Call, Driver\n"


@dataclass(frozen=True)
class Block:
    """A block of code in the guide."""

    language: str
    text: str


def blocks(start: str, end: str) -> Iterator[Block]:
    """The blocks between two headings."""
    part = GUIDE[GUIDE.index(f"\n## {start}\n") : GUIDE.index(f"\n## {end}\n")]
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", part, flags=re.MULTILINE | re.DOTALL):
        yield Block(language, text)


def matches(shown: str, printed: str) -> bool:
    """Whether a line of the guide is one that was printed; … stands for whatever follows."""
    shown, printed = (" ".join(line.split()) for line in (shown, printed))
    return printed.startswith(shown[:-1]) if shown.endswith("…") else printed == shown


class Reader:
    """Does what the guide says, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.checks = 0
        drivers = f'["{directory}/drivers"]'
        path = f"{BIN}:{os.environ['PATH']}"
        self._environment = {
            **os.environ,
            "PATH": path,
            "TMPDIR": str(directory),
            "ODB_DRIVER_DIRS": drivers,
            "COLUMNS": "200",
        }

    def follow(self, block: Block) -> None:
        """Run it, or put it where it belongs."""
        if block.language == "console":
            for entry in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
                command, *shown = entry.rstrip().split("\n")
                self.run(command, shown)
        elif block.language == "toml":
            path = re.match(r"# (\S+)\n", block.text)
            assert path, block
            (self.directory / path[1]).write_text(block.text)
        elif block.language == "python":
            self.edit("drivers/datastore/shelf/driver.py", block.text)
        elif block.language == "sh":
            self.edit("drivers/datastore/crate/driver.sh", block.text)

    def run(self, command: str, shown: list[str]) -> None:
        """A command prints what the guide shows, in that order; it fails only if a failure is shown."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.directory,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        print(f"$ {command}\n{done.stdout}{done.stderr}")
        self.checks += "driver check" in command
        fails = any(line.startswith("failed") for line in shown)
        assert done.returncode == (70 if fails else 0), (command, done.stdout, done.stderr)
        printed = iter(done.stdout.splitlines())
        for line in shown:
            if line != "…":
                assert any(matches(line, one) for one in printed), (command, line, done.stdout)
        if shown and "…" not in shown:
            assert not list(printed), (command, done.stdout)

    def edit(self, name: str, text: str) -> None:
        """A method or function takes the place of the one with its name; the rest goes before the first."""
        path = self.directory / name
        code = path.read_text()
        if method := re.match(r"    def (\w+)\(", text):
            old = re.compile(rf"^    def {method[1]}\(.*?(?=^    def |^def |\Z)", re.MULTILINE | re.DOTALL)
            if old.search(code):
                code = old.sub(
                    lambda _: f"{text}\n\n" if method[1] == "monitor" else f"{text}\n", code, count=1
                )
            else:
                code = code.replace("\n\n\ndef _todo", f"\n\n{text}\n\ndef _todo", 1)
        elif function := re.match(r"(action_\w+)\(\) {\n", text):
            old = re.compile(rf"^{function[1]}\(\) {{\n.*?^}}\n", re.MULTILINE | re.DOTALL)
            assert old.search(code), function[1]
            code = old.sub(lambda _: text, code, count=1)
        elif path.suffix == ".py":
            code = (
                code.replace(IMPORTS, text, 1)
                if IMPORTS in code
                else code.replace("\nSCHEME", f"{text}\nSCHEME", 1)
            )
        else:
            code = code.replace("\ntodo() {", f"\n{text}\ntodo() {{", 1)
        path.write_text(code)


@pytest.fixture
def reader(short_dir: Path) -> Reader:
    return Reader(short_dir)


@pytest.mark.whole_matrix  # four whole checks of a driver
@pytest.mark.timeout(600)
def test_in_python(reader: Reader) -> None:
    for block in blocks("In Python", "In shell"):
        reader.follow(block)
    code = (reader.directory / "drivers/datastore/shelf/driver.py").read_text()
    assert code.count("_todo(") == 1, "only the function that the guide says can go"
    assert reader.checks == 5
    ruff = [BIN / "ruff", "check", "--quiet", "--ignore", "I001", "--config", ROOT / "pyproject.toml"]
    linted = subprocess.run(
        [*ruff, reader.directory / "drivers"], capture_output=True, text=True, check=False
    )
    assert linted.returncode == 0, linted.stdout


@pytest.mark.timeout(600)
def test_in_shell(reader: Reader) -> None:
    for block in blocks("In shell", "A store elsewhere"):
        reader.follow(block)
    code = (reader.directory / "drivers/datastore/crate/driver.sh").read_text()
    assert "# TODO\n" not in code
    assert reader.checks == 1


def test_the_description_of_a_store_elsewhere(reader: Reader) -> None:
    here = reader.directory
    (block,) = blocks("A store elsewhere", "When a clause fails")
    reader.follow(block)
    (here / "driver.toml").touch()
    (here / "password").write_text("x")
    stores = here / "stores.toml"
    stores.write_text(stores.read_text().replace("/root/password", str(here / "password")))
    settings = load_settings(here, store_file=stores)
    assert settings.makes_stores()
    assert settings.parameters["HOST"] == "root@backup"
    assert set(settings.commands) == {"create", "remove", "fill", "unfill"}
    assert tomllib.loads(block.text)["unreachable"]
