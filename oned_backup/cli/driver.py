"""The commands `oned-backup driver`: they work without a daemon."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from oned_backup.cli import output
from oned_backup.cli.session import Json, key_values, settings_file
from oned_backup.contract.actions import Kind
from oned_backup.errors import DriverBug, OnedBackupError

app = typer.Typer(help="Drivers: list, check, begin a new one.", no_args_is_help=True)


@app.command("list")
def list_drivers(*, json: Json = False) -> None:
    """List the drivers that the daemon would use. Also those that it refuses."""
    from oned_backup.config import load_settings  # noqa: PLC0415 - loads slowly
    from oned_backup.runner.drivers import find_drivers  # noqa: PLC0415

    refused: list[tuple[Path, OnedBackupError]] = []
    settings = load_settings(settings_file()).settings
    found = find_drivers(
        settings.all_driver_dirs, on_refused=lambda path, error: refused.append((path, error))
    )
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
    folder: Annotated[Path, typer.Argument(help="The driver's folder.")],
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
    name: Annotated[str, typer.Argument(help="Name of the driver and its folder.")],
    kind: Annotated[Kind, typer.Option(help="The layer that it is for.")] = Kind.DATASTORE,
    directory: Annotated[Path, typer.Option(help="Where to make the folder.")] = Path(),
    *,
    shell: Annotated[bool, typer.Option("--shell", help="In shell instead of Python.")] = False,
) -> None:
    """Write the skeleton of a driver."""
    from oned_backup.runner.skeleton import new_driver  # noqa: PLC0415 - loads slowly

    output.say(str(new_driver(directory, name, kind, shell=shell)))
