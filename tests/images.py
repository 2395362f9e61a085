"""Directories of images for tests, with random content that a seed fixes."""

import os
import random
import struct
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

TIMESTEP = UUID("6a0ecf0c-4a5b-4a49-9cb3-0c7a86a4e2a1")
KEY = "images/20261123_004/20261123/104207_6a0ecf0c.tar"

MIB = 1 << 20
# A bundle of four parts of 5 MiB and a shorter one.
SEVERAL_PARTS = [4 * MIB] * 5 + [123]


def tiff(content: bytes = b"pixels") -> bytes:
    """The smallest TIFF around any bytes: one strip, of which only place and length are told."""
    fields = struct.pack("<HHII", 273, 4, 1, 38) + struct.pack("<HHII", 279, 4, 1, len(content))
    return b"II*\0" + struct.pack("<IH", 8, 2) + fields + bytes(4) + content


def make_images(directory: Path, sizes: Sequence[int]) -> Path:
    """Write `Img/Img_r00_c00.tif` and so on, of the given sizes in bytes."""
    (directory / "Img").mkdir(parents=True)
    for number, size in enumerate(sizes):
        (directory / "Img" / f"Img_r{number:02}_c00.tif").write_bytes(random.Random(number).randbytes(size))
    return directory


def alter(path: Path) -> None:
    """Other content of the same size and modification time, in place: only its time of change tells."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([(last + 1) % 256]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
