"""A second daemon on the catalogue of a first one refuses to start, and does it no harm."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from product import Product

from oned_backup.errors import Conflict


@pytest.fixture
def directory() -> Iterator[Path]:
    made = Path(tempfile.mkdtemp(prefix="odb-", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.mark.fault("daemon", "two daemons on one database")
@pytest.mark.parametrize("same_sockets", [True, False], ids=["same settings", "other sockets"])
def test_the_second_one_refuses(directory: Path, *, same_sockets: bool) -> None:
    first, second = Product(directory), Product(directory)
    first.start()
    try:
        if not same_sockets:
            text = second.config.read_text().replace(str(first.run_dir), f"{directory}/run2")
            second.config = directory / "other.toml"
            second.config.write_text(text)
        refused = second.call("serve", timeout_s=60)
        assert refused.returncode == Conflict.exit_code
        told = refused.stderr.decode()
        assert f"{first.state_dir}/oned-backup.sqlite is in use by another daemon" in told
        assert "give this one another state directory" in told
        assert "Traceback" not in told
        assert first.run("vm", "list") == "", "the first one answers as before"
    finally:
        first.stop()
