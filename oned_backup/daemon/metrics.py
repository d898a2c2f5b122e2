"""What Prometheus may know: counted as operations end, and read from the catalogue when it asks.

Counters begin at zero with each start of the daemon, as Prometheus expects. A VM is
labelled by its id; `oned_backup_vm_info` has its name and host.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Summary, disable_created_metrics, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from oned_backup import __version__
from oned_backup.contract.exports import Reason
from oned_backup.model.datastore import Datastore
from oned_backup.model.vm import VmState
from oned_backup.store import Operation, OperationState, Store

_MIB = 1 << 20

disable_created_metrics()  # type: ignore[no-untyped-call]  # when each series began: more lines than everything else


class Metrics:
    """Counts what `observe` is told."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._operations = self._counter(
            "oned_backup_operations", "Operations that have ended.", "kind", "state"
        )
        self._seconds = self._summary("oned_backup_operation_seconds", "How long operations ran.", "kind")
        self._failures = self._counter(
            "oned_backup_vm_backup_failures", "Backups that failed.", "vm_id", "error"
        )
        self._fallbacks = self._counter(
            "oned_backup_disk_fallbacks",
            "Disks that were taken in full although an increment was due.",
            "vm_id",
            "reason",
        )
        self._vm_seconds = self._summary(
            "oned_backup_vm_backup_seconds", "How long good backups took.", "vm_id"
        )
        self._vm_bytes = self._summary("oned_backup_vm_backup_bytes", "What good backups store.", "vm_id")
        self._frozen = self._summary("oned_backup_vm_frozen_seconds", "How long guests were frozen.", "vm_id")

    def observe(self, operation: Operation) -> None:
        """Count an operation that has ended; one that is to be tried again does not count yet."""
        if not operation.state.is_final:
            return
        seconds = max((operation.ended_at or 0) - (operation.started_at or operation.queued_at), 0)
        self._operations.labels(operation.kind, operation.state.value).inc()
        self._seconds.labels(operation.kind).observe(seconds)
        if operation.kind != "backup" or operation.vm_id is None:
            return
        vm_id = str(operation.vm_id)
        if operation.state is OperationState.FAILED:
            error = json.loads(operation.error)["code"] if operation.error else "unknown"
            self._failures.labels(vm_id, error).inc()
        if operation.state is OperationState.DONE:
            self._vm_seconds.labels(vm_id).observe(seconds)
            self._observe_backup(vm_id, operation.result)

    def text(self, store: Store) -> bytes:
        """Everything in Prometheus' text format."""
        catalogue = CollectorRegistry()
        catalogue.register(_Catalogue(store))
        return generate_latest(catalogue) + self.counted()

    def counted(self) -> bytes:
        """What was counted since the daemon started."""
        return generate_latest(self._registry)

    def _observe_backup(self, vm_id: str, result: Any) -> None:
        self._vm_bytes.labels(vm_id).observe(int(result.get("size_mb", 0)) * _MIB)
        freeze = result.get("freeze", {})
        if freeze.get("method", "NONE") != "NONE":
            self._frozen.labels(vm_id).observe(freeze["window_ms"] / 1000)
        for disk in result.get("disks", ()):
            if disk["type"] == "FULL" and Reason(disk["reason"]).is_fallback:
                self._fallbacks.labels(vm_id, disk["reason"]).inc()

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _summary(self, name: str, text: str, *labels: str) -> Summary:
        return Summary(name, text, labels, registry=self._registry)


class _Catalogue:
    """What the catalogue says at the moment of asking."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def collect(self) -> Iterable[Metric]:
        """The gauges."""
        yield _gauge("oned_backup_info", "The daemon.", ("version",), [((__version__,), 1)])
        yield from self._vms()
        yield from self._datastores()
        waiting = [
            ((state.value,), self._store.journal.count(state))
            for state in (OperationState.QUEUED, OperationState.RUNNING)
        ]
        yield _gauge("oned_backup_operations_open", "Operations that are not over.", ("state",), waiting)

    def _vms(self) -> Iterable[Metric]:
        vms = self._store.rows("vm")
        found = self._store.points_of_vms()
        # One that is backed up no more must not raise an alarm for being backed up no more.
        current = {vm["id"] for vm in vms if vm["state"] != VmState.DONE.name}
        info = [((str(vm["id"]), vm["name"], vm["host"]), 1) for vm in vms if vm["id"] in current]
        yield _gauge("oned_backup_vm_info", "A VM's name and host.", ("vm_id", "name", "host"), info)
        for name, text, values in (
            ("restore_points", "Restore points.", {key: one.points for key, one in found.items()}),
            ("broken_points", "Damaged restore points.", {key: one.broken for key, one in found.items()}),
            (
                "last_success_timestamp_seconds",
                "When the newest good restore point was made.",
                {
                    key: one.last_good_at
                    for key, one in found.items()
                    if one.last_good_at is not None and key in current
                },
            ),
            (
                "last_proved_timestamp_seconds",
                "When a good restore point was last proved.",
                {key: one.last_proved_at for key, one in found.items() if one.last_proved_at is not None},
            ),
            (
                "last_backup_failed",
                "1 if the last backup failed.",
                {vm["id"]: int(bool(vm["error"])) for vm in vms if vm["id"] in current},
            ),
        ):
            yield _gauge(
                f"oned_backup_vm_{name}", text, ("vm_id",), [((str(key),), values[key]) for key in values]
            )

    def _datastores(self) -> Iterable[Metric]:
        stores = [Datastore(entry.element) for entry in self._store.find("datastore")]
        labels = ("datastore_id", "name")
        for name, text, value in (
            ("free_bytes", "Free space, as last measured.", lambda one: one.free_mb * _MIB),
            ("total_bytes", "Space in all, as last measured.", lambda one: one.total_mb * _MIB),
            ("enabled", "0 if new backups are refused.", lambda one: int(one.is_enabled)),
        ):
            rows = [((str(one.id), one.name), value(one)) for one in stores]
            yield _gauge(f"oned_backup_datastore_{name}", text, labels, rows)


def _gauge(
    name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for values, value in rows:
        family.add_metric(values, value)
    return family
