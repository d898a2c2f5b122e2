"""Wait for an operation, showing how far it is, and end as it ended."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from oned_backup.cli.output import complain, duration, print_json, say, size, warn
from oned_backup.client import Client, error_of, wait_for_end
from oned_backup.errors import OnedBackupError, Salvaged

#: no bar for what is over sooner
_BAR_AFTER_S = 1.0

JSON = Mapping[str, Any]
Show = Callable[[JSON], None]

_WORDS = {
    "PLAN": "planning",
    "PREPARE": "freezing a view of the disks",
    "restore PREPARE": "making room",
    "download PREPARE": "making room",
    "STORE": "storing",
    "RECORD": "recording",
    "CLEAN": "cleaning up",
    "DISCARD": "discarding",
    "DOWNLOAD": "reading from the store",
    "PLACE": "putting in place",
    "DEFINE": "defining",
    "READ": "re-reading",
    "REMOVE": "removing",
    "MERGE": "merging",
    "SWITCH": "recording",
}


def conclude(client: Client, operation: JSON, *, wait: bool, as_json: bool, show: Show) -> None:
    """Wait for the operation (or not) and tell how it ended; raises its error, or `Salvaged`."""
    if not wait:
        if as_json:
            print_json(operation)
        else:
            say(operation["id"])
        return
    ended = follow(client, operation)
    if as_json:
        print_json(ended)
    elif ended["state"] == "DONE":
        show(ended)
    for note in ended["result"].get("notes", ()):
        if not as_json:
            warn(f"note: {note}")
    if ended["state"] != "DONE":
        raise error_of(ended)
    salvaged = ended["result"].get("salvaged")
    if salvaged:
        raise Salvaged(
            "; ".join(map(str, salvaged)), hint="Everything else was restored; the ranges named are zero."
        )


def conclude_many(
    client: Client,
    begin: Sequence[tuple[str, Callable[[], JSON]]],
    *,
    wait: bool,
    as_json: bool,
    show: Show,
    skip: type[OnedBackupError] | None = None,
) -> None:
    """Begin all, then wait for each (or not); one that fails keeps no other from it. JSON is a list.

    `begin`: of each its name, and what queues it. `skip`: such an error is told, and is none. If some failed
    an error is raised in the end, of the kind of their errors if that is one.
    """
    failed: list[OnedBackupError] = []
    skipped: list[str] = []

    @contextmanager
    def going_on(name: str) -> Iterator[None]:
        try:
            yield
        except OnedBackupError as error:
            if skip is not None and isinstance(error, skip):
                warn(f"skipped: {error.message}")
                skipped.append(name)
                return
            complain(error.message if name in error.message else f"{name}: {error.message}", error.hint)
            failed.append(error)

    begun: list[tuple[str, JSON]] = []
    for name, queue in begin:
        with going_on(name):
            begun.append((name, queue()))
    views = []
    for name, operation in begun:
        with going_on(name):
            if not as_json:
                conclude(client, operation, wait=wait, as_json=False, show=show)
                continue
            views.append(follow(client, operation) if wait else operation)
            if wait and views[-1]["state"] != "DONE":
                raise error_of(views[-1])
    if as_json:
        print_json(views)
    if failed:
        kinds = {type(error) for error in failed}
        kind = kinds.pop() if len(kinds) == 1 else OnedBackupError
        tried = len(begin) - len(skipped)
        raise kind(f"{len(failed)} of {tried} failed", hint="See `oned-backup operation list --failed`.")


def follow(client: Client, operation: JSON, *, quiet: bool = False, goes_on: bool = True) -> JSON:
    """The operation once it has ended. Interrupting the command cancels it unless it `goes_on`."""
    try:
        with _bar(quiet=quiet) as update:
            return wait_for_end(
                client, operation, update, lambda: warn("the daemon does not answer: waiting for it")
            )
    except KeyboardInterrupt:
        if not goes_on:
            client.post(f"operations/{operation['id']}/cancel")
            raise
        warn(f"{operation['kind']} {operation['id']} goes on in the daemon")
        warn(f"  oned-backup operation show {operation['id']} --wait    oned-backup operation cancel …")
        raise


def elapsed(operation: JSON) -> str:
    """How long the operation ran."""
    if operation["started_at"] is None or operation["ended_at"] is None:
        return ""
    return duration(operation["ended_at"] - operation["started_at"])


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[JSON], None]]:
    """A progress bar on stderr if that is a terminal and the work takes longer than a second."""
    if quiet or not sys.stderr.isatty():
        yield (lambda _view: None) if quiet else _waits_teller()
        return
    from rich.console import Console  # noqa: PLC0415 - loads slowly
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    began = time.monotonic()
    task = progress.add_task("waiting", total=None)
    started = False
    step = ""

    def update(view: JSON) -> None:
        nonlocal started, step, task
        if view["ended_at"] is not None:
            return
        if not started and time.monotonic() - began > _BAR_AFTER_S:
            progress.start()
            started = True
        now = view.get("progress") or {}
        if now.get("step") != step:
            step = now.get("step", "")
            progress.remove_task(task)  # a reset would keep the total of the step before
            task = progress.add_task(_description(view, step), total=None)
        progress.update(
            task,
            description=_description(view, step),
            completed=now.get("done_bytes", 0),
            total=now.get("total_bytes") or None,
        )

    try:
        yield update
    finally:
        if started:
            progress.stop()


def _waits_teller() -> Show:
    """Where there is no bar: a line for each reason why an operation waits to try again."""
    told: set[str] = set()

    def tell(view: JSON) -> None:
        if view["ended_at"] is None and view.get("not_before"):
            text = _description(view, "")
            if text not in told:
                warn(text)
            told.add(text)

    return tell


def _description(view: JSON, step: str) -> str:
    blocker = view.get("waits_for")
    if blocker:
        return f"waiting for {blocker['kind']} {blocker['id']}"
    if view.get("not_before"):
        return f"{view['kind']}: waiting to try again: {view['error']['message']}"
    words = _WORDS.get(f"{view['kind']} {step}") or _WORDS.get(step) or step.lower() or "queued"
    message = (view.get("progress") or {}).get("message", "")
    return f"{view['kind']}: {words}" + (f": {message}" if message else "")


def freeze_text(freeze: JSON) -> str:
    """The freeze window in words."""
    if not freeze or freeze.get("method", "NONE") == "NONE":
        return "not frozen"
    return f"frozen {freeze['window_ms']} ms ({freeze['method']})"


def sizes_text(disks: list[dict[str, Any]]) -> str:
    """The disks of a backup in words: `vda INCREMENT, vdb FULL (new-disk)`."""
    return ", ".join(
        f"{disk['target']} {disk['type']}"
        + (f" ({disk['reason']})" if disk["type"] == "FULL" else "")
        + (f" of {size(disk['size_bytes'])}" if "size_bytes" in disk else "")
        for disk in disks
    )
