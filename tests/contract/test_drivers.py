"""Finding drivers, and refusing those that somebody else could have changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from oned_backup.contract.actions import Kind
from oned_backup.errors import Misconfigured, NotFound, OnedBackupError, PermissionDenied, Unsupported
from oned_backup.runner.drivers import find_driver, find_drivers, load_driver
from oned_backup.runner.skeleton import new_driver


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    return new_driver(tmp_path / "drivers" / "datastore", "shelf", Kind.DATASTORE)


def outside_link(folder: Path) -> None:
    (folder / "verify").unlink()
    (folder / "verify").symlink_to("/bin/true")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda folder: folder.chmod(0o777), "shelf is writable by others"),
        (lambda folder: (folder / "driver.py").chmod(0o646), "driver.py is writable by others"),
        (lambda folder: (folder / "backup").chmod(0o757), "backup is writable by others"),
        (outside_link, "verify leads out of its driver's folder"),
    ],
)
@pytest.mark.fault("driver", "writable by others, or of another owner")
def test_what_others_could_change_is_refused(shelf: Path, change: Callable[[Path], None], text: str) -> None:
    load_driver(shelf)
    change(shelf)
    with pytest.raises(PermissionDenied, match=text):
        load_driver(shelf)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
@pytest.mark.fault("driver", "writable by others, or of another owner")
def test_a_foreign_owner_is_refused(shelf: Path) -> None:
    os.chown(shelf / "driver.py", 65534, 65534)
    with pytest.raises(PermissionDenied, match=r"driver\.py belongs to uid 65534"):
        load_driver(shelf)


@pytest.mark.fault("driver", "writable by others, or of another owner")
def test_the_executable_is_looked_at_again_before_it_runs(shelf: Path) -> None:
    driver = load_driver(shelf)
    outside_link(shelf)
    with pytest.raises(PermissionDenied, match="leads out"):
        driver.executable("verify")


def test_links_within_the_folder_are_fine(shelf: Path) -> None:
    (shelf / "stat").unlink()
    (shelf / "stat").symlink_to("ls")
    assert load_driver(shelf).supports("stat")


def test_actions_that_are_absent_or_unknown_are_unsupported(shelf: Path) -> None:
    (shelf / "monitor").chmod(0o644)
    (shelf / "rm").unlink()
    (shelf / "explode").write_text("#!/bin/sh\n")
    (shelf / "explode").chmod(0o755)
    driver = load_driver(shelf)
    assert not any(driver.supports(action) for action in ("monitor", "rm", "explode", "../shelf/ls", ""))
    with pytest.raises(Unsupported, match="driver datastore/shelf has no action rm"):
        driver.executable("rm")
    assert driver.actions == ("backup", "backup_cancel", "ls", "stat", "restore", "download", "verify")


def test_find_drivers_in_order(tmp_path: Path, shelf: Path) -> None:
    drivers, own = tmp_path / "drivers", tmp_path / "own"
    new_driver(own / "datastore", "shelf", Kind.DATASTORE)
    new_driver(own / "tm", "shelf", Kind.TM)
    misnamed = own / "vmm" / "other"
    shutil.copytree(own / "tm" / "shelf", misnamed)
    (own / "vmm" / "notes").mkdir()
    refused: list[tuple[Path, OnedBackupError]] = []
    found = find_drivers([own, drivers, tmp_path / "absent"], on_refused=lambda *what: refused.append(what))
    assert [(str(driver), driver.folder.parents[1]) for driver in found] == [
        ("tm/shelf", own),
        ("datastore/shelf", own),
    ]
    assert [(path, type(error)) for path, error in refused] == [(misnamed, Misconfigured)]
    assert find_driver([drivers, own], Kind.DATASTORE, "shelf").folder == shelf


def test_not_found_names_what_there_is(tmp_path: Path, shelf: Path) -> None:
    with pytest.raises(NotFound, match="no datastore driver 'fs'") as caught:
        find_driver([tmp_path / "drivers"], Kind.DATASTORE, "fs")
    assert caught.value.hint == "There is: shelf."
    for odd in ("", ".", "..", "../datastore/shelf", "/etc"):
        with pytest.raises(NotFound):
            find_driver([tmp_path / "drivers"], Kind.DATASTORE, odd)


def test_a_broken_manifest_says_which(shelf: Path) -> None:
    (shelf / "driver.toml").write_text("spec = 2\n")
    with pytest.raises(Misconfigured, match="spec is 2, this version knows 1"):
        load_driver(shelf)
    (shelf / "driver.toml").write_text('spec = 1\nkind = "datastore"\nname = "shelf"\n[parameters.ID]\n')
    with pytest.raises(Misconfigured, match="ODB_DS_ID is the number of the datastore"):
        load_driver(shelf)
