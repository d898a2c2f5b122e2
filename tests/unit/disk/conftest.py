"""Real images, served and judged by QEMU's own tools."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from oned_backup.disk.chain import Layer
from oned_backup.disk.image import VirtualImage, open_export

DEADLINE_S = 20


def listening(path: Path) -> bool:
    """Whether a server accepts clients there; the file exists a moment earlier."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@contextmanager
def running(argv: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server process from the moment its socket is there."""
    process = subprocess.Popen(argv, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not listening(path):
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            assert time.monotonic() < deadline, f"{argv[0]} made no socket"
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()
        path.unlink(missing_ok=True)


@dataclass
class Qemu:
    """QEMU's tools with a folder of their own."""

    folder: Path
    _sockets: int = 0
    _server: subprocess.Popen[bytes] | None = None

    def kill(self) -> None:
        """End the server that was started last."""
        assert self._server is not None
        self._server.kill()
        self._server.wait()

    def img(self, *arguments: str | Path) -> str:
        return _run("qemu-img", *arguments)

    def io(self, image: Path, *commands: str, fmt: str = "qcow2") -> str:
        argv = [word for command in commands for word in ("-c", command)]
        return _run("qemu-io", "-f", fmt, *argv, image)

    @contextmanager
    def export(self, image: Path, *, fmt: str = "qcow2", bitmap: str = "") -> Iterator[str]:
        """The socket of `qemu-nbd`, which lets one client in at a time."""
        self._sockets += 1
        path = self.folder / f"{self._sockets}.sock"
        argv = ["qemu-nbd", "-r", "-t", "-k", str(path), "-f", fmt]
        argv += ["-B", bitmap] if bitmap else []
        with running([*argv, str(image)], path) as self._server:
            yield str(path)

    @contextmanager
    def nbdkit(self, *arguments: str | Path) -> Iterator[str]:
        self._sockets += 1
        path = self.folder / f"{self._sockets}.sock"
        argv = ["nbdkit", "-f", "-U", str(path), *map(str, arguments)]
        with running(argv, path) as self._server:
            yield str(path)

    def back_up(self, image: Path, name: str, *, bitmap: str = "", fmt: str = "qcow2") -> Layer:
        """Store a backup of the image; `qemu-img check` finds nothing."""
        with (
            self.export(image, fmt=fmt, bitmap=bitmap) as socket,
            open_export(socket, "", dirty_bitmap=bitmap) as view,
        ):
            layer = store(view, self.folder / name)
        self.img("check", "-q", "-f", "qcow2", layer.path)
        return layer

    def same(self, left: Path, left_fmt: str, right: Path, right_fmt: str) -> None:
        """`qemu-img compare` says identical."""
        self.img("compare", "-q", "-f", left_fmt, "-F", right_fmt, left, right)


def store(view: VirtualImage, path: Path) -> Layer:
    """Write the image and its checksums as a datastore does."""
    with path.open("wb") as file:
        for chunk in view.chunks():
            file.write(chunk)
    assert path.stat().st_size == view.size_bytes
    blocks = path.with_name(path.name + ".blocks")
    blocks.write_bytes(b"".join(view.blocks_bytes()))
    assert blocks.stat().st_size == view.blocks_size_bytes
    return Layer(path, blocks, path.name)


def _run(*argv: str | Path) -> str:
    done = subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture
def qemu(tmp_path: Path) -> Qemu:
    return Qemu(tmp_path)


@pytest.fixture
def stored() -> Callable[[VirtualImage, Path], Layer]:
    return store
