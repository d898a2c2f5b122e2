"""The command `oned-backup`: one line and a stable exit code for every error, never a traceback.

ODB_DEBUG=1 shows tracebacks. Exit codes: those of `oned_backup.errors`; 130 after Ctrl-C.
"""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from oned_backup import __version__
from oned_backup.cli import datastore, download, driver, host, image, operation, output, session, system, vm
from oned_backup.errors import InvalidInput, NoSpace, OnedBackupError

app = typer.Typer(
    help="Incremental backup and proved restore of KVM/libvirt virtual machines.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command()(system.serve)
app.command()(system.doctor)
app.command()(system.metrics)
app.add_typer(system.config_app, name="config")
app.add_typer(host.app, name="host")
app.add_typer(vm.app, name="vm")
app.add_typer(datastore.app, name="datastore")
app.add_typer(image.app, name="image")
app.command()(download.download)
app.add_typer(operation.app, name="operation")
app.add_typer(driver.app, name="driver")

_INTERRUPTED = 130
#: Click's class, whether this Typer uses the package or brings its own
_UsageError: Any = typer.BadParameter.__base__


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Option(help="Settings file; also as $ODB_CONFIG. May stand anywhere.")
    ] = None,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        sys.stdout.write(f"oned-backup {__version__}\n")
        raise typer.Exit
    if config is not None:
        session.use_settings_file(config)
    if context.invoked_subcommand is None:
        sys.stdout.write(context.get_help() + "\n")
        raise typer.Exit(InvalidInput.exit_code)


def main(arguments: list[str] | None = None) -> None:
    """Run a command line and exit."""
    _open_streams()
    given = config_first(sys.argv[1:] if arguments is None else arguments)
    sys.exit(run(given))


def _open_streams() -> None:
    """Let what is written to a standard stream that the caller has closed go nowhere.

    Without that Python has None there, and the next file that is opened takes its descriptor.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))


def run(arguments: list[str]) -> int:
    """Run a command line; its exit code."""
    try:
        code = app(arguments, standalone_mode=False, prog_name="oned-backup")
    except (typer.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain again at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OnedBackupError.exit_code
    except Exception as error:
        if os.environ.get("ODB_DEBUG", "") not in {"", "0"}:
            raise
        return _complain(error)
    return code if isinstance(code, int) else 0


def config_first(arguments: list[str]) -> list[str]:
    """The arguments with `--config FILE` moved to where it is understood, wherever it stood."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for place, argument in enumerate(arguments[:end]):
        if argument == "--config" and place + 1 < end:
            return arguments[place : place + 2] + arguments[:place] + arguments[place + 2 :]
        if argument.startswith("--config="):
            return [argument, *arguments[:place], *arguments[place + 1 :]]
    return arguments


def _complain(error: Exception) -> int:
    """Tell the error on stderr, its hint on a second line; its exit code."""
    hint: str | None
    if isinstance(error, OnedBackupError):
        text, hint, code = error.message, error.hint, error.exit_code
    elif isinstance(error, _UsageError):
        where = getattr(error, "ctx", None)
        if where is not None and type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(where.get_help() + "\n")
            return InvalidInput.exit_code
        path = "oned-backup" if where is None else where.command_path
        text, hint, code = error.format_message().rstrip("."), f"See: {path} --help", InvalidInput.exit_code
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = f"{error.filename or 'standard output'}: {error.strerror}"
        hint, code = None, NoSpace.exit_code
    else:
        text = f"internal error: {type(error).__name__}: {error}"
        hint, code = "ODB_DEBUG=1 shows where.", OnedBackupError.exit_code
    output.complain(text, hint)
    return code
