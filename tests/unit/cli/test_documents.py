"""What the documents tell people to type, and where their links lead, is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from oned_backup.cli.main import app

ROOT = Path(__file__).parents[3]
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "share/doc").rglob("*.md")),
]
COMMANDS = typer.main.get_command(app)
#: up to what cannot be part of the command
MENTION = re.compile(r"(?:^|[`$( ])oned-backup ((?:[^`\n|>&;]|\\\n)+)", re.MULTILINE)
WORD = re.compile(r"[a-z][a-z-]*")
OPTION = re.compile(r"(?<=[\s\[])--?[a-z][a-z-]*")


def unknown(text: str) -> str:
    """What of a command line does not exist; empty if all does."""
    command: Any = COMMANDS
    known = {name for one in command.params for name in one.opts}
    words = [word for word in text.replace("\\\n", " ").split() if word not in {"--config", "FILE"}]
    while words and hasattr(command, "commands"):
        word = words.pop(0)
        if word.startswith("-"):
            continue
        if not WORD.fullmatch(word):
            return ""  # prose, or an ellipsis
        if word not in command.commands:
            return word
        command = command.commands[word]
    known |= {name for one in command.params for name in (*one.opts, *one.secondary_opts)} | {"--help"}
    return next((option for option in OPTION.findall(" " + " ".join(words)) if option not in known), "")


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_commands_and_options_exist(page: Path) -> None:
    mentioned = MENTION.findall(page.read_text())
    wrong = {text: word for text in mentioned if (word := unknown(text))}
    assert not wrong
    assert len(mentioned) > 10 or page.name != "README.md"


LINK = re.compile(r"\]\(([^)\s]*)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
DECISION = re.compile(r"\bADR (\d+(?:, \d+)*)")


def anchors(page: Path) -> set[str]:
    """What a link to a heading of the page ends in, as forges make it."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = HEADING.findall(prose)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_decisions_that_are_named_exist() -> None:
    known = {int(path.name[:4]) for path in (ROOT / "share/doc/adr").glob("*.md")}
    for page in PAGES:
        named = {int(number) for found in DECISION.findall(page.read_text()) for number in found.split(", ")}
        assert named <= known, page


def test_what_does_not_exist_is_found() -> None:
    assert unknown("vm bakcup 0") == "bakcup"
    assert unknown("vm backup 0 --everything") == "--everything"
    assert unknown("--version") == ""
    assert unknown("vm backup --all -d nightly") == ""
