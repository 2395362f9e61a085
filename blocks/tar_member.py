"""One member of a tar: its header, and where its bytes lie."""

import tarfile
from dataclasses import dataclass
from typing import Self

from blocks.source_file import SourceFile


@dataclass(frozen=True, slots=True)
class Member:
    """One file of the bundle and where it lies in it. Offsets and sizes are bytes."""

    name: str
    """Path below the image directory; in the tar './' stands before it."""
    size: int
    offset: int
    """Where its header begins."""
    header: bytes
    source: SourceFile | None
    """None for the metadata and the manifest, whose content is not a file's."""

    @classmethod
    def at(cls, offset: int, name: str, size: int, mtime_ns: int, source: SourceFile | None) -> Self:
        """Lay a member out. All that says nothing about the image is fixed: owner, mode, device."""
        info = tarfile.TarInfo(f"./{name}")
        info.size = size
        info.mtime = mtime_ns // 10**9
        info.mode = 0o644
        # Adds a pax header only where the name is long or not ASCII, or the size above 8 GiB.
        return cls(name, size, offset, info.tobuf(tarfile.PAX_FORMAT, "utf-8"), source)

    @property
    def data_offset(self) -> int:
        return self.offset + len(self.header)

    @property
    def padding(self) -> int:
        return -self.size % tarfile.BLOCKSIZE

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.data_offset + self.size + self.padding
