"""share/config.toml: every setting is there, with its default."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from oned_backup.config import load_settings

SAMPLE = Path(__file__).parents[2] / "share" / "config.toml"


@pytest.fixture
def uncommented(tmp_path: Path) -> Path:
    """The sample as if each of its settings were used."""
    path = tmp_path / "config.toml"
    path.write_text(re.sub(r"^# (?=\[|[a-z_]+ = )", "", SAMPLE.read_text(), flags=re.MULTILINE))
    return path


def test_it_changes_nothing_as_it_is() -> None:
    assert tomllib.loads(SAMPLE.read_text()) == {}


def test_it_has_every_setting_with_its_default(
    uncommented: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    sample = load_settings(uncommented)
    empty = tmp_path / "empty.toml"
    empty.touch()
    assert {key: value for key, value, _ in sample.rows()} == {
        key: value for key, value, _ in load_settings(empty).rows()
    }
    assert {key for key, origin in sample.origins.items() if origin == "default"} == set()
