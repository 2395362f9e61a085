"""What uploads leave behind that were begun and never completed: it costs space and is not listed."""

from dataclasses import dataclass
from datetime import datetime

from blocks.lifecycle import read_lifecycle
from blocks.object_errors import Refused
from blocks.s3_wire import S3Wire

RULE = "abort-incomplete-uploads"

# Ceph answers the second one to a question about parts.
GONE = {"NoSuchUpload", "NoSuchKey"}


def expire_by_rule(wire: S3Wire, days: int) -> None:
    """Have the store remove them by itself; the bucket's other lifecycle rules stay.

    Raises:
        ObjectStoreError: if the rule can't be set.
    """
    rules = [rule for rule in read_lifecycle(wire) if rule.get("ID") != RULE]
    rules.append(
        {
            "ID": RULE,
            "Filter": {"Prefix": ""},
            "Status": "Enabled",
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
        }
    )
    wire.call(
        f"setting the lifecycle of {wire.location}",
        wire.client.put_bucket_lifecycle_configuration,
        Bucket=wire.bucket,
        LifecycleConfiguration={"Rules": rules},
    )


def has_rule(wire: S3Wire) -> bool:
    """Whether a lifecycle rule, ours or another, removes incomplete uploads.

    Raises:
        ObjectStoreError: if the store can't be asked.
    """
    return any("AbortIncompleteMultipartUpload" in rule for rule in read_lifecycle(wire) if rule["Status"] == "Enabled")


@dataclass(frozen=True)
class IncompleteUpload:
    """A multipart upload that was begun, and neither completed nor aborted."""

    key: str
    upload_id: str
    begun_at: datetime
    """As the store tells it; moto says 2010 of all of them."""


def find(wire: S3Wire) -> list[IncompleteUpload]:
    """All incomplete uploads of the bucket, also those that are under way.

    Raises:
        ObjectStoreError: if the store can't be asked.
    """
    pages = wire.client.get_paginator("list_multipart_uploads").paginate(Bucket=wire.bucket)
    return wire.call(
        f"listing the incomplete uploads of {wire.location}",
        lambda: [
            IncompleteUpload(upload["Key"], upload["UploadId"], upload["Initiated"])
            for page in pages
            for upload in page.get("Uploads", [])
        ],
    )


def abort(wire: S3Wire, upload: IncompleteUpload) -> None:
    """Have the store remove what it holds of an upload; no-op where that is gone already.

    Raises:
        ObjectStoreError: if the store fails.
    """
    try:
        wire.call(
            f"aborting the upload of {upload.key}",
            wire.client.abort_multipart_upload,
            Bucket=wire.bucket,
            Key=upload.key,
            UploadId=upload.upload_id,
        )
    except Refused as error:
        if error.code not in GONE:
            raise
