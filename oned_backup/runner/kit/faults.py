"""Clauses about stores that are gone, full, damaged or locked, and about secrets."""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from oned_backup.contract.documents import RestorePlan, VerifyReport
from oned_backup.errors import DataCorrupt, NoSpace, NotFound, OnedBackupError, PermissionDenied, Unavailable
from oned_backup.runner.kit.bench import Bench
from oned_backup.runner.kit.called import Called
from oned_backup.runner.kit.catalogue import Chain, Store
from oned_backup.runner.kit.clause import NotApplicable, Unmet, clause
from oned_backup.runner.kit.disturbances import changed_byte, filled_files, free_bytes, small_file_system
from oned_backup.runner.kit.guest import SMALL_FILES, raw_problem

_READING = ("ls", "stat", "restore", "download", "monitor", "verify", "catalogue")


@clause("DS-30", "a store that cannot be reached is Unavailable (69), not NotFound")
def unreachable(bench: Bench) -> None:
    """By the commands block and unblock, by the parameters `unreachable`, or BASE_PATH is not there."""
    chain = _own_chain(bench)
    if "block" in bench.settings.commands:
        with bench.settings.between("block", "unblock", chain.store):
            _all_unavailable(bench, chain, "a store that cannot be reached")
        bench.check_restored(chain, 0, bench.guests.points[0])
        return
    if bench.settings.unreachable:
        elsewhere = replace(chain.store, parameters={**chain.store.parameters, **bench.settings.unreachable})
        chain.store = elsewhere
        _all_unavailable(bench, chain, "a store that cannot be reached")
        return
    path = bench.own_path(chain.store)
    with _moved_away(path):
        _all_unavailable(bench, chain, f"a store whose BASE_PATH {path} is not there")


@clause("DS-31", "the empty directory beneath a file system that is not mounted is not an empty store (69)")
def not_mounted(bench: Bench) -> None:
    """ODB_IMAGES and DATASTORE/IMAGES say that there must be something."""
    chain = _own_chain(bench)
    path = bench.own_path(chain.store)
    with _moved_away(path):
        path.mkdir()
        try:
            actions = ("ls", "stat", "restore", "download", "verify")
            _all_unavailable(bench, chain, "an empty directory where backups should be", actions)
            if left := list(path.iterdir()):
                raise Unmet(f"a driver wrote {left[0]} into the directory beneath an unmounted file system")
        finally:
            subprocess.run(["rm", "-rf", "--", str(path)], check=True, timeout=60)


@clause("DS-32", "a full store is NoSpace (73): no debris, and what was there restores")
def full(bench: Bench) -> None:
    """A backup of 24 MB into a file system of 12 MB, or what the command fill leaves."""
    store = bench.new_store()
    if "fill" in bench.settings.commands:
        _full_elsewhere(bench, store)
        return
    if store.own_path is None or os.geteuid() != 0:
        raise NotApplicable("needs root, and a store of the kit's own, to mount a small file system")
    chain = bench.new_chain(store)
    with small_file_system(store.own_path, 12):
        bench.must_backup(chain, bench.guests.tiny)
        bench.own_path(store)
        before = free_bytes(store.own_path)
        called = _does_not_fit(bench, store)
        lost = before - free_bytes(store.own_path)
        if lost > 256 * 1024:
            raise called.unmet(f"{lost} bytes of a backup that did not fit are left after backup_cancel")
        bench.check_restored(chain, 0, bench.guests.tiny)


def _full_elsewhere(bench: Bench, store: Store) -> None:
    chain = bench.new_chain(store)
    bench.must_backup(chain, bench.guests.tiny)
    with bench.settings.between("fill", "unfill", store):
        _does_not_fit(bench, store)
        bench.check_restored(chain, 0, bench.guests.tiny)
    bench.must_backup(bench.new_chain(store), bench.guests.large)


def _does_not_fit(bench: Bench, store: Store) -> Called:
    """The call of a backup that is larger than what is free."""
    attempt = bench.plan(bench.new_chain(store), bench.guests.large)
    called = bench.backup(attempt)
    called.require(NoSpace, "the answer of a full store")
    bench.find(attempt).require(NotFound, "the answer about a backup that did not fit")
    cancelled = bench.cancel_backup(attempt)
    if cancelled.exit_code != 0:
        raise cancelled.unmet(f"after a backup that did not fit: {cancelled.ended_with}")
    return called


@clause("DS-33", "damage to any stored file is found by verify, and never restored as if it were good (65)")
def damaged(bench: Bench) -> None:
    """One byte is changed in the middle of each file of an increment; what lies before it stays good."""
    chain = _own_chain(bench)
    path = bench.own_path(chain.store)
    old = set(filled_files(path))
    bench.must_backup(chain, bench.guests.points[1])
    for file in sorted(set(filled_files(path)) - old):
        with changed_byte(file):
            found = _restore_everything(bench, chain, f"one byte of {file} was changed", first=1)
            _verify_reports(bench, chain, file, "one byte was changed", found)
            bench.check_restored(chain, 0, bench.guests.points[0])
    bench.check_restored(chain, 1, bench.guests.points[1])


@clause("DS-34", "a stored file that is cut short or missing is found, and never restored as if it were good")
def incomplete(bench: Bench) -> None:
    """The largest file of a full backup, which the increment after it needs too."""
    chain = _own_chain(bench)
    path = bench.own_path(chain.store)
    bench.must_backup(chain, bench.guests.points[1])
    file = max(filled_files(path), key=lambda f: f.stat().st_size)
    content = file.read_bytes()
    mode = file.stat().st_mode & 0o777
    for how in ("cut to half its length", "missing"):
        if how == "missing":
            file.unlink()
        else:
            os.truncate(file, len(content) // 2)
        try:
            found = _restore_everything(bench, chain, f"{file} is {how}")
            if not found:
                raise Unmet(f"{file} is {how}, but everything was restored")
            _verify_reports(bench, chain, file, how, found)
        finally:
            file.write_bytes(content)
            file.chmod(mode)
    bench.check_restored(chain, 1, bench.guests.points[1])


@clause("DS-35", "a wrong secret is PermissionDenied (77)")
def wrong_secret(bench: Bench) -> None:
    """Each secret parameter in turn is replaced by another one."""
    if not bench.secrets:
        raise NotApplicable("the driver has no secret parameter")
    chain = bench.good_chain
    for name in bench.secrets:
        request = bench.request_for(chain.store, "ls", chain=chain)
        wrong = {**bench.secrets, name: f"wrong-{secrets.token_hex(12)}"}
        called = bench.call("ls", request, secret_values=wrong)
        called.require(PermissionDenied, f"the answer to a wrong {name}")


@clause("DS-36", "no secret is in any output, argument or environment")
def secrets_stay_secret(bench: Bench) -> None:
    """Processes are looked at while a backup and a failing call run; output, in all calls of the check."""
    if not bench.secrets:
        raise NotApplicable("the driver has no secret parameter")
    chain = bench.new_chain(bench.new_store())
    with _watched_processes(list(bench.secrets.values())) as seen:
        attempt = bench.must_backup(chain, bench.guests.points[0])
        bench.check_restored(chain, 0, bench.guests.points[0])
        bench.find(bench.plan(bench.new_chain(chain.store), bench.guests.tiny))
    if seen:
        raise Unmet(f"a secret of backup {attempt.backup.id} was in {', '.join(sorted(seen))}")
    if bench.leaks:
        raise bench.leaks[0].unmet("printed a secret")


def _own_chain(bench: Bench) -> Chain:
    """A chain with one backup, in a store that no other clause uses."""
    chain = bench.new_chain(bench.new_store())
    bench.must_backup(chain, bench.guests.points[0])
    return chain


def _all_unavailable(bench: Bench, chain: Chain, why: str, actions: tuple[str, ...] = _READING) -> None:
    source = chain.increments[0].source
    url = f"{bench.driver.manifest.name}://103/-/0:{source}/{chain.vm_id}/disk.0"
    for action in actions:
        if bench.driver.supports(action):
            called = bench.read(action, chain, URL=url, FORMAT="raw", TARGET=bench.new_path())
            called.require(Unavailable, f"the answer about {why}")
    bench.backup(bench.plan(chain, bench.guests.points[1])).require(Unavailable, f"the answer of {why}")
    bench.read("rm", chain).require(Unavailable, f"the answer of {why}")


@contextlib.contextmanager
def _moved_away(path: Path) -> Iterator[None]:
    away = path.with_name("away")
    path.rename(away)
    try:
        yield
    finally:
        away.rename(path)


def _restore_everything(bench: Bench, chain: Chain, damage: str, *, first: int = 0) -> list[Called]:
    """The calls that noticed the damage; `Unmet` if one handed out wrong content as good."""
    noticed = []
    for number in range(first, len(chain.increments)):
        called = bench.read("restore", chain, INCREMENT_ID=number)
        if called.exit_code != 0:
            noticed.append(_honest(called, damage))
            continue
        plan = RestorePlan.from_xml(called.element("PLAN"))
        for name, content in SMALL_FILES.items():
            if plan.file(name) != content:
                raise called.unmet(
                    f"{damage}: {name} of increment {number} is wrong in a plan that succeeded"
                )
        for stored in plan.disks:
            target = bench.new_path()
            called = bench.read("download", chain, URL=stored.url, FORMAT="raw", TARGET=target)
            if called.exit_code != 0:
                noticed.append(_honest(called, damage))
            elif problem := raw_problem(target, bench.guests.points[number].disks[stored.disk_id].reference):
                raise called.unmet(f"{damage}: increment {number}, disk {stored.disk_id}: {problem}")
            target.unlink(missing_ok=True)
    return noticed


def _honest(called: Called, damage: str) -> Called:
    if called.exit_code not in {DataCorrupt.exit_code, NotFound.exit_code if "missing" in damage else -1}:
        called.require(DataCorrupt, f"the answer when {damage}")
    return called


def _verify_reports(bench: Bench, chain: Chain, file: Path, damage: str, noticed: list[Called]) -> None:
    if not bench.driver.supports("verify"):
        if not noticed:
            raise Unmet(f"{damage} in {file}: no action noticed it")
        return
    called = bench.read("verify", chain)
    if called.exit_code == DataCorrupt.exit_code:
        return
    try:
        report = VerifyReport.from_xml(called.element("REPORT"))
    except OnedBackupError as error:
        raise called.unmet(error.message) from error
    if not any(backup.failures for backup in report.backups):
        raise called.unmet(f"{file}: {damage}, but REPORT names no failure")


@contextlib.contextmanager
def _watched_processes(values: list[str]) -> Iterator[set[str]]:
    """While inside, look for `values` in all processes' arguments and environments."""
    seen: set[str] = set()
    wanted = [value.encode() for value in values]
    stop = threading.Event()

    def watch() -> None:
        own = str(os.getpid())
        while not stop.wait(0.002):
            for process in Path("/proc").iterdir():
                if process.name.isdecimal() and process.name != own:
                    for name in ("cmdline", "environ"):
                        with contextlib.suppress(OSError):
                            data = (process / name).read_bytes()
                            if any(value in data for value in wanted):
                                seen.add(
                                    f"{name} of {data.partition(bytes(1))[0].decode('utf-8', 'replace')}"
                                )

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()
