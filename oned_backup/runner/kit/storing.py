"""Clauses about storing and restoring: what went in comes out, byte for byte."""

from __future__ import annotations

import os
import threading

from oned_backup.contract.documents import Catalogue, RestorePlan, StoredDisk, VerifyReport
from oned_backup.contract.url import parse_url
from oned_backup.errors import DataCorrupt, DriverBug, InvalidInput, OnedBackupError
from oned_backup.model.manifest import parse_manifest
from oned_backup.model.names import checked_name
from oned_backup.runner.kit.bench import Bench
from oned_backup.runner.kit.called import Called
from oned_backup.runner.kit.catalogue import Chain
from oned_backup.runner.kit.clause import NotApplicable, Unmet, clause
from oned_backup.runner.kit.folders import allocated_bytes, tree
from oned_backup.runner.kit.guest import (
    MIB,
    SMALL_FILES,
    Disk,
    Point,
    exported_for_writing,
    image_problem,
    make_points,
    raw_problem,
)


@clause("DS-01", "backup prints BACKUP_ID, SIZE_MB and FORMAT, and they are plausible")
def backup_answers(bench: Bench) -> None:
    """A MANIFEST is optional, but must be one. Of 4 MB that cannot be made smaller, all is stored."""
    store = bench.new_store()
    chain = bench.new_chain(store)
    attempt = bench.plan(chain, bench.guests.points[0])
    called = bench.backup(attempt)
    answer = called.answer()
    bench.record(attempt, called)
    try:
        checked_name(answer["BACKUP_ID"], "BACKUP_ID")
        manifest = parse_manifest(answer["MANIFEST"], what="MANIFEST") if "MANIFEST" in answer else None
    except (InvalidInput, DataCorrupt) as error:
        raise called.unmet(error.message) from error
    if manifest and manifest.id != attempt.backup.id:
        raise called.unmet(f"MANIFEST is of backup {manifest.id}, not of {attempt.backup.id}")
    if not 1 <= int(answer["SIZE_MB"]) <= 21:
        raise called.unmet(f"SIZE_MB={answer['SIZE_MB']} for a guest of 20 MB that holds 3 MB")
    if answer["FORMAT"] not in {"raw", "qcow2"}:
        raise called.unmet(f"FORMAT={answer['FORMAT']} is neither raw nor qcow2")
    attempt = bench.plan(bench.new_chain(store), bench.guests.noise)
    called = bench.backup(attempt)
    bench.record(attempt, called)
    if (stored := attempt.chain.increments[0].size_mb) < 4:
        raise called.unmet(f"SIZE_MB={stored} for 4 MB that cannot be made smaller")


@clause("DS-02", "a full backup restores to the same bytes")
def full_restores(bench: Bench) -> None:
    """FORMAT raw to a new file."""
    chain = bench.new_chain(bench.new_store())
    bench.must_backup(chain, bench.guests.points[0])
    bench.check_restored(chain, 0, bench.guests.points[0])


@clause("DS-03", "every increment of a chain restores to the bytes of its moment")
def increments_restore(bench: Bench) -> None:
    """Zeroed and discarded ranges, a disk without changes, and one that is FULL inside an increment."""
    for number, point in enumerate(bench.guests.points):
        bench.check_restored(bench.good_chain, number, point)


@clause("DS-04", "download writes raw to stdout, and qcow2 to a file and to stdout")
def other_targets(bench: Bench) -> None:
    """The qcow2 image is clean by qemu-img check and identical by qemu-img compare."""
    chain = bench.good_chain
    listed = bench.disks(chain)
    for disk in bench.guests.points[-1].disks:
        url = _listed(listed, disk).url
        target = bench.new_path()
        called = bench.read("download", chain, URL=url, FORMAT="raw", stdout_to=target)
        _succeeded(called)
        if problem := raw_problem(target, disk.reference):
            raise called.unmet(f"raw to stdout: {problem}")
        for where in ("a file", "stdout"):
            target = bench.new_path()
            if where == "stdout":
                called = bench.read("download", chain, URL=url, FORMAT="qcow2", stdout_to=target)
            else:
                called = bench.read("download", chain, URL=url, FORMAT="qcow2", TARGET=target)
            _succeeded(called)
            if problem := image_problem(target, disk.reference):
                raise called.unmet(f"qcow2 to {where}: {problem}")


@clause("DS-05", "download over an existing file leaves nothing of the old content")
def over_existing(bench: Bench) -> None:
    """The file has the disk's size and is full of other bytes."""
    chain = bench.good_chain
    disk = bench.guests.points[-1].disks[0]
    target = bench.new_path()
    target.write_bytes(b"\xee" * disk.size_bytes)
    called = bench.read(
        "download", chain, URL=_listed(bench.disks(chain), disk).url, FORMAT="raw", TARGET=target
    )
    _succeeded(called)
    if problem := raw_problem(target, disk.reference):
        raise called.unmet(problem)


@clause("DS-06", "an empty disk (0 bytes) is backed up and restored")
def empty_disk(bench: Bench) -> None:
    """Beside it is a disk with data."""
    point = make_points(bench.root / "empty", [(0, [[]]), (MIB, [["write -P 1 0 64k"]])])[0]
    _there_and_back(bench, point)


@clause("DS-07", "64 disks are backed up and restored")
def many_disks(bench: Bench) -> None:
    """Each has content of its own; four of them are restored."""
    disks = [(64 * 1024, [[f"write -P {number} 0 4k"]]) for number in range(1, 65)]
    point = make_points(bench.root / "many", disks)[0]
    chain = bench.new_chain(bench.new_store())
    bench.must_backup(chain, point)
    listed = bench.disks(chain)
    if sorted(listed) != list(range(64)):
        raise Unmet(f"ls of a backup with 64 disks lists {len(listed)}: {sorted(listed)}")
    bench.check_restored(chain, 0, Point(tuple(point.disks[number] for number in (0, 9, 10, 63))))


@clause("DS-08", "zeros stay sparse, in the store and in a restored file")
def sparse(bench: Bench) -> None:
    """A disk of 1 GiB that holds 1 MiB."""
    point = make_points(bench.root / "sparse", [(1024 * MIB, [["write -P 1 700M 1M"]])])[0]
    store = bench.new_store()
    chain = bench.new_chain(store)
    bench.must_backup(chain, point)
    if store.own_path is not None and (stored := allocated_bytes(store.own_path)) > 16 * MIB:
        raise Unmet(f"1 MiB of data in a disk of 1 GiB takes {stored} bytes in {store.own_path}")
    if chain.increments[0].size_mb > 16:
        raise Unmet(f"backup: SIZE_MB={chain.increments[0].size_mb} for 1 MiB of data in a disk of 1 GiB")
    target = bench.new_path()
    called = bench.read("download", chain, URL=bench.disks(chain)[0].url, FORMAT="raw", TARGET=target)
    _succeeded(called)
    if target.stat().st_size != 1024 * MIB or target.stat().st_blocks * 512 > 16 * MIB:
        status = target.stat()
        raise called.unmet(f"TARGET has {status.st_size} bytes and takes {status.st_blocks * 512}")
    target.unlink()


@clause("DS-09", "restore's plan holds vm.xml and the other small files unchanged, and every disk")
def plan_is_complete(bench: Bench) -> None:
    """Byte for byte: white space, CDATA and names that are not ASCII too."""
    called = bench.read("restore", bench.good_chain)
    plan = _plan(called)
    for name, content in SMALL_FILES.items():
        if plan.file(name) is None:
            raise called.unmet(f"PLAN lacks {name}")
        if plan.file(name) != content:
            raise called.unmet(f"PLAN: {name} is not what was backed up: {plan.file(name)!r:.300}")
    _check_disks(called, plan.disks, bench.guests.points[-1], bench.good_chain)


@clause("DS-10", "ls and restore obey INCREMENT_ID and DISK_ID, and their URLs are well-formed")
def one_of_many(bench: Bench) -> None:
    """The URL names the disk, the datastore and the VM, and download takes it."""
    chain = bench.good_chain
    for number, point in enumerate(bench.guests.points):
        called = bench.read("restore", chain, INCREMENT_ID=number)
        plan = _plan(called)
        if plan.increment_id != number:
            raise called.unmet(f"INCREMENT_ID {number} was asked, the plan is of {plan.increment_id}")
        _check_disks(called, plan.disks, point, chain)
    called = bench.read("ls", chain, DISK_ID=1)
    if sorted(bench.disks(chain, DISK_ID=1)) != [1]:
        raise called.unmet("DISK_ID 1 was asked, but other disks are listed")


@clause("DS-11", "stat tells the restored size")
def size_is_told(bench: Bench) -> None:
    """The sum of the disks' sizes; each may be rounded up to whole MB."""
    called = bench.read("stat", bench.good_chain)
    answer = called.answer()["SIZE_MB"]
    if not answer.isdecimal() or not 20 < int(answer) <= 22:
        raise called.unmet(f"SIZE_MB={answer}, but the disks have 16 MB + 1.5 KB and 4 MB")
    called = bench.read("stat", bench.good_chain, DISK_ID=1)
    if called.answer()["SIZE_MB"] != "4":
        raise called.unmet(f"SIZE_MB={called.answer()['SIZE_MB']} for the disk with DISK_ID 1 of 4 MB")


@clause("DS-12", "monitor's numbers are plausible")
def capacity(bench: Bench) -> None:
    """Whole megabytes; used and free do not exceed the total."""
    called = bench.call("monitor", bench.request_for(bench.good_chain.store, "monitor"))
    answer = called.answer()
    if not all(answer[key].isdecimal() for key in ("TOTAL_MB", "USED_MB", "FREE_MB")):
        raise called.unmet("a number is not whole and positive")
    total, used, free = (int(answer[key]) for key in ("TOTAL_MB", "USED_MB", "FREE_MB"))
    if not 0 < used + free <= total * 1.01 + 1:
        raise called.unmet(f"used {used} MB + free {free} MB in {total} MB")
    path = bench.good_chain.store.own_path
    if path is not None:
        found = os.statvfs(path)
        real_mb = found.f_blocks * found.f_frsize // MIB
        if total > real_mb * 1.01 + 1:
            raise called.unmet(f"TOTAL_MB={total}, but the file system of BASE_PATH has {real_mb} MB")


@clause("DS-13", "reading actions do not write to the store")
def reading_is_reading(bench: Bench) -> None:
    """Names, modes, change times and contents are the same afterwards."""
    chain = bench.good_chain
    path = bench.own_path(chain.store)
    url = _listed(bench.disks(chain), bench.guests.points[-1].disks[0]).url
    for action in ("ls", "stat", "restore", "monitor", "download", "verify", "catalogue"):
        if bench.driver.supports(action):
            before = tree(path)
            called = bench.read(action, chain, URL=url, FORMAT="raw", TARGET=bench.new_path())
            after = tree(path)
            changed = sorted(
                name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
            )
            if changed:
                raise called.unmet(f"changed in {path}: {', '.join(changed[:5])}")


@clause("DS-14", "verify finds nothing wrong with good backups")
def verify_is_content(bench: Bench) -> None:
    """All, one of them, and a share of them."""
    if not bench.driver.supports("verify"):
        raise NotApplicable("the driver has no action verify")
    ids = [increment.source for increment in bench.good_chain.increments]
    for options, wanted in (({}, ids), ({"BACKUP_IDS": ids[1]}, ids[1:2]), ({"PERCENT": "10"}, ids)):
        called = bench.read("verify", bench.good_chain, stdout_to=None, **options)
        report = VerifyReport.from_xml(called.element("REPORT"))
        if [backup.backup_id for backup in report.backups] != wanted:
            raise called.unmet(f"REPORT is about {[b.backup_id for b in report.backups]}, not {wanted}")
        if any(backup.failures for backup in report.backups):
            raise called.unmet("REPORT names failures in backups that are good")
        if "PERCENT" not in options and not all(backup.read_bytes for backup in report.backups):
            raise called.unmet("READ_BYTES is 0 of a backup that was read")


@clause("DS-15", "catalogue lists every finished backup")
def catalogue_is_complete(bench: Bench) -> None:
    """With the manifests that backup printed."""
    if not bench.driver.supports("catalogue"):
        raise NotApplicable("the driver has no action catalogue")
    called = bench.read("catalogue", bench.good_chain)
    found = Catalogue.from_xml(called.element("CATALOGUE"))
    try:
        ids = {parse_manifest(text).id for text in found.manifests}
    except OnedBackupError as error:
        raise called.unmet(error.message) from error
    missing = {increment.source for increment in bench.good_chain.increments} - ids
    if missing or found.unreadable:
        raise called.unmet(f"missing: {sorted(missing)}, unreadable: {found.unreadable}")


@clause("DS-16", "backups of different VMs run at the same time")
def side_by_side(bench: Bench) -> None:
    """Two at once into one store."""
    store = bench.new_store()
    attempts = [bench.plan(bench.new_chain(store), bench.guests.points[0]) for _ in range(2)]
    called: dict[int, Called] = {}
    threads = [
        threading.Thread(target=lambda number=number: called.update({number: bench.backup(attempts[number])}))
        for number in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, attempt in enumerate(attempts):
        if number not in called:
            raise Unmet("backup: one of two at once did not end")
        bench.record(attempt, called[number])
        bench.check_restored(attempt.chain, 0, attempt.point)


@clause("DS-17", "a download whose reader goes away ends by itself, as a failure")
def reader_goes_away(bench: Bench) -> None:
    """As with `download URL - | head`."""
    chain = bench.good_chain
    url = _listed(bench.disks(chain), bench.guests.points[-1].disks[0]).url
    read_fd, write_fd = os.pipe()
    with os.fdopen(read_fd, "rb", buffering=0) as reader, os.fdopen(write_fd, "wb") as writer:

        def read_a_little() -> None:
            reader.read(1)
            reader.close()

        thread = threading.Thread(target=read_a_little)
        thread.start()
        request = bench.request_for(
            chain.store, "download", chain=chain, options={"URL": url, "FORMAT": "raw"}
        )
        called = bench.call("download", request, stdout_fd=writer.fileno())
        writer.close()
        thread.join()
    if called.exit_code in {0, DriverBug.exit_code}:
        raise called.unmet(f"ended with {called.ended_with} although nobody read its output")


@clause("DS-18", "download into an NBD export leaves nothing of what was there")
def into_an_export(bench: Bench) -> None:
    """Feature nbd. The export has the disk's size and is full of other bytes."""
    if "nbd" not in bench.driver.manifest.features:
        raise NotApplicable("the driver does not promise the feature nbd")
    chain = bench.good_chain
    disk = bench.guests.points[-1].disks[0]
    image = bench.new_path()
    image.write_bytes(b"\xee" * disk.size_bytes)
    url = _listed(bench.disks(chain), disk).url
    with exported_for_writing(image, "raw", bench.root) as export:
        called = bench.read("download", chain, URL=url, FORMAT="raw", TARGET=export)
        _succeeded(called)
    if problem := raw_problem(image, disk.reference):
        raise called.unmet(problem)


def _there_and_back(bench: Bench, point: Point) -> None:
    chain = bench.new_chain(bench.new_store())
    bench.must_backup(chain, point)
    bench.check_restored(chain, 0, point)


def _listed(listed: dict[int, StoredDisk], disk: Disk) -> StoredDisk:
    if disk.disk_id not in listed:
        raise Unmet(f"ls: disk {disk.disk_id} is not listed")
    return listed[disk.disk_id]


def _succeeded(called: Called) -> None:
    if called.exit_code != 0:
        raise called.unmet(f"ended with {called.ended_with}, but should have succeeded")


def _plan(called: Called) -> RestorePlan:
    try:
        return RestorePlan.from_xml(called.element("PLAN"))
    except OnedBackupError as error:
        raise called.unmet(f"PLAN: {error.message}") from error


def _check_disks(called: Called, disks: tuple[StoredDisk, ...], point: Point, chain: Chain) -> None:
    if sorted(disk.disk_id for disk in disks) != [disk.disk_id for disk in point.disks]:
        raise called.unmet(f"disks {[disk.disk_id for disk in disks]} are not those that were backed up")
    sizes = {disk.disk_id: disk.size_bytes for disk in point.disks}
    for disk in disks:
        try:
            url = parse_url(disk.url)
        except InvalidInput as error:
            raise called.unmet(error.message) from error
        if (url.datastore_id, url.vm_id, url.disk_id) != (103, chain.vm_id, disk.disk_id):
            raise called.unmet(f"{disk.url} is not of datastore 103, VM {chain.vm_id}, disk {disk.disk_id}")
        if disk.size_bytes != sizes[disk.disk_id]:
            raise called.unmet(
                f"disk {disk.disk_id}: SIZE_BYTES={disk.size_bytes}, it has {sizes[disk.disk_id]}"
            )
