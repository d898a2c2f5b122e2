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

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import HERE, LabError, wait_for

CLI = Path(sys.prefix) / "bin" / "oned-backup"
DRIVERS = HERE.parents[1] / "drivers"


class Product:
    """Settings, catalogue, sockets and log in `directory`; `driver_dirs` go before the built-in ones."""

    def __init__(self, directory: Path, *, driver_dirs: Sequence[Path] = ()) -> None:
        self.state_dir = directory / "state"
        self.run_dir = directory / "run"
        self.log = directory / "daemon.log"
        self._config = directory / "config.toml"
        dirs = json.dumps([str(path) for path in (*driver_dirs, DRIVERS)])
        self._config.write_text(
            f'state_dir = "{self.state_dir}"\nrun_dir = "{self.run_dir}"\ndriver_dirs = {dirs}\n'
        )
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the daemon and wait until it answers."""
        with self.log.open("ab") as log:
            self._daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", CLI, "--config", self._config, "serve"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        wait_for("answer from the daemon", self._answers, 30)

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
        return subprocess.run(
            [CLI, "--config", self._config, *words],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
        )

    def _answers(self) -> bool:
        if self._daemon is not None and self._daemon.poll() is not None:
            raise LabError(f"the daemon ended:\n{self._tail()}")
        return self.call("vm", "list").returncode == 0

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
