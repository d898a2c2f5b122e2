"""Secrets on the command line: from a file, from standard input, never as they are."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from oned_backup.cli.parameters import parameter_values
from oned_backup.contract.driver_toml import load_driver_toml
from oned_backup.errors import InvalidInput

DRIVERS = Path(__file__).parents[3] / "drivers"
SECRET = ["PASSWORD", "KEY"]


def test_a_secret_is_read_from_a_file_without_its_newline(tmp_path):
    (tmp_path / "password").write_text(" with spaces \n")
    found = parameter_values([f"password=@{tmp_path}/password", "BASE_PATH=@home"], SECRET)
    assert found == {"PASSWORD": " with spaces ", "BASE_PATH": "@home"}


def test_a_secret_comes_on_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("geheim\n"))
    assert parameter_values(["PASSWORD=-"], SECRET) == {"PASSWORD": "geheim"}


def test_two_secrets_cannot_both_be_piped_in(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("geheim\n"))
    with pytest.raises(InvalidInput, match="KEY and PASSWORD cannot both come"):
        parameter_values(["PASSWORD=-", "KEY=-"], SECRET)


def test_a_secret_among_the_arguments_is_refused_and_not_repeated():
    with pytest.raises(InvalidInput, match="PASSWORD is secret") as caught:
        parameter_values(["PASSWORD=geheim"], SECRET)
    assert "PASSWORD=@FILE" in (caught.value.hint or "")
    assert "geheim" not in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize("content", ["", "\n", "x" * 70_000])
def test_a_file_without_a_secret_is_refused(tmp_path, content):
    (tmp_path / "password").write_text(content)
    with pytest.raises(InvalidInput, match="empty, or too long"):
        parameter_values([f"PASSWORD=@{tmp_path}/password"], SECRET)


def test_a_path_may_end_with_a_slash_and_a_secret_that_looks_like_one_stays_as_it_is():
    manifest = load_driver_toml(DRIVERS / "datastore/restic")
    given = {"BASE_PATH": "/srv/restic//", "RESTIC_SFTP_SERVER": "bk", "RESTIC_PASSWORD": "/a/"}
    checked = manifest.checked_parameters(given)
    assert (checked["BASE_PATH"], checked["RESTIC_PASSWORD"]) == ("/srv/restic", "/a/")


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(InvalidInput, match="absent: No such file"):
        parameter_values([f"PASSWORD=@{tmp_path}/absent"], SECRET)


def test_an_empty_value_restores_the_default_also_of_a_secret():
    assert parameter_values(["PASSWORD="], SECRET) == {"PASSWORD": ""}
