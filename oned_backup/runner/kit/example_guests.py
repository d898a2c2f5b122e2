"""The guests whose disks the clauses back up, each with one thing or another that drivers get wrong."""

from __future__ import annotations

import secrets
from functools import cached_property
from pathlib import Path

from oned_backup.runner.kit.guest import KIB, MIB, Point, make_points


class ExampleGuests:
    """They are made when a clause asks for them, below `root`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def points(self) -> tuple[Point, ...]:
        """Three points of a guest with two disks of odd sizes; the second disk restarts at the third."""
        size = 16 * MIB + 3 * 512
        noise = self._noise(128 * KIB)
        first = (
            [
                "write -P 17 0 1M",
                f"write -P 34 {5 * MIB + 1536} 300k",
                f"write -s {noise} 12M 128k",
                f"write -P 51 {size - 2048} 2048",
            ],
            [
                f"write -s {noise} 13M 64k",
                "write -z 64k 128k",
                "write -P 68 512k 64k",
                "write -P 85 9M 100k",
                "discard 5M 64k",
            ],
            ["write -P 102 70k 4k", f"write -P 119 {size - 512} 512", "write -P 136 512k 4k"],
        )
        second: tuple[list[str], ...] = (
            ["write -P 153 0 1M", "write -P 170 1M 64k"],
            [],
            ["write -z 0 512k", "write -P 187 3M 64k"],
        )
        return make_points(self.root / "guest", [(size, first), (4 * MIB, second)], restarts=[(1, 2)])

    @cached_property
    def tiny(self) -> Point:
        """A guest with one disk of 1 MiB."""
        return make_points(self.root / "tiny", [(MIB, [["write -P 5 64k 128k"]])])[0]

    @cached_property
    def large(self) -> Point:
        """A guest with one disk of 24 MiB that no store can make smaller."""
        noise = self._noise(24 * MIB)
        return make_points(self.root / "large", [(24 * MIB, [[f"write -s {noise} 0 24M"]])])[0]

    @cached_property
    def noise(self) -> Point:
        """The same with 4 MiB."""
        return make_points(self.root / "noise", [(4 * MIB, [[f"write -s {self._noise(4 * MIB)} 0 4M"]])])[0]

    def _noise(self, size: int) -> Path:
        """A file that no store can make smaller, so that there is something to damage in each."""
        path = self.root / f"noise{size}"
        if not path.exists():
            path.write_bytes(secrets.token_bytes(size))
        return path

    @cached_property
    def changing(self) -> tuple[Point, ...]:
        """Four points of a guest whose disks also grow, come, go and are FULL inside an increment.

        Zeros written in increments hide what lies beneath; one disk grows beyond a cluster that it
        only had a part of.
        """
        size = 16 * MIB + 3 * 512
        main: tuple[list[str], ...] = (
            ["write -P 17 0 1M", f"write -P 34 {5 * MIB + 1536} 300k", f"write -P 51 {size - 2048} 2048"],
            ["write -z 64k 128k", "write -P 68 512k 64k", "write -P 85 9M 100k", "discard 5M 64k"],
            ["write -P 102 70k 4k", f"write -P 119 {size - 512} 512", "write -z 9M 64k"],
            ["write -P 136 512k 4k", "write -z 0 64k"],
        )
        growing: tuple[list[str], ...] = (
            ["write -P 153 0 1M", "write -P 160 4M 1536"],
            [],
            [f"grow {6 * MIB + 1024}", "write -P 170 5M 4k"],
            ["write -P 171 5000k 1k"],
        )
        added = (None, ["write -P 4 0 64k"], ["write -P 5 128k 4k", "write -z 0 64k"], ["write -P 6 64k 4k"])
        restarted = (
            ["write -P 187 0 1M"],
            ["write -P 188 256k 64k"],
            ["write -z 0 512k", "write -P 189 3M 64k"],
            ["write -P 190 3M 4k"],
        )
        removed = (["write -P 204 0 64k"], ["write -P 205 64k 64k"], None, None)
        disks = [
            (size, main),
            (4 * MIB + 1536, growing),
            (MIB, added),
            (4 * MIB, restarted),
            (MIB, removed),
        ]
        return make_points(self.root / "changing", disks, restarts=[(3, 2)])
