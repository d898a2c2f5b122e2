"""Our side: a daemon of its own, driven through its API, with the memory of its drivers watched."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import httpx

ROOT = Path(__file__).resolve().parents[2]


class Watch:
    """Looks again and again, in a thread of its own, while a `with` block runs."""

    _interval_s = 0.02

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._look()

    def _look(self) -> None:
        raise NotImplementedError


class RssWatch(Watch):
    """The peak memory (MiB) of processes whose command line ends with a driver's action."""

    def __init__(self, action: str) -> None:
        super().__init__()
        self.peak_mib = 0.0
        self._action = f"/{action}".encode()

    def _look(self) -> None:
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                if not any(word.endswith(self._action) for word in words[:3]):
                    continue
                for line in (entry / "status").read_text().splitlines():
                    if line.startswith("VmHWM:"):
                        self.peak_mib = max(self.peak_mib, int(line.split()[1]) / 1024)
            except OSError:
                continue


class SpaceWatch(Watch):
    """The most that files take which come and go in a folder, beside those that are there already."""

    _interval_s = 0.01

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._folder = folder
        self._present = set(folder.iterdir())

    def _look(self) -> None:
        taken = 0
        for path in set(self._folder.iterdir()) - self._present:
            with contextlib.suppress(OSError):
                taken += path.stat().st_blocks * 512
        self.peak_bytes = max(self.peak_bytes, taken)


class Product:
    """A daemon with one host and one fs datastore."""

    def __init__(self, directory: Path, uri: str) -> None:
        directory.mkdir()
        self.store = directory / "store"
        self.store.mkdir()
        config = directory / "config.toml"
        config.write_text(
            f'state_dir = "{directory}/state"\nrun_dir = "{directory}/run"\n'
            f'driver_dirs = ["{ROOT}/drivers"]\n'
        )
        self._log = (directory / "daemon.log").open("wb")
        self._daemon = subprocess.Popen(
            [Path(sys.prefix) / "bin" / "oned-backup", "--config", config, "serve"],
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
        )
        transport = httpx.HTTPTransport(uds=str(directory / "run" / "api" / "daemon.sock"))
        self._client = httpx.Client(transport=transport, base_url="http://daemon", timeout=60)
        deadline = time.monotonic() + 30
        while True:
            try:
                self.ask("GET", "/v1/status")
                break
            except httpx.TransportError:
                if time.monotonic() > deadline or self._daemon.poll() is not None:
                    raise
                time.sleep(0.05)
        self._host = self.ask("POST", "/v1/hosts", name="local", uri=uri)["id"]
        self._datastore = self.ask(
            "POST", "/v1/datastores", name="bench", driver="fs", values={"BASE_PATH": str(self.store)}
        )["id"]

    def ask(self, method: str, path: str, **body: Any) -> Any:
        """What the API answers."""
        reply = self._client.request(method, path, json=body or None)
        if reply.is_error:
            raise RuntimeError(f"{method} {path}: {reply.text}")
        return reply.json()

    def import_vm(self, name: str, **config: str) -> int:
        """The id of a VM, imported and configured."""
        self.ask("POST", f"/v1/hosts/{self._host}/import", domains=[name])
        vm_id = next(vm["id"] for vm in self.ask("GET", "/v1/vms") if vm["name"] == name)
        self.configure(vm_id, MODE="INCREMENT", **config)
        return int(vm_id)

    def configure(self, vm_id: int, **config: str) -> None:
        """Set BACKUP_CONFIG values."""
        self.ask("PATCH", f"/v1/vms/{vm_id}/config", values=config)

    def backup(self, vm_id: int, *, reset: bool = False) -> dict[str, Any]:
        """A finished backup operation, with `seconds` from its start to its end by the journal."""
        return self._finished(
            self.ask("POST", f"/v1/vms/{vm_id}/backup", datastore_id=self._datastore, reset=reset)
        )

    def restore(self, image_id: int, target: Path, **options: Any) -> dict[str, Any]:
        """A finished restore operation."""
        return self._finished(self.ask("POST", f"/v1/images/{image_id}/restore", to=str(target), **options))

    def delete(self, image_id: int) -> None:
        """Remove an image."""
        self._finished(self.ask("DELETE", f"/v1/images/{image_id}"))

    def close(self) -> None:
        """End the daemon."""
        self._client.close()
        self._daemon.terminate()
        self._daemon.wait(60)
        self._log.close()

    def _finished(self, operation: dict[str, Any]) -> dict[str, Any]:
        path = f"/v1/operations/{operation['id']}"
        while operation["state"] in {"QUEUED", "RUNNING"}:
            operation = self.ask("GET", f"{path}?wait_s=5&seen={operation['version']}")
        if operation["state"] != "DONE":
            raise RuntimeError(f"{operation['kind']}: {operation['state']}: {operation['error']}")
        operation["seconds"] = operation["ended_at"] - operation["started_at"]
        return operation
