"""A read-only directory of files that a Python object produces: the kernel's FUSE protocol, spoken directly.

No library sits between: a reply is one `writev` of the producer's own buffer,
and `fusermount3` does the mounting for root and for everybody else. With its
`auto_unmount` a helper process outlives us and takes the mount away, however we end.

    kernel ── READ ──> dispatcher ──> the file's own thread ── entry.read() ──> reply

Files are opened for direct I/O: reads come as the reader makes them, in its
order and up to 1 MiB each, with no page cache and no read-ahead between.
Structures: Linux `include/uapi/linux/fuse.h`, protocol 7.31 (Linux 5.4).
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import queue
import select
import socket
import stat
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from oned_backup.errors import Misconfigured

_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
_INIT_IN = struct.Struct("<IIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHI28x")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_HEAD = struct.Struct("<QII")
_OPEN_OUT = struct.Struct("<QII")
_READ_IN = struct.Struct("<QQI")
_DIRENT = struct.Struct("<QQII")
_STATFS_OUT = struct.Struct("<QQQQQIIII24x")

_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR, _ACCESS, _INTERRUPT = 25, 26, 27, 28, 29, 34, 36
_DESTROY, _BATCH_FORGET = 38, 42
_EMPTY_ANSWER = {_RELEASE, _RELEASEDIR, _FLUSH, _ACCESS, _DESTROY}
_MINOR = 31
_ASYNC_READ, _MAX_PAGES = 1 << 0, 1 << 22
_DIRECT_IO = 1 << 0
#: 1 MiB, the most that the kernel asks for at once
_PAGES = 256
_ROOT = 1
_FOREVER_S = 1 << 30
_REQUEST_BYTES = 1 << 16
_JOIN_S = 5.0
#: how often somebody who waits for a read and had a signal is looked at: was it killed since?
_WATCH_MS = 200

Reply = bytes | memoryview


class Entry(Protocol):
    """A file in the directory. `read` is called by one thread at a time; what it raises is an EIO there."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    def read(self, offset: int, size: int) -> Reply:
        """The bytes at `offset`, fewer than `size` only at the end; valid until the next call."""


class Mount:
    """Shows `entries` as files of mode 0400 in `directory` until `close`."""

    def __init__(self, directory: Path, entries: Mapping[str, Entry]) -> None:
        self._directory = directory
        self._names = list(entries)
        self._entries = list(entries.values())
        self._born_ns = time.time_ns()
        # readers that compare with what they saw before must not take these files for known ones
        self._first_inode = int.from_bytes(os.urandom(6), "little") << 12
        self._queues: dict[int, queue.SimpleQueue[tuple[int, int, int] | None]] = {}
        self._workers: list[threading.Thread] = []
        self._writing = threading.Lock()
        self._requester: dict[int, int] = {}
        self._interrupted: set[int] = set()
        self._closed = False
        self._answers: Mapping[int, Callable[[int, bytes], bytes]] = {
            _INIT: self._init,
            _LOOKUP: self._lookup,
            _GETATTR: self._getattr,
            _OPEN: self._open,
            _OPENDIR: self._opendir,
            _READDIR: self._readdir,
            _STATFS: self._statfs,
        }
        self._device, self._helper, self._control = _mount(directory)
        self._wake, self._waker = os.pipe()
        self._dispatcher = threading.Thread(target=self._dispatch, name="fuse", daemon=True)
        self._dispatcher.start()

    def close(self) -> None:
        """End all reads with an error, and unmount."""
        if self._closed:
            return
        os.close(self._waker)
        self._dispatcher.join()
        with self._writing:
            self._closed = True
            os.close(self._device)  # what still waits for us gets ECONNABORTED
        os.close(self._wake)
        for waiting in self._queues.values():
            waiting.put(None)
        self._control.close()  # the helper unmounts
        try:
            self._helper.wait(_JOIN_S)
        except subprocess.TimeoutExpired:
            self._helper.kill()
            self._helper.wait()
        unmount(self._directory)
        for worker in self._workers:
            worker.join(_JOIN_S)

    def _dispatch(self) -> None:
        poll = select.poll()
        poll.register(self._device, select.POLLIN)
        poll.register(self._wake, select.POLLIN | select.POLLHUP)
        while True:
            ready = dict(poll.poll(_WATCH_MS if self._interrupted else None))
            if self._wake in ready:
                return
            for unique in [one for one in self._interrupted if _is_doomed(self._requester.get(one))]:
                self._interrupted.discard(unique)
                self._fail(unique, errno.EINTR)
            if self._device not in ready:
                continue
            try:
                request = os.read(self._device, _REQUEST_BYTES)
            except OSError as error:
                if error.errno in {errno.EINTR, errno.EAGAIN, errno.ENOENT}:
                    continue
                return  # ENODEV: somebody has unmounted it
            self._handle(request)

    def _handle(self, request: bytes) -> None:
        _, opcode, unique, node, _, _, pid, _, _ = _IN_HEADER.unpack_from(request)
        body = request[_IN_HEADER.size :]
        if opcode == _READ:
            _, offset, size = _READ_IN.unpack_from(body)
            self._requester[unique] = pid
            self._queue(node).put((unique, offset, size))
        elif opcode == _INTERRUPT:
            target = int.from_bytes(body[:8], "little")
            if target in self._requester:
                self._interrupted.add(target)
        elif opcode not in {_FORGET, _BATCH_FORGET}:
            try:
                self._reply(unique, self._answer(opcode, node, body))
            except OSError as error:
                self._fail(unique, error.errno or errno.EIO)

    def _answer(self, opcode: int, node: int, body: bytes) -> bytes:
        if opcode in _EMPTY_ANSWER:
            return b""
        if opcode not in self._answers:
            raise OSError(errno.ENOSYS, f"operation {opcode}")
        return self._answers[opcode](node, body)

    def _init(self, _node: int, body: bytes) -> bytes:
        _, minor, readahead, _ = _INIT_IN.unpack_from(body)
        flags = _ASYNC_READ | _MAX_PAGES
        return _INIT_OUT.pack(7, min(minor, _MINOR), readahead, flags, 64, 48, 4096, 1, _PAGES, 0, 0)

    def _lookup(self, _node: int, body: bytes) -> bytes:
        name = os.fsdecode(body.rstrip(b"\0"))
        if name not in self._names:
            raise OSError(errno.ENOENT, name)
        node = self._names.index(name) + 2
        return _ENTRY.pack(node, 0, _FOREVER_S, _FOREVER_S, 0, 0) + self._attributes(node)

    def _getattr(self, node: int, _body: bytes) -> bytes:
        return _ATTR_HEAD.pack(_FOREVER_S, 0, 0) + self._attributes(node)

    def _attributes(self, node: int) -> bytes:
        size = 0 if node == _ROOT else self._entries[node - 2].size_bytes
        mode = stat.S_IFDIR | 0o500 if node == _ROOT else stat.S_IFREG | 0o400
        seconds, nanoseconds = divmod(self._born_ns, 10**9)
        return _ATTR.pack(
            self._first_inode + node,
            size,
            -(-size // 512),
            *(seconds,) * 3,
            *(nanoseconds,) * 3,
            mode,
            1,
            os.getuid(),
            os.getgid(),
            0,
            4096,
            0,
        )

    def _open(self, _node: int, _body: bytes) -> bytes:
        return _OPEN_OUT.pack(0, _DIRECT_IO, 0)

    def _opendir(self, _node: int, _body: bytes) -> bytes:
        return _OPEN_OUT.pack(0, 0, 0)

    def _readdir(self, _node: int, body: bytes) -> bytes:
        _, start, size = _READ_IN.unpack_from(body)
        listed = b""
        for number, name in list(enumerate([".", "..", *self._names], 1))[start:]:
            data = os.fsencode(name)
            kind = (stat.S_IFDIR if number <= 2 else stat.S_IFREG) >> 12
            node = _ROOT if number <= 2 else number - 1
            one = _DIRENT.pack(self._first_inode + node, number, len(data), kind) + data
            one += bytes(-len(one) % 8)
            if len(listed) + len(one) > size:
                break
            listed += one
        return listed

    def _statfs(self, _node: int, _body: bytes) -> bytes:
        blocks = sum(-(-entry.size_bytes // 4096) for entry in self._entries)
        return _STATFS_OUT.pack(blocks, 0, 0, len(self._names), 0, 4096, 255, 4096, 0)

    def _queue(self, node: int) -> queue.SimpleQueue[tuple[int, int, int] | None]:
        """Where a file's reads wait; its thread starts with the first one."""
        if node not in self._queues:
            waiting = self._queues[node] = queue.SimpleQueue()
            worker = threading.Thread(
                target=self._work, args=(self._entries[node - 2], waiting), name=f"fuse-{node}", daemon=True
            )
            self._workers.append(worker)
            worker.start()
        return self._queues[node]

    def _work(self, entry: Entry, waiting: queue.SimpleQueue[tuple[int, int, int] | None]) -> None:
        while (request := waiting.get()) is not None and not self._closed:
            unique, offset, size = request
            try:
                self._reply(unique, entry.read(offset, size))
            except BaseException:  # noqa: BLE001  # top of a thread; the entry knows what it raised
                self._fail(unique, errno.EIO)

    def _reply(self, unique: int, data: Reply) -> None:
        self._send(unique, 0, data)

    def _fail(self, unique: int, number: int) -> None:
        self._send(unique, -number, b"")

    def _send(self, unique: int, result: int, data: Reply) -> None:
        self._requester.pop(unique, None)
        header = _OUT_HEADER.pack(_OUT_HEADER.size + len(data), result, unique)
        # ENOENT: nobody waits for it any more
        with self._writing, contextlib.suppress(OSError):
            if not self._closed:
                os.writev(self._device, (header, data))


def unmount(directory: Path) -> None:
    """Take away whatever FUSE mount is at `directory`, used or not; nothing happens if there is none."""
    if is_mounted(directory):
        subprocess.run(
            ["fusermount3", "-u", "-z", "-q", "--", str(directory)],
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
        )


def is_mounted(directory: Path) -> bool:
    """Whether something is mounted at `directory`, alive or dead."""
    wanted = str(directory.parent.resolve() / directory.name)
    with Path("/proc/self/mountinfo").open(encoding="utf-8", errors="surrogateescape") as table:
        return any(_unescape(line.split(" ")[4]) == wanted for line in table)


def _mount(directory: Path) -> tuple[int, subprocess.Popen[bytes], socket.socket]:
    """The kernel's side of a new mount, the helper that will take it away, and what tells it when."""
    if not Path("/dev/fuse").exists():
        raise Misconfigured(
            "/dev/fuse is not there", hint="Load the kernel's module fuse, or give the container the device."
        )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    options = "ro,nosuid,nodev,auto_unmount,fsname=oned-backup,subtype=oned-backup"
    with theirs:
        try:
            helper = subprocess.Popen(
                ["fusermount3", "-o", options, "--", str(directory)],
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        except FileNotFoundError as error:
            ours.close()
            raise Misconfigured("fusermount3 is not installed", hint="Install the package fuse3.") from error
    device = _receive_descriptor(ours)
    assert helper.stderr is not None  # noqa: S101 - for the type checker
    if device is None:
        ours.close()
        said = helper.communicate()[1].decode("utf-8", "replace").strip()
        raise Misconfigured(f"{directory}: cannot be mounted: {said or 'no message'}")
    helper.stderr.close()
    os.set_blocking(device, False)
    return device, helper, ours


def _receive_descriptor(source: socket.socket) -> int | None:
    numbers = array.array("i")
    _, found, _, _ = source.recvmsg(1, socket.CMSG_LEN(numbers.itemsize), socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in found:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers.frombytes(data[: numbers.itemsize])
    return numbers[0] if numbers else None


def _is_doomed(pid: int | None) -> bool:
    """Whether that thread has been killed and only waits for us to let it go."""
    try:
        text = Path(f"/proc/{pid or 0}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    pending = [
        int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigPnd", "ShdPnd"))
    ]
    return any(mask >> 8 & 1 for mask in pending)


def _unescape(text: str) -> str:
    for number in (" ", "\t", "\n", "\\"):
        text = text.replace(f"\\{ord(number):03o}", number)
    return text
