"""Calls of drivers, on behalf of one operation or of one question of a user's.

A `Caller` knows the operation's id, how to tell its driver to stop, the lock that
its drivers inherit, and how long each action may take.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Request
from oned_backup.model.datastore import Datastore, without_secrets
from oned_backup.model.host import Host
from oned_backup.operations.services import Services
from oned_backup.runner.ahead import Ahead
from oned_backup.runner.drivers import Driver
from oned_backup.runner.run import Cancellation, Invocation, Limits, Log, Progress
from oned_backup.ssh.command import CONFIG_VARIABLE

#: begins the ids of calls outside any operation
QUERY_PREFIX = "query-"

#: which of `Settings.deadlines` an action has; the others answer a question
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


def query_caller(services: Services, what: str) -> Caller:
    """A caller for a question outside any operation."""
    return Caller(services, f"{QUERY_PREFIX}{secrets.token_hex(6)}", what)


def secret_context(datastore_id: int, parameter: str) -> str:
    """What a sealed parameter belongs to; sealing and unsealing must say the same."""
    return f"datastore/{datastore_id}/{parameter}"
