"""The tar of one timestep: laid out from `stat` alone, then streamed once.

Because the layout is known before a byte is read, the bundle needs no temporary file, its size
can be announced, and any part of it can be made again from the source files.
"""

import hashlib
import io
import tarfile
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Self

from typing_extensions import Buffer

from blocks.proven_object import Image
from blocks.source_file import BundleError, SourceChanged, SourceFile, find_sources, settled_state_of
from blocks.tar_member import Member

__all__ = ["MANIFEST", "METADATA", "Bundle", "BundleError", "BundleReader", "Member", "SourceChanged"]

METADATA = "metadata.json"
MANIFEST = "manifest-sha256.txt"

# Small enough that the second hash finds the bytes still in the processor's cache.
_READ_BYTES = 256 << 10
_NO_HASH = "0" * 64


class Bundle:
    """The layout of a timestep's tar: `metadata.json`, the images by name, `manifest-sha256.txt`.

    Attributes:
        members: in the order of the tar.
        metadata: content of `metadata.json`.
        size: bytes of the whole tar.
        layout_digest: SHA-256 over all headers and the metadata; it identifies names, sizes,
            modification times and order.
        source_state: of the files as they were before any was read, to tell later that they are the same
            still; None where they had changed just before.
        known_hashes: SHA-256 in hex that files are known to have, by their names.
    """

    def __init__(
        self,
        members: tuple[Member, ...],
        metadata: bytes,
        source_state: str | None = None,
        known_hashes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.members = members
        self.known_hashes = known_hashes
        self.metadata = metadata
        self.source_state = source_state
        # Like GNU tar: two empty blocks, then filled up to whole records.
        end = members[-1].end + 2 * tarfile.BLOCKSIZE
        self.size = end + -end % tarfile.RECORDSIZE
        layout = hashlib.sha256(metadata)
        for member in members:
            layout.update(member.header)
        self.layout_digest = layout.hexdigest()
        self._hashes: dict[str, str] | None = None

    @classmethod
    def of(cls, image_dir: Path, metadata: bytes, known_hashes: Mapping[str, str] = MappingProxyType({})) -> Self:
        """Lay out the bundle of an image directory, without reading any file.

        Args:
            image_dir: its regular files, at any depth, become members. Empty directories leave no trace.
            metadata: content of the member `metadata.json`.
            known_hashes: SHA-256 in hex that files are known to have, by their names; who reads another content fails.

        Raises:
            BundleError: if something in the directory is not a regular file, has a name that is
                not UTF-8 or that of a member made here; or if the directory can't be read.
        """
        sources = find_sources(image_dir)
        for name in (METADATA, MANIFEST):
            if name in sources:
                raise BundleError(f"{image_dir / name} has the name of a member that the archiver adds; rename it")
        # The newest image's time: the same for the same input, and GNU tar warns about files from 1970.
        made_at = max((source.mtime_ns for source in sources.values()), default=0)
        manifest_size = sum(len(manifest_line(name, _NO_HASH)) for name in (METADATA, *sources))

        members: list[Member] = []

        def add(name: str, size: int, mtime_ns: int, source: SourceFile | None = None) -> None:
            offset = members[-1].end if members else 0
            members.append(Member.at(offset, name, size, mtime_ns, source))

        add(METADATA, len(metadata), made_at)
        for name, source in sources.items():
            add(name, source.size, source.mtime_ns, source)
        add(MANIFEST, manifest_size, made_at)
        return cls(tuple(members), metadata, settled_state_of(sources), known_hashes)

    @property
    def image_members(self) -> tuple[Member, ...]:
        """The members that come from the image directory."""
        return self.members[1:-1]

    def reader(self) -> "BundleReader":
        """Start reading the bundle from its first byte."""
        return BundleReader(self)

    def manifest(self, hashes: Mapping[str, str]) -> bytes:
        """The content of `manifest-sha256.txt`.

        Args:
            hashes: SHA-256 in hex of every other member, by its name.
        """
        return b"".join(manifest_line(member.name, hashes[member.name]) for member in self.members[:-1])

    def read_range(self, start: int, stop: int) -> Iterator[bytes]:
        """Make the bytes from `start` up to `stop` again, from the source files alone.

        The first range that touches the manifest reads every image for its hash.

        Raises:
            BundleError: if a file can't be read or has changed.
            ValueError: if the range does not lie within the bundle.
        """
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"{start} to {stop} is not a range of a bundle of {self.size} bytes")
        return filter(None, self._pieces(start, stop))

    def _pieces(self, start: int, stop: int) -> Iterator[bytes]:
        """What the range covers of headers, contents and padding; some pieces are empty."""
        for member in self.members:
            if member.end <= start or stop <= member.offset:
                continue
            first, last = max(start - member.offset, 0), stop - member.offset
            yield member.header[first:last]
            first, last = max(first - len(member.header), 0), last - len(member.header)
            if first < min(last, member.size):
                yield from self._read_member(member, first, min(last, member.size))
            first, last = max(first - member.size, 0), min(last - member.size, member.padding)
            yield bytes(max(last - first, 0))
        yield bytes(max(stop - max(start, self.members[-1].end), 0))

    def _read_member(self, member: Member, first: int, last: int) -> Iterator[bytes]:
        if member.source is None:
            content = self.metadata if member.name == METADATA else self.manifest(self._hash_members())
            yield content[first:last]
            return
        with member.source.open() as file:
            file.seek(first)
            while first < last:
                chunk = memoryview(bytearray(min(last - first, _READ_BYTES)))
                count = member.source.read_into(file, chunk)
                first += count
                yield bytes(chunk[:count])

    def _hash_members(self) -> dict[str, str]:
        if self._hashes is None:
            hashes = {}
            for member in self.members[:-1]:
                digest = hashlib.sha256()
                for chunk in self._read_member(member, 0, member.size):
                    digest.update(chunk)
                hashes[member.name] = digest.hexdigest()
            self._hashes = hashes
        return self._hashes


class BundleReader(io.RawIOBase):
    """A bundle as a file that is read once, hashing every member and the whole on the way.

    Reading raises `SourceChanged` or `BundleError`, naming the source file.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self._whole = hashlib.sha256()
        self._member: hashlib._Hash | None = None
        self._hashes: dict[str, str] = {}
        self._pieces = self._open_pieces()
        self._read_piece: Callable[[memoryview], int] = io.BytesIO().readinto
        self._left = 0
        self._done = 0

    @property
    def sha256(self) -> str:
        """SHA-256 of the whole bundle, in hex. Known at its end."""
        self._require_end()
        return self._whole.hexdigest()

    @property
    def images(self) -> list[Image]:
        """Every file of the image directory with its place and hash. Known at the bundle's end."""
        self._require_end()
        return [
            Image(name=member.name, offset=member.data_offset, size=member.size, sha256=self._hashes[member.name])
            for member in self.bundle.image_members
        ]

    def _require_end(self) -> None:
        if self._done < self.bundle.size:
            raise ValueError("the bundle was not read to its end")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._pieces.close()
        super().close()

    def readinto(self, buffer: Buffer) -> int:
        while self._left == 0:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._read_piece, self._left = piece
        view = memoryview(buffer).cast("B")[: min(self._left, _READ_BYTES)]
        count = self._read_piece(view)
        self._left -= count
        self._done += count
        self._whole.update(view[:count])
        if self._member is not None:
            self._member.update(view[:count])
        return count

    def _open_pieces(self) -> Generator[tuple[Callable[[memoryview], int], int], None, None]:
        """Header, content and padding of one member after the other: how to read it, and how many bytes."""
        for member in self.bundle.members:
            yield io.BytesIO(member.header).readinto, len(member.header)
            self._member = hashlib.sha256()
            if member.source is not None:
                with member.source.open() as file:
                    yield partial(member.source.read_into, file), member.size
            else:
                content = self.bundle.metadata if member.name == METADATA else self.bundle.manifest(self._hashes)
                yield io.BytesIO(content).readinto, member.size
            found = self._hashes[member.name] = self._member.hexdigest()
            self._member = None
            if member.source is not None and self.bundle.known_hashes.get(member.name, found) != found:
                raise SourceChanged(f"{member.source.path} was read with another content than it is known to have")
            yield io.BytesIO(bytes(member.padding)).readinto, member.padding
        ending = self.bundle.size - self.bundle.members[-1].end
        yield io.BytesIO(bytes(ending)).readinto, ending


def manifest_line(name: str, sha256: str) -> bytes:
    """A line as `sha256sum` writes it: a name with a line break or backslash is escaped, and marked by one."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    mark = "" if escaped == name else "\\"
    return f"{mark}{sha256}  ./{escaped}\n".encode()
