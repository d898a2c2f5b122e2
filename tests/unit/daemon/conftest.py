"""The operations' world, in a running service."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from oned_backup.daemon.service import Service
from tests.unit.operations.conftest import DOMAIN, World, empty_database, world

__all__ = ["empty_database", "world"]


@pytest.fixture
def vms(world: World) -> list[int]:
    """Four VMs on one host, and their domains."""
    ids = [0]
    for number in range(1, 4):
        domain = DOMAIN.replace("000000000001", f"00000000001{number}").replace(">web<", f">web{number}<")
        ids.append(world.add_vm(f"web{number}", domain))
    return ids


@pytest.fixture
def service(world: World) -> Iterator[Service]:
    """A service that a test starts itself."""
    found = Service(world.services)
    yield found
    found.stop()
