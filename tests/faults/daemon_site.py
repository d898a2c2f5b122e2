"""A daemon that looks at failpoints, and what its catalogue says, for simulated VMs and real ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lab import wait_for
from product import Product

from oned_backup import failpoints
from oned_backup.client import Client
from oned_backup.errors import OnedBackupError

#: the daemon has this long to end what its predecessor left
RECOVERY_S = 30.0


class DaemonSite:
    """A daemon in `directory`, whose path must be short, with one VM (0) and one store in `store`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = directory / "store"
        self.store.mkdir()
        self.product = Product(directory)
        self.client = Client(self.product.run_dir / "api/daemon.sock")
        self._armed = directory / "armed"

    def tear_down(self) -> None:
        """End the daemon."""
        self.product.stop()

    def start(self, **environment: str) -> None:
        """A daemon that looks at our failpoints, with further variables."""
        self.product.start({failpoints.VARIABLE: f"@{self._armed}", **environment})

    def restart(self, **environment: str) -> None:
        """Another daemon, after this one has ended in good order."""
        self.product.stop()
        self.start(**environment)

    def arm(self, armed: str = "") -> None:
        """From now on these failpoints act."""
        self._armed.write_text(armed)

    # --- operations

    def held_at(self, point: str, submit: Callable[[], str]) -> tuple[str, Path]:
        """An operation whose driver waits at a failpoint until the file, its gate, is removed."""
        gate = self.directory / "gate"
        gate.unlink(missing_ok=True)
        self.arm(f"{point}=wait:{gate}")
        operation_id = submit()
        wait_for(point, gate.exists, 60)
        self.arm()
        return operation_id, gate

    def held_backup(self, point: str) -> tuple[str, Path]:
        """The same for a backup of VM 0."""
        return self.held_at(point, lambda: self.submit("vms/0/backup"))

    def submit(self, path: str, body: Mapping[str, Any] | None = None, *, method: str = "post") -> str:
        """The id of a new operation."""
        call: Callable[..., Any] = getattr(self.client, method)
        answer = call(path) if method == "delete" else call(path, body or {})
        return str(answer["id"])

    def ended(self, operation_id: str, timeout_s: float = 60) -> dict[str, Any]:
        """The operation once it is over; `LabError` if that takes longer."""
        wait_for(
            f"end of {operation_id}",
            lambda: self.state(operation_id, wait_s=5) in {"DONE", "FAILED", "CANCELLED"},
            timeout_s,
        )
        return dict(self.client.get(f"operations/{operation_id}"))

    def done(self, operation_id: str) -> dict[str, Any]:
        """The result of an operation that must succeed."""
        ended = self.ended(operation_id)
        assert ended["state"] == "DONE", json.dumps(ended, indent=1)
        return dict(ended["result"])

    def set(self, **values: str) -> None:
        """Settings of the VM."""
        self.client.patch("vms/0/config", {"values": values})

    def settle(self) -> None:
        """Wait until nothing is queued or running any more."""
        wait_for("end of all operations", self.is_idle, 60)

    def is_idle(self) -> bool:
        """Whether the daemon lives, has recovered, and has nothing to do."""
        return not self.open_operations()

    def wait_recovered(self) -> None:
        """Every operation is over within the time that recovery has, and what it queued again as well."""
        began = time.monotonic()
        wait_for("end of all operations", self.is_idle, RECOVERY_S + 30)
        assert time.monotonic() - began < RECOVERY_S, "recovery took too long"

    def open_operations(self) -> list[str]:
        """The operations that are not over; not empty as long as that cannot be told."""
        try:
            if not self.client.get("status")["recovered"]:
                return ["recovery"]
            rows = self.client.get("operations")
        except OnedBackupError:
            return ["no daemon answers"]
        return [row["id"] for row in rows if row["state"] in {"QUEUED", "RUNNING"}]

    def state(self, operation_id: str, wait_s: float = 0) -> str:
        """Where an operation stands; empty if no daemon answers."""
        try:
            return str(self.client.get(f"operations/{operation_id}", wait_s=wait_s)["state"])
        except OnedBackupError:
            return ""

    # --- the catalogue

    def operations(self, kind: str) -> list[dict[str, Any]]:
        """All operations of a kind, newest first."""
        return [row for row in self.client.get("operations", limit=1000) if row["kind"] == kind]

    def chain(self) -> list[int]:
        """The increments of the newest image."""
        newest = self.newest_image()
        return [point["increment_id"] for point in self.points() if point["image_id"] == newest]

    def images(self) -> list[dict[str, Any]]:
        """All images with their restore points."""
        return [self.client.get(f"images/{row['id']}") for row in self.client.get("images")]

    def points(self) -> list[dict[str, Any]]:
        """All restore points, oldest first; `backup_id`, `image_id`, `increment_id`, `type`."""
        found = [
            {**increment, "image_id": image["id"]}
            for image in self.images()
            for increment in image["increments"]
        ]
        return sorted(found, key=lambda point: (point["image_id"], point["increment_id"]))

    def newest_image(self) -> int:
        """The image with the active chain."""
        return max(int(row["id"]) for row in self.client.get("images"))

    # --- what must hold after any fault

    def assert_tidy(self) -> None:
        """Nothing runs, lies about or waits that the catalogue does not know."""
        assert self.open_operations() == []
        assert list(self.store.glob("*/.*")) == []
        known = {point["backup_id"] for point in self.points()}
        assert {path.name for path in self.store.glob("0/*")} == known, "store and catalogue differ"
        wait_for("end of all drivers", lambda: not self.drivers(), 10)
        wait_for("removal of what operations and questions used", lambda: not self._used(), 10)

    def _used(self) -> list[Path]:
        return [*(self.product.state_dir / "work").iterdir(), *self.product.run_dir.glob("op-*.lock")]

    def drivers(self) -> list[int]:
        """The drivers of our daemons that live."""
        found = []
        for process in Path("/proc").iterdir():
            try:
                if process.name.isdecimal() and (process / "cwd").readlink().is_relative_to(
                    self.product.state_dir
                ):
                    found.append(int(process.name))
            except OSError:  # it has ended meanwhile
                continue
        return found
