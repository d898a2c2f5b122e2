"""A store of the fs driver; `stores.py` does the work."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from stores import (
    Chain,
    Disk,
    Store,
    copy_chain,
    export,
    exports_of,
    make_chain,
    make_disk,
    make_store,
    staged,
)

DRIVER = Path(__file__).parents[3] / "drivers/datastore/fs"


@pytest.fixture
def lab() -> SimpleNamespace:
    """The helpers of the lab, for tests that build their own exports."""
    store = partial(Store, driver=DRIVER)
    return SimpleNamespace(Disk=Disk, Store=store, export=export, exports_of=exports_of, staged=staged)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return make_store(tmp_path, DRIVER)


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return make_disk(tmp_path)


@pytest.fixture(scope="session")
def made_chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return make_chain(make_store(tmp_path_factory.mktemp("chain"), DRIVER))


@pytest.fixture
def chain(made_chain: Chain, tmp_path: Path) -> Chain:
    """A copy to damage."""
    return copy_chain(made_chain, tmp_path)
