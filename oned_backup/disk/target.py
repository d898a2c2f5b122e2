"""Where a restored disk is written: a file, a block device, a stream, or an NBD export (`nbdtarget`).

Each target is told in ascending order what lies where (`write`) and what is
zero (`zero`). What a fresh file was never told reads as zero anyway.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import parse_qs, quote, unquote, urlsplit

from oned_backup.disk.filewriter import FileWriter
from oned_backup.errors import (
    Conflict,
    InvalidInput,
    NoSpace,
    NotFound,
    OnedBackupError,
    PermissionDenied,
    Unavailable,
)

_BLKGETSIZE64 = 0x80081272
_BLKZEROOUT = 0x127F
_FLOCK = struct.Struct("hhqqi4x")
#: QEMU locks a byte from 200 on for each permission that it shares with nobody (RAW_LOCK_SHARED_BASE)
_QEMU_UNSHARED = (200, 8)
_ZEROS = memoryview(bytes(1 << 20))
#: zeroing is asked for in steps, so that progress and cancellation are not held up
ZERO_STEP = 1 << 30

IsALayer = Callable[[int, int], bool]

_NBD_SCHEME = "nbd+unix"


@dataclass(frozen=True)
class NbdExport:
    """An export of an NBD server behind a unix socket."""

    socket: str
    export: str = ""

    def __str__(self) -> str:
        """Its NBD URI."""
        return f"{_NBD_SCHEME}:///{quote(self.export)}?socket={quote(self.socket)}"


def parse_target(text: str) -> Path | NbdExport:
    """The file, block device or export (`nbd+unix:///EXPORT?socket=PATH`) that a text names."""
    if text.startswith("/"):
        return Path(text)
    parts = urlsplit(text)
    sockets = parse_qs(parts.query).get("socket", [])
    if parts.scheme != _NBD_SCHEME or parts.netloc or len(sockets) != 1 or not sockets[0].startswith("/"):
        raise InvalidInput(
            f"target '{text[:200]}' is neither an absolute path nor {_NBD_SCHEME}:///EXPORT?socket=PATH"
        )
    return NbdExport(sockets[0], unquote(parts.path.removeprefix("/")))


def open_target(target: Path | int | NbdExport, size: int, *, is_a_layer: IsALayer) -> Target:
    """The target for `size` bytes. An existing file is emptied.

    `InvalidInput` for one that is a layer, `Conflict` for one that QEMU has open: the disk of a guest.
    """
    if isinstance(target, int):
        return StreamTarget(target)
    if isinstance(target, NbdExport):
        from oned_backup.disk.nbdtarget import NbdTarget  # noqa: PLC0415 - the others need no libnbd

        return NbdTarget(target, size)
    what = str(target)
    try:
        fd, created = _open(target)
    except OSError as error:
        raise _explained(error, what) from error
    try:
        status = os.fstat(fd)
        if is_a_layer(status.st_dev, status.st_ino):
            raise InvalidInput(f"{what}: is one of the files to restore from")
        if not created and _is_open_in_qemu(fd):
            raise Conflict(
                f"{what}: QEMU has it open, perhaps as the disk of a running guest",
                hint="Shut the guest down first, or restore to another file.",
            )
        if stat.S_ISBLK(status.st_mode):
            return DeviceTarget(fd, what, size)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidInput(f"{what}: neither a regular file nor a block device")
        return FileTarget(fd, what, size, remove=target if created else None)
    except BaseException:
        os.close(fd)
        if created:
            target.unlink()
        raise


class Target:
    """Base of all targets: sequential `write` and `zero`, then `finish`; a context manager."""

    def write(self, offset: int, view: memoryview) -> None:
        """These bytes at that offset; the view is free afterwards."""
        raise NotImplementedError

    def zero(self, start: int, end: int) -> None:
        """Zeros in `[start, end)`."""
        raise NotImplementedError

    def finish(self) -> None:
        """Make it durable. A failure is final."""
        raise NotImplementedError

    def abandon(self) -> None:
        """The restore failed."""

    def close(self) -> None:
        """Close what was opened here."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                self.abandon()
        finally:
            self.close()


class DescriptorTarget(Target):
    """What is written through a descriptor of ours."""

    def __init__(self, fd: int, what: str) -> None:
        self._fd = fd
        self._what = what
        self._writer = FileWriter(fd)

    def write(self, offset: int, view: memoryview) -> None:
        """These bytes at that offset."""
        try:
            self._writer.write(offset, view)
        except OSError as error:
            raise _explained(error, self._what) from error

    def finish(self) -> None:
        """Make it durable. A failure is final."""
        try:
            self._writer.sync()
        except OSError as error:
            raise _explained(error, self._what) from error

    def close(self) -> None:
        """Close what was opened here."""
        os.close(self._fd)


class FileTarget(DescriptorTarget):
    """A regular file, emptied and set to its size first, so that zeros cost nothing."""

    def __init__(self, fd: int, what: str, size: int, *, remove: Path | None) -> None:
        super().__init__(fd, what)
        self._remove = remove
        try:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
        except OSError as error:
            raise _explained(error, what) from error

    def zero(self, start: int, end: int) -> None:
        """Nothing to do: never written is zero."""

    def abandon(self) -> None:
        """Remove the file if it was made here."""
        if self._remove is not None:
            self._remove.unlink(missing_ok=True)


class DeviceTarget(DescriptorTarget):
    """A block device: what was on it before must be overwritten."""

    def __init__(self, fd: int, what: str, size: int) -> None:
        super().__init__(fd, what)
        buffer = bytearray(8)
        fcntl.ioctl(fd, _BLKGETSIZE64, buffer)
        available = struct.unpack("=Q", buffer)[0]
        if available < size:
            raise InvalidInput(f"{what}: {size} bytes needed, the device has {available}")
        self._can_zero_out = True

    def zero(self, start: int, end: int) -> None:
        """Let the kernel zero the range (it discards where that gives zeros), else write zeros."""
        while start < end:
            stop = min(end, start + ZERO_STEP)
            if self._can_zero_out and start % 512 == 0 and stop % 512 == 0:
                try:
                    fcntl.ioctl(self._fd, _BLKZEROOUT, struct.pack("=QQ", start, stop - start))
                    start = stop
                    continue
                except OSError:
                    self._can_zero_out = False
            stop = min(stop, start + len(_ZEROS))
            self.write(start, _ZEROS[: stop - start])
            start = stop


class StreamTarget(DescriptorTarget):
    """A descriptor of the caller's that is written from front to back: a pipe, a socket, stdout."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, "output stream")

    def write(self, offset: int, view: memoryview) -> None:  # noqa: ARG002  # it comes in order
        """The next bytes."""
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise _explained(error, self._what) from error

    def zero(self, start: int, end: int) -> None:
        """The next bytes are zeros."""
        while start < end:
            count = min(end - start, len(_ZEROS))
            self.write(start, _ZEROS[:count])
            start += count

    def finish(self) -> None:
        """Make it durable where that means something."""
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            super().finish()

    def close(self) -> None:
        """The descriptor is the caller's."""


def _open(path: Path) -> tuple[int, bool]:
    """The descriptor, and whether the file was created."""
    flags = os.O_WRONLY | os.O_CLOEXEC
    try:
        # The kernel gives a device that is mounted, or a part of another one, to nobody who wants it alone.
        alone = os.O_EXCL if path.is_block_device() else 0
        return os.open(path, flags | alone), False
    except FileNotFoundError:
        return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600), True


def _is_open_in_qemu(fd: int) -> bool:
    """Whether somebody holds the locks by which QEMU keeps others from an image."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, *_QEMU_UNSHARED, 0)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, asked)
    except OSError:  # a file system without locks
        return False
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def _explained(error: OSError, what: str) -> OnedBackupError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return NoSpace(f"{what}: {error.strerror}")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return PermissionDenied(f"{what}: {error.strerror}")
    if error.errno in {errno.EISDIR, errno.ENXIO}:
        return InvalidInput(f"{what}: {error.strerror}")
    if error.errno == errno.EBUSY:
        return Conflict(
            f"{what}: in use by the kernel: mounted, or a part of LVM, RAID or swap space",
            hint="Unmount it first, or restore to another device.",
        )
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return NotFound(f"{what}: {error.strerror}")
    return Unavailable(f"{what}: {error.strerror}")
