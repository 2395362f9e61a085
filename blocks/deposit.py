"""Put a bundle under its key, once, and prove that it is there."""

import hashlib
import re
from datetime import UTC, datetime
from uuid import UUID

from blocks import s3_object
from blocks.bundle import Bundle, BundleReader
from blocks.multipart import MultipartUpload, Sending, send_whole
from blocks.object_errors import KeyTaken, NotStored
from blocks.proven_object import Proof, ProvenObject
from blocks.s3_object import ObjectHead
from blocks.s3_wire import S3Wire

_MD5_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")
_READ_BYTES = 1 << 20


class StoredObject(ProvenObject):
    """A bundle that is in the store, and what proves it."""

    sent: int
    """Bytes that this attempt had to send."""


def deposit(wire: S3Wire, bundle: Bundle, key: str, timestep_id: UUID, sending: Sending) -> StoredObject:
    """Send a bundle, unless it is stored already, and prove that it is.

    Raises:
        KeyTaken: if the key holds something else.
        BundleError: if a source file can't be read or changed meanwhile; nothing becomes visible then.
        ObjectStoreError: if the store fails, or does not hold what was sent.
    """
    identity = {"timestep-id": str(timestep_id), "layout-digest": bundle.layout_digest}
    reader = bundle.reader()
    if found := s3_object.head(wire, key):
        _compare(wire, found, bundle, identity)
        return _recognise(wire, found, reader)

    try:
        if bundle.size <= sending.part_size:
            receipt = send_whole(wire, key, reader, identity, sending.fence)
        else:
            receipt = MultipartUpload(wire, key, identity, sending).send(reader)
    except KeyTaken:
        # Another worker may have sent the same bundle meanwhile.
        if found := s3_object.head(wire, key):
            _compare(wire, found, bundle, identity)
            return _recognise(wire, found, reader)
        raise

    found = s3_object.head(wire, key)
    if found is None:
        raise NotStored(f"{key} is not in {wire.location} although its upload was completed")
    _compare(wire, found, bundle, identity)
    checks = [
        "Every request's body was signed with its SHA-256; the store refuses a body that does not match.",
        f"Looked up again, the object has the {bundle.size} bytes of the bundle.",
        "Looked up again, its metadata names the timestep and the layout digest.",
    ]
    if receipt.kept:
        checks.append(
            f"{receipt.kept} bytes were there from an earlier attempt; the SHA-256 of these parts, recorded when "
            "the store confirmed them, equals that of the source now."
        )
    if receipt.etag and _MD5_ETAG.fullmatch(found.etag):
        if found.etag != receipt.etag:
            raise NotStored(f"{key} in {wire.location} has the ETag {found.etag}, expected was {receipt.etag}")
        checks.append(
            "Its ETag is the MD5 sum of what was sent."
            if "-" not in found.etag
            else "Its ETag is the one that follows from the MD5 sums of its parts, computed here."
            if sending.check_md5
            else "Its ETag is the one that follows from the MD5 sums the store gave for its parts as it confirmed them."
        )
    return _stored(found, reader, checks, receipt.sent)


def _recognise(wire: S3Wire, found: ObjectHead, reader: BundleReader) -> StoredObject:
    """Prove that the object under the key is this bundle, from the source files and the stored bytes."""
    buffer = bytearray(_READ_BYTES)
    while reader.readinto(buffer):
        pass
    stored = hashlib.sha256()
    for chunk in s3_object.read(wire, found.key, 0, found.size, found.etag):
        stored.update(chunk)
    if stored.hexdigest() != reader.sha256:
        raise KeyTaken(f"{found.key} in {wire.location} has this timestep's identity, but other bytes")
    checks = [
        "The object was there already; its metadata names the timestep and the layout digest.",
        "It was read back completely and has the SHA-256 of the bundle of the source files.",
    ]
    return _stored(found, reader, checks, sent=0)


def _compare(wire: S3Wire, found: ObjectHead, bundle: Bundle, identity: dict[str, str]) -> None:
    differing = [
        f"its {name} is {found.metadata.get(name, 'not set')}, expected was {value}"
        for name, value in identity.items()
        if found.metadata.get(name) != value
    ]
    if found.size != bundle.size:
        differing.append(f"it has {found.size} bytes, expected were {bundle.size}")
    if differing:
        raise KeyTaken(f"{found.key} in {wire.location} holds another object: {'; '.join(differing)}")


def _stored(found: ObjectHead, reader: BundleReader, checks: list[str], sent: int) -> StoredObject:
    return StoredObject(
        key=found.key,
        size=found.size,
        etag=found.etag,
        sha256=reader.sha256,
        layout_digest=reader.bundle.layout_digest,
        images=reader.images,
        proof=Proof(verified_at=datetime.now(UTC), checks=checks),
        modified_at=found.modified_at,
        sent=sent,
    )
