"""What doctor says of the datastores' drivers: whether there is what they need on this machine."""

from __future__ import annotations

import shutil
from pathlib import Path

from oned_backup.cli.doctor_datastores import check_datastores

DRIVERS = Path(__file__).parents[3] / "drivers"


def test_what_the_drivers_need_is_named_and_found_here() -> None:
    checks = {check.name: check for check in check_datastores([DRIVERS], ["rsync", "fs", "restic", "fs"])}
    assert list(checks) == [f"datastores of driver {name}" for name in ("fs", "restic", "rsync")]
    assert {check.status for check in checks.values()} == {"ok"}
    assert {"rsync", "sshfs", "fusermount3", "/dev/fuse"} <= set(
        checks["datastores of driver rsync"].text.split(", ")
    )


def test_what_is_missing_is_named_with_its_remedy(tmp_path: Path) -> None:
    folder = tmp_path / "datastore/odd"
    shutil.copytree(DRIVERS / "datastore/fs", folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / "driver.toml").read_text().replace('name = "fs"', 'name = "odd"')
    needs = '[needs]\nsh = "a shell"\nno-such-program = "write one"\n"/no/such/device" = "buy one"\n'
    (folder / "driver.toml").write_text(text + needs)
    found = [(check.status, check.text, check.remedy) for check in check_datastores([tmp_path], ["odd"])]
    assert found == [
        ("fail", "no-such-program not found", "write one"),
        ("fail", "/no/such/device not found", "buy one"),
    ]


def test_a_driver_that_is_gone_is_a_failure(tmp_path: Path) -> None:
    (check,) = check_datastores([tmp_path], ["gone"])
    assert check.status == "fail"
    assert "gone" in check.text
