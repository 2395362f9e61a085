"""TIFFs as cameras write them, and what is left of them when writing stops half-way."""

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import tifffile
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from blocks.tiff import DamagedTiff, check_tiff
from tests.images import tiff

PIXELS = numpy.arange(3 * 96 * 80, dtype=numpy.uint16).reshape(3, 96, 80)


def written(order: Literal["<", ">"] = "<", bigtiff: bool = False, **options: Any) -> bytes:
    """Three pages, one after the other, each with its data behind its header."""
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, bigtiff=bigtiff, byteorder=order) as out:
        for page in PIXELS:
            out.write(page, contiguous=False, **options)
    return buffer.getvalue()


STARTS = [b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"]


KINDS: dict[str, Callable[[], bytes]] = {
    "strips": written,
    "many strips": lambda: written(rowsperstrip=8),
    "tiles": lambda: written(tile=(32, 16)),
    "compressed": lambda: written(compression="zlib", rowsperstrip=16),
    "big endian": lambda: written(order=">"),
    "BigTIFF": lambda: written(bigtiff=True),
    "BigTIFF in big endian tiles": lambda: written(bigtiff=True, order=">", tile=(32, 16)),
    "with a thumbnail": lambda: written(subifds=0, description="x" * 500),
    "smallest": tiff,
}


@pytest.mark.parametrize("make", KINDS.values(), ids=KINDS)
def test_a_whole_image_is_sound_and_any_part_of_it_is_not(make: Callable[[], bytes], tmp_path: Path) -> None:
    content, path = make(), tmp_path / "a.tif"
    path.write_bytes(content)
    check_tiff(path)
    path.write_bytes(content + b"more")
    check_tiff(path)
    last = len(content) - 1
    for size in {0, 1, 4, 7, 8, 9, 15, 16, 100, last, *range(0, last, max(1, last // 60))} & set(range(len(content))):
        os.truncate(path, 0)
        path.write_bytes(content[:size])
        with pytest.raises(DamagedTiff, match=r"is empty|is no TIFF|has no page|\d+ bytes"):
            check_tiff(path)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    looped = tiff()[:34] + struct.pack("<I", 8) + tiff()[38:]
    for content, sentence in {
        b"": "is empty",
        b"\x89PNG\r\n\x1a\n" * 9: "is no TIFF",
        bytes(500): "is no TIFF",
        b"II*\0" + bytes(500): "has no page",
        tiff(b"pixels")[:-1]: "has 43 bytes, but its header says 44",
        looped: "has pages without an end",
    }.items():
        path.write_bytes(content)
        with pytest.raises(DamagedTiff, match=sentence):
            check_tiff(path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "sound.tif").write_bytes(tiff())
    (tmp_path / "link.tif").symlink_to("sound.tif")
    with pytest.raises(OSError, match="Too many levels"):
        check_tiff(tmp_path / "link.tif")


@hypothesis_settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    start=st.sampled_from([b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"]), rest=st.binary(max_size=400)
)
def test_no_content_does_anything_but_pass_or_be_refused(tmp_path: Path, start: bytes, rest: bytes) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(start + rest)
    try:
        check_tiff(path)
    except DamagedTiff as error:
        str(error).encode()
