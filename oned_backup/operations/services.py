"""What there is one of in a daemon: the store, the settings, and how drivers are called."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from oned_backup.config import Settings
from oned_backup.contract.actions import Kind
from oned_backup.contract.request import Request
from oned_backup.model.datastore import Datastore
from oned_backup.model.host import Host
from oned_backup.model.image import Image
from oned_backup.model.vm import Vm
from oned_backup.runner.ahead import Ahead, start_ahead
from oned_backup.runner.drivers import Driver, find_driver
from oned_backup.runner.run import Cancellation, Invocation, Limits, Log, Progress, run_action
from oned_backup.store import SecretBox, Store


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
    """The parts that all operations share. `run_action` is another one only in tests of failures."""

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
