"""Downloads as Python programs and the command ask for them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from waiting import wait_for

from oned_backup.cli.main import run
from oned_backup.client import download
from oned_backup.errors import Conflict, InvalidInput, NotFound, Unsupported

from .conftest import Stack, fill_disk


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


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["image", "restore", "0", "--to", "/x", "--name", "new"], "--name is for a domain that is defined"),
        (["image", "restore", "0", "--to", "/x", "--no-ip"], "--no-ip is for a domain that is defined"),
        (["image", "restore", "web", "--to", "/x"], "image list --vm VM"),
        (["download", "0:0", "lab:there"], "'lab:there': the path on a host begins with a slash"),
        (["download", "0:0", "/x", "--overwrite"], "--overwrite is for one disk on this machine"),
        (["download", "fs://100/-/0:x/0/disk.0", "lab:/x", "--overwrite"], "--overwrite is for one disk"),
    ],
)
def test_what_would_be_ignored_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """No daemon is asked: nothing is done."""
    assert run(words) == InvalidInput.exit_code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert told in printed.err


def settled(stack: Stack) -> None:
    """Wait until nothing runs and nothing is queued."""
    wait_for(
        "end of all",
        lambda: all(one["ended_at"] is not None for one in stack.ok("operation", "list", "--json").json),
        every_s=0.1,
    )


def test_urls_of_before_a_merge(stack: Stack, tmp_path: Path) -> None:
    """As long as the content is there they lead to it; after that they are told apart from unknown ones."""
    settings = stack.daemon.config
    stack.ok("vm", "set", "web", "MODE=INCREMENT", "KEEP_LAST=2")
    urls, contents = [], []
    for number in range(4):
        fill_disk(stack.disk("web"), seed=b"state %d" % number)
        stack.ok("vm", "backup", "web")
        settled(stack)
        image = stack.ok("image", "list", "--json").json[-1]["id"]
        urls.append(stack.ok("image", "ls", str(image), "--json").json[0]["url"])
        contents.append(stack.disk("web").read_bytes())
    assert len(stack.ok("image", "show", str(image), "--json").json["increments"]) == 2
    for number in (2, 3):
        done = download(urls[number], tmp_path / str(number), settings=settings)
        assert (tmp_path / str(number)).read_bytes() == contents[number]
        assert ("merged since" in str(done.get("notes"))) == (number == 2)
    with pytest.raises(NotFound, match="was merged into"):
        download(urls[0], tmp_path / "gone", settings=settings)
    with pytest.raises(NotFound):
        download(urls[0].replace("0:", "0:x"), tmp_path / "unknown", settings=settings)


def test_a_block_device(stack: Stack, tmp_path: Path) -> None:
    stack.ok("vm", "backup", "web")
    (tmp_path / "device").write_bytes(b"\xaa" * (9 << 20))
    made = subprocess.run(
        ["losetup", "--find", "--show", tmp_path / "device"], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"no loop device: {made.stderr.strip()}")
    device = Path(made.stdout.strip())
    try:
        words = ("download", stack.ok("image", "ls", "0", "--json").json[0]["url"], str(device))
        assert "--overwrite writes over it" in stack(*words).err
        assert device.read_bytes() == b"\xaa" * (9 << 20)
        stack.ok(*words, "--overwrite")
        expected = stack.disk("web").read_bytes()
        assert device.read_bytes() == expected + b"\xaa" * ((9 << 20) - len(expected))
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
