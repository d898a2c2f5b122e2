"""The command `oned-backup` with a daemon of its own, for tests and the demo.

    product = Product(directory)
    product.start()
    product.run("vm", "backup", "0")
    product.ask("image", "list")
    product.stop()

The directory's path must be short: sockets lie in it. The daemon ends with the
process that started it, however that one ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab import HERE, LabError, wait_for

if TYPE_CHECKING:
    from netlab import Machine

CLI = Path(sys.prefix) / "bin" / "oned-backup"
DRIVERS = HERE.parents[1] / "drivers"


class Product:
    """Settings, catalogue, sockets and log in `directory`; `driver_dirs` go before the built-in ones.

    With a `machine` of a network lab, all of it runs in that machine.
    """

    def __init__(
        self, directory: Path, *, driver_dirs: Sequence[Path] = (), machine: Machine | None = None
    ) -> None:
        self._machine = machine
        self.state_dir = directory / "state"
        self.run_dir = directory / "run"
        self.log = directory / "daemon.log"
        self.config = directory / "config.toml"
        dirs = json.dumps([str(path) for path in (*driver_dirs, DRIVERS)])
        self.config.write_text(
            f'state_dir = "{self.state_dir}"\nrun_dir = "{self.run_dir}"\ndriver_dirs = {dirs}\n'
            "scrub_gb_per_day = 0\n"  # only what a test asks for is read
        )
        self._daemon: subprocess.Popen[bytes] | None = None

    def settings(self, **values: int | str) -> None:
        """Further settings, for the next start."""
        with self.config.open("a") as config:
            config.writelines(f"{name} = {json.dumps(value)}\n" for name, value in values.items())

    @property
    def pid(self) -> int:
        """The daemon's process; 0 if none was started."""
        return 0 if self._daemon is None else self._daemon.pid

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Start the daemon, with further variables, and wait until it answers."""
        argv = ["setpriv", "--pdeathsig", "TERM", CLI, "--config", self.config, "serve"]
        with self.log.open("ab") as log:
            streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            if self._machine is not None:
                self._daemon = self._machine.popen(argv, environment=environment, **streams)
            else:
                env = {**os.environ, **(environment or {})}
                self._daemon = subprocess.Popen(argv, env=env, **streams)
        wait_for("answer from the daemon", self._answers, 120)

    @property
    def is_running(self) -> bool:
        """Whether the daemon lives."""
        return self._daemon is not None and self._daemon.poll() is None

    def stop(self) -> None:
        """End the daemon in good order, if it runs."""
        if self._daemon is not None:
            self._daemon.terminate()
            try:
                self._daemon.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self) -> None:
        """SIGKILL the daemon."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait(10)

    def run(self, *words: str, timeout_s: float = 300) -> str:
        """What a command prints; `LabError` with the end of the daemon's log if it fails."""
        done = self.call(*words, timeout_s=timeout_s)
        if done.returncode != 0:
            complaint = done.stderr.decode(errors="replace")
            raise LabError(
                f"oned-backup {' '.join(words)}: exit {done.returncode}\n{complaint}\n{self._tail()}"
            )
        return done.stdout.decode()

    def ask(self, *words: str) -> Any:
        """What a command tells, as data."""
        return json.loads(self.run(*words, "--json"))

    def call(self, *words: str, timeout_s: float = 300) -> subprocess.CompletedProcess[bytes]:
        """A command that has ended, however it did."""
        argv = [str(CLI), "--config", str(self.config), *words]
        return subprocess.run(
            argv if self._machine is None else self._machine.argv(argv),
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
        )

    def _answers(self) -> bool:
        if self._daemon is not None and self._daemon.poll() is not None:
            raise LabError(f"the daemon ended:\n{self._tail()}")
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.run_dir / "api/daemon.sock"))
            return True
        return False

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
