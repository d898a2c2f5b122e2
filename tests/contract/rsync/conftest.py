"""A store behind a real sshd on a loopback port."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sshd import Sshd
from stores import Chain, Disk, Store, copy_chain, make_chain, make_disk, make_store

DRIVER = Path(__file__).parents[3] / "drivers/datastore/rsync"


def at(sshd: Sshd, store: Store, **parameters: str) -> Store:
    """The store as it is reached through `sshd`."""
    user, _, host = sshd.target.partition("@")
    account = {"RSYNC_USER": user, "RSYNC_HOST": host}
    return replace(
        store,
        parameters={**account, **parameters},
        environment={"ODB_SSH_CONFIG": str(sshd.config)},
    )


@pytest.fixture
def make(sshd: Sshd, tmp_path: Path) -> Callable[..., Store]:
    """An empty store with these further parameters."""
    return lambda **parameters: at(sshd, make_store(tmp_path, DRIVER), **parameters)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    """20 MiB with 3 MiB that do not compress, and some that do."""
    made = make_disk(tmp_path)
    (tmp_path / "random").write_bytes(os.urandom(3 << 20))
    made.write(f"write -s {tmp_path}/random 0 3M")
    return made


@pytest.fixture(scope="session")
def made_chain(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(at(sshd, make_store(tmp_path_factory.mktemp("chain"), DRIVER)))


@pytest.fixture
def chain(made_chain: Chain, tmp_path: Path) -> Chain:
    """A copy to damage."""
    return copy_chain(made_chain, tmp_path)
