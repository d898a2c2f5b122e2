"""The commands `oned-backup vm`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import typer

from oned_backup.cli import follow, output
from oned_backup.cli.operation import failure_fields
from oned_backup.cli.session import Json, Wait, Xml, client, key_values, print_document
from oned_backup.client import Client, error_of
from oned_backup.errors import InvalidInput, NothingToBackUp

app = typer.Typer(help="Virtual machines and their backups.", no_args_is_help=True)

_Ref = Annotated[str, typer.Argument(metavar="VM", help="Id or name.")]


@app.command("import")
def import_vms(
    host: Annotated[str, typer.Argument(metavar="HOST", help="Id or name of the host.")],
    domains: Annotated[list[str] | None, typer.Argument(metavar="DOMAIN", help="Names or UUIDs.")] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All domains of the host.")] = False,
    json: Json = False,
) -> None:
    """Import domains of a host. Importing one again changes nothing."""
    api = client()
    body = {"domains": domains or [], "all": every}
    found = api.post(f"hosts/{api.resolve('host', host)}/import", body)
    if json:
        output.print_json(found)
        return
    output.print_table(
        ("ID>", "NAME", "STATE", "RESULT"),
        [(vm["id"], vm["name"], vm["state"], vm["result"]) for vm in found],
        empty="The host has no domains.",
    )


@app.command("list")
def list_vms(*, json: Json = False) -> None:
    """List the VMs. The last good backup, when one was last proved, and whether the last try failed."""
    vms = client().get("vms")
    if json:
        output.print_json(vms)
        return
    output.print_table(
        ("ID>", "NAME", "STATE", "MODE", "BACKUPS>", "LAST GOOD", "VERIFIED", "RESULT"),
        [
            (
                vm["id"],
                vm["name"],
                vm["state"],
                vm["mode"],
                vm["backups"],
                output.minute(vm["last_backup"] and vm["last_backup"]["stored_at"]),
                output.minute(vm["last_verified_at"]),
                "FAILED" if vm["error"] else "ok" if vm["backups"] else "",
            )
            for vm in vms
        ],
        empty="No VMs. Import some: oned-backup vm import HOST --all",
    )
    if any(vm["error"] for vm in vms):
        output.warn("Why, and what to do: oned-backup operation list --failed")


def _settings(vm: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What `vm set` can change: without the ids of the chain."""
    return [(key, value) for key, value in vm["config"].items() if not key.endswith("_ID")]


def _ago(seconds: float | None) -> str:
    """A time and how long ago that was; `never` for none."""
    return f"{output.when(seconds)} ({output.age(seconds)} ago)" if seconds else "never"


@app.command()
def show(ref: _Ref, *, json: Json = False, xml: Xml = False) -> None:
    """Show how a VM is backed up. Its disks, and why one is left out; its backups."""
    api = client()
    vm_id = api.resolve("vm", ref)
    if xml:
        print_document(api, "vm", vm_id)
        return
    vm = api.get(f"vms/{vm_id}")
    if json:
        output.print_json(vm)
        return
    chain = vm["chain"]
    output.print_fields(
        [
            *((name, vm[name]) for name in ("id", "name", "uuid", "state", "host")),
            ("last good", _ago(vm["last_backup"] and vm["last_backup"]["stored_at"])),
            ("last proved", _ago(vm["last_verified_at"])),
            ("chain", f"image {chain['image_id']}, increment {chain['increment_id']}" if chain else "none"),
            *_settings(vm),
        ]
    )
    output.say("")
    output.print_table(
        ("DISK>", "TARGET", "FORMAT", "SIZE>", "BACKED UP", "SOURCE"),
        [
            (
                disk["disk_id"],
                disk["target"],
                disk["format"],
                output.size_mb(disk["size_mb"]),
                "yes" if disk["included"] else f"no: {disk['reason']}",
                disk["source"],
            )
            for disk in vm["disks"]
        ],
    )
    if vm["images"]:
        output.say("")
        print_images(vm["images"])
    failed = vm["last_failure"]
    if failed:
        output.say("")
        since = " (a later one succeeded)" if failed["succeeded_since"] else ""
        output.say(f"last failed backup: {output.when(failed['ended_at'])}  {failed['id']}{since}")
        output.print_fields([(f"  {name}", text) for name, text in failure_fields(failed)])


def print_images(images: list[dict[str, Any]]) -> None:
    """The table of images."""
    output.print_table(
        ("ID>", "VM", "STORE", "STATE", "POINTS>", "SIZE>", "NEWEST", "VERIFIED"),
        [
            (
                image["id"],
                f"{image['vm_id']} {image['vm_name']}".rstrip(),
                image["datastore"],
                image["state"],
                image["restore_points"],
                output.size_mb(image["size_mb"]),
                output.minute(image["newest_at"]),
                output.minute(image["verified_at"]),
            )
            for image in images
        ],
        empty="No backups. Make one: oned-backup vm backup VM",
    )


@app.command("set")
def configure(
    ref: _Ref,
    values: Annotated[list[str], typer.Argument(metavar="KEY=VALUE", help="MODE, KEEP_LAST, FS_FREEZE, …")],
    *,
    json: Json = False,
) -> None:
    """Change how a VM is backed up. An empty value restores the default.

    How: MODE=INCREMENT or FULL, FS_FREEZE=AGENT, SUSPEND or NONE, CHAIN_LENGTH=n (a full one after so many).

    Which disks: DISK_IDS=0,2 (empty: all that can be), BACKUP_VOLATILE=YES or NO.

    What is kept: KEEP_LAST, KEEP_DAILY, KEEP_WEEKLY, KEEP_MONTHLY, KEEP_YEARLY=n; all empty: everything.
    """
    api = client()
    vm = api.patch(f"vms/{api.resolve('vm', ref)}/config", {"values": key_values(values)})
    if json:
        output.print_json(vm)
        return
    output.print_fields(_settings(vm))
    if vm["chain_ended"]:
        output.warn("note: this ends the active chain: the next backup is a full one")


@app.command()
def backup(
    refs: Annotated[list[str] | None, typer.Argument(metavar="VM", help="Ids or names.")] = None,
    datastore: Annotated[
        str | None, typer.Option("-d", "--datastore", help="Id or name; a chain goes on where it is.")
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="All VMs that are on a host.")] = False,
    reset: Annotated[bool, typer.Option("--reset", help="Begin a new chain.")] = False,
    wait: Wait = True,
    json: Json = False,
) -> None:
    """Back up VMs, running or off.

    Several are backed up side by side, as far as the daemon's limits let them. If some fail, the others are
    backed up all the same. With --all, VMs without a disk to back up are named and skipped.
    """
    if every == bool(refs):
        raise InvalidInput("name the VMs to back up, or use --all")
    api = client()
    body = {
        "reset": reset,
        "datastore_id": None if datastore is None else api.resolve("datastore", datastore),
    }
    if not every and len(refs or ()) == 1:
        operation = api.post(f"vms/{api.resolve('vm', refs[0] if refs else '')}/backup", body)
        follow.conclude(api, operation, wait=wait, as_json=json, show=_show_backup)
        return
    vm_ids = list(dict.fromkeys(api.resolve("vm", ref) for ref in refs or ()))
    if every:
        vm_ids = [vm["id"] for vm in api.get("vms") if vm["host_id"] >= 0 and vm["state"] != "DONE"]
    begin = [(f"VM {vm_id}", partial(api.post, f"vms/{vm_id}/backup", body)) for vm_id in vm_ids]
    if not begin:
        output.warn("No VMs on any host. Import some: oned-backup vm import HOST --all")
    skip = NothingToBackUp if every else None
    follow.conclude_many(api, begin, wait=wait, as_json=json, show=_show_backup, skip=skip)


def _show_backup(operation: Mapping[str, Any]) -> None:
    result = operation["result"]
    output.say(
        f"VM {result['vm_id']}: image {result['image_id']}, increment {result['increment_id']}"
        f" ({result['type']}, {output.size_mb(result['size_mb'])}) in {follow.elapsed(operation)},"
        f" {follow.freeze_text(result.get('freeze', {}))}"
    )
    output.say(f"  disks: {follow.sizes_text(result['disks'])}")
    for disk in result["excluded"]:
        output.say(f"  not backed up: {disk['target']} ({disk['reason']})")


@app.command()
def forget(ref: _Ref) -> None:
    """Forget a VM that is gone, or not to be backed up. Its backups stay and can be restored.

    Its domain is not touched: if there is one, `vm untrack` first takes our dirty bitmaps off its disks.
    `vm import` makes it the VM that it was. When the last of its images is deleted nothing of it is left.
    """
    api = client()
    vm = api.delete(f"vms/{api.resolve('vm', ref)}")
    output.say(f"VM {vm['id']} ({vm['name']}) forgotten")
    if vm["images"]:
        kept = output.counted(vm["images"], "image")
        output.say(f"  its backups stay ({kept}): oned-backup image list --vm {vm['id']}")


@app.command()
def retention(
    ref: _Ref,
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what it would do.")] = False,
    wait: Wait = True,
    json: Json = False,
) -> None:
    """Let go what no rule keeps. Of each restore point it is said why it stays or goes.

    The rules: vm set VM KEEP_LAST=n KEEP_DAILY=n KEEP_WEEKLY=n KEEP_MONTHLY=n KEEP_YEARLY=n, in the
    daemon's local time. `image pin` keeps a single restore point.
    """
    api = client()
    path = f"vms/{api.resolve('vm', ref)}/retention"
    if dry_run:
        found = api.get(path)
        if json:
            output.print_json(found)
        else:
            _print_verdicts(found)
        return
    operation = api.post(path)
    follow.conclude(
        api, operation, wait=wait, as_json=json, show=lambda done: _print_verdicts(done["result"]["points"])
    )
    if wait:
        queued = api.get(f"operations/{operation['id']}")["result"].get("queued", [])
        for operation_id in queued:
            _follow_queued(api, operation_id, json=json)


def _follow_queued(api: Client, operation_id: str, *, json: bool) -> None:
    ended = follow.follow(api, api.get(f"operations/{operation_id}"))
    if ended["state"] != "DONE":
        raise error_of(ended)
    result = ended["result"]
    if not json and "merged" in result:
        merged = ", ".join(map(str, result["merged"][:-1]))
        output.say(
            f"image {result['image_id']}: {merged} merged into {result['increment_id']}"
            f" ({output.size_mb(result['size_mb'])}) in {follow.elapsed(ended)}"
        )


def _print_verdicts(points: list[dict[str, Any]]) -> None:
    """One line each, not folded: the reasons may be many."""
    if not points:
        output.warn("No backups.")
        return
    output.say(f"{'IMAGE':>5}  {'INCR':>4}  {'DATE':<16}  {'SIZE':>9}  {'WHAT':<14}  WHY")
    for point in points:
        what = {"KEPT": "kept", "GOES": "goes"}.get(point["fate"], f"merged into {point['into']}")
        reasons = [*([] if point["good"] else ["broken"]), *point["reasons"]]
        output.say(
            f"{point['image_id']:>5}  {point['increment_id']:>4}  {output.when(point['date'])[:16]}"
            f"  {output.size_mb(point['size_mb']):>9}  {what:<14}  {'; '.join(reasons)}"
        )


@app.command("backup-cancel")
def backup_cancel(ref: _Ref, *, wait: Wait = True, json: Json = False) -> None:
    """Cancel the backup of a VM that is under way."""
    api = client()
    operation = api.post(f"vms/{api.resolve('vm', ref)}/backup-cancel")
    if wait:
        operation = follow.follow(api, operation)
    if json:
        output.print_json(operation)
    else:
        output.say(f"backup {operation['id']}: {operation['state']}")


@app.command()
def untrack(ref: _Ref, *, wait: Wait = True, json: Json = False) -> None:
    """Take off a VM's disks what tracks changes. That is our checkpoints and dirty bitmaps; its backups stay.

    Before it is reverted to an internal snapshot, or when it is not to be backed up any more. Its next
    backup is a full one.
    """
    api = client()
    operation = api.post(f"vms/{api.resolve('vm', ref)}/untrack")
    follow.conclude(api, operation, wait=wait, as_json=json, show=_show_untracked)


def _show_untracked(operation: Mapping[str, Any]) -> None:
    output.say(f"VM {operation['vm_id']}: nothing of ours is on its disks; the next backup is a full one")
