"""A real daemon over the dummy hypervisor and a directory as its store; commands run in this process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from oned_backup.cli import session
from oned_backup.cli.main import config_first, run
from oned_backup.client import Client
from oned_backup.errors import DaemonUnreachable
from oned_backup.hypervisor.dummy import DummyHost

SETTINGS = """\
state_dir = "{directory}/state"
run_dir = "{directory}/run"
workers = 3

[retry]
for_s = 1
first_wait_s = 0.1
"""


@dataclass
class Ran:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The output of --json."""
        return json.loads(self.out)


class Daemon:
    """`oned-backup serve` as a process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = directory / "config.toml"
        self.config.write_text(SETTINGS.format(directory=directory))
        self.log = directory / "log"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "oned_backup", "serve", "--config", str(self.config)],
                stdout=log,
                stderr=log,
                env={**os.environ, "ODB_CONFIG": ""},
            )
        client = Client(self.directory / "run/api/daemon.sock")
        deadline = time.monotonic() + 120
        while True:
            assert self._process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            try:
                if client.get("status")["recovered"]:
                    return
            except DaemonUnreachable:
                pass
            time.sleep(0.05)

    def open_files(self) -> int:
        """How many it has open, connections among them."""
        assert self._process is not None
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))  # noqa: PTH208 - counted only

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send it a signal; its exit code."""
        if self._process is None:
            return 0
        self._process.send_signal(number)
        code = self._process.wait(30)
        self._process = None
        return code


@dataclass
class Stack:
    """The daemon, its dummy host with two domains, a store, and the commands."""

    daemon: Daemon
    host: DummyHost
    store: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str) -> Ran:
        """Run a command."""
        self.capture.readouterr()
        session.use_settings_file(self.daemon.config)
        code = run(config_first(list(arguments)))
        printed = self.capture.readouterr()
        return Ran(code, printed.out, printed.err)

    def ok(self, *arguments: str) -> Ran:
        """Run a command that must succeed."""
        ran = self(*arguments)
        assert ran.code == 0, f"{arguments}: {ran}\n{self.daemon.log.read_text()}"
        return ran

    def disk(self, name: str) -> Path:
        """The disk of a domain."""
        return Path(self.host.find(name).disks[0].source)


def fill_disk(path: Path, *, seed: bytes) -> None:
    """Put a little data into a sparse file of 8 MiB."""
    with path.open("r+b") as file:
        for place in (0, 3 << 20, 7 << 20):
            file.seek(place)
            file.write(seed * 5000)


def _prepared(directory: Path) -> Daemon:
    """A started daemon with the host `lab`, the VMs db (0) and web (1), and the datastore `store`."""
    daemon = Daemon(directory)
    host = DummyHost(f"dummy://{directory}/domains")
    for name in ("web", "db"):
        fill_disk(Path(host.create(name, {"vda": 8 << 20}).disks[0].source), seed=name.encode())
    (directory / "store").mkdir()
    daemon.start()
    try:
        client = Client(directory / "run/api/daemon.sock")
        lab = {"name": "lab", "uri": f"dummy://{host.root}", "vmm": "dummy", "tm": "dummy"}
        host_id = client.post("hosts", lab)["id"]
        client.post(f"hosts/{host_id}/import", {"all": True})
        values = {"BASE_PATH": str(directory / "store")}
        client.post("datastores", {"name": "store", "driver": "fs", "values": values})
    except BaseException:
        daemon.end()
        raise
    return daemon


def _stack(daemon: Daemon, capture: pytest.CaptureFixture[str]) -> Stack:
    host = DummyHost(f"dummy://{daemon.directory}/domains")
    return Stack(daemon, host, daemon.directory / "store", capture)


@pytest.fixture
def stack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Stack]:
    """A stack of its own; see `_prepared`."""
    daemon = _prepared(tmp_path)
    yield _stack(daemon, capsys)
    daemon.end()


@pytest.fixture(scope="session")
def shared_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """The daemon behind `shared`."""
    daemon = _prepared(tmp_path_factory.mktemp("shared"))
    yield daemon
    daemon.end()


@pytest.fixture
def shared(shared_daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> Stack:
    """A stack that tests share which change nothing that others look at."""
    return _stack(shared_daemon, capsys)
