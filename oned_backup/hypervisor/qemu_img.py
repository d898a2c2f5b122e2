"""qemu-img, wrapped once: what is in an image, and its persistent bitmaps.

The format of the top image is always given: a guest that writes a qcow2 header
into its raw disk must not make us follow it. The program is limited in memory
and processor time, because an image can be made to ask for a lot of both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oned_backup.errors import Busy, DataCorrupt, DriverFailed, NotFound
from oned_backup.hypervisor.host import Host

_LIMITS = ["prlimit", f"--as={2 << 30}", "--cpu=60", "--"]


@dataclass(frozen=True)
class Bitmap:
    """A persistent dirty bitmap in a qcow2 image.

    `in_use`: the program that had the image open for writing has not closed
    it; if none has it open now, the bitmap is lost.
    """

    name: str
    in_use: bool
    records: bool


@dataclass(frozen=True)
class Image:
    """One file of a backing chain."""

    path: str
    format: str
    size_bytes: int
    bitmaps: Mapping[str, Bitmap]


def backing_chain(host: Host, path: str, image_format: str) -> tuple[Image, ...]:
    """The images that make up a disk, the top one first; also while it is in use.

    `NotFound` if one is absent, `DataCorrupt` if one cannot be understood.
    """
    return tuple(map(_image, _info(host, path, image_format, "--backing-chain")))


def top_image(host: Host, path: str, image_format: str) -> Image:
    """The uppermost of them, whatever becomes of those below; errors are as above."""
    return _image(_info(host, path, image_format))


def _info(host: Host, path: str, image_format: str, *options: str) -> Any:
    argv = ["qemu-img", "info", "--force-share", "--output=json", *options, "-f", image_format]
    done = host.run([*_LIMITS, *argv, "--", path], check=False)
    if done.returncode != 0:
        missing = "No such file" in done.stderr
        raise (NotFound if missing else DataCorrupt)(f"image {path}: {done.last_words}")
    return json.loads(done.stdout)


def create(host: Host, path: str, size_bytes: int) -> None:
    """Make an empty qcow2 image."""
    host.run([*_LIMITS, "qemu-img", "create", "-q", "-f", "qcow2", "--", path, str(size_bytes)])


def add_bitmap(host: Host, path: str, name: str, *, records: bool = True) -> None:
    """Add a persistent bitmap to a qcow2 image that nobody has open; `Busy` if somebody has."""
    switch = "--enable" if records else "--disable"
    _bitmap(host, path, ["--add", switch, "-f", "qcow2", "--", path, name])


def merge_bitmap(host: Host, path: str, name: str, *, source_name: str, source: str = "") -> None:
    """Add to the bitmap `name` of `path` what `source_name` has, a bitmap of `source` or else of `path`."""
    other = ["-F", "qcow2", "-b", source] if source else []
    _bitmap(host, path, ["--merge", source_name, *other, "-f", "qcow2", "--", path, name])


def remove_bitmap(host: Host, path: str, name: str) -> None:
    """Remove a persistent bitmap from a qcow2 image that nobody has open; `Busy` if somebody has."""
    _bitmap(host, path, ["--remove", "-f", "qcow2", "--", path, name])


def _bitmap(host: Host, path: str, arguments: list[str]) -> None:
    done = host.run([*_LIMITS, "qemu-img", "bitmap", *arguments], check=False)
    if done.returncode != 0:
        in_use = '" lock' in done.stderr  # Failed to get "write" lock
        raise (Busy if in_use else DriverFailed)(f"qemu-img bitmap on {path}: {done.last_words}")


def _image(entry: Mapping[str, Any]) -> Image:
    data = entry.get("format-specific", {}).get("data", {})
    bitmaps = {
        bitmap["name"]: Bitmap(bitmap["name"], "in-use" in bitmap["flags"], "auto" in bitmap["flags"])
        for bitmap in data.get("bitmaps", [])
    }
    return Image(str(entry["filename"]), str(entry["format"]), int(entry["virtual-size"]), bitmaps)
