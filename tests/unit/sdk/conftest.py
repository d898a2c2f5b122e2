"""A driver in a file of its own, started as the daemon starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Ended:
    code: int
    stdout: str
    stderr: str

    @property
    def message(self) -> str:
        return self.stderr.splitlines()[-1]


@dataclass
class Script:
    """An executable named after an action."""

    path: Path

    def start(self, env: Mapping[str, str] | None = None, **settings: Any) -> subprocess.Popen[bytes]:
        environ = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "ODB_SPEC": "1", **(env or {})}
        pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        return subprocess.Popen([self.path], env=environ, **{**pipes, **settings})

    def run(self, stdin: bytes = b"", env: Mapping[str, str] | None = None) -> Ended:
        process = self.start(env)
        out, err = process.communicate(stdin, timeout=60)
        return Ended(process.returncode, out.decode(), err.decode())

    def stop_when_it_says(self, word: bytes, number: int = signal.SIGTERM) -> Ended:
        """Send a signal once the driver has written `word` as the beginning of a line on stderr."""
        process = self.start()
        assert process.stderr is not None
        assert process.stdout is not None
        seen = b""
        while word not in seen:
            line = process.stderr.readline()
            assert line, seen
            seen += line
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        return Ended(process.returncode, out.decode(), (seen + err).decode())


@pytest.fixture
def driver(tmp_path: Path) -> Callable[..., Script]:
    def make(body: str, action: str = "monitor") -> Script:
        path = tmp_path / action
        head = f"#!{sys.executable}\nimport os, sys, time\nfrom oned_backup import errors, sdk\n"
        method = textwrap.indent(textwrap.dedent(body).strip(), "        ")
        text = f"{head}class D(sdk.Driver):\n    def {action}(self, call):\n{method}\nsdk.main(D())\n"
        path.write_text(text)
        path.chmod(0o755)
        return Script(path)

    return make
