"""What is done at once with datastores, without an operation: made, changed, measured, forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oned_backup.contract.actions import Kind
from oned_backup.contract.driver_toml import DriverManifest
from oned_backup.contract.result import whole_number
from oned_backup.errors import Conflict, Misconfigured, OnedBackupError
from oned_backup.model.datastore import (
    Datastore,
    enabled,
    new_datastore,
    with_capacity,
    with_name,
    with_parameters,
)
from oned_backup.operations.caller import Caller, query_caller, secret_context
from oned_backup.operations.inventory import accept_key
from oned_backup.operations.services import Services
from oned_backup.operations.stored import list_disks
from oned_backup.store import OperationState, Transaction

#: for so long a measurement of a datastore is good enough to plan by
FRESH_S = 300


def create_datastore(
    services: Services, name: str, driver: str, values: Mapping[str, str], *, accept: str = ""
) -> Datastore:
    """The new datastore, measured once; nothing is added if its driver refuses it.

    `accept`: the fingerprint of its server's host key, which is known from now on.
    """
    manifest = services.driver(Kind.DATASTORE, driver).manifest
    parameters = manifest.checked_parameters(values)
    if accept:
        accept_key(services, _ssh_target(parameters), accept)
    element = services.store.create(
        "datastore",
        lambda datastore_id: (
            new_datastore(
                datastore_id,
                name=name,
                ds_mad=driver,
                parameters=_sealed(services, manifest, datastore_id, parameters),
            ).element
        ),
    )
    datastore_id = Datastore(element).id
    try:
        return measure(services, datastore_id)
    except OnedBackupError:
        services.store.delete("datastore", datastore_id)
        raise


def _ssh_target(parameters: Mapping[str, str]) -> str:
    """Where a datastore's driver goes by SSH; empty if it does not."""
    for user, host in (("RSYNC_USER", "RSYNC_HOST"), ("RESTIC_SFTP_USER", "RESTIC_SFTP_SERVER")):
        if parameters.get(host):
            return "@".join(filter(None, (parameters.get(user), parameters[host])))
    return ""


def update_datastore(
    services: Services, datastore_id: int, values: Mapping[str, str], *, name: str | None = None
) -> Datastore:
    """The datastore with changed parameters (empty: the default again), measured and enabled."""
    old = services.datastore(datastore_id)
    manifest = services.driver(Kind.DATASTORE, old.ds_mad).manifest
    sealed = old.sealed_parameters
    opened = {
        key: services.box.unseal(text, secret_context(datastore_id, key)) if key in sealed else text
        for key, text in old.parameters.items()
        if not (key in sealed and key in values)  # what is replaced may be lost: the key file was
    }
    parameters = manifest.checked_parameters({**opened, **values})
    if old.image_ids and parameters.get("BASE_PATH", "") != old.base_path:
        raise Conflict(
            f"datastore {datastore_id} keeps {len(old.image_ids)} images: its BASE_PATH cannot change",
            hint="Make another datastore, or move the files and mount them at the old path.",
        )

    def changed(element: Any) -> Datastore:
        new = with_parameters(Datastore(element), _sealed(services, manifest, datastore_id, parameters))
        new = enabled(new)
        return new if name is None else with_name(new, name)

    # Asked before it is stored: a wrong password would take the place of the only right one.
    caller = query_caller(services, "update")
    sizes = _capacity(changed(old.element), caller)
    if any(manifest.parameters[key].secret and parameters.get(key) != opened.get(key) for key in values):
        images = (services.image(image_id) for image_id in reversed(old.image_ids))
        if image := next((one for one in images if one.is_ready), None):
            list_disks(services, caller, image, datastore=changed(old.element))
    stored = services.store.change(
        "datastore", datastore_id, lambda element: with_capacity(changed(element), **sizes).element
    )
    services.measured_at.pop(datastore_id, None)
    return Datastore(stored)


def unreadable_secrets(services: Services) -> list[str]:
    """The secrets of datastores that this key file does not open, each with what to do about it."""
    found = []
    for entry in services.store.find("datastore"):
        datastore = Datastore(entry.element)
        for key in sorted(datastore.sealed_parameters):
            try:
                services.box.unseal(datastore.parameters[key], secret_context(datastore.id, key))
            except Misconfigured as error:
                found.append(f"{error.message}. {error.hint}")
    return found


def _sealed(
    services: Services, manifest: DriverManifest, datastore_id: int, parameters: Mapping[str, str]
) -> dict[str, str]:
    return {
        key: services.box.seal(value, secret_context(datastore_id, key))
        if manifest.parameters[key].secret
        else value
        for key, value in parameters.items()
    }


def delete_datastore(services: Services, datastore_id: int) -> None:
    """Forget a datastore that keeps nothing; what lies in the store itself is not touched."""
    with services.store.transaction() as tx:
        datastore = Datastore(tx.get("datastore", datastore_id).element)
        if datastore.image_ids:
            raise Conflict(
                f"datastore {datastore_id} ({datastore.name}) keeps {len(datastore.image_ids)} images",
                hint="Delete the images first: `oned-backup image delete ID`.",
            )
        _refuse_used(tx, datastore_id)
        tx.delete("datastore", datastore_id)


def _refuse_used(tx: Transaction, datastore_id: int) -> None:
    """`Conflict` while a backup goes into the datastore: it would be left there, known to nobody."""
    for operation in tx.journal.list(state=OperationState.RUNNING):
        plans = [step.result.get("plan", {}) for step in tx.journal.steps(operation.id)]
        if datastore_id in {operation.datastore_id, *(plan.get("datastore_id") for plan in plans)}:
            raise Conflict(
                f"datastore {datastore_id}: {operation.kind} {operation.id} is using it",
                hint="Wait till it is finished, or cancel it.",
            )


def measure(services: Services, datastore_id: int, caller: Caller | None = None) -> Datastore:
    """The datastore with its capacity as its driver measures it now."""
    asking = caller or query_caller(services, "monitor")
    sizes = _capacity(services.datastore(datastore_id), asking)
    return Datastore(
        services.store.change(
            "datastore", datastore_id, lambda element: with_capacity(Datastore(element), **sizes).element
        )
    )


def free_mb(services: Services, datastore_id: int, caller: Caller) -> int:
    """Free space in the datastore, at most `FRESH_S` old: its driver checks exactly when it stores."""
    measured_at = services.measured_at.get(datastore_id)
    now = services.clock()
    if measured_at is not None and 0 <= now - measured_at < FRESH_S:
        return services.datastore(datastore_id).free_mb
    found = measure(services, datastore_id, caller).free_mb
    services.measured_at[datastore_id] = now
    return found


def _capacity(datastore: Datastore, caller: Caller) -> dict[str, int]:
    answer = caller.datastore("monitor", datastore)
    return {key.lower(): whole_number(answer, key) for key in ("TOTAL_MB", "USED_MB", "FREE_MB")}
