"""The HTTP API of the daemon, for the command line and scripts: JSON over a unix socket.

Errors are `{code, message, hint, exit_code}`. Whoever may enter the socket's
directory (0700) may do everything; there are no users here.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any
from urllib.parse import quote

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from oned_backup import __version__
from oned_backup.api import views
from oned_backup.api.bodies import (
    BackupBody,
    ConfigBody,
    DatastoreBody,
    DatastoreChange,
    DownloadBody,
    HostBody,
    HostChange,
    ImportBody,
    KeyBody,
    PinBody,
    RestoreBody,
    VerifyBody,
    given,
)
from oned_backup.api.limits import BodyLimit
from oned_backup.api.naming import resolve
from oned_backup.contract.actions import Kind
from oned_backup.daemon import requests
from oned_backup.daemon.service import Service
from oned_backup.errors import (
    Busy,
    Conflict,
    DriverBug,
    DriverFailed,
    InvalidInput,
    Misconfigured,
    NoSpace,
    NotFound,
    OnedBackupError,
    PermissionDenied,
    Unavailable,
    Unsupported,
)
from oned_backup.model.datastore import Datastore
from oned_backup.model.host import Host
from oned_backup.operations import datastores, inventory, retention, scrub
from oned_backup.operations.caller import query_caller
from oned_backup.operations.kinds import KINDS
from oned_backup.operations.stored import list_disks, stored_manifest
from oned_backup.store import OperationState

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 1024 * 1024
LONGEST_WAIT_S = 30.0
_MOST_OPERATIONS = 1000
_MOST_WAITING = 512

#: of a value in a request, which its name tells as well
_PLACES = frozenset({"body", "path", "query"})
_STATUS: tuple[tuple[type[OnedBackupError], int], ...] = (
    (InvalidInput, 400),
    (PermissionDenied, 403),
    (NotFound, 404),
    (Conflict, 409),
    (Misconfigured, 422),
    (Unsupported, 501),
    (DriverFailed, 502),
    (DriverBug, 502),
    (Busy, 503),
    (Unavailable, 503),
    (NoSpace, 507),
)


def _long(rows: list[dict[str, Any]]) -> Response:
    """A long list of plain data, without FastAPI's look at every value of it."""
    text = json.dumps(rows, ensure_ascii=False, separators=(",", ":"))
    return Response(text, media_type="application/json")


def make_app(service: Service) -> FastAPI:
    """The API over a started service."""
    app = FastAPI(title="oned-backup", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimit, max_bytes=MAX_BODY_BYTES)
    _add_error_handlers(app)
    _add_general(app, service)
    _add_hosts(app, service)
    _add_vms(app, service)
    _add_datastores(app, service)
    _add_images(app, service)
    _add_operations(app, service)
    return app


def _path(request: Request) -> str:
    """The path for messages and the log, whatever bytes it is made of."""
    return quote(str(request.scope["path"])[:200], errors="replace")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(OnedBackupError)
    def known(_request: Request, error: OnedBackupError) -> JSONResponse:
        status = next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
        return JSONResponse(error.to_json(), status)

    @app.exception_handler(RequestValidationError)
    def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in _PLACES)
        return JSONResponse(InvalidInput(f"{where}: {first['msg']}").to_json(), 400)

    @app.exception_handler(OverflowError)
    def too_large(_request: Request, _error: OverflowError) -> JSONResponse:
        return JSONResponse(InvalidInput("a number is too large for an id").to_json(), 400)

    @app.exception_handler(HTTPException)
    def unknown_path(request: Request, error: HTTPException) -> JSONResponse:
        text = f"{request.method} {_path(request)}: {error.detail}"
        return JSONResponse(NotFound(text).to_json(), error.status_code)

    @app.exception_handler(Exception)
    def fault(request: Request, error: Exception) -> JSONResponse:
        logger.error("%s %s", request.method, _path(request), exc_info=error)
        text = f"internal error: {type(error).__name__}"
        known = OnedBackupError(text, hint="The daemon's log has the traceback.")
        return JSONResponse(known.to_json(), 500)


def _add_general(app: FastAPI, service: Service) -> None:
    store = service.services.store

    @app.get("/v1/status")
    def status() -> Any:
        journal = store.journal
        return {
            "version": __version__,
            "installation": store.installation,
            "started_at": service.started_at,
            "recovered": service.recovered.is_set(),
            "running": journal.count(OperationState.RUNNING),
            "queued": journal.count(OperationState.QUEUED),
            "state_dir": str(service.settings.state_dir),
        }

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(service.metrics.text(store), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/documents/{kind}/{number}")
    def document(kind: str, number: int) -> Any:
        return {"xml": views.document(store, kind, number)}

    @app.get("/v1/resolve")
    def resolved(kind: str, ref: str) -> Any:
        return {"id": resolve(store, kind, ref)}


def _add_hosts(app: FastAPI, service: Service) -> None:
    services = service.services

    @app.get("/v1/hosts")
    def hosts() -> Any:
        return [views.host_row(Host(entry.element)) for entry in services.store.find("host")]

    @app.post("/v1/hosts")
    def add(body: HostBody) -> Any:
        host = inventory.add_host(
            services,
            body.name,
            uri=body.uri,
            vm_mad=body.vmm,
            tm_mad=body.tm,
            accept=body.accept_host_key,
        )
        return views.host_row(host)

    @app.post("/v1/ssh/keys")
    def accept_key(body: KeyBody) -> Any:
        key = inventory.accept_key(services, body.target, body.fingerprint)
        return {"name": key.name, "fingerprint": key.fingerprint}

    @app.get("/v1/hosts/{host_id}")
    def show(host_id: int) -> Any:
        error, found = None, []
        try:
            found = list(inventory.look_at_host(services, host_id))
        except (Unavailable, Busy) as trouble:
            error = trouble.to_json()
        known = {row["uuid"]: row["id"] for row in services.store.rows("vm")}
        domains = [
            {"name": one.name, "uuid": one.uuid, "state": one.state.value, "vm_id": known.get(one.uuid)}
            for one in found
        ]
        return {**views.host_row(services.host(host_id)), "domains": domains, "unreachable": error}

    @app.patch("/v1/hosts/{host_id}")
    def update(host_id: int, body: HostChange) -> Any:
        return views.host_row(inventory.update_host(services, host_id, body.values))

    @app.delete("/v1/hosts/{host_id}")
    def remove(host_id: int, *, force: bool = False) -> Any:
        inventory.remove_host(services, host_id, force=force)
        return {}

    @app.post("/v1/hosts/{host_id}/import")
    def import_vms(host_id: int, body: ImportBody) -> Any:
        return _long(inventory.import_vms(services, host_id, body.domains, every=body.all))


def _add_vms(app: FastAPI, service: Service) -> None:
    services = service.services

    @app.get("/v1/vms")
    def vms() -> Any:
        return _long(views.vm_rows(services.store))

    @app.get("/v1/vms/{vm_id}")
    def show(vm_id: int) -> Any:
        return views.vm_view(services.store, services.vm(vm_id))

    @app.delete("/v1/vms/{vm_id}")
    def forget(vm_id: int) -> Any:
        vm = inventory.forget_vm(services, vm_id)
        return {"id": vm.id, "name": vm.name, "images": len(services.store.rows("image", vm_id=vm_id))}

    @app.patch("/v1/vms/{vm_id}/config")
    def configure(vm_id: int, body: ConfigBody) -> Any:
        vm, ended = inventory.configure_vm(services, vm_id, body.values)
        return {**views.vm_view(services.store, vm), "chain_ended": ended}

    @app.post("/v1/vms/{vm_id}/backup")
    def backup(vm_id: int, body: BackupBody) -> Any:
        return views.operation_view(service, requests.backup(service, vm_id, **given(body)))

    @app.post("/v1/vms/{vm_id}/backup-cancel")
    def cancel(vm_id: int) -> Any:
        return views.operation_view(service, requests.cancel_backup(service, vm_id))

    @app.post("/v1/vms/{vm_id}/untrack")
    def untrack(vm_id: int) -> Any:
        return views.operation_view(service, requests.untrack(service, vm_id))

    @app.get("/v1/vms/{vm_id}/retention")
    def retention_plan(vm_id: int) -> Any:
        with services.store.transaction() as tx:
            return retention.verdicts_view(retention.look(services, tx, vm_id))

    @app.post("/v1/vms/{vm_id}/retention")
    def retain(vm_id: int) -> Any:
        return views.operation_view(service, requests.retention(service, vm_id))


def _add_datastores(app: FastAPI, service: Service) -> None:
    services = service.services

    @app.get("/v1/drivers/datastore/{name}")
    def driver(name: str) -> Any:
        manifest = services.driver(Kind.DATASTORE, name).manifest
        return {
            "name": manifest.name,
            "secrets": [one.name for one in manifest.parameters.values() if one.secret],
        }

    @app.get("/v1/datastores")
    def all_datastores() -> Any:
        return [views.datastore_row(Datastore(entry.element)) for entry in services.store.find("datastore")]

    @app.post("/v1/datastores")
    def create(body: DatastoreBody) -> Any:
        return views.datastore_view(
            datastores.create_datastore(
                services, body.name, body.driver, body.values, accept=body.accept_host_key
            )
        )

    @app.get("/v1/datastores/{datastore_id}")
    def show(datastore_id: int) -> Any:
        datastore = services.datastore(datastore_id)
        return {**views.datastore_view(datastore), "proof": scrub.view(services, datastore)}

    @app.patch("/v1/datastores/{datastore_id}")
    def update(datastore_id: int, body: DatastoreChange) -> Any:
        return views.datastore_view(
            datastores.update_datastore(services, datastore_id, body.values, name=body.name)
        )

    @app.delete("/v1/datastores/{datastore_id}")
    def delete(datastore_id: int) -> Any:
        datastores.delete_datastore(services, datastore_id)
        return {}

    @app.post("/v1/datastores/{datastore_id}/monitor")
    def monitor(datastore_id: int) -> Any:
        return views.datastore_view(datastores.measure(services, datastore_id))

    @app.post("/v1/datastores/{datastore_id}/import")
    def import_store(datastore_id: int) -> Any:
        return views.operation_view(service, requests.import_store(service, datastore_id))

    @app.post("/v1/datastores/{datastore_id}/prune")
    def prune(datastore_id: int) -> Any:
        return views.operation_view(service, requests.prune(service, datastore_id))

    @app.post("/v1/datastores/{datastore_id}/scrub")
    def read_again(datastore_id: int) -> Any:
        return views.operation_view(service, requests.scrub(service, datastore_id))


def _add_images(app: FastAPI, service: Service) -> None:
    services = service.services

    @app.get("/v1/images")
    def images(vm_id: int | None = None) -> Any:
        return _long(views.image_rows(services.store, vm_id))

    @app.get("/v1/images/{image_id}")
    def show(image_id: int) -> Any:
        return views.image_view(services.store, services.image(image_id))

    @app.get("/v1/images/{image_id}/manifest")
    def manifest(image_id: int, increment_id: int | None = None) -> Any:
        return {"text": stored_manifest(services, services.image(image_id), increment_id)}

    @app.get("/v1/images/{image_id}/disks")
    def disks(image_id: int, increment_id: int | None = None) -> Any:
        listing = list_disks(services, query_caller(services, "ls"), services.image(image_id), increment_id)
        return [vars(disk) for disk in listing.disks]

    @app.post("/v1/images/{image_id}/verify")
    def verify(image_id: int, body: VerifyBody) -> Any:
        return views.operation_view(service, requests.verify(service, image_id, given(body)))

    @app.post("/v1/images/{image_id}/restore")
    def restore(image_id: int, body: RestoreBody) -> Any:
        return views.operation_view(service, requests.restore(service, image_id, given(body)))

    @app.delete("/v1/images/{image_id}")
    def delete(image_id: int, *, force: bool = False, increment_id: int | None = None) -> Any:
        if increment_id is None:
            return views.operation_view(service, requests.delete(service, image_id, force=force))
        return views.operation_view(service, requests.delete_increment(service, image_id, increment_id))

    @app.post("/v1/images/{image_id}/pin")
    def pin(image_id: int, body: PinBody) -> Any:
        image = requests.pin(service, image_id, body.increment_id, pinned=body.pinned)
        return views.image_view(services.store, image)

    @app.post("/v1/downloads")
    def download(body: DownloadBody) -> Any:
        return views.operation_view(service, requests.download(service, given(body)))


def _add_operations(app: FastAPI, service: Service) -> None:
    journal = service.services.store.journal

    @app.get("/v1/operations")
    def operations(
        limit: Annotated[int, Query(ge=1, le=_MOST_OPERATIONS)] = 50,
        state: OperationState | None = None,
        kind: str | None = None,
        vm_id: int | None = None,
        *,
        failed: bool = False,
    ) -> Any:
        """The newest operations. `failed`: only such, with what was undone and what to do next."""
        if kind is not None and kind not in KINDS:
            raise InvalidInput(
                f"there are no operations of kind '{kind[:40]}'", hint=f"Kinds are {', '.join(KINDS)}."
            )
        if failed:
            found = journal.list(state=OperationState.FAILED, kind=kind, vm_id=vm_id, limit=limit)
            return [views.failed_row(service.services.store, entry) for entry in found]
        found = journal.list(state=state, kind=kind, vm_id=vm_id, limit=limit)
        return [views.operation_row(entry) for entry in found]

    # Threads of their own: many who wait must not keep others from being answered.
    waiting = CapacityLimiter(_MOST_WAITING)

    def wait_for(operation_id: str, seen: int, wait_s: float) -> Any:
        operation, version = service.wait_for(operation_id, seen, wait_s)
        return views.operation_view(service, operation, version=version)

    @app.get("/v1/operations/{operation_id}")
    async def show(
        operation_id: str, wait_s: Annotated[float, Query(ge=0, le=LONGEST_WAIT_S)] = 0, seen: int = 0
    ) -> Any:
        if wait_s:
            return await to_thread.run_sync(wait_for, operation_id, seen, wait_s, limiter=waiting)
        return await to_thread.run_sync(as_it_is, operation_id)

    def as_it_is(operation_id: str) -> Any:
        return views.operation_view(service, journal.get(operation_id), steps=journal.steps(operation_id))

    @app.post("/v1/operations/{operation_id}/cancel")
    def cancel(operation_id: str) -> Any:
        return views.operation_view(service, service.cancel(operation_id))
