"""What operations work with: the store, the settings, and calls of drivers.

A `Caller` calls drivers on behalf of one operation (or one query of a user):
it knows the operation's id, how to tell its driver to stop, and the lock that
its drivers inherit.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from oned_backup import xmldoc
from oned_backup.config import Settings
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Request
from oned_backup.errors import InvalidInput, Misconfigured, NotFound
from oned_backup.model.datastore import Datastore, without_secrets
from oned_backup.model.host import Host
from oned_backup.model.image import Image
from oned_backup.model.vm import Vm
from oned_backup.runner.ahead import Ahead, start_ahead
from oned_backup.runner.drivers import Driver, find_driver
from oned_backup.runner.run import Cancellation, Invocation, Limits, Log, Progress, run_action
from oned_backup.ssh.command import CONFIG_VARIABLE
from oned_backup.ssh.config_file import config_text, write_config, write_shared
from oned_backup.store import SecretBox, Store

#: begins the ids of calls outside any operation
QUERY_PREFIX = "query-"
#: option for a driver: none was called with this backup id before
NEW_ID: Mapping[str, str] = {"NEW_ID": "YES"}


class RunAction(Protocol):
    """The signature of `runner.run.run_action`."""

    def __call__(
        self,
        driver: Driver,
        action: str,
        request: Request,
        invocation: Invocation,
        *,
        limits: Limits,
        cancellation: Cancellation | None = None,
        progress: Progress | None = None,
        log: Log | None = None,
        stdout_fd: int | None = None,
        ahead: Ahead | None = None,
    ) -> dict[str, str]:
        """What the driver answered."""
        ...


@dataclass(frozen=True)
class Services:
    """What there is one of in a daemon. `run_action` is another one only in tests of failures."""

    store: Store
    settings: Settings
    box: SecretBox
    run_action: RunAction = run_action
    start_ahead: Callable[..., Ahead | None] = start_ahead
    clock: Callable[[], float] = time.time
    #: when the daemon last measured a datastore, by its id
    measured_at: dict[int, float] = field(default_factory=dict)

    def vm(self, vm_id: int) -> Vm:
        """The VM as the catalogue has it."""
        return Vm(self.store.get("vm", vm_id).element)

    def image(self, image_id: int) -> Image:
        """The backup image as the catalogue has it."""
        return Image(self.store.get("image", image_id).element)

    def datastore(self, datastore_id: int) -> Datastore:
        """The datastore as the catalogue has it."""
        return Datastore(self.store.get("datastore", datastore_id).element)

    def host(self, host_id: int) -> Host:
        """The host as the catalogue has it."""
        return Host(self.store.get("host", host_id).element)

    def driver(self, kind: Kind, name: str) -> Driver:
        """The driver of that kind and name."""
        return find_driver(self.settings.all_driver_dirs, kind, name)


@dataclass
class Caller:
    """Calls drivers for one operation; `budget_until` (monotonic) bounds all of its calls together."""

    services: Services
    operation_id: str
    operation_kind: str
    cancellation: Cancellation = field(default_factory=Cancellation)
    progress: Progress | None = None
    log: Log | None = None
    lock_fd: int | None = None
    source_dir: Path | None = None
    #: `stream`, or `staged` where the datastore's driver wants files
    transfer: str = "stream"
    budget_until: float | None = None
    #: drivers that were started before their request was known
    waiting: list[Ahead] = field(default_factory=list)

    def start_ahead(self, kind: Kind, name: str, action: str) -> None:
        """Start the driver of the step to come, so that it waits for its request; if it can do that."""
        ahead = self.services.start_ahead(
            self.services.driver(kind, name),
            action,
            work_root=self.services.settings.work_dir,
            operation_id=self.operation_id,
            lock_fd=self.lock_fd,
        )
        if ahead is not None:
            self.waiting.append(ahead)

    def datastore(self, action: str, datastore: Datastore, **fields: Any) -> dict[str, str]:
        """The answer of a datastore's driver; secrets go to it as files, never in the request."""
        driver = self.services.driver(Kind.DATASTORE, datastore.ds_mad)
        box = self.services.box
        opened = {
            name: box.unseal(text, secret_context(datastore.id, name))
            for name, text in datastore.sealed_parameters.items()
        }
        return self._call(driver, action, opened, datastore=without_secrets(datastore), **fields)

    def tm(self, action: str, name: str, **fields: Any) -> dict[str, str]:
        """The answer of the transfer manager driver `name`."""
        return self._call(self.services.driver(Kind.TM, name), action, {}, **fields)

    def vmm(self, action: str, host: Host, **fields: Any) -> dict[str, str]:
        """The answer of the driver that reaches the domains of `host`."""
        driver = self.services.driver(Kind.VMM, host.vm_mad)
        return self._call(driver, action, {}, host=host.element, **fields)

    def _call(
        self,
        driver: Driver,
        action: str,
        opened: Mapping[str, str],
        *,
        options: Mapping[str, str] | None = None,
        stdout_fd: int | None = None,
        deadline_s: float | None = None,
        **fields: Any,
    ) -> dict[str, str]:
        request = Request(
            kind=driver.manifest.kind,
            operation_id=self.operation_id,
            operation_kind=self.operation_kind,
            options=options or {},
            **fields,
        )
        invocation = Invocation(
            work_root=self.services.settings.work_dir,
            source_dir=self.source_dir,
            secrets=opened,
            transfer=self.transfer,
            lock_fd=self.lock_fd,
            environment={CONFIG_VARIABLE: str(self.services.settings.ssh_config)},
        )
        return self.services.run_action(
            driver,
            action,
            request,
            invocation,
            limits=self._limits(action, deadline_s),
            cancellation=self.cancellation,
            progress=self.progress,
            log=self.log,
            stdout_fd=stdout_fd,
            ahead=self._waiting_for(driver, action),
        )

    def _waiting_for(self, driver: Driver, action: str) -> Ahead | None:
        for ahead in self.waiting:
            if ahead.is_for(driver, action):
                self.waiting.remove(ahead)
                return ahead
        return None

    def _limits(self, action: str, deadline_s: float | None) -> Limits:
        settings = self.services.settings
        name = _DEADLINES.get(action, "query_s")
        deadline = deadline_s or float(getattr(settings.deadlines, name))
        inactivity = settings.inactivity_s if name == "transfer_s" else None
        limits = Limits(deadline_s=deadline, inactivity_s=inactivity)
        if self.budget_until is None:
            return limits
        left = max(self.budget_until - time.monotonic(), 0.5)
        return replace(limits, deadline_s=min(deadline, settings.deadlines.recovery_s, left), grace_s=2)


_DEADLINES = {
    "pre_backup": "pre_backup_s",
    "pre_backup_live": "pre_backup_s",
    "pre_restore": "pre_backup_s",
    "post_restore": "post_backup_s",
    "post_backup": "post_backup_s",
    "post_backup_live": "post_backup_s",
    "backup": "transfer_s",
    "download": "transfer_s",
    "verify": "transfer_s",
    "rm": "transfer_s",
    "increment_flatten": "transfer_s",
    "catalogue": "transfer_s",
    "define": "define_s",
}


def secret_context(datastore_id: int, parameter: str) -> str:
    """What a sealed parameter belongs to; sealing and unsealing must say the same."""
    return f"datastore/{datastore_id}/{parameter}"


def new_backup_id(now: float) -> str:
    """A fresh backup id: the time in UTC, and six random hex digits."""
    return f"{datetime.fromtimestamp(now, UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"


def query_caller(services: Services, what: str) -> Caller:
    """A caller for a question outside any operation."""
    return Caller(services, f"{QUERY_PREFIX}{secrets.token_hex(6)}", what)


def make_directories(settings: Settings) -> None:
    """Create the daemon's directories with their modes; what exists is set right."""
    for path, mode in (
        (settings.state_dir, 0o700),
        (settings.work_dir, 0o700),
        (settings.run_dir, 0o711),
        (settings.api_dir, 0o700),
        (settings.ssh_sockets_dir, 0o700),
        (settings.nbd_dir, 0o711),
    ):
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as error:
            raise Misconfigured(
                f"directory {path} cannot be made: {error.strerror}",
                hint="Set state_dir and run_dir to where the daemon may write.",
            ) from error
        if path.stat().st_uid == os.geteuid():
            path.chmod(mode)


def write_ssh_config(settings: Settings) -> None:
    """Make the client configuration that all drivers use for SSH; accepted host keys stay."""
    ssh = settings.ssh
    directory = settings.ssh_config.parent
    text = config_text(
        directory,
        identity_file=ssh.identity_file,
        include=ssh.include,
        connect_timeout_s=ssh.connect_timeout_s,
        keepalive_s=ssh.keepalive_s,
    )
    write_config(directory, text)
    write_shared(directory, settings.ssh_sockets_dir)


def resolve(store: Store, kind: str, name_or_id: str) -> int:
    """The id of the document that a user means by its id or its name."""
    what = "VM" if kind == "vm" else kind
    if name_or_id.isdecimal() and len(name_or_id) < 10:
        return xmldoc.integer(store.get(kind, int(name_or_id)).element, "ID")
    found = [xmldoc.integer(entry.element, "ID") for entry in store.find(kind, name=name_or_id)]
    if len(found) == 1:
        return found[0]
    if found:
        ids = ", ".join(map(str, found))
        raise InvalidInput(f"{len(found)} {what}s are named '{name_or_id[:64]}'", hint=f"Use the id: {ids}.")
    raise NotFound(
        f"there is no {what} '{name_or_id[:64]}'", hint=f"`oned-backup {kind} list` shows what there is."
    )
