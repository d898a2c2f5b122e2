"""Stores that are full, gone, read-only or not mounted, and drivers that are stopped at any moment."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from waiting import wait_for

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.exports import Exports
from oned_backup.contract.request import Backup, Request
from oned_backup.errors import Cancelled, DriverFailed, NoSpace, PermissionDenied, Unavailable
from oned_backup.runner.drivers import load_driver
from oned_backup.runner.environment import Invocation, action_environment
from oned_backup.runner.run import Cancellation, Limits

IDS = [f"20260101-00000{number}-aaaaaa" for number in range(3)]
DRIVER = Path(__file__).parents[3] / "drivers/datastore/fs"
#: moments of a backup that can be seen from outside, in order
MOMENTS = [
    "",
    "7",
    "7/.partial-*",
    "7/.partial-*/vm.xml",
    "7/.partial-*/disk.0.0",
    "7/.partial-*/disk.0.0.blocks",
]

needs_mount = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system takes root")


def seen(what, condition):
    """Wait for what is there for a moment only."""
    wait_for(what, condition, 30, every_s=0.0005)


@pytest.fixture
def small():
    """Mounts a tmpfs with given options."""
    mounted = []

    def mount(options, path):
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
        mounted.append(path)

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


def request_of(store, exports):
    return Request(
        kind=Kind.DATASTORE,
        operation_id="op-0123456789ab",
        operation_kind="test",
        backup=Backup(id=IDS[0], chain_id=IDS[0], increment_id=0, date=1),
        vm=xmldoc.build("VM", {"ID": 7, "NAME": "web"}),
        datastore=xmldoc.build("DATASTORE", {"ID": 100, "TEMPLATE": {"BASE_PATH": str(store.base)}}),
        exports=exports,
    )


def start(store, exports):
    """The bare driver process, so that it can be killed without the runner's tidying."""
    private = store.root / f"private-{time.monotonic_ns()}"
    private.mkdir()
    request = request_of(store, exports)
    environment = action_environment(
        load_driver(DRIVER), request, Invocation(store.root, source_dir=store.source), private, Limits(60)
    )
    (private / "stdin").write_text(xmldoc.serialize(request.to_xml()))
    with (private / "stdin").open() as stdin, (private / "stdout").open("w") as stdout:
        process = subprocess.Popen(
            [DRIVER / "backup"], stdin=stdin, stdout=stdout, stderr=subprocess.DEVNULL, env=environment
        )
    return process, private / "stdout"


@pytest.fixture
def large(tmp_path, lab):
    """A disk whose backup takes long enough to be interrupted in the middle."""
    made = lab.Disk.create(tmp_path / "large.qcow2", "256M")
    made.write("write -P 1 0 96M")
    return made


@pytest.mark.parametrize("moment", [*MOMENTS, 0.05, 0.3])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_driver_that_is_killed_leaves_nothing_that_looks_finished(store, large, lab, moment, number):
    with large.served() as socket:
        exports = lab.exports_of(lab.export(large, socket))
        process, stdout = start(store, exports)
        if isinstance(moment, str):
            seen(moment, lambda: not moment or any(store.base.glob(moment)) or process.poll() is not None)
        else:
            seen("the first effect", (store.base / "7").exists)
            time.sleep(moment)
        process.send_signal(number)
        code = process.wait(30)
        if code == 0:  # it was quicker
            assert "MANIFEST=" in stdout.read_text()
            assert store.names() == {IDS[0]}
        else:
            # TERM before Python is up ends the process by the signal itself
            assert code in ({-9} if number == signal.SIGKILL else {143, -15})
            assert stdout.read_text() == ""
            leftover = {f".partial-{IDS[0]}"} if number == signal.SIGKILL else set()
            # killed between the rename and the answer, it is finished and complete
            assert store.names() in ({IDS[0]}, leftover, set())
        if store.names() != {IDS[0]}:
            assert store.catalogue().manifests == ()
        store.backup(IDS[0], exports)
    assert store.names() == {IDS[0]}
    assert store.failures() == {IDS[0]: {}}


def test_cancelling_leaves_no_trace(store, large, lab):
    cancellation = Cancellation()
    with large.served() as socket:
        exports = lab.exports_of(lab.export(large, socket))

        def cancel():
            seen("the first data", lambda: any(store.base.glob("7/.partial-*/disk.0.0")))
            cancellation.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(Cancelled):
            store.backup(IDS[0], exports, cancellation=cancellation)
        thread.join()
    assert [entry.name for entry in store.base.iterdir()] == [".oned-backup-store"]


def test_backup_cancel_removes_what_a_killed_driver_left_and_nothing_else(chain):
    folder = chain.store.path(IDS[0]).parent
    (folder / ".partial-new").mkdir()
    (folder / ".partial-new" / "disk.0.0").write_bytes(b"half")
    (folder / ".partial-other").mkdir()
    for _ in range(2):
        chain.store.cancel("new")
        assert chain.store.names() == {*IDS, ".partial-other"}
    chain.store.cancel(IDS[0])
    assert chain.store.failures()[IDS[0]] == {}


@needs_mount
@pytest.mark.fault("store", "full at the start")
def test_a_full_store_tells_numbers_and_keeps_no_debris(small, store, disk, lab):
    small("size=2M", store.base)
    with disk.served() as socket, pytest.raises(NoSpace, match=r"[34] MB needed, 1 MB free"):
        store.backup(IDS[0], lab.exports_of(lab.export(disk, socket)))
    assert [entry.name for entry in store.base.iterdir()] == [".oned-backup-store"]


@needs_mount
@pytest.mark.fault("store", "full in mid-transfer")
def test_a_store_that_fills_up_on_the_way(small, store, disk, lab):
    small("size=64M,nr_inodes=7", store.base)
    with disk.served() as socket, pytest.raises(NoSpace, match="MB needed"):
        store.backup(IDS[0], lab.exports_of(lab.export(disk, socket)))
    assert [entry.name for entry in store.base.iterdir()] == [".oned-backup-store"]
    subprocess.run(["mount", "-o", "remount,nr_inodes=50", store.base], check=True)
    with disk.served() as socket:
        store.backup(IDS[0], lab.exports_of(lab.export(disk, socket)))
    assert store.failures() == {IDS[0]: {}}


@needs_mount
def test_a_full_target_tells_numbers_and_leaves_no_file(small, chain, tmp_path):
    target = tmp_path / "small"
    target.mkdir()
    small("size=1M", target)
    with pytest.raises(NoSpace, match=r"MB needed, \d MB free"):
        chain.store.download(chain.store.url(0), target / "disk", FORMAT="qcow2")
    assert list(target.iterdir()) == []


@needs_mount
@pytest.mark.fault("store", "read-only")
def test_a_read_only_store_can_be_read_and_not_written(small, store, disk, lab):
    small("size=64M", store.base)
    with disk.served() as socket:
        exports = lab.exports_of(lab.export(disk, socket))
        store.backup(IDS[0], exports)
        subprocess.run(["mount", "-o", "remount,ro", store.base], check=True)
        with pytest.raises(PermissionDenied):
            store.backup(IDS[1], exports)
        with pytest.raises(PermissionDenied):
            store.call("rm", {"BACKUP_IDS": IDS[0]})
    assert store.failures() == {IDS[0]: {}}


READING = ["ls", "stat", "restore", "verify", "download"]
ONLY_FILES = Exports(disks=(), files=("vm.xml",))
URL = f"fs://100/-/0:{IDS[0]}/7/disk.0"


@pytest.mark.parametrize("action", [*READING, "monitor", "rm", "catalogue", "backup_cancel", "backup"])
@pytest.mark.parametrize("how", ["gone", "a file", "not mounted"])
@pytest.mark.fault("store", "unreachable at the start")
def test_a_store_that_is_not_there_is_unavailable_not_empty(chain, action, how):
    store = chain.store
    shutil.move(store.base, store.root / "aside")
    if how == "a file":
        store.base.write_text("")
    elif how == "not mounted":
        store.base.mkdir()
    place = Backup(id="new", chain_id="new", increment_id=0, date=1)
    exports = ONLY_FILES if action == "backup" else None
    with pytest.raises(Unavailable):
        store.call(action, {"URL": URL}, backup=place, exports=exports)
    if how == "not mounted":
        assert list(store.base.iterdir()) == []


@pytest.mark.parametrize("action", READING)
@pytest.mark.fault("store", "an unmounted directory in its place")
def test_a_backup_that_is_known_is_not_called_absent_because_nothing_is_mounted(chain, action):
    """Also where the caller does not list the datastore's images."""
    store = chain.store
    store.images_known = False
    shutil.move(store.base, store.root / "aside")
    store.base.mkdir()
    with pytest.raises(Unavailable):
        store.call(action, {"URL": URL})


def test_a_new_store_is_empty_and_may_be_used(store):
    assert store.catalogue().manifests == ()
    assert int(store.call("monitor")["TOTAL_MB"]) > 0
    store.cancel("new")
    assert list(store.base.iterdir()) == []
    store.backup("new", ONLY_FILES)
    assert (store.base / ".oned-backup-store").read_text().startswith("oned-backup store, version 1\n")


def test_a_source_that_dies_in_the_middle_leaves_no_trace(store, large, lab):
    failed = []
    with large.served() as socket:
        exports = lab.exports_of(lab.export(large, socket))

        def back_up():
            try:
                store.backup(IDS[0], exports)
            except Unavailable as error:
                failed.append(error)

        thread = threading.Thread(target=back_up)
        thread.start()
        seen("the first data", lambda: any(store.base.glob("7/.partial-*/disk.0.0")))
    thread.join()  # the server has ended
    assert (len(failed), store.names()) in ((1, set()), (0, {IDS[0]}))


def test_a_download_whose_reader_goes_away_ends(chain):
    url = chain.store.url(0)
    read, write = os.pipe()
    os.close(read)
    try:
        with pytest.raises((DriverFailed, Unavailable)):
            chain.store.call("download", {"URL": url}, stdout_fd=write)
    finally:
        os.close(write)
