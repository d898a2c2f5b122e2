"""The kit judges a store that is elsewhere by commands that make, block and fill it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from plain_driver import build_plain, failures

from oned_backup.errors import InvalidInput
from oned_backup.runner.kit import Report, Status

Judge = Callable[..., Report]
CLI = Path(sys.executable).parent / "oned-backup"

MOVED = 'mkdir "$2" && mount --bind "$1" "$2" && umount "$1" && rmdir "$1"'
MOUNTED = 'mkdir "$1" && mount -t tmpfs -o size=40m,mode=0700 elsewhere "$1"'


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A directory of which the kit is told nothing but commands."""
    path = tmp_path / "elsewhere"
    path.mkdir()
    yield path
    for mounted in path.iterdir():
        subprocess.run(["umount", "--lazy", mounted], check=False)


def store_file(directory: Path, **settings: object) -> Path:
    """A description of stores below `directory`: each is a file system of 40 MB."""
    base = f"{directory}/{{store}}"
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    lines += ["[parameters]", f'BASE_PATH = "{base}"', "[commands]"]
    commands = {
        "create": ["sh", "-c", MOUNTED, "sh", base],
        "remove": ["sh", "-c", 'umount "$1" && rmdir "$1"', "sh", "{BASE_PATH}"],
        "block": ["sh", "-c", MOVED, "sh", base, f"{base}.away"],
        "unblock": ["sh", "-c", MOVED, "sh", f"{base}.away", base],
        "fill": ["fallocate", "-l", "30M", f"{base}/.fill"],
        "unfill": ["rm", f"{base}/.fill"],
    }
    lines += [f"{name} = {json.dumps(argv)}" for name, argv in commands.items()]
    file = directory.with_suffix(".toml")
    file.write_text("\n".join(lines))
    return file


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_by_commands(judge: Judge, elsewhere: Path, tmp_path: Path) -> None:
    only = {"DS-02", "DS-21", "DS-30", "DS-32", "DS-33"}
    report = judge(build_plain(tmp_path), store_file=store_file(elsewhere), only=only)
    assert report.passed, failures(report)
    assert {clause.clause_id for clause in report.having(Status.SKIPPED)} == {"DS-33"}
    assert list(elsewhere.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_damage_is_done_where_the_kit_sees_the_files(judge: Judge, elsewhere: Path, tmp_path: Path) -> None:
    only = {"DS-13", "DS-34"}
    seen = store_file(elsewhere, path=f"{elsewhere}/{{store}}")
    report = judge(build_plain(tmp_path), store_file=seen, only=only)
    assert report.passed, failures(report)
    assert not report.having(Status.SKIPPED)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount")
def test_a_driver_that_breaks_a_clause_elsewhere_fails(judge: Judge, elsewhere: Path, tmp_path: Path) -> None:
    for broken, clause_id in (("full_is_an_error", "DS-32"), ("gone_is_absent", "DS-30")):
        folder = build_plain(tmp_path / broken, broken)
        report = judge(folder, store_file=store_file(elsewhere), only={clause_id})
        assert [one.clause_id for one in report.having(Status.FAILED)] == [clause_id], failures(report)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("colour = 1", "'colour' is unknown"),
        ("path = 1", "'path' is unknown or of the wrong type"),
        ("[commands]\nexplode = []", "the command 'explode' is unknown"),
        ("[commands]\nfill = 'rm'", "the command 'fill' is unknown, or no list of words"),
        ("[parameters]\nA = 1", "a value in 'parameters' is no text"),
        ("[secrets]\nPASSWORD = '/none/password'", "/none/password: No such file"),
        ("x = ", "Invalid value"),
    ],
)
def test_what_is_wrong_in_the_file_is_named(judge: Judge, text: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "store.toml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=complaint):
        judge(build_plain(tmp_path), store_file=file, only={"DS-01"})


def test_secrets_come_from_files(judge: Judge, tmp_path: Path) -> None:
    folder, password = build_plain(tmp_path), tmp_path / "password"
    password.write_text("s3cret-enough\n")
    argv = [CLI, "driver", "check", folder, f"PASSWORD=@{password}", "--only", "DS-35"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split()[:2]) == (0, ["passed", "DS-35"]), done.stderr
    assert "s3cret" not in done.stdout + done.stderr


def test_nothing_is_left_of_a_folder_that_is_no_driver(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [CLI, "driver", "check", "/nonexist"], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 2
    assert "/nonexist is not a driver's folder" in done.stderr
    assert list(tmp_path.iterdir()) == []
