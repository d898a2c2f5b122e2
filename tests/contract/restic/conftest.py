"""A store of restic repositories behind a real sshd on a loopback port."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from sshd import Sshd
from stores import Chain, Disk, Store, make_chain, make_disk, make_store, run

DRIVER = Path(__file__).parents[3] / "drivers/datastore/restic"
PASSWORD = "correct horse"  # noqa: S105


def at(sshd: Sshd, store: Store, **parameters: str) -> Store:
    """The store as it is reached through `sshd`."""
    user, _, host = sshd.target.partition("@")
    account = {"RESTIC_SFTP_USER": user, "RESTIC_SFTP_SERVER": host}
    return replace(
        store,
        parameters={**account, **parameters},
        environment={"ODB_SSH_CONFIG": str(sshd.config)},
        secrets={"RESTIC_PASSWORD": PASSWORD},
    )


@pytest.fixture
def make(sshd: Sshd, tmp_path: Path) -> Callable[..., Store]:
    """An empty store with these further parameters."""
    return lambda **parameters: at(sshd, make_store(tmp_path, DRIVER), **parameters)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return make_disk(tmp_path)


@pytest.fixture(scope="session")
def made_chain(sshd: Sshd, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """Not to be changed: making one takes a while."""
    return make_chain(at(sshd, make_store(tmp_path_factory.mktemp("chain"), DRIVER)))


@pytest.fixture
def restic(tmp_path: Path) -> Callable[..., str]:
    """Runs restic itself on the repository of a store's VM, or another, which lies on this machine."""
    password = tmp_path / "password"
    password.write_text(PASSWORD)

    def call(store: Store, *words: object, repository: str = "") -> str:
        place = store.base / (repository or str(store.vm_id))
        return run("restic", "--no-cache", "--repo", place, "--password-file", password, *words)

    return call
