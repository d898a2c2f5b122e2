"""The bench on which a driver is judged: stores, chains of backups, and recorded calls.

Every call leaves a directory with the request, the output and a script that
repeats it; a failure names them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from oned_backup import xmldoc
from oned_backup.contract.actions import Kind
from oned_backup.contract.documents import Listing, StoredDisk
from oned_backup.contract.request import Backup, Request
from oned_backup.errors import OnedBackupError
from oned_backup.model.increments import BackupType, Increment
from oned_backup.places import default_state_dir
from oned_backup.runner.drivers import Driver
from oned_backup.runner.environment import Invocation, action_environment
from oned_backup.runner.kit.called import Called, write_repeat
from oned_backup.runner.kit.catalogue import Attempt, Chain, Store
from oned_backup.runner.kit.clause import NotApplicable, Unmet
from oned_backup.runner.kit.example_guests import ExampleGuests
from oned_backup.runner.kit.guest import MIB, Point, exported, raw_problem
from oned_backup.runner.kit.settings import Settings
from oned_backup.runner.process import Cancellation, Ending, Limits, run_process, start_process
from oned_backup.ssh.command import CONFIG_VARIABLE
from oned_backup.ssh.config_file import config_text, write_config

_KEPT_STDERR_BYTES = 4 * MIB


class Bench:
    """One driver, a directory to work in, and what it was told."""

    def __init__(self, driver: Driver, root: Path, settings: Settings) -> None:
        self.driver = driver
        self.root = root
        self.settings = settings
        self.guests = ExampleGuests(root)
        self.stream = "stream" in driver.manifest.features
        self.leaks: list[Called] = []
        self.chains: list[Chain] = []
        self.made_stores: list[Store] = []
        self._unfinished: dict[str, Attempt] = {}
        self.ssh_environment = _ssh_environment(root / "ssh", settings.ssh_config)
        self._numbers = itertools.count(1)
        known = [one.name for one in driver.manifest.parameters.values() if one.secret]
        # of a store that gets some of them, the others are for stores of another kind
        wanted = [name for name in known if name in settings.parameters] or known
        self.secrets = {
            name: settings.parameters.get(name) or f"kit-{secrets.token_hex(12)}" for name in wanted
        }
        for name in ("calls", "work", "exports", "stores", "out"):
            (root / name).mkdir(mode=0o700)

    def new_store(self) -> Store:
        """An empty store of the kit's own; the one given by BASE_PATH if there is one."""
        given = {name: value for name, value in self.settings.parameters.items() if name not in self.secrets}
        if self.settings.makes_stores():
            self.made_stores.append(self.settings.new_store(f"kit-{secrets.token_hex(4)}", given))
            return self.made_stores[-1]
        if "BASE_PATH" in given or "BASE_PATH" not in self.driver.manifest.parameters:
            return self._given_store
        path = self.root / "stores" / str(next(self._numbers)) / "store"
        path.mkdir(parents=True, mode=0o700)
        return Store({**given, "BASE_PATH": str(path)}, path)

    @cached_property
    def _given_store(self) -> Store:
        return Store(
            {name: value for name, value in self.settings.parameters.items() if name not in self.secrets},
            None,
        )

    def own_path(self, store: Store) -> Path:
        """Where `store` keeps its files, if that is below a directory of the kit's own."""
        if store.own_path is None:
            raise NotApplicable("the store is not the kit's own: nothing may be hidden or damaged in it")
        if sum(path.stat().st_size for path in store.own_path.rglob("*") if path.is_file()) < 4096:
            raise NotApplicable(f"the driver does not keep its data in files below {store.own_path}")
        return store.own_path

    @cached_property
    def changing_chain(self) -> Chain:
        """A chain with all of `guests.changing`, in a store of its own; whoever merges removes the result."""
        chain = self.new_chain(self.new_store())
        for point in self.guests.changing:
            self.must_backup(chain, point)
        return chain

    @cached_property
    def good_chain(self) -> Chain:
        """A chain with all of `guests.points`, for clauses that only read it."""
        chain = self.new_chain(self.new_store())
        for point in self.guests.points:
            self.must_backup(chain, point)
        return chain

    def new_chain(self, store: Store) -> Chain:
        """A VM without backups."""
        number = next(self._numbers)
        chain = Chain(store, 1000 + number, 2000 + number)
        self.chains.append(chain)
        return chain

    def plan(self, chain: Chain, point: Point, *, backup_id: str = "") -> Attempt:
        """The next backup of a chain."""
        chosen = backup_id or f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
        before = chain.increments
        backup = Backup(
            id=chosen,
            chain_id=before[0].source if before else chosen,
            increment_id=before[-1].id + 1 if before else 0,
            date=int(time.time()),
            parent_id=before[-1].source if before else "",
        )
        return Attempt(chain, point, backup)

    def backup(
        self,
        attempt: Attempt,
        *,
        limits: Limits | None = None,
        cancellation: Cancellation | None = None,
        on_start: Callable[[], None] = lambda: None,
        source_is_gone: bool = False,
    ) -> Called:
        """Call `backup` with the exports of its point, or with exports that are there no more."""
        directory = self.root / "exports" / str(next(self._numbers))
        increment_id = attempt.backup.increment_id
        with exported(attempt.point, directory, increment_id=increment_id, stream=self.stream) as exports:
            request = replace(
                self.request_for(attempt.chain.store, "backup", attempt=attempt), exports=exports
            )
            if source_is_gone:
                for disk in exports.disks:
                    Path(disk.path or disk.nbd_socket).unlink(missing_ok=True)
            called = self.call(
                "backup",
                request,
                source_dir=directory / "files",
                limits=limits,
                cancellation=cancellation,
                on_start=on_start,
            )
        shutil.rmtree(directory)
        if called.exit_code != 0:
            self._unfinished[attempt.backup.id] = attempt
        return called

    def record(self, attempt: Attempt, called: Called) -> None:
        """Enter a finished backup into the catalogue; `Unmet` if its answer is not one."""
        answer = called.answer()
        chain, backup = attempt.chain, attempt.backup
        kind = BackupType.INCREMENT if backup.increment_id else BackupType.FULL
        if not answer["SIZE_MB"].isdecimal():
            raise called.unmet(f"SIZE_MB={answer['SIZE_MB']!r} is not a whole number")
        chain.increments.append(
            Increment(
                backup.increment_id,
                backup.increment_id - 1,
                backup.date,
                int(answer["SIZE_MB"]),
                answer["BACKUP_ID"],
                kind,
            )
        )
        if chain.image_id not in chain.store.image_ids:
            chain.store.image_ids.append(chain.image_id)

    def must_backup(self, chain: Chain, point: Point) -> Attempt:
        """A backup that succeeds and is in the catalogue."""
        attempt = self.plan(chain, point)
        self.record(attempt, self.backup(attempt))
        return attempt

    def request_for(
        self,
        store: Store,
        action: str,
        *,
        chain: Chain | None = None,
        attempt: Attempt | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Request:
        """A request about a store, a chain of the catalogue, or a backup that may not be finished."""
        chain = attempt.chain if attempt else chain
        return Request(
            Kind.DATASTORE,
            f"op-{secrets.token_hex(6)}",
            action,
            backup=attempt.backup if attempt else None,
            vm=chain.vm if chain else None,
            datastore=self._datastore(store),
            image=chain.image if chain and chain.increments else None,
            options=options or {},
        )

    def read(self, action: str, chain: Chain, *, stdout_to: Path | None = None, **options: object) -> Called:
        """Call an action on a chain of the catalogue; options by their names."""
        given = {name: str(value) for name, value in options.items()}
        request = self.request_for(chain.store, action, chain=chain, options=given)
        if stdout_to is None:
            return self.call(action, request)
        with stdout_to.open("wb") as file:
            return self.call(action, request, stdout_fd=file.fileno())

    def cancel_backup(self, attempt: Attempt) -> Called:
        """Call `backup_cancel`."""
        self._unfinished.pop(attempt.backup.id, None)
        request = self.request_for(attempt.chain.store, "backup_cancel", attempt=attempt)
        return self.call("backup_cancel", request)

    def find(self, attempt: Attempt, action: str = "ls") -> Called:
        """Ask for a backup as if it were in the catalogue."""
        return self.read(action, attempt.supposed)

    def disks(self, chain: Chain, **options: int) -> dict[int, StoredDisk]:
        """What `ls` says, by disk id."""
        called = self.read("ls", chain, stdout_to=None, **options)
        try:
            listing = Listing.from_xml(called.element("LISTING"))
        except OnedBackupError as error:
            raise called.unmet(f"LISTING: {error.message}") from error
        return {disk.disk_id: disk for disk in listing.disks}

    def check_restored(self, chain: Chain, increment_id: int, point: Point) -> None:
        """`Unmet` unless every disk of an increment restores to the bytes of `point`."""
        disks = self.disks(chain, INCREMENT_ID=increment_id)
        for disk in point.disks:
            if disk.disk_id not in disks:
                raise Unmet(f"ls of increment {increment_id}: disk {disk.disk_id} is not listed")
            target = self.new_path()
            called = self.read("download", chain, URL=disks[disk.disk_id].url, FORMAT="raw", TARGET=target)
            called.answer()
            problem = raw_problem(target, disk.reference) if target.exists() else "TARGET was not made"
            if problem:
                raise called.unmet(f"increment {increment_id}, disk {disk.disk_id}: {problem}")
            target.unlink()

    def new_path(self) -> Path:
        """A file name that is not taken."""
        return self.root / "out" / str(next(self._numbers))

    def call(
        self,
        action: str,
        request: Request,
        *,
        source_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        stdin: bytes | None = None,
        stdout_fd: int | None = None,
        limits: Limits | None = None,
        cancellation: Cancellation | None = None,
        secret_values: Mapping[str, str] | None = None,
        on_start: Callable[[], None] = lambda: None,
    ) -> Called:
        """Run an action with nothing hidden; see `run.run_action` for what the daemon does."""
        _, executable = self.driver.executable(action)
        limits = limits or Limits(self.settings.timeout_s)
        directory = self.root / "calls" / f"{next(self._numbers):04}-{action}"
        directory.mkdir(mode=0o700)
        values = secret_values or self.secrets
        given = self.settings.parameters
        invocation = Invocation(
            directory,
            source_dir=source_dir,
            secrets={name: value for name, value in values.items() if name not in given},
            transfer="stream" if self.stream else "staged",
            environment={**self.ssh_environment, **(environment or {})},
        )
        variables = action_environment(self.driver, request, invocation, directory, limits)
        stdin = xmldoc.serialize(request.to_xml()).encode() if stdin is None else stdin
        write_repeat(directory, executable, variables, stdin)
        stderr = bytearray()
        with self._secrets_dir(values) as secrets_dir, self._work_dir() as work:
            on_start()
            start = time.monotonic()
            process = start_process(
                [str(executable)],
                environment={**variables, "ODB_SECRETS_DIR": str(secrets_dir)},
                directory=work,
                stdout_fd=stdout_fd,
            )
            ended = run_process(
                process,
                stdin=stdin,
                limits=limits,
                on_stderr=lambda piece: stderr.extend(piece[: _KEPT_STDERR_BYTES - len(stderr)]),
                cancellation=cancellation,
            )
            elapsed_s = time.monotonic() - start
        (directory / "stdout").write_bytes(ended.stdout)
        (directory / "stderr").write_bytes(stderr)
        code = -9 if ended.exit_code is None else ended.exit_code
        called = Called(action, code, ended.ending, ended.stdout, bytes(stderr), directory, elapsed_s)
        self._look_for_leaks(called)
        if ended.ending is Ending.DEADLINE:
            raise called.unmet(f"has not ended after {elapsed_s:.0f} s")
        return called

    def clean_up(self) -> None:
        """Remove what the check left in a store that is not its own, also of backups that failed."""
        for attempt in list(self._unfinished.values()):
            if attempt.chain.store is self.__dict__.get("_given_store"):
                with contextlib.suppress(Unmet):
                    self.cancel_backup(attempt)
                    self.read("rm", attempt.supposed, BACKUP_IDS=attempt.backup.id)
        for chain in self.chains:
            if chain.store.own_path is None and chain.increments:
                with contextlib.suppress(Unmet):
                    self.read("rm", chain)
        for store in self.made_stores:
            with contextlib.suppress(NotApplicable):
                self.settings.run("remove", store)

    def _look_for_leaks(self, called: Called) -> None:
        printed = called.stdout + called.stderr
        if any(len(value) >= 4 and value.encode() in printed for value in self.secrets.values()):
            self.leaks.append(called)

    def _datastore(self, store: Store) -> xmldoc.Element:
        return xmldoc.build(
            "DATASTORE",
            {
                "ID": 103,
                "NAME": "kit",
                "DS_MAD": self.driver.manifest.name,
                "BASE_PATH": store.parameters.get("BASE_PATH", ""),
                "TYPE": 3,
                "IMAGES": {"ID": [xmldoc.build("ID", number) for number in store.image_ids]},
                "TEMPLATE": store.parameters,
            },
        )

    @contextlib.contextmanager
    def _secrets_dir(self, values: Mapping[str, str]) -> Iterator[Path]:
        directory = self.root / "work" / f"secrets{next(self._numbers)}"
        directory.mkdir(mode=0o700)
        for name, value in values.items():
            path = directory / name
            path.touch(0o600)
            path.write_text(value)
        yield directory
        shutil.rmtree(directory)

    @contextlib.contextmanager
    def _work_dir(self) -> Iterator[Path]:
        directory = self.root / "work" / str(next(self._numbers))
        directory.mkdir(mode=0o700)
        yield directory
        shutil.rmtree(directory, ignore_errors=True)


def _ssh_environment(directory: Path, given: Path | None) -> dict[str, str]:
    """The client configuration for SSH.

    One that includes what was given; else the caller's, or the daemon's if it lies where it does by default.
    """
    if given is not None:
        return {CONFIG_VARIABLE: str(write_config(directory, config_text(directory, include=given)))}
    config = os.environ.get(CONFIG_VARIABLE, "") or str(default_state_dir() / "ssh" / "config")
    return {CONFIG_VARIABLE: config} if Path(config).is_file() else {}
