"""Send a bundle to S3 in parts, several at once, from a handful of reused buffers."""

import hashlib
from concurrent.futures import Future, ThreadPoolExecutor
from io import RawIOBase
from queue import SimpleQueue
from typing import TYPE_CHECKING

from blocks.bundle import BundleReader

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

MAX_PARTS = 10_000


def fill(reader: RawIOBase, buffer: memoryview) -> memoryview:
    """Read until the buffer is full or the reader at its end; returns the filled part of it."""
    filled = 0
    while filled < len(buffer) and (count := reader.readinto(buffer[filled:])):
        filled += count
    return buffer[:filled]


def composite_etag(etags: list[str]) -> str:
    """The ETag of a multipart object on endpoints whose ETags are MD5 sums, from the parts' ETags."""
    digests = b"".join(bytes.fromhex(etag.strip('"')) for etag in etags)
    return f"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(etags)}"


def send_whole(client: "S3Client", bucket: str, key: str, reader: BundleReader, metadata: dict[str, str]) -> str:
    """Send a small bundle with a single request; returns the ETag."""
    content = fill(reader, memoryview(bytearray(reader.bundle.size + 1)))
    answer = client.put_object(
        Bucket=bucket, Key=key, Body=bytes(content), Metadata=metadata, ContentType="application/x-tar"
    )
    return answer["ETag"].strip('"')


def send_parts(
    client: "S3Client",
    bucket: str,
    key: str,
    reader: BundleReader,
    metadata: dict[str, str],
    part_size: int,
    parts_in_flight: int,
) -> str:
    """Send a bundle as a multipart upload; returns the ETag that follows from those of the parts.

    If anything fails, the upload is aborted: no half-made object becomes visible.
    """
    part_size = max(part_size, -(-reader.bundle.size // MAX_PARTS))
    upload_id = client.create_multipart_upload(
        Bucket=bucket, Key=key, Metadata=metadata, ContentType="application/x-tar"
    )["UploadId"]
    free: SimpleQueue[memoryview] = SimpleQueue()
    for _ in range(parts_in_flight + 1):
        free.put(memoryview(bytearray(part_size)))

    def send(number: int, buffer: memoryview, content: memoryview) -> "CompletedPartTypeDef":
        try:
            answer = client.upload_part(
                Bucket=bucket, Key=key, UploadId=upload_id, PartNumber=number, Body=bytes(content)
            )
            return {"PartNumber": number, "ETag": answer["ETag"]}
        finally:
            free.put(buffer)

    try:
        with ThreadPoolExecutor(parts_in_flight, "part") as pool:
            sent: list[Future[CompletedPartTypeDef]] = []
            while True:
                buffer = free.get()
                content = fill(reader, buffer)
                if not content:
                    break
                if failed := next((part for part in sent if part.done() and part.exception()), None):
                    failed.result()
                sent.append(pool.submit(send, len(sent) + 1, buffer, content))
            parts = [part.result() for part in sent]
        client.complete_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts})
    except BaseException:
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
        raise
    return composite_etag([part["ETag"] for part in parts])
