"""The conformance kit's judgement of the fs driver, and of the shell driver that the specification prints."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from oned_backup.runner.kit.check import check_driver
from oned_backup.runner.kit.clause import CLAUSES, Status

ROOT = Path(__file__).parents[3]
SPECIFICATION = (ROOT / "share/doc/driver-spec.md").read_text()
TOML = """spec = 1
kind = "datastore"
name = "shelf"
summary = "a directory, in shell"

[parameters.BASE_PATH]
required = true
help = "absolute path of an existing directory"
"""
#: take long and prove little more for a driver that is an example
SLOW = {"DS-07", "DS-24", "DS-25"}


def failures(report):
    return [f"{clause.clause_id}: {clause.detail}" for clause in report.having(Status.FAILED)]


@pytest.mark.timeout(600)
def test_the_fs_driver_keeps_the_contract():
    report = check_driver(ROOT / "drivers/datastore/fs")
    assert failures(report) == []
    skipped = {clause.clause_id for clause in report.having(Status.SKIPPED)}
    assert skipped <= {"DS-32", "DS-35", "DS-36", "DS-46"}


@pytest.fixture
def shelf(tmp_path):
    """The example as somebody would type it in."""
    (script,) = re.findall(r"^```sh\n(#!/bin/sh\n.*?)^```$", SPECIFICATION, re.MULTILINE | re.DOTALL)
    folder = tmp_path / "shelf"
    folder.mkdir(mode=0o755)
    (folder / "driver.toml").write_text(TOML)
    (folder / "backup").write_text(script)
    (folder / "backup").chmod(0o755)
    for action in ("backup_cancel", "ls", "stat", "restore", "download", "rm", "monitor"):
        (folder / action).symlink_to("backup")
    return folder


@pytest.mark.timeout(600)
def test_the_example_of_the_specification_keeps_the_contract(shelf):
    report = check_driver(shelf, only=set(CLAUSES) - SLOW)
    assert failures(report) == []


def test_the_example_is_clean_shell(shelf):
    subprocess.run(["shellcheck", shelf / "backup"], check=True)


def test_the_clauses_that_the_specification_names_are_those_of_the_kit():
    assert set(re.findall(r"\[((?:ALL|DS|VMM)-\d\d)\]", SPECIFICATION)) == set(CLAUSES)
