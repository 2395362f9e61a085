"""What uploads leave behind that were begun and never completed: it costs space and is not listed."""

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from blocks.object_errors import Refused
from blocks.s3_wire import S3Wire

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import LifecycleRuleOutputTypeDef

RULE = "abort-incomplete-uploads"


def expire_by_rule(wire: S3Wire, days: int = 7) -> None:
    """Have the store remove them by itself; the bucket's other lifecycle rules stay.

    Raises:
        ObjectStoreError: if the rule can't be set.
    """
    what = f"setting the lifecycle of {wire.location}"
    rules: list[LifecycleRuleOutputTypeDef] = []
    try:
        answer = wire.call(what, wire.client.get_bucket_lifecycle_configuration, Bucket=wire.bucket)
        rules = [rule for rule in answer["Rules"] if rule.get("ID") != RULE]
    except Refused as error:
        if error.code != "NoSuchLifecycleConfiguration":
            raise
    rules.append(
        {
            "ID": RULE,
            "Filter": {"Prefix": ""},
            "Status": "Enabled",
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
        }
    )
    wire.call(
        what,
        wire.client.put_bucket_lifecycle_configuration,
        Bucket=wire.bucket,
        LifecycleConfiguration={"Rules": rules},
    )


def abort_abandoned(wire: S3Wire, older_than: timedelta) -> list[str]:
    """Abort the uploads that were begun so long ago; returns their keys.

    Uploads in progress are among them if they take longer: choose a time no upload needs.

    Raises:
        ObjectStoreError: if the store fails.
    """
    begun_before = datetime.now(UTC) - older_than
    pages = wire.client.get_paginator("list_multipart_uploads").paginate(Bucket=wire.bucket)
    uploads = wire.call(
        f"listing the open uploads of {wire.location}",
        lambda: [upload for page in pages for upload in page.get("Uploads", [])],
    )
    abandoned = [upload for upload in uploads if upload["Initiated"] < begun_before]
    for upload in abandoned:
        wire.call(
            f"aborting the upload of {upload['Key']}",
            wire.client.abort_multipart_upload,
            Bucket=wire.bucket,
            Key=upload["Key"],
            UploadId=upload["UploadId"],
        )
    return [upload["Key"] for upload in abandoned]
