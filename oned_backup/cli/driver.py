"""The commands `oned-backup driver`: they work without a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oned_backup.cli import output
from oned_backup.cli.session import Json, key_values, settings_file
from oned_backup.contract.actions import Kind
from oned_backup.errors import DriverBug, InvalidInput, NotFound, OnedBackupError

app = typer.Typer(help="Drivers: list, show, check, begin a new one.", no_args_is_help=True)


def _found() -> tuple[list[Any], list[tuple[Path, OnedBackupError]]]:
    """The drivers that the daemon would use, and those that it refuses."""
    from oned_backup.config import load_settings  # noqa: PLC0415 - loads slowly
    from oned_backup.runner.drivers import find_drivers  # noqa: PLC0415

    refused: list[tuple[Path, OnedBackupError]] = []
    settings = load_settings(settings_file()).settings
    found = find_drivers(
        settings.all_driver_dirs, on_refused=lambda path, error: refused.append((path, error))
    )
    return list(found), refused


@app.command("list")
def list_drivers(*, json: Json = False) -> None:
    """List the drivers that the daemon would use. Also those that it refuses."""
    found, refused = _found()
    if json:
        output.print_json(
            {
                "drivers": [_view(driver) for driver in found],
                "refused": [{"folder": str(path), "error": str(error)} for path, error in refused],
            }
        )
        return
    output.print_table(
        ("KIND", "NAME", "SUMMARY"),
        [(one.manifest.kind.value, one.manifest.name, one.manifest.summary) for one in found],
        empty="No drivers found.",
    )
    for path, error in refused:
        output.warn(f"refused: {path}: {error}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the driver.")],
    kind: Annotated[Kind | None, typer.Option(help="Its layer, if two have drivers of that name.")] = None,
    *,
    json: Json = False,
) -> None:
    """Show a driver and its parameters. A datastore's are those of `datastore create`."""
    drivers = [driver for driver in _found()[0] if kind in {None, driver.manifest.kind}]
    named = [driver for driver in drivers if driver.manifest.name == name]
    if not named:
        raise NotFound(f"there is no driver '{name[:40]}'", hint=f"There is {', '.join(map(str, drivers))}.")
    if len(named) > 1:
        hint = f"Choose one of {', '.join(map(str, named))} by --kind."
        raise InvalidInput(f"{len(named)} drivers are named {name}", hint=hint)
    view = _view(named[0])
    if json:
        output.print_json(view)
        return
    output.print_fields(
        [
            *((field, view[field]) for field in ("kind", "name", "summary", "folder")),
            *((field, ", ".join(view[field])) for field in ("features", "actions")),
        ]
    )
    for parameter, of in view["parameters"].items():
        words = [word for word in ("required", "secret") if of[word]]
        words += [f"default {of['default']}"] if of["default"] else []
        output.say(f"\n{parameter}" + (f" ({', '.join(words)})" if words else ""))
        output.say(f"    {of['help']}")


def _view(driver: Any) -> dict[str, Any]:
    manifest = driver.manifest
    return {
        "kind": manifest.kind.value,
        "name": manifest.name,
        "summary": manifest.summary,
        "folder": str(driver.folder),
        "features": sorted(manifest.features),
        "actions": list(driver.actions),
        "parameters": {
            one.name: {
                "required": one.required,
                "secret": one.secret,
                "default": one.default,
                "help": one.help,
            }
            for one in manifest.parameters.values()
        },
    }


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The driver's folder.")],
    values: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE",
            help="Parameters of a datastore to use, or URI=… of a host; KEY=@FILE reads a secret.",
        ),
    ] = None,
    store: Annotated[
        Path | None, typer.Option(help="A file that says how to make, block and fill stores (TOML).")
    ] = None,
    ssh_config: Annotated[
        Path | None, typer.Option(help="OpenSSH configuration for the driver (default: the daemon's).")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Only this clause; may be repeated.")] = None,
    *,
    json: Json = False,
) -> None:
    """Run the conformance kit on a driver. Exits with 70 if a clause fails."""
    if not folder.is_dir():
        raise InvalidInput(
            f"{folder} is not a driver's folder",
            hint="Those of the daemon's drivers are told by `oned-backup driver show NAME`.",
        )
    from oned_backup.runner.kit import ClauseResult, Status, check_driver  # noqa: PLC0415 - loads slowly
    from oned_backup.runner.kit.settings import read_secret  # noqa: PLC0415

    told: dict[str, str] = {}

    def tell(result: ClauseResult) -> None:
        if not json:
            detail = result.detail.removeprefix(f"{result.clause_id}: ")
            first, _, more = detail.partition("\n")
            if more and told.setdefault(first, result.clause_id) != result.clause_id:
                detail = f"{first} (as in {told[first]})"
            shown = f": {detail}" if detail else ""
            output.say(f"{result.status.value:<8} {result.clause_id:<6} {result.title}{shown}")

    parameters = {
        name: read_secret(Path(value[1:])) if value.startswith("@") else value
        for name, value in key_values(values or []).items()
    }
    report = check_driver(
        folder,
        parameters=parameters,
        store_file=store,
        ssh_config=ssh_config,
        only=only,
        on_result=tell,
    )
    if json:
        output.print_json([vars(result) for result in report.clauses])
    failed = report.having(Status.FAILED)
    if failed:
        names = ", ".join(result.clause_id for result in failed)
        kept = f"What was run is kept in {report.calls}." if report.calls else None
        raise DriverBug(
            f"{folder}: {len(failed)} of {len(report.clauses)} clauses failed: {names}", hint=kept
        )


@app.command()
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the driver and its folder.")],
    kind: Annotated[Kind, typer.Option(help="The layer that it is for.")] = Kind.DATASTORE,
    directory: Annotated[Path, typer.Option(help="Where to make the folder.")] = Path(),
    *,
    shell: Annotated[bool, typer.Option("--shell", help="In shell instead of Python.")] = False,
) -> None:
    """Write the skeleton of a driver."""
    from oned_backup.runner.skeleton import new_driver  # noqa: PLC0415 - loads slowly

    output.say(str(new_driver(directory, name, kind, shell=shell)))
