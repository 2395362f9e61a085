"""What an object in the bucket tells of its timestep: by a few small reads, or read from its first byte to its last."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import IO, cast

from typing_extensions import Buffer

from blocks.bundle import MANIFEST, METADATA, manifest_line
from blocks.event_file import ImagingEvent
from blocks.messages import Uploaded
from blocks.object_ranges import ObjectRanges
from blocks.object_store import ObjectHead, ObjectStore
from blocks.proven_object import Image, Proof

_LINE = re.compile(rb"\\?([0-9a-f]{64})  ")


class NotATimestep(Exception):
    """An object that is none of our tars, or is damaged; the message says in what."""


@dataclass(frozen=True)
class _Content:
    """What is in a tar. The hash of the whole is None where it was not read."""

    metadata: bytes
    images: list[Image]
    sha256: str | None
    checks: list[str]


def read_stored(store: ObjectStore, key: str, modified_at: datetime, *, whole: bool = False) -> Uploaded:
    """Read what a timestep's object tells, and compare it with what its upload noted of it.

    Args:
        modified_at: when the store got the object.
        whole: read every byte and compare every image with the manifest. Without it, only the headers,
            `metadata.json` and the manifest are read: these give the same, but for the SHA-256 of the whole and
            a proof of the images.

    Returns:
        What would be said of its upload. When it began, and its flow run, nobody knows any more.

    Raises:
        NotATimestep: when it is none of ours, or not what it says.
        ObjectStoreError: if it can't be read.
    """
    head = store.head(key)
    if head is None:
        raise NotATimestep("it is gone")
    timestep_id, layout_digest = head.metadata.get("timestep-id"), head.metadata.get("layout-digest")
    if not timestep_id or not layout_digest:
        raise NotATimestep("its metadata names no timestep")
    try:
        content = _read_whole(store, head) if whole else _read_headers(store, head, layout_digest)
    except tarfile.TarError as error:
        raise NotATimestep(f"it is no tar: {error}") from error
    try:
        system, event = _announcement(content.metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise NotATimestep(f"its {METADATA} can't be read: {error}") from error
    if str(event.timestep_id) != timestep_id or event.key != key:
        raise NotATimestep(f"its {METADATA} is that of timestep {event.timestep_id}, whose key is {event.key}")
    return Uploaded(
        timestep_id=event.timestep_id,
        system=system,
        event=event,
        bucket=store.bucket_name,
        key=key,
        size=head.size,
        etag=head.etag,
        sha256=content.sha256,
        layout_digest=layout_digest,
        images=content.images,
        proof=Proof(verified_at=datetime.now(UTC), checks=content.checks),
        modified_at=head.modified_at,
        started_at=modified_at,
    )


def _read_headers(store: ObjectStore, head: ObjectHead, layout_digest: str) -> _Content:
    """Go from header to header, past the images. The layout digest proves that they are the headers of the upload."""
    made_here: dict[str, bytes] = {}
    images: list[tarfile.TarInfo] = []
    headers: list[bytes] = []
    end = 0
    with ObjectRanges(store, head) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            file.seek(member.offset)
            headers.append(file.read(member.offset_data - member.offset))
            end = member.offset_data + member.size + -member.size % tarfile.BLOCKSIZE
            if (name := _name(member)) in (METADATA, MANIFEST):
                file.seek(member.offset_data)
                made_here[name] = file.read(member.size)
            else:
                images.append(member)
            if name == MANIFEST:
                break  # the rest of the record is empty
    _require(made_here)
    if hashlib.sha256(b"".join([made_here[METADATA], *headers])).hexdigest() != layout_digest:
        raise NotATimestep("its headers are not those of its upload: their digest is not the one in its metadata")
    end += 2 * tarfile.BLOCKSIZE
    if head.size != (size := end + -end % tarfile.RECORDSIZE):
        raise NotATimestep(f"it has {head.size} bytes, the tar in it has {size}")
    hashes = _read_manifest(made_here[MANIFEST], [METADATA, *map(_name, images)])
    if hashes[METADATA] != hashlib.sha256(made_here[METADATA]).hexdigest():
        raise NotATimestep(f"what is in it differs from its {MANIFEST}")
    return _Content(
        made_here[METADATA],
        [
            Image(name=name, offset=member.offset_data, size=member.size, sha256=hashes[name])
            for member in images
            for name in (_name(member),)
        ],
        None,
        [
            f"Its headers and its {METADATA} have the layout digest that was noted at its upload.",
            f"The SHA-256 of each image is that of its {MANIFEST}; the images were not read.",
        ],
    )


def _read_whole(store: ObjectStore, head: ObjectHead) -> _Content:
    stream = _Hashed(store.read_range(head.key, 0, head.size, head.etag))
    hashes: list[tuple[str, str]] = []
    images: list[Image] = []
    made_here: dict[str, bytes] = {}
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        for member in tar:
            name = _name(member)
            file = cast(IO[bytes], tar.extractfile(member))  # None for what is not regular
            if name in (METADATA, MANIFEST):
                made_here[name] = file.read()
            if name == METADATA:
                sha256 = hashlib.sha256(made_here[name]).hexdigest()
            elif name != MANIFEST:
                sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
                images.append(Image(name=name, offset=member.offset_data, size=member.size, sha256=sha256))
            if name != MANIFEST:
                hashes.append((name, sha256))
    while stream.read(1 << 20):
        pass  # what fills the last record up
    _require(made_here)
    if made_here[MANIFEST] != b"".join(manifest_line(name, sha256) for name, sha256 in hashes):
        raise NotATimestep(f"what is in it differs from its {MANIFEST}")
    checks = [f"It was read back completely, and every image in it has the SHA-256 of its {MANIFEST}."]
    return _Content(made_here[METADATA], images, stream.hash.hexdigest(), checks)


def _name(member: tarfile.TarInfo) -> str:
    if not member.isfile():
        raise NotATimestep(f"{member.name} in it is no file")
    return member.name.removeprefix("./")


def _require(made_here: dict[str, bytes]) -> None:
    if missing := [name for name in (METADATA, MANIFEST) if name not in made_here]:
        raise NotATimestep(f"it has no {', '.join(missing)}")


def _read_manifest(manifest: bytes, names: list[str]) -> dict[str, str]:
    """The hashes by name, of a manifest that must be one of these files, in this order."""
    lines = [_LINE.match(line) for line in manifest.splitlines()]
    hashes = [line[1].decode() for line in lines if line]
    if manifest != b"".join(map(manifest_line, names, hashes)) or len(hashes) != len(names):
        raise NotATimestep(f"its {MANIFEST} is not one of the files in it")
    return dict(zip(names, hashes, strict=True))


class _Hashed(io.RawIOBase):
    """A stream of chunks as a file, hashed on the way."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")
        self.hash = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int:
        if not self._rest:
            chunk = next(self._chunks, b"")
            self.hash.update(chunk)
            self._rest = memoryview(chunk)
        view = memoryview(buffer).cast("B")
        count = min(len(view), len(self._rest))
        view[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _announcement(metadata: bytes) -> tuple[str, ImagingEvent]:
    document = json.loads(metadata)
    return str(document.pop("system")), ImagingEvent.model_validate(document)
