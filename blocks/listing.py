"""What a bucket holds, page by page, so that a bucket of any size fits into memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from blocks.s3_wire import S3Wire


@dataclass(frozen=True)
class ListedObject:
    """What a listing tells of an object."""

    key: str
    size: int
    etag: str
    modified_at: datetime


def list_objects(wire: S3Wire, prefix: str) -> Iterator[list[ListedObject]]:
    """The objects whose keys begin so, by pages, in the order of their keys' bytes.

    Raises:
        ObjectStoreError: if the store can't be asked.
    """
    which: dict[str, Any] = {"Bucket": wire.bucket, "Prefix": prefix}
    while True:
        page = wire.call(f"listing {prefix} in {wire.location}", wire.client.list_objects_v2, **which)
        yield [
            ListedObject(found["Key"], found["Size"], found["ETag"].strip('"'), found["LastModified"])
            for found in page.get("Contents", [])
        ]
        if not page["IsTruncated"]:
            return
        which["ContinuationToken"] = page["NextContinuationToken"]
