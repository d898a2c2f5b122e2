"""The commands `oned-backup operation`."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import quote

import typer

from oned_backup.cli import follow, output
from oned_backup.cli.session import Json, client
from oned_backup.client import error_of
from oned_backup.errors import InvalidInput

app = typer.Typer(help="What the daemon does and did.", no_args_is_help=True)

_Id = Annotated[str, typer.Argument(metavar="OPERATION", help="Id of the operation.")]


def _path(operation: str) -> str:
    if not operation:
        raise InvalidInput("the id of an operation is not empty")
    return f"operations/{quote(operation, safe='')}"


@app.command("list")
def list_operations(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20,
    vm: Annotated[str | None, typer.Option(help="Of this VM only: id or name.")] = None,
    kind: Annotated[str | None, typer.Option(help="Of this kind only: backup, restore, …")] = None,
    *,
    failed: Annotated[
        bool, typer.Option("--failed", help="Only failed ones: why, what was undone, what to do.")
    ] = False,
    json: Json = False,
) -> None:
    """List the newest operations."""
    api = client()
    vm_id = None if vm is None else api.resolve("vm", vm)
    query = {"failed": "true"} if failed else {}
    operations = api.get("operations", limit=limit, vm_id=vm_id, kind=kind, **query)
    if json:
        output.print_json(operations)
    elif failed:
        print_failures(operations)
    else:
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
            empty="No operations yet." if vm is None and kind is None else "No such operations.",
        )


def print_failures(operations: list[dict[str, Any]]) -> None:
    """Each failed operation with its cause, what was undone and what to do next."""
    if not operations:
        output.warn("Nothing has failed.")
    for number, operation in enumerate(operations):
        if number:
            output.say("")
        of = "" if operation["vm_id"] is None else f" of VM {operation['vm_id']} ({operation['vm_name']})"
        output.say(f"{output.when(operation['ended_at'])}  {operation['kind']}{of} failed  {operation['id']}")
        output.print_fields([(f"  {name}", text) for name, text in failure_fields(operation)])


def failure_fields(operation: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to tell of a failed operation; a field may occur more than once."""
    failure, error = operation["failure"], operation["error"] or {}
    if failure is None:
        return []
    where = f"{failure['step']}: " if failure["step"] else ""
    return [
        ("cause", f"{where}{error.get('message', operation['state'])}"),
        ("code", f"{error['code']} (exit code {error['exit_code']})" if error else ""),
        *(("undone", text) for text in failure["undone"] or ["nothing was done yet that had to be"]),
        *(("left", text) for text in failure["left"]),
        ("next", failure["next"]),
    ]


@app.command()
def show(
    operation: _Id,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for its end first, and exit as it ended.")
    ] = False,
    json: Json = False,
) -> None:
    """Show an operation. Its steps, how far it is, its result, and if it failed what was undone."""
    api = client()
    found = api.get(_path(operation))
    if wait and found["ended_at"] is None:
        follow.follow(api, found)
        found = api.get(_path(operation))
    if json:
        output.print_json(found)
    else:
        _print_operation(found)
    if wait and found["state"] != "DONE":
        raise error_of(found)


def _print_operation(found: dict[str, Any]) -> None:
    blocker = found["waits_for"]
    waiting = found["not_before"] and found["error"]
    output.print_fields(
        [
            *((name, found[name]) for name in ("id", "kind", "state", "vm_id", "vm_name")),
            *((name, found[name]) for name in ("image_id", "datastore_id")),
            ("queued", output.when(found["queued_at"])),
            ("took", follow.elapsed(found)),
            ("waits for", f"{blocker['kind']} {blocker['id']}" if blocker else ""),
            ("tried again", output.when(found["not_before"]) if waiting else ""),
            ("after", found["error"]["message"] if waiting else ""),
            ("progress", _progress(found["progress"])),
            *failure_fields(found),
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
    message = f": {progress['message']}" if progress["message"] else ""
    if not progress["total_bytes"]:
        return f"{progress['step']}{message}"
    done, total = progress["done_bytes"], progress["total_bytes"]
    share = f"{output.size(done)} of {output.size(total)} ({done * 100 // total} %)"
    return f"{progress['step']}: {share}{message}"


@app.command()
def cancel(operation: _Id, *, json: Json = False) -> None:
    """Cancel an operation; what it began is undone first."""
    found = client().post(f"{_path(operation)}/cancel")
    if json:
        output.print_json(found)
    else:
        output.say(f"{found['kind']} {found['id']}: asked to end")
