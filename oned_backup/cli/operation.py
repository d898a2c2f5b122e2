"""The commands `oned-backup operation`."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from oned_backup.cli import follow, output
from oned_backup.cli.session import Json, client
from oned_backup.errors import InvalidInput

app = typer.Typer(help="What the daemon does and did.", no_args_is_help=True)

_Id = Annotated[str, typer.Argument(metavar="OPERATION", help="Id of the operation.")]


def _path(operation: str) -> str:
    if not operation:
        raise InvalidInput("the id of an operation is not empty")
    return f"operations/{quote(operation, safe='')}"


@app.command("list")
def list_operations(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20, *, json: Json = False
) -> None:
    """List the newest operations."""
    operations = client().get("operations", limit=limit)
    if json:
        output.print_json(operations)
        return
    output.print_table(
        ("ID", "KIND", "STATE", "VM>", "IMAGE>", "QUEUED", "TOOK>"),
        [
            (
                one["id"],
                one["kind"],
                one["state"],
                one["vm_id"],
                one["image_id"],
                output.when(one["queued_at"])[5:],
                follow.elapsed(one),
            )
            for one in operations
        ],
        empty="No operations yet.",
    )


@app.command()
def show(
    operation: _Id,
    *,
    wait: Annotated[bool, typer.Option("--wait", help="Wait for its end first.")] = False,
    json: Json = False,
) -> None:
    """Show an operation: its steps, how far it is, its result."""
    api = client()
    found = api.get(_path(operation))
    if wait and found["ended_at"] is None:
        follow.follow(api, found)
        found = api.get(_path(operation))
    if json:
        output.print_json(found)
        return
    error = found["error"] or {}
    blocker = found["waits_for"]
    output.print_fields(
        [
            *((name, found[name]) for name in ("id", "kind", "state", "vm_id", "image_id", "datastore_id")),
            ("queued", output.when(found["queued_at"])),
            ("took", follow.elapsed(found)),
            ("waits for", f"{blocker['kind']} {blocker['id']}" if blocker else ""),
            ("progress", _progress(found["progress"])),
            ("error", error.get("message")),
            ("hint", error.get("hint")),
        ]
    )
    for note in found["result"].get("notes", ()):
        output.say(f"note: {note}")
    output.say("")
    output.print_table(
        ("#>", "STEP", "STATE", "UNDOES", "TRY>", "TOOK>"),
        [
            (
                step["number"],
                step["name"],
                step["state"],
                step["undoes"],
                step["attempt"],
                follow.elapsed(step),
            )
            for step in found["steps"]
        ],
    )


def _progress(progress: dict[str, Any] | None) -> str:
    if not progress:
        return ""
    if not progress["total_bytes"]:
        return str(progress["step"])
    done, total = progress["done_bytes"], progress["total_bytes"]
    return f"{progress['step']}: {output.size(done)} of {output.size(total)} ({done * 100 // total} %)"


@app.command()
def cancel(operation: _Id, *, json: Json = False) -> None:
    """Cancel an operation; what it began is undone first."""
    found = client().post(f"{_path(operation)}/cancel")
    if json:
        output.print_json(found)
    else:
        output.say(f"{found['kind']} {found['id']}: asked to end")
