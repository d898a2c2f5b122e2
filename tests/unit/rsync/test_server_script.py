"""The script that runs on the server, run here."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

import oned_backup.rsync

SCRIPT = Path(oned_backup.rsync.__file__).with_name("server.sh")
MARKER = "oned-backup store, version 1\n"
ID = "20260101-000000-aaaaaa"


def ask(base: Path, verb: str, *words: str, stdin: bytes = b"", code: int = 0) -> tuple[dict[str, str], str]:
    """What it answers, by key, and its last words."""
    argv = ["sh", "-c", SCRIPT.read_text(), "sh", verb, str(base), *words]
    done = subprocess.run(argv, input=stdin, capture_output=True, check=False, timeout=30)
    assert done.returncode == code, done.stderr.decode()
    lines = [line.split(" ", 2) for line in done.stdout.decode().splitlines()]
    assert all(line[0] == "odb" for line in lines)
    words_ = done.stderr.decode().strip().splitlines()
    return {line[1]: " ".join(line[2:]) for line in lines}, words_[-1] if words_ else ""


def test_it_is_clean_shell() -> None:
    subprocess.run(["shellcheck", "-s", "sh", SCRIPT], check=True)


def test_a_backup_from_beginning_to_end(tmp_path: Path) -> None:
    answers, _ = ask(tmp_path, "prepare", "0", "7", ID)
    assert "finished" not in answers
    total, used, free = map(int, answers["space"].split())
    assert 0 < free <= total - used
    assert (tmp_path / ".oned-backup-store").read_text().startswith(MARKER)
    partial = tmp_path / "7" / f".partial-{ID}"
    assert partial.stat().st_mode & 0o777 == 0o700
    (partial / "vm.xml").write_text("<VM/>")
    data = bytes(range(256)) * 100
    digest = ask(tmp_path, "receive", "7", ID, "disk.0.0", "1000", stdin=data)[0]["digest"]
    assert digest == hashlib.sha256(bytes(1000) + data).hexdigest()
    head = b"h" * 1000
    ask(tmp_path, "publish", "7", ID, "8", "disk.0.0", "1000", stdin=head + b"manifest")
    stored = tmp_path / "7" / ID
    assert {path.name for path in stored.iterdir()} == {"vm.xml", "disk.0.0", "manifest.json"}
    assert (stored / "disk.0.0").read_bytes() == head + data
    assert (stored / "manifest.json").read_bytes() == b"manifest"
    assert "finished" in ask(tmp_path, "prepare", "1", "7", ID)[0]
    ask(tmp_path, "cancel", "1", "7", ID)
    assert stored.exists(), "what is finished is no matter of cancel"
    ask(tmp_path, "remove", "1", "7", ID, "absent")
    assert {path.name for path in tmp_path.iterdir()} == {".oned-backup-store"}


def test_a_manifest_that_was_cut_off_is_not_published(tmp_path: Path) -> None:
    ask(tmp_path, "prepare", "0", "7", ID)
    _, words = ask(tmp_path, "publish", "7", ID, "9", stdin=b"manifest", code=69)
    assert words == "the manifest was cut off"
    assert not (tmp_path / "7" / ID).exists()


def test_a_finished_backup_is_never_replaced(tmp_path: Path) -> None:
    ask(tmp_path, "prepare", "0", "7", ID)
    (tmp_path / "7" / ID).mkdir()
    _, words = ask(tmp_path, "publish", "7", ID, "1", stdin=b"m", code=4)
    assert "exists already" in words
    assert list((tmp_path / "7" / ID).iterdir()) == []


def test_what_is_there_is_made_ready_to_be_continued(tmp_path: Path) -> None:
    partial = tmp_path / "7" / f".partial-{ID}"
    (partial / "folder").mkdir(parents=True)
    (partial / "disk.0.0").write_bytes(b"12345")
    (partial / "empty").write_bytes(b"")
    (partial / "manifest.json").write_bytes(b"{}")
    (partial / ".manifest").write_bytes(b"{}")
    (partial / "link").symlink_to(tmp_path)
    answers, _ = ask(tmp_path, "prepare", "0", "7", ID)
    assert answers["file"] == "4 disk.0.0"
    assert {path.name: path.read_bytes() for path in partial.iterdir()} == {"disk.0.0": b"1234"}


@pytest.mark.parametrize("verb", ["monitor", "prepare", "cancel", "remove"])
def test_a_place_without_a_mark_is_no_store_if_backups_are_known(verb: str, tmp_path: Path) -> None:
    words = [] if verb == "monitor" else ["7", ID]
    assert "is it mounted?" in ask(tmp_path, verb, "1", *words, code=69)[1]
    assert list(tmp_path.iterdir()) == []
    assert "is not there" in ask(tmp_path / "absent", verb, "0", *words, code=69)[1]
    (tmp_path / "7" / "a78156").mkdir(parents=True)  # OpenNebula's stores have no mark
    ask(tmp_path, verb, "1", *words)


def test_another_store_is_told_by_its_id(tmp_path: Path) -> None:
    store = ask(tmp_path, "prepare", "0", "7", ID)[0]["store"]
    assert len(store) == 32
    assert ask(tmp_path, "prepare", store, "7", ID)[0]["store"] == store
    for verb, *words in (("monitor",), ("prepare", "8", ID), ("cancel", "7", ID), ("remove", "7", ID)):
        other = "0" * 32
        assert f"this is store {store}, not {other}" in ask(tmp_path, verb, other, *words, code=69)[1]
    assert sorted(path.name for path in (tmp_path / "7").iterdir()) == [f".partial-{ID}"]
    assert not (tmp_path / "8").exists()
    (tmp_path / ".oned-backup-store").unlink()
    (tmp_path / "7" / "a78156").mkdir()
    assert ask(tmp_path, "prepare", store, "7", ID)[0]["store"] == store, "a lost mark is made as it was"
    (tmp_path / ".oned-backup-store").write_text(MARKER)  # before there were ids
    assert "store" not in ask(tmp_path, "prepare", "1", "7", ID)[0]


def test_a_mark_of_another_version_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / ".oned-backup-store").write_text("oned-backup store, version 2\n")
    assert "not a store of a version" in ask(tmp_path, "prepare", "0", "7", ID, code=78)[1]
    assert not (tmp_path / "7").exists()


@pytest.mark.parametrize("link", ["7", f"7/{ID}", f"7/.partial-{ID}"])
def test_links_are_not_followed(link: str, tmp_path: Path) -> None:
    base, outside = tmp_path / "base", tmp_path / "outside"
    outside.mkdir()
    (outside / "canary").write_text("must live")
    (base / link).parent.mkdir(parents=True)
    (base / link).symlink_to(outside)
    assert "is not what a store has there" in ask(base, "prepare", "0", "7", ID, code=65)[1]
    ask(base, "remove", "0", "7", ID, code=65 if link == "7" else 0)
    assert [path.name for path in outside.iterdir()] == ["canary"]
