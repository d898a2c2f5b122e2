"""What clauses do to a call or a store on purpose: end it at a moment, fill it, damage it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from oned_backup.runner.kit.clause import NotApplicable, Unmet
from oned_backup.runner.process import Cancellation


def cancel_after(cancellation: Cancellation, delay_s: float) -> None:
    """Cancel after that time."""
    cancellation.wait(delay_s)
    cancellation.cancel()


def cancel_at_state(cancellation: Cancellation, path: Path, number: int) -> None:
    """Cancel as soon as the names and sizes below `path` were seen in `number` different states."""
    last = _state(path)
    seen = 0
    end = time.monotonic() + 120
    while not cancellation.wait(0.001) and time.monotonic() < end:
        state = _state(path)
        if state != last:
            last, seen = state, seen + 1
        if seen >= number:
            cancellation.cancel()


def _state(path: Path) -> frozenset[tuple[str, int]]:
    found = set()
    for directory, folders, files in os.walk(path):  # which passes over what vanishes meanwhile
        for name in (*folders, *files):
            with contextlib.suppress(FileNotFoundError):
                found.add((f"{directory}/{name}", os.lstat(f"{directory}/{name}").st_size))
    return frozenset(found)


@contextlib.contextmanager
def small_file_system(path: Path, size_mb: int) -> Iterator[None]:
    """While inside, `path` is an empty file system of that size; `NotApplicable` where none can be made."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size_mb}m,mode=0700", "oned-backup-kit", str(path)]
    done = subprocess.run(mount, capture_output=True, timeout=60, check=False)
    if done.returncode != 0:
        raise NotApplicable(f"no small file system: {done.stderr.decode('utf-8', 'replace').strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", "--", str(path)], check=True, timeout=60)


def free_bytes(path: Path) -> int:
    """What is free on the file system of `path`."""
    found = os.statvfs(path)
    return found.f_bfree * found.f_frsize


def filled_files(path: Path) -> list[Path]:
    """The files below `path` that are not empty."""
    return [entry for entry in path.rglob("*") if entry.is_file() and entry.stat().st_size > 0]


@contextlib.contextmanager
def changed_byte(file: Path, share: float = 0.5) -> Iterator[None]:
    """While inside, one byte of `file` is another one: that after a share of it, in the middle.

    `Unmet` if the driver has removed it by then: what is damaged may be all that there is.
    """
    try:
        opened = file.open("r+b")
    except FileNotFoundError as error:
        raise Unmet(f"{file} is gone: it was removed when another file was damaged") from error
    with opened:
        place = int(file.stat().st_size * share)
        opened.seek(place)
        old = opened.read(1)
        opened.seek(place)
        opened.write(bytes([old[0] ^ 0x10]))
        opened.flush()
        yield
        opened.seek(place)
        opened.write(old)
    if not file.exists():
        raise Unmet(f"{file} is gone: it was removed because it was damaged")
