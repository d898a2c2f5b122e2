"""Settings: where they come from, and how they fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from oned_backup.config import load_settings
from oned_backup.errors import Misconfigured
from oned_backup.places import daemon_socket


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text('workers = 3\nrun_dir = "/run/x"\n[retry]\nfor_s = 5\n')
    return path


def test_every_value_says_where_it_comes_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODB_RETRY__FIRST_WAIT_S", "7")
    loaded = load_settings(file)
    rows = {key: (value, origin) for key, value, origin in loaded.rows()}
    assert rows["workers"] == (3, str(file))
    assert rows["retry.for_s"] == (5, str(file))
    assert rows["retry.first_wait_s"] == (7, "ODB_RETRY__FIRST_WAIT_S")
    assert rows["workers_per_host"] == (2, "default")
    assert loaded.settings.retry.longest_wait_s == 120


def test_the_environment_wins(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODB_WORKERS", "8")
    assert load_settings(file).settings.workers == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrkers = 3", "wrkers: no such setting"),
        ("workers = 'many'", "workers: input should be a valid integer"),
        ("workers = 0", "workers: input should be greater than or equal to 1"),
        ("[retry]\nfor_ever = true", "retry.for_ever: no such setting"),
        ("workers = ", "config.toml: "),
        ("driver_dirs = ['/srv/drivers', 'here']", "driver_dirs: a path must be absolute, not 'here'"),
        ("state_dir = 'here'", "state_dir: a path must be absolute"),
    ],
)
def test_errors_name_file_and_key(file: Path, text: str, message: str) -> None:
    file.write_text(text)
    with pytest.raises(Misconfigured) as caught:
        load_settings(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)
    assert caught.value.hint


def test_a_file_that_was_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Misconfigured, match="no such file"):
        load_settings(tmp_path / "none")
    monkeypatch.setenv("ODB_CONFIG", str(tmp_path / "none"))
    with pytest.raises(Misconfigured, match="no such file"):
        daemon_socket()


def test_both_readers_find_the_same_socket(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert daemon_socket(file) == load_settings(file).settings.socket
    monkeypatch.setenv("ODB_RUN_DIR", "/run/y")
    assert daemon_socket(file) == load_settings(file).settings.socket == Path("/run/y/api/daemon.sock")
    monkeypatch.delenv("ODB_RUN_DIR")
    file.write_text("")
    assert daemon_socket(file) == load_settings(file).settings.socket


def test_what_is_empty_is_not_set(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('scratch_dir = ""\nrun_dir = "/run/x"')
    monkeypatch.setenv("ODB_RUN_DIR", "")
    settings = load_settings(file).settings
    assert settings.scratch_dir is None
    assert settings.socket == daemon_socket(file)
