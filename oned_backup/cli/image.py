"""The commands `oned-backup image`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from oned_backup.cli import follow, output
from oned_backup.cli.session import Json, Wait, Xml, client, print_document
from oned_backup.cli.vm import print_images
from oned_backup.errors import InvalidInput, NotFound

app = typer.Typer(help="Stored backups: a chain or one full backup each.", no_args_is_help=True)


def _image_id(text: str) -> int:
    """An image's id; a VM's name, which people try first, is answered with where the ids are."""
    if not (text.isascii() and text.isdecimal()):
        raise typer.BadParameter(
            f"'{text[:40]}' is no number; `oned-backup image list --vm VM` has the ids of a VM's images"
        )
    return int(text)


_Id = Annotated[int, typer.Argument(metavar="IMAGE", parser=_image_id, help="Id of the image.")]
_Increment = Annotated[int | None, typer.Option("--increment", help="Its id; the newest if absent.")]
Salvage = Annotated[
    bool, typer.Option("--salvage", help="Fill what is damaged with zeros, list it, and exit with 79.")
]
#: of so many restore points all disks are shown
SHORT_CHAIN = 20


@app.command("list")
def list_images(
    vm: Annotated[str | None, typer.Option(help="Of this VM only: id or name.")] = None, *, json: Json = False
) -> None:
    """List the backup images."""
    api = client()
    images = api.get("images", vm_id=None if vm is None else api.resolve("vm", vm))
    if json:
        output.print_json(images)
    else:
        print_images(images)


@app.command()
def show(image: _Id, increment: _Increment = None, *, json: Json = False, xml: Xml = False) -> None:
    """Show every restore point of an image. Its disks with reasons, freeze, whether it was verified.

    Of a long chain the disks of the newest one are shown, and those that were taken in full;
    `--increment` shows those of another.
    """
    api = client()
    if xml:
        print_document(api, "image", image)
        return
    found = api.get(f"images/{image}")
    if json:
        output.print_json(found)
        return
    disks = disks_shown(found["increments"], increment)
    names = ("id", "name", "vm_id", "vm_name", "datastore", "state", "error")
    output.print_fields(
        [*((name, found[name]) for name in names), ("size", output.size_mb(found["size_mb"]))]
    )
    output.say("")
    output.print_table(
        ("INCR>", "TYPE", "DATE", "SIZE>", "FREEZE", "STATE", "VERIFIED"),
        [
            (
                point["increment_id"],
                point["type"],
                output.minute(point["date"]),
                output.size_mb(point["size_mb"]),
                _freeze(point.get("freeze") or {}),
                f"{point['state']}, pinned" if point["pinned"] else point["state"],
                output.minute(point["verified_at"]),
            )
            for point in found["increments"]
        ],
    )
    output.say("")
    output.print_table(
        ("INCR>", "DISK>", "TARGET", "TYPE", "REASON", "SIZE>", "STORED>"),
        disks,
    )
    if increment is None and len(found["increments"]) > SHORT_CHAIN:
        output.warn("disks of other increments: --increment N")
    for point in found["increments"]:
        if point["failure"]:
            output.warn(f"increment {point['increment_id']}: {point['failure']}")


def disks_shown(points: Sequence[Mapping[str, Any]], increment: int | None) -> list[tuple[Any, ...]]:
    """Rows for the disks of the restore point that is asked for, or of all.

    Of a long chain: those of the newest, and all that were taken in full, each with its reason.
    """
    if increment is not None:
        wanted = [point for point in points if point["increment_id"] == increment]
        if not wanted:
            known = ", ".join(str(point["increment_id"]) for point in points[-SHORT_CHAIN:])
            raise NotFound(f"there is no increment {increment}", hint=f"The newest are {known}.")
        return _disk_rows(wanted[0])
    if len(points) <= SHORT_CHAIN:
        return [row for point in points for row in _disk_rows(point)]
    in_full = [row for point in points[:-1] for row in _disk_rows(point) if row[3] == "FULL"]
    return in_full + _disk_rows(points[-1])


def _freeze(freeze: Mapping[str, Any]) -> str:
    return "" if freeze.get("method", "NONE") == "NONE" else f"{freeze['window_ms']} ms {freeze['method']}"


def _disk_rows(point: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    stored = [
        (
            point["increment_id"],
            disk["disk_id"],
            disk["target"],
            disk["type"],
            disk["reason"],
            output.size(disk["size_bytes"]),
            output.size(disk["stored_bytes"] or None)
            + (f" of {output.size(disk['uncompressed_bytes'])}" if disk["uncompressed_bytes"] else ""),
        )
        for disk in point["disks"]
    ]
    left_out = [
        (point["increment_id"], disk["disk_id"], disk["target"], "excluded", disk["reason"], "", "")
        for disk in point["excluded"]
    ]
    return stored + left_out


@app.command()
def ls(image: _Id, increment: _Increment = None, *, json: Json = False) -> None:
    """List a restore point's disks with the URLs for `download`."""
    disks = client().get(f"images/{image}/disks", increment_id=increment)
    if json:
        output.print_json(disks)
        return
    for disk in disks:
        output.say(f"{disk['disk_id']}  {output.size(disk['size_bytes']):>9}  {disk['url']}")


@app.command()
def manifest(image: _Id, increment: _Increment = None) -> None:
    """Print a restore point's manifest.json. As the catalogue has it: a store may have lost its own."""
    output.say(client().get(f"images/{image}/manifest", increment_id=increment)["text"].rstrip("\n"))


@app.command()
def verify(
    image: _Id,
    increment: Annotated[
        int | None, typer.Option("--increment", help="Only this one and what it continues; all if absent.")
    ] = None,
    percent: Annotated[
        int | None, typer.Option(min=1, max=100, help="Only a random share of each file.")
    ] = None,
    *,
    wait: Wait = True,
    json: Json = False,
) -> None:
    """Re-read what is stored and compare all checksums."""
    api = client()
    operation = api.post(f"images/{image}/verify", {"increment_id": increment, "percent": percent})
    follow.conclude(api, operation, wait=wait, as_json=json, show=_show_verified)


def _show_verified(operation: Mapping[str, Any]) -> None:
    backups = operation["result"]["backups"]
    read = sum(backup["read_bytes"] for backup in backups)
    share = "" if operation["result"]["whole"] else " (a sample)"
    output.say(
        f"{output.counted(len(backups), 'backup')} whole: {output.size(read)} read"
        f" in {follow.elapsed(operation)}{share}"
    )


@app.command()
def delete(
    image: _Id,
    *,
    force: Annotated[
        bool, typer.Option("--force", help="Forget it even if its store cannot remove it.")
    ] = False,
    increment: Annotated[
        int | None, typer.Option("--increment", help="Only this one: it is merged into the next one.")
    ] = None,
    wait: Wait = True,
    json: Json = False,
) -> None:
    """Delete an image, or one of its increments."""
    api = client()
    if increment is not None:
        if force:
            raise InvalidInput("--force is for whole images")
        operation = api.delete(f"images/{image}?increment_id={increment}")
        follow.conclude(api, operation, wait=wait, as_json=json, show=_show_increment_deleted)
        return
    operation = api.delete(f"images/{image}{'?force=true' if force else ''}")
    follow.conclude(
        api, operation, wait=wait, as_json=json, show=lambda _ended: output.say(f"image {image} deleted")
    )


def _show_increment_deleted(operation: Mapping[str, Any]) -> None:
    result = operation["result"]
    if "merged" in result:
        gone, into = result["merged"][0], result["increment_id"]
        output.say(
            f"increment {gone} merged into increment {into} ({output.size_mb(result['size_mb'])})"
            f" in {follow.elapsed(operation)}"
        )
    else:
        output.say("deleted")


@app.command()
def pin(image: _Id, increment: _Increment = None, *, json: Json = False) -> None:
    """Keep a restore point whatever the retention says."""
    _pin(image, increment, pinned=True, json=json)


@app.command()
def unpin(image: _Id, increment: _Increment = None, *, json: Json = False) -> None:
    """Leave a restore point to the retention again."""
    _pin(image, increment, pinned=False, json=json)


def _pin(image: int, increment: int | None, *, pinned: bool, json: bool) -> None:
    found = client().post(f"images/{image}/pin", {"increment_id": increment, "pinned": pinned})
    if json:
        output.print_json(found)
        return
    held = [str(point["increment_id"]) for point in found["increments"] if point["pinned"]]
    output.say(f"image {image}: pinned: {', '.join(held) or 'none'}")


@app.command()
def restore(
    image: _Id,
    *,
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="Directory for the restored files.")],
    host: Annotated[
        str | None, typer.Option("--host", metavar="HOST", help="Where DIR is; this machine if absent.")
    ] = None,
    increment: _Increment = None,
    disk_id: Annotated[int | None, typer.Option("--disk-id", help="Only this disk.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the new domain; NAME-restored-1 and so on if absent.")
    ] = None,
    define: Annotated[
        str | None, typer.Option(metavar="HOST", help="Define a domain over the files, which go there.")
    ] = None,
    image_format: Annotated[str, typer.Option("--format", help="qcow2 or raw.")] = "qcow2",
    no_nic: Annotated[bool, typer.Option("--no-nic", help="Without network interfaces.")] = False,
    no_ip: Annotated[
        bool, typer.Option("--no-ip", help="With new MAC addresses, so that it can run beside the original.")
    ] = False,
    salvage: Salvage = False,
    space_check: Annotated[
        bool, typer.Option("--space-check/--no-space-check", help="Look for free space in DIR first.")
    ] = True,
    wait: Wait = True,
    json: Json = False,
) -> None:
    """Restore a VM, or a disk, to a directory of a host. Every byte is proved on the way."""
    if not to:
        raise InvalidInput("--to names no directory")
    given = {"--name": name is not None, "--no-nic": no_nic, "--no-ip": no_ip}
    if define is None and any(given.values()):
        raise InvalidInput(
            f"{next(option for option, value in given.items() if value)} is for a domain that is defined",
            hint="Add --define HOST; without it files are restored, and domain.xml as it was.",
        )
    api = client()
    body = {
        "to": to if host else str(Path(to).absolute()),
        "host_id": None if host is None else api.resolve("host", host),
        "increment_id": increment,
        "disk_id": disk_id,
        "name": name,
        "no_nic": no_nic,
        "no_ip": no_ip,
        "format": image_format,
        "define_host_id": None if define is None else api.resolve("host", define),
        "salvage": salvage,
        "check_space": space_check,
    }
    operation = api.post(f"images/{image}/restore", body)
    follow.conclude(api, operation, wait=wait, as_json=json, show=show_restored)


def show_restored(operation: Mapping[str, Any]) -> None:
    """What a restore has made, and where."""
    result = operation["result"]
    where = f" on {result['host']}" if "host" in result else ""
    output.say(f"increment {result['increment_id']} restored in {follow.elapsed(operation)}{where}:")
    for path in result["placed"]:
        output.say(f"  {path}")
    for dropped in result.get("dropped", ()):
        output.say(f"  left out of the domain: {dropped}")
    if "deploy_id" in result:
        output.say(f"domain {result['deploy_id']} defined")
