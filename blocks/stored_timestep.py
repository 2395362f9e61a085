"""What an object in the bucket tells of its timestep: read from its first byte to its last, and proven."""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from uuid import UUID

from typing_extensions import Buffer

from blocks.bundle import MANIFEST, METADATA, manifest_line
from blocks.event_file import ImagingEvent
from blocks.messages import Image, Proof, Uploaded
from blocks.object_store import ObjectStore


class NotATimestep(Exception):
    """An object that is none of our tars, or is damaged; the message says in what."""


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


def read_stored(store: ObjectStore, key: str, modified_at: datetime) -> Uploaded:
    """Read a timestep's object and compare every image with the manifest in it.

    Args:
        modified_at: when the store got the object.

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
    stream = _Hashed(store.read_range(key, 0, head.size, head.etag))
    metadata, images = _read_tar(stream)
    while stream.read(1 << 20):
        pass  # what fills the last record up
    try:
        system, event = _announcement(metadata)
    except (ValueError, KeyError, TypeError) as error:
        raise NotATimestep(f"its {METADATA} can't be read: {error}") from error
    if event.timestep_id != UUID(timestep_id) or event.key != key:
        raise NotATimestep(f"its {METADATA} is that of timestep {event.timestep_id}, whose key is {event.key}")
    return Uploaded(
        timestep_id=event.timestep_id,
        system=system,
        event=event,
        bucket=store.bucket_name,
        key=key,
        size=head.size,
        etag=head.etag,
        sha256=stream.hash.hexdigest(),
        layout_digest=layout_digest,
        images=images,
        proof=Proof(
            verified_at=datetime.now(UTC),
            checks=[f"It was read back completely, and every image in it has the SHA-256 of its {MANIFEST}."],
        ),
        started_at=modified_at,
    )


def _read_tar(stream: _Hashed) -> tuple[bytes, list[Image]]:
    hashes: list[tuple[str, str]] = []
    images: list[Image] = []
    made_here: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                file = tar.extractfile(member)
                if file is None:
                    raise NotATimestep(f"{member.name} in it is no file")
                name = member.name.removeprefix("./")
                if name in (METADATA, MANIFEST):
                    made_here[name] = file.read()
                if name == METADATA:
                    sha256 = hashlib.sha256(made_here[name]).hexdigest()
                elif name != MANIFEST:
                    sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
                    images.append(Image(name=name, offset=member.offset_data, size=member.size, sha256=sha256))
                if name != MANIFEST:
                    hashes.append((name, sha256))
    except tarfile.TarError as error:
        raise NotATimestep(f"it is no tar: {error}") from error
    if missing := [name for name in (METADATA, MANIFEST) if name not in made_here]:
        raise NotATimestep(f"it has no {', '.join(missing)}")
    if made_here[MANIFEST] != b"".join(manifest_line(name, sha256) for name, sha256 in hashes):
        raise NotATimestep(f"what is in it differs from its {MANIFEST}")
    return made_here[METADATA], images


def _announcement(metadata: bytes) -> tuple[str, ImagingEvent]:
    document = json.loads(metadata)
    return str(document.pop("system")), ImagingEvent.model_validate(document)
