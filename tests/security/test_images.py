"""Images that somebody has made or changed: read as a disk or refused, in bounded time and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ADDRESS_SPACE_BYTES = 2 << 30

_FUZZ = """
import random, resource, sys
from pathlib import Path
from oned_backup.disk.chain import ChainReader, Layer
from oned_backup.errors import OnedBackupError

image, damaged, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
whole = bytearray(open(image, "rb").read())
numbers = (0, 1, 2, 0xFF, 1 << 31, 1 << 63 | 0x10000, (1 << 63) - 1, (1 << 64) - 1, 0x30000, 1 << 62 | 5)
header = (4, 8, 16, 20, 24, 32, 36, 40, 48, 56, 60, 64, 72, 80, 88, 96, 100, 104)
chance = random.Random(7)
read = refused = 0
for _ in range(rounds):
    data = bytearray(whole)
    for _ in range(chance.choice((1, 1, 2, 5))):
        if chance.random() < 0.5:  # the header
            at, size = chance.choice(header), 8
        else:  # any table
            at, size = chance.randrange(0, min(len(data), 6 * 65536) - 8) & ~7, 8
        number = chance.choice(numbers) if chance.random() < 0.7 else chance.getrandbits(64)
        data[at : at + size] = number.to_bytes(8, "big")
    if chance.random() < 0.1:
        del data[chance.randrange(len(data)) :]
    with open(damaged, "wb") as file:
        file.write(data)
    try:
        with ChainReader([Layer(path=Path(damaged), blocks=None, name="x")]) as chain:
            buffer = memoryview(bytearray(65536))
            for offset in range(0, min(chain.guest_bytes, 64 << 20), 65536):
                chain.read_into(offset, buffer[: min(65536, chain.guest_bytes - offset)])
        read += 1
    except OnedBackupError as error:
        assert len(error.message) < 500
        refused += 1
print(read, refused)
""".replace("MOST", str(ADDRESS_SPACE_BYTES))


def qemu_img(*arguments: str | Path) -> None:
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


@pytest.mark.fault("security", "images made to harm: tables, sizes, backing and data files")
@pytest.mark.parametrize("options", ["", "compression_type=zstd", "compression_type=zlib"])
@pytest.mark.fault("data", "damaged image of somebody else")
def test_damaged_images_are_read_or_refused(tmp_path: Path, options: str) -> None:
    raw, image = tmp_path / "raw", tmp_path / "image.qcow2"
    with raw.open("wb") as file:
        file.truncate(8 << 20)
        for cluster in range(0, 128, 3):
            file.seek(cluster * 65536)
            file.write(bytes(range(256)) * 200)
    packed = ["-c", "-o", options] if options else []
    qemu_img("convert", "-f", "raw", "-O", "qcow2", *packed, raw, image)
    argv = [sys.executable, "-c", _FUZZ, str(image), str(tmp_path / "damaged"), "400"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    read, refused = map(int, done.stdout.split())
    assert read > 10
    assert refused > 100
