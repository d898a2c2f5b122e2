"""The fs driver, which stops in the middle of a disk for as long as there is a file `hold`.

A test puts this beside the real driver's files, as `driver.py`, and the real one
as `real.py`. `reached` appears when a disk has been written in part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from real import DRIVER

from oned_backup.sdk.files import BackupFile, Chunk

HOLD = Path(__file__).with_name("hold")
REACHED = Path(__file__).with_name("reached")


def _held(chunks: Callable[[BackupFile], Iterator[Chunk]]) -> Callable[[BackupFile], Iterator[Chunk]]:
    def chunks_then_wait(file: BackupFile) -> Iterator[Chunk]:
        done = 0
        for chunk in chunks(file):
            yield chunk
            done += len(chunk)
            if file.name.startswith("disk.") and done < file.size_bytes and HOLD.exists():
                REACHED.touch()
                while HOLD.exists():
                    time.sleep(0.02)

    return chunks_then_wait


BackupFile.chunks = _held(BackupFile.chunks)  # type: ignore[method-assign]

__all__ = ["DRIVER"]
