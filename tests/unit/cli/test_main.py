"""The command itself, without a daemon."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from oned_backup import __version__
from oned_backup.cli import session
from oned_backup.cli.doctor import check_apparmor, check_daemon, check_directory, check_module, check_program
from oned_backup.cli.main import config_first, run
from oned_backup.errors import DaemonUnreachable, InvalidInput, NotFound


@pytest.fixture(autouse=True)
def _settings(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(f'run_dir = "{tmp_path}/run"\nstate_dir = "{tmp_path}/state"\n')
    session.use_settings_file(path)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["vm", "list", "--config", "x"], ["--config", "x", "vm", "list"]),
        (["serve", "--config=x"], ["--config=x", "serve"]),
        (["--config", "x", "vm"], ["--config", "x", "vm"]),
        (["vm", "list"], ["vm", "list"]),
        (["vm", "--", "--config", "x"], ["vm", "--", "--config", "x"]),
    ],
)
def test_config_may_stand_anywhere(given: list[str], expected: list[str]) -> None:
    assert config_first(given) == expected


def test_no_daemon(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["vm", "list"]) == 5
    said = capsys.readouterr().err.splitlines()
    assert "no daemon answers" in said[0]
    assert said[1] == "  Start it with `oned-backup serve`."


def test_debug_shows_where(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ODB_DEBUG", "1")
    with pytest.raises(DaemonUnreachable):
        run(["vm", "list"])


def test_a_socket_that_talks_nonsense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run/api").mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "run/api/daemon.sock"))
        listener.listen(1)
        listener.shutdown(socket.SHUT_RDWR)
        assert run(["vm", "list"]) == 5
    assert "Traceback" not in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"oned-backup {__version__}\n"


def test_settings_with_origins(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["config", "show"]) == 0
    shown = capsys.readouterr().out
    assert f'state_dir = "{tmp_path}/state"' in shown
    assert f"{'workers = 4':<42} # default" in shown


def test_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_program("qemu-img", "qemu-utils").status == "ok"
    old = tmp_path / "qemu-img"
    old.write_text("#!/bin/sh\necho 'qemu-img version 5.2.0 (Debian)'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = check_program("qemu-img", "qemu-utils")
    assert (found.status, found.text) == ("fail", "5.2.0, 6.1.0 is needed")
    missing = check_program("qemu-nbd", "qemu-utils")
    assert (missing.status, missing.remedy) == ("fail", "Run: apt-get install qemu-utils")


def test_modules() -> None:
    assert check_module("nbd", "python3-libnbd").status == "ok"
    assert check_module("no_such_module", "python3-none").status == "fail"


def test_apparmor(tmp_path: Path) -> None:
    enabled, rules = tmp_path / "enabled", tmp_path / "rules"
    assert check_apparmor(Path("/run/nbd"), enabled, rules).status == "ok"
    enabled.write_text("Y\n")
    warned = check_apparmor(Path("/run/nbd"), enabled, rules)
    assert warned.status == "warn"
    assert "`/run/nbd/** rw,`" in warned.remedy
    rules.write_text("/run/nbd/** rw,\n")
    assert check_apparmor(Path("/run/nbd"), enabled, rules).status == "ok"


def test_directories(tmp_path: Path) -> None:
    assert check_directory("state_dir", tmp_path / "a/b", private=True).text == "will be made by the daemon"
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o755)
    assert check_directory("state_dir", open_to_all, private=True).remedy == f"Run: chmod 700 {open_to_all}"
    assert check_directory("run_dir", open_to_all, private=False).status == "ok"
    plain = tmp_path / "file"
    plain.touch()
    assert check_directory("state_dir", plain, private=True).status == "fail"
    assert check_daemon(tmp_path / "none").status == "warn"


@pytest.mark.parametrize("group", ["", "config", "host", "vm", "datastore", "image", "operation", "driver"])
def test_no_command_is_explained_half(
    group: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run([*group.split(), "--help"])
    commands = capsys.readouterr().out.partition("Commands:\n")[2]
    assert commands
    assert "..." not in commands


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_the_caller_has_closed_is_no_error(closed: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$0" -m oned_backup --version {closed}', sys.executable],
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("" if ">&-" in closed.split() else f"oned-backup {__version__}\n")


def test_a_driver_is_shown_with_its_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["driver", "show", "rsync"]) == 0
    shown = capsys.readouterr().out
    assert "\nRSYNC_HOST (required)\n    " in shown
    assert re.search(r"^folder +/.*/drivers/datastore/rsync$", shown, re.MULTILINE)
    assert run(["driver", "show", "nosuch"]) == NotFound.exit_code
    assert "tm/qcow2" in capsys.readouterr().err
    assert run(["driver", "show", "dummy"]) == InvalidInput.exit_code
    assert run(["driver", "show", "dummy", "--kind", "vmm"]) == 0
    assert run(["driver", "check", "rsync"]) == InvalidInput.exit_code
    assert "driver show NAME" in capsys.readouterr().err
