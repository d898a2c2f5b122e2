"""Downloads as Python programs and the command ask for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from oned_backup.client import download
from oned_backup.errors import Conflict, InvalidInput, NotFound, Unsupported

from .conftest import Stack


def test_a_python_program_downloads_a_disk_and_a_restore_point(stack: Stack, tmp_path: Path) -> None:
    stack.ok("vm", "backup", "web")
    settings = stack.daemon.config
    (disk,) = stack.ok("image", "ls", "0", "--json").json
    # as OpenNebula would write it, with a path of its own
    own = disk["url"].replace("/-/", "//").rpartition("/")[0]
    vm_id = own.rpartition("/")[2]
    backup_id = own.rpartition("/")[0].rpartition(":")[2]
    theirs = f"{own.rpartition('/')[0]}/var/lib/one/datastores/100/{vm_id}/{backup_id}/disk.0.0"
    for number, url in enumerate((disk["url"], theirs)):
        target = tmp_path / f"disk{number}"
        assert download(url, target, settings=settings)["target"] == str(target)
        assert target.read_bytes() == stack.disk("web").read_bytes()
    placed = download("0", tmp_path / "point", settings=settings)["placed"]
    assert str(tmp_path / "point" / "disk.0.raw") in placed
    assert (tmp_path / "point" / "disk.0.raw").read_bytes() == stack.disk("web").read_bytes()
    with pytest.raises(Conflict, match=r"disk\.0\.raw exists already"):
        download("0:0", tmp_path / "point", settings=settings)
    with pytest.raises(NotFound, match="no increment"):
        download("0:7", tmp_path / "other", settings=settings)
    with pytest.raises(NotFound, match="no host 'nowhere'"):
        download(disk["url"], "nowhere:/srv/disk", settings=settings)
    with pytest.raises(Unsupported, match="not supported yet"):
        download(disk["url"].replace("fs://", "fs+rbd://"), tmp_path / "x", settings=settings)
    with pytest.raises(InvalidInput, match="not a pseudo-URL"):
        download("http://example.org/disk", tmp_path / "x", settings=settings)


def test_a_restore_point_on_a_host(stack: Stack, tmp_path: Path) -> None:
    """The same command for a host: this one is on this machine, so that nothing is forwarded."""
    stack.ok("vm", "backup", "web")
    stack.ok("download", "0:0", f"lab:{tmp_path}/there", "--format", "qcow2")
    assert (tmp_path / "there" / "disk.0.qcow2").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tmp_path.glob("*/.oned-backup-op-*")) == []
