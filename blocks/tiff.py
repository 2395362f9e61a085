"""Whether a TIFF is all there, as far as its own header tells. No pixel is read.

Libraries that decode TIFFs take one that was cut off between two pages for a shorter one. Here
every offset that the file names must lie within it.
"""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

# Bytes of one value, by the field types of TIFF 6 and BigTIFF.
_VALUE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_UNSIGNED = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_SUB_PAGES = 330
# Tags of where strips and tiles begin, and of how long they are.
_DATA = ((273, 279), (324, 325))
# More than any camera writes, and little enough to read at once.
_MOST_PAGES = 100_000
_MOST_VALUES = 1 << 20


class DamagedTiff(Exception):
    """A TIFF that can't be read to its end; the message goes on after the file's name."""


def check_tiff(path: Path) -> None:
    """Make sure that a file has a TIFF's header, and is as long as that says.

    Raises:
        DamagedTiff: when it is empty, no TIFF, or shorter than it should be.
        OSError: when it can't be read.
    """
    # Should a link or a pipe stand in its place by now: neither follow it nor wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _Walk(descriptor).check()
    finally:
        os.close(descriptor)


class _Walk:
    """From page to page through one file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._size = os.fstat(descriptor).st_size

    def check(self) -> None:
        if self._size == 0:
            raise DamagedTiff("is empty")
        start = os.pread(self._descriptor, 16, 0)
        if start[:4] in (b"II*\0", b"MM\0*"):
            self._order, self._offset, self._count, self._inline = "<" if start[:1] == b"I" else ">", "I", "H", 4
            first = self._numbers("I", start[4:8])
        elif start[:8] in (b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"):
            self._order, self._offset, self._count, self._inline = "<" if start[:1] == b"I" else ">", "Q", "Q", 8
            first = self._numbers("Q", start[8:16])
        else:
            raise DamagedTiff("is no TIFF")
        if not first or first[0] == 0:
            raise DamagedTiff("has no page")
        pages, seen = [first[0]], set[int]()
        while pages:
            page = pages.pop()
            if page in seen or len(seen) == _MOST_PAGES:
                raise DamagedTiff("has pages without an end")
            seen.add(page)
            pages += self._check_page(page)

    def _check_page(self, start: int) -> Iterator[int]:
        """Check one page's fields and data; gives the pages it leads to."""
        head = struct.calcsize(self._order + self._count)
        (count,) = self._numbers(self._count, self._read(start, head))
        length = 4 + 2 * self._inline
        if count > _MOST_VALUES:
            raise DamagedTiff("has a page with too many fields")
        body = self._read(start + head, count * length + self._inline)
        fields: dict[int, tuple[int, ...]] = {}
        for at in range(0, count * length, length):
            tag, kind = self._numbers("HH", body[at : at + 4])
            fields[tag] = self._values(tag, kind, body[at + 4 : at + length])
        for offsets, lengths in _DATA:
            for offset, size in zip(fields.get(offsets, ()), fields.get(lengths, ()), strict=False):
                self._need(offset, size)
        (following,) = self._numbers(self._offset, body[count * length :])
        yield from (page for page in (following, *fields.get(_SUB_PAGES, ())) if page)

    def _values(self, tag: int, kind: int, rest: bytes) -> tuple[int, ...]:
        """The values of a field that says where something is; of any other, only that they are there."""
        (count,) = self._numbers(self._offset, rest[: self._inline])
        size = count * _VALUE_BYTES.get(kind, 0)
        value = rest[self._inline :]
        if size > self._inline:
            (where,) = self._numbers(self._offset, value)
            self._need(where, size)
        if kind not in _UNSIGNED or tag not in {_SUB_PAGES, *(tag for pair in _DATA for tag in pair)}:
            return ()
        if count > _MOST_VALUES:
            raise DamagedTiff("has a page in too many pieces")
        if size > self._inline:
            value = self._read(where, size)
        return self._numbers(_UNSIGNED[kind] * count, value[:size])

    def _need(self, offset: int, size: int) -> None:
        if offset + size > self._size:
            raise DamagedTiff(f"has {self._size} bytes, but its header says {offset + size}")

    def _read(self, offset: int, size: int) -> bytes:
        self._need(offset, size)
        content = os.pread(self._descriptor, size, offset)
        if len(content) < size:
            raise DamagedTiff("became shorter while it was read")
        return content

    def _numbers(self, kinds: str, content: bytes) -> tuple[int, ...]:
        if len(content) < struct.calcsize(self._order + kinds):
            raise DamagedTiff(f"has {self._size} bytes, too few for a header")
        return struct.unpack(self._order + kinds, content)
