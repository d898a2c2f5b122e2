"""The commands `oned-backup datastore`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import typer

from oned_backup.cli import follow, output
from oned_backup.cli.parameters import parameter_values
from oned_backup.cli.session import Json, Wait, Xml, client, print_document
from oned_backup.client import Client

app = typer.Typer(help="Where backups are kept.", no_args_is_help=True)

_Ref = Annotated[str, typer.Argument(metavar="DATASTORE", help="Id or name.")]
_Values = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="The driver's parameters; KEY=@FILE or KEY=- (ask) for a secret."
    ),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name for the datastore.")],
    values: _Values = None,
    *,
    driver: Annotated[str, typer.Option(help="Datastore driver; `driver show NAME` has its parameters.")],
    accept_host_key: Annotated[
        str,
        typer.Option(
            metavar="SHA256:…", help="Fingerprint of its server's SSH host key, as you compared it."
        ),
    ] = "",
    json: Json = False,
) -> None:
    """Create a datastore; it must be reachable."""
    api = client()
    given = parameter_values(values or [], _secret_names(api, driver))
    body = {"name": name, "driver": driver, "values": given, "accept_host_key": accept_host_key}
    _print_one(api.post("datastores", body), as_json=json)


@app.command("list")
def list_datastores(*, json: Json = False) -> None:
    """List the datastores, with their space as last measured."""
    datastores = client().get("datastores")
    if json:
        output.print_json(datastores)
        return
    output.print_table(
        ("ID>", "NAME", "DRIVER", "STATE", "IMAGES>", "SIZE>", "FREE>"),
        [
            (
                one["id"],
                one["name"],
                one["driver"],
                one["state"],
                len(one["images"]),
                output.size_mb(one["total_mb"]),
                output.size_mb(one["free_mb"]),
            )
            for one in datastores
        ],
        empty="No datastores. Create one: oned-backup datastore create NAME --driver fs BASE_PATH=/…",
    )


@app.command()
def show(ref: _Ref, *, json: Json = False, xml: Xml = False) -> None:
    """Show a datastore and its parameters (secret ones as ***)."""
    api = client()
    datastore_id = api.resolve("datastore", ref)
    if xml:
        print_document(api, "datastore", datastore_id)
    else:
        _print_one(api.get(f"datastores/{datastore_id}"), as_json=json)


@app.command()
def update(
    ref: _Ref,
    values: _Values = None,
    *,
    name: Annotated[str | None, typer.Option(help="A new name.")] = None,
    json: Json = False,
) -> None:
    """Change parameters, and enable it again. An empty value restores the default."""
    api = client()
    datastore_id = api.resolve("datastore", ref)
    driver = api.get(f"datastores/{datastore_id}")["driver"]
    given = parameter_values(values or [], _secret_names(api, driver))
    _print_one(api.patch(f"datastores/{datastore_id}", {"name": name, "values": given}), as_json=json)


@app.command()
def delete(ref: _Ref) -> None:
    """Forget a datastore without images. What lies in the store is not touched."""
    api = client()
    datastore_id = api.resolve("datastore", ref)
    api.delete(f"datastores/{datastore_id}")
    output.say(f"datastore {datastore_id} deleted")


@app.command()
def monitor(ref: _Ref, *, json: Json = False) -> None:
    """Measure a datastore's space now."""
    api = client()
    _print_one(api.post(f"datastores/{api.resolve('datastore', ref)}/monitor"), as_json=json)


@app.command("import")
def import_store(ref: _Ref, *, wait: Wait = True, json: Json = False) -> None:
    """Find the backups that a store holds. What is known already stays as it is."""
    api = client()
    operation = api.post(f"datastores/{api.resolve('datastore', ref)}/import")
    follow.conclude(api, operation, wait=wait, as_json=json, show=_show_import)


@app.command()
def prune(ref: _Ref, *, wait: Wait = True, json: Json = False) -> None:
    """Free the space of removed backups. For stores that do not do so at once; the daemon does it daily."""
    api = client()
    operation = api.post(f"datastores/{api.resolve('datastore', ref)}/prune")
    follow.conclude(
        api,
        operation,
        wait=wait,
        as_json=json,
        show=lambda ended: output.say(f"{ended['result']['freed_mb']} MB freed"),
    )


@app.command()
def scrub(ref: _Ref, *, wait: Wait = True, json: Json = False) -> None:
    """Read again what was proved longest ago. Within the day's budget; the daemon does it by itself."""
    api = client()
    operation = api.post(f"datastores/{api.resolve('datastore', ref)}/scrub")
    follow.conclude(api, operation, wait=wait, as_json=json, show=_show_scrub)


def _show_scrub(operation: Mapping[str, Any]) -> None:
    result = operation["result"]
    if not result["backups"]:
        output.say("nothing is due to be read again")
        return
    share = "" if result["percent"] is None else f", {result['percent']} % of it as a sample"
    backups = output.counted(len(result["backups"]), "backup")
    output.say(f"{backups} read again ({output.size(result['read_bytes'])}{share})")


def _show_import(operation: Mapping[str, Any]) -> None:
    found = operation["result"]
    output.say(
        f"{output.counted(found['backups'], 'backup')} imported"
        f" into {output.counted(found['images'], 'image')},"
        f" {output.counted(found['vms'], 'new VM')}; known already: {found['known']}"
    )
    for name in ("unreadable", "left_over"):
        for text in found.get(name, ()):
            output.say(f"{name.replace('_', ' ')}: {text}")


def _secret_names(api: Client, driver: str) -> list[str]:
    return [str(name) for name in api.get(f"drivers/datastore/{quote(driver, safe='')}")["secrets"]]


def _print_one(datastore: Mapping[str, Any], *, as_json: bool) -> None:
    if as_json:
        output.print_json(datastore)
        return
    output.print_fields(
        [
            *((name, datastore[name]) for name in ("id", "name", "driver", "state", "error")),
            ("size", output.size_mb(datastore["total_mb"])),
            ("free", output.size_mb(datastore["free_mb"])),
            ("images", len(datastore["images"])),
            *datastore["parameters"].items(),
            *_proof_fields(datastore.get("proof")),
        ]
    )


def _proof_fields(proof: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    if proof is None:
        return []
    counted = f"{proof['proved']} of {proof['backups']} backups"
    if proof["oldest_proof_at"] is not None:
        counted += f", the oldest proof is of {output.when(proof['oldest_proof_at'])}"
    budget = "off"
    if proof["budget_bytes"]:
        budget = f"{output.size(proof['read_bytes'])} of {output.size(proof['budget_bytes'])} in 24 hours"
    return [("proved", counted), ("broken", proof["broken"]), ("scrub", budget)]
