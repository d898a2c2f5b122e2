"""What lies in a folder: to see whether a driver has changed it, and what it takes."""

from __future__ import annotations

import os
from pathlib import Path


def tree(path: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Everything below a directory: mode, size, change time and content by relative name.

    Directories without times: a lock that was there meanwhile is no change.
    """
    found = {}
    for entry in sorted(path.rglob("*")):
        status = entry.lstat()
        content = entry.read_bytes() if entry.is_file() and not entry.is_symlink() else b""
        name = os.fsdecode(entry.relative_to(path))
        changed_ns = 0 if entry.is_dir() else status.st_mtime_ns
        found[name] = (status.st_mode, 0 if entry.is_dir() else status.st_size, changed_ns, content)
    return found


def allocated_bytes(path: Path) -> int:
    """What everything below a directory takes on its file system."""
    return sum(entry.lstat().st_blocks * 512 for entry in path.rglob("*"))
