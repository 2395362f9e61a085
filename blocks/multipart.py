"""Send a bundle to S3 in parts, several at once, from a handful of reused buffers."""

import hashlib
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from botocore.exceptions import BotoCoreError, ClientError

from blocks import incomplete_uploads, s3_object
from blocks.bundle import BundleReader
from blocks.object_errors import KeyTaken, NotStored, Refused
from blocks.s3_wire import S3Wire
from blocks.source_file import BundleError
from blocks.upload_journal import OpenUpload, SentPart, UploadJournal

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

log = logging.getLogger(__name__)

MAX_PARTS = 10_000


@dataclass(frozen=True)
class Receipt:
    """What an upload did. Sizes in bytes."""

    etag: str
    """What the object's ETag must be on endpoints whose ETags are MD5 sums."""
    sent: int
    kept: int
    """In the store already, from an attempt that did not end."""


def send_whole(
    wire: S3Wire, key: str, reader: BundleReader, metadata: dict[str, str], fence: Callable[[], None]
) -> Receipt:
    """Send a small bundle with a single request."""
    content = fill(reader, memoryview(bytearray(reader.bundle.size)))
    headers = {f"x-amz-meta-{name}": value for name, value in metadata.items()}
    s3_object.put(wire, key, content, reader.sha256, headers=headers, fence=fence)
    return Receipt(hashlib.md5(content, usedforsecurity=False).hexdigest(), len(content), 0)


def fill(reader: BundleReader, buffer: memoryview) -> memoryview:
    """Read until the buffer is full or the reader at its end; returns the filled part of it."""
    filled = 0
    while filled < len(buffer) and (count := reader.readinto(buffer[filled:])):
        filled += count
    return buffer[:filled]


@dataclass(frozen=True)
class Sending:
    """How to send.

    Args:
        part_size: bytes per part.
        parts_in_flight: how many parts are sent at the same time; one more is being read meanwhile.
        journal: where the next attempt finds what this one sent. Without it a failed upload is aborted.
        check_md5: compute the MD5 sum of every part as well, which its ETag must be then.
        fence: raises when this process may no longer write; asked before every write.
    """

    part_size: int
    parts_in_flight: int
    check_md5: bool
    journal: UploadJournal | None
    fence: Callable[[], None]


@dataclass(frozen=True)
class MultipartUpload:
    """The sending of one bundle, which an attempt that died may have begun."""

    wire: S3Wire
    key: str
    metadata: dict[str, str]
    sending: Sending

    def send(self, reader: BundleReader) -> Receipt:
        """Send the parts that the store does not have, and make them one object.

        Raises:
            BundleError: if a source file can't be read or changed; the upload is aborted.
            KeyTaken: if another object got the key meanwhile; the upload is aborted.
            ObjectStoreError: if the store fails; with a journal, what it has is kept for the next attempt.
        """
        upload, kept = self._resume(reader) or self._begin(reader)
        try:
            parts, sent = self._send_parts(reader, upload, kept)
            self._complete(upload, parts)
        except BaseException as error:
            if self.sending.journal is None or isinstance(error, BundleError | KeyTaken):
                self._abort(upload.upload_id)
            raise
        if self.sending.journal:
            self.sending.journal.forget(self.key)
        return Receipt(_composite_etag(parts), sent, reader.bundle.size - sent)

    def _begin(self, reader: BundleReader) -> tuple[OpenUpload, dict[int, SentPart]]:
        self.sending.fence()
        answer = self.wire.call(
            f"beginning the upload of {self.key}",
            self.wire.client.create_multipart_upload,
            Bucket=self.wire.bucket,
            Key=self.key,
            Metadata=self.metadata,
            ContentType=s3_object.CONTENT_TYPE,
        )
        upload = OpenUpload(
            upload_id=answer["UploadId"],
            metadata=self.metadata,
            part_size=max(self.sending.part_size, -(-reader.bundle.size // MAX_PARTS)),
            begun_at=datetime.now(UTC),
        )
        if self.sending.journal:
            self.sending.journal.begin(self.key, upload)
        return upload, {}

    def _resume(self, reader: BundleReader) -> tuple[OpenUpload, dict[int, SentPart]] | None:
        """The upload that an earlier attempt left open, with the parts that journal and store agree on."""
        if self.sending.journal is None or (upload := self.sending.journal.find(self.key)) is None:
            return None
        if upload.metadata != self.metadata:
            log.warning("%s: the source is no longer what an earlier attempt began to send; starting anew", self.key)
            self._abort(upload.upload_id)
            return None
        try:
            stored = self.wire.call(f"looking up the parts of {self.key}", self._stored_parts, upload.upload_id)
        except Refused as error:
            if error.code not in incomplete_uploads.GONE:
                raise
            return None
        recorded = self.sending.journal.parts(self.key)
        kept = {number: part for number, part in recorded.items() if stored.get(number) == part.etag}
        log.info("%s: going on with an earlier upload, %d parts of it are there", self.key, len(kept))
        return upload, kept

    def _stored_parts(self, upload_id: str) -> dict[int, str]:
        pages = self.wire.client.get_paginator("list_parts").paginate(
            Bucket=self.wire.bucket, Key=self.key, UploadId=upload_id
        )
        return {part["PartNumber"]: part["ETag"].strip('"') for page in pages for part in page.get("Parts", [])}

    def _send_parts(
        self, reader: BundleReader, upload: OpenUpload, kept: dict[int, SentPart]
    ) -> tuple[list[SentPart], int]:
        """Returns all parts in order, and how many bytes were sent."""
        count = -(-reader.bundle.size // upload.part_size)
        free: SimpleQueue[memoryview] = SimpleQueue()
        for _ in range(min(count, self.sending.parts_in_flight + 1)):
            free.put(memoryview(bytearray(upload.part_size)))

        def send(number: int, buffer: memoryview, content: memoryview) -> tuple[SentPart, int]:
            try:
                return self._send_part(upload.upload_id, number, content, kept.get(number))
            finally:
                free.put(buffer)

        parts: list[SentPart] = []
        sent = 0
        flying: deque[Future[tuple[SentPart, int]]] = deque()
        with ThreadPoolExecutor(self.sending.parts_in_flight, "part") as pool:
            try:
                for number in range(1, count + 1):
                    buffer = free.get()
                    flying.append(pool.submit(copy_context().run, send, number, buffer, fill(reader, buffer)))
                    while flying and (flying[0].done() or number == count):
                        part, size = flying.popleft().result()
                        parts.append(part)
                        sent += size
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return parts, sent

    def _send_part(
        self, upload_id: str, number: int, content: memoryview, kept: SentPart | None
    ) -> tuple[SentPart, int]:
        sha256 = hashlib.sha256(content).hexdigest()
        md5 = hashlib.md5(content, usedforsecurity=False).hexdigest() if self.sending.check_md5 else None
        if kept and kept.sha256 == sha256 and md5 in (None, kept.etag):
            return kept, 0
        query: dict[str, str | int] = {"partNumber": number, "uploadId": upload_id}
        etag = s3_object.put(self.wire, self.key, content, sha256, query, fence=self.sending.fence)
        if md5 not in (None, etag):
            raise NotStored(f"part {number} of {self.key} has the ETag {etag}, the MD5 sum of what was sent is {md5}")
        part = SentPart(sha256=sha256, etag=etag)
        if self.sending.journal:
            self.sending.journal.record(self.key, number, part)
        return part, len(content)

    def _complete(self, upload: OpenUpload, parts: list[SentPart]) -> None:
        # Not every store heeds a condition on the completion itself.
        if s3_object.head(self.wire, self.key):
            raise KeyTaken(f"{self.key} got an object while it was being sent")
        listed: list[CompletedPartTypeDef] = [
            {"PartNumber": number, "ETag": part.etag} for number, part in enumerate(parts, 1)
        ]
        try:
            self.wire.call(
                f"completing {self.key}",
                self._complete_if_allowed,
                Bucket=self.wire.bucket,
                Key=self.key,
                UploadId=upload.upload_id,
                MultipartUpload={"Parts": listed},
            )
        except Refused as error:
            # Or it was completed, and only the answer got lost: the object itself will tell.
            if error.code not in incomplete_uploads.GONE:
                raise

    def _complete_if_allowed(self, **request: Any) -> object:
        # Here, so that every try asks: the lease may be gone after a long pause between two.
        self.sending.fence()
        return self.wire.client.complete_multipart_upload(**request)

    def _abort(self, upload_id: str) -> None:
        if self.sending.journal:
            self.sending.journal.forget(self.key)
        # What stays in the store is removed later, as abandoned; the first error is the one to report.
        with suppress(ClientError, BotoCoreError):
            self.wire.client.abort_multipart_upload(Bucket=self.wire.bucket, Key=self.key, UploadId=upload_id)


def _composite_etag(parts: list[SentPart]) -> str:
    """The ETag of a multipart object on endpoints whose ETags are MD5 sums.

    Empty if the parts' ETags are not such sums.
    """
    try:
        digests = b"".join(bytes.fromhex(part.etag) for part in parts)
    except ValueError:
        return ""
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"
