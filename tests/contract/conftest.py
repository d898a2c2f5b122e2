"""What all tests of the contract share."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sshd import Sshd

from oned_backup.runner.kit import Report, check_driver


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    """A real sshd on a loopback port."""
    with Sshd(tmp_path_factory.mktemp("sshd") / "server") as server:
        yield server


@pytest.fixture
def judge() -> Iterator[Callable[..., Report]]:
    """`check_driver`; what it keeps of failures is removed after the test."""
    reports: list[Report] = []

    def check(folder: Path, **settings: Any) -> Report:
        reports.append(check_driver(folder, **settings))
        return reports[-1]

    yield check
    for report in reports:
        if report.calls is not None:
            shutil.rmtree(report.calls.parent)
