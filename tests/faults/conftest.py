"""`--whole-matrix`: all rows of the kill matrix, not only those that continuous integration has time for."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--whole-matrix", action="store_true", help="kill at every failpoint, in every way")
