"""Compressed clusters of qcow2 files: to bytes, whatever they are made of, in bounded memory.

zstd is what this engine and newer QEMUs write, raw deflate what older ones did.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable

import zstandard

DEFLATE, ZSTD = 0, 1
#: zlib's window for qcow2: no header, 4 KiB
_DEFLATE_WBITS = -12
#: what a decoder must be able to keep (RFC 8878, 3.1.1.1.2); no cluster needs more
_MAX_WINDOW_BYTES = 8 << 20

#: compressed data, which may be followed by something else, and the size of a cluster; None: not valid
Unpack = Callable[[memoryview, int], bytes | None]

_own = threading.local()


def unpack_zstd(data: memoryview, size: int) -> bytes | None:
    """The cluster in the zstd frame at the start of `data`."""
    if not hasattr(_own, "zstd"):
        _own.zstd = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES)
    try:
        announced = zstandard.get_frame_parameters(data).content_size
        if announced not in {size, zstandard.CONTENTSIZE_UNKNOWN}:
            return None  # it would be allocated
        result: bytes = _own.zstd.decompress(data, max_output_size=size)
    except zstandard.ZstdError:
        return None
    return result if len(result) == size else None


def unpack_deflate(data: memoryview, size: int) -> bytes | None:
    """The cluster in the deflate stream at the start of `data`."""
    try:
        result = zlib.decompressobj(_DEFLATE_WBITS).decompress(data, size)
    except zlib.error:
        return None
    return result if len(result) == size else None


#: by the header's type of compression
CODECS: dict[int, Unpack] = {DEFLATE: unpack_deflate, ZSTD: unpack_zstd}
