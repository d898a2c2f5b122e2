"""A small file system on a disk that can be told to fail: what the kernel does then is real.

ext4 at `place` → loop device → a file shown by nbdfuse → nbdkit's filters `error` and `rate` → memory
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from lab import wait_for

SIZE_MB = 32
#: bits per second
_FAST = "100G"


class FaultyDisk:
    """A disk that is mounted at `place` for as long as `mounted_disk` says."""

    def __init__(self, directory: Path, place: Path) -> None:
        self.place = place
        self.device = directory / "device" / "nbd"
        self._rate = directory / "rate"
        self._fails = {kind: directory / f"fail-{kind}" for kind in ("pread", "pwrite")}

    @contextmanager
    def failing(self, kind: str) -> Iterator[None]:
        """Meanwhile each `pread`, or each `pwrite`, is an I/O error."""
        self._forget_cached()
        self._fails[kind].touch()
        try:
            yield
        finally:
            self._fails[kind].unlink()

    @contextmanager
    def slow(self, bits_per_second: str) -> Iterator[None]:
        """Meanwhile it reads and writes no faster, such as 8M."""
        self._rate.write_text(bits_per_second)
        try:
            yield
        finally:
            self._rate.write_text(_FAST)

    def mount(self) -> None:
        """Show it at its place."""
        argv = ["losetup", "--find", "--show", "--direct-io=on", str(self.device)]
        loop = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
        try:
            subprocess.run(["mount", loop, str(self.place)], check=True)
        finally:
            subprocess.run(["losetup", "--detach", loop], check=True)  # when it is not used any more

    def unmount(self, *, lazily: bool = False) -> None:
        """Take it away; lazily: also from under those who use it."""
        subprocess.run(["umount", *(["--lazy"] if lazily else []), str(self.place)], check=True)

    def remount(self, options: str) -> None:
        """Change how it is mounted, such as `ro`; that waits for whoever still writes."""
        argv = ["mount", "-o", f"remount,{options}", str(self.place)]
        wait_for(f"mount as {options}", lambda: subprocess.run(argv, check=False).returncode == 0, 20)

    def fill(self) -> Path:
        """Leave no room; the file that takes it."""
        filler = self.place / ".filler"
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 20, 4096, 4096):  # what was reserved is free again when all is written
                with suppress(OSError):
                    while file.write(bytes(size)):
                        pass
                os.fsync(file.fileno())
        return filler

    def start(self) -> subprocess.Popen[bytes]:
        """The server behind it, when the disk can be used."""
        self.device.parent.mkdir()
        nbdkit = [
            *("nbdkit", "--exit-with-parent", "--filter=error", "--filter=rate", "memory", f"{SIZE_MB}M"),
            *(f"rate-file={self._rate}", f"rate={_FAST}", "burstiness=0.1", "error=EIO"),
            *(f"error-{kind}-file={path}" for kind, path in self._fails.items()),
            *(f"error-{kind}-rate=1" for kind in self._fails),
        ]
        server = subprocess.Popen(
            ["nbdfuse", str(self.device.parent), "[", *nbdkit, "]"], stderr=subprocess.DEVNULL
        )
        wait_for("the disk", self.device.exists)
        subprocess.run(
            ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(self.device)], check=True
        )
        return server

    def stop(self, server: subprocess.Popen[bytes]) -> None:
        """End the server; the disk is gone."""
        subprocess.run(["fusermount3", "-u", str(self.device.parent)], check=False)
        server.terminate()
        server.wait(10)

    def _forget_cached(self) -> None:
        """Have the next read of each file come from the disk."""
        os.sync()
        for path in self.place.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


@contextmanager
def mounted_disk(place: Path) -> Iterator[FaultyDisk]:
    """A disk that works, mounted at `place`."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="odb-disk-")))
        disk = FaultyDisk(directory, place)
        server = disk.start()
        stack.callback(disk.stop, server)
        disk.mount()
        stack.callback(subprocess.run, ["umount", "--lazy", str(place)], check=False)
        (place / "lost+found").rmdir()
        yield disk
