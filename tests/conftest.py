"""For all tests: the whole matrix, the fault table, and what cannot be tested.

In continuous integration, what cannot be tested is a failure and not a skip.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

from tests.faults.table import FaultTable, note_faults

# How fast the machine is decides nothing; fixtures may serve all examples of a test.
settings.register_profile(
    "oned-backup",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("oned-backup")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--whole-matrix",
        action="store_true",
        help="kill at every failpoint, in every way; run the slow rows of the fault table as well",
    )
    parser.addoption(
        "--fault-table", action="store_true", help="write what was seen into share/doc/fault-table.md"
    )


def pytest_configure(config: pytest.Config) -> None:
    # A shell that starts pytest in the background ignores SIGINT in it, and all it starts inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("--fault-table") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FaultTable())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    note_faults(items)
    if not config.getoption("--whole-matrix"):
        slow = [item for item in items if item.get_closest_marker("whole_matrix")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and os.environ.get("CI") == "true" and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid}: skipped in continuous integration: {report.longrepr}"
    return report
