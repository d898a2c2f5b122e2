"""A disk that no QEMU has, served by qemu-nbd: read-only that of a domain that is off, or a new one.

While it is served nobody can open the image for writing, QEMU included: the
domain cannot be started in the middle of its backup. The server's pid file is
locked for as long as it lives, so that whoever comes later can end it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from oned_backup.errors import Busy, DriverFailed
from oned_backup.hypervisor import qemu_img
from oned_backup.hypervisor.host import Host
from oned_backup.hypervisor.qemu_img import Image

#: NBD connections that one export accepts at a time
_MAX_CLIENTS = 8


@dataclass(frozen=True)
class Server:
    """Where one disk is served. All of it lies in the operation's socket directory."""

    socket: Path
    pid_file: Path
    export: str

    @classmethod
    def at(cls, directory: Path, export: str) -> Server:
        """The server of that export; all names are fixed beforehand."""
        return cls(directory / f"{export}.sock", directory / f"{export}.pid", export)


def serve(
    host: Host, image: str, image_format: str, *, directory: Path, export: str, bitmap: str = ""
) -> Server:
    """Serve an image until the server is stopped; `Busy` if somebody has it open for writing."""
    options = ["--read-only", *([f"--bitmap={bitmap}"] if bitmap else [])]
    server = Server.at(directory, export)
    if image_format == "raw":
        return _start(host, image, server, [*options, "--", _kept_from_writers(image)])
    return _start(host, image, server, [*options, f"--format={image_format}", "--", image])


def serve_new(host: Host, image: str, image_format: str, *, directory: Path, export: str) -> Server:
    """Serve a new image for writing until the server is stopped; zeros make holes in it."""
    operands = ["--discard=unmap", f"--format={image_format}", "--", image]
    return _start(host, image, Server.at(directory, export), operands)


def _kept_from_writers(path: str) -> str:
    """A raw image, by a name for which QEMU locks it as it does others.

    With raw there is no metadata to protect, so a reader of it lets others write: the domain
    could be started. QEMU's filter `blkdebug` (4.2) is the one that can refuse them.
    """
    kept = {"driver": "blkdebug", "unshare-child-perms": ["write"], "image": {"filename": path}}
    return "json:" + json.dumps({"driver": "raw", "file": kept}, ensure_ascii=False)


def _start(host: Host, image: str, server: Server, operands: Sequence[str]) -> Server:
    argv = ["qemu-nbd", "--persistent", "--fork", f"--shared={_MAX_CLIENTS}"]
    argv += [f"--socket={server.socket}", f"--pid-file={server.pid_file}", f"--export-name={server.export}"]
    done = host.run([*argv, "--cache=writeback", "--aio=threads", *operands], timeout_s=30, check=False)
    if done.returncode != 0:
        in_use = '" lock' in done.stderr  # Failed to get "write" lock
        raise (Busy if in_use else DriverFailed)(f"qemu-nbd on {image}: {done.last_words}")
    return server


def stop_servers(host: Host, directory: Path) -> None:
    """End all servers of a directory on the host, and what forwards their sockets to us."""
    host.end_forwards()
    for name in host.names(directory):
        if name.endswith(".pid"):
            host.stop_process(directory / name)


def tracking_layers(chain: tuple[Image, ...], bitmap: str) -> tuple[Image, ...]:
    """The images from the top down that carry `bitmap` without a gap.

    libvirt carries bitmaps into the overlay of an external snapshot, so that
    the changes lie in the bitmaps of that name of several images.
    """
    layers = []
    for image in chain:
        if bitmap not in image.bitmaps:
            break
        layers.append(image)
    return tuple(layers)


def gather_changes(host: Host, layers: tuple[Image, ...], bitmap: str, merged: str) -> str:
    """The name of a bitmap in the top image that has the changes of all `layers`.

    `bitmap` itself where there is only one; otherwise they are merged into the new bitmap `merged`.
    """
    if len(layers) == 1:
        return bitmap
    top = layers[0].path
    qemu_img.add_bitmap(host, top, merged, records=False)
    for layer in layers:
        qemu_img.merge_bitmap(
            host, top, merged, source="" if layer is layers[0] else layer.path, source_name=bitmap
        )
    return merged
