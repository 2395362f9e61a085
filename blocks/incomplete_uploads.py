"""What uploads leave behind that were begun and never completed: it costs space and is not listed."""

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from blocks.event_file import TimestepType
from blocks.object_errors import Refused
from blocks.s3_wire import S3Wire

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import LifecycleRuleOutputTypeDef

RULE = "abort-incomplete-uploads"

# Ceph answers the second one to a question about parts.
GONE = {"NoSuchUpload", "NoSuchKey"}


def expire_by_rule(wire: S3Wire, days: int) -> None:
    """Have the store remove them by itself; the bucket's other lifecycle rules stay.

    Raises:
        ObjectStoreError: if the rule can't be set.
    """
    rules = [rule for rule in _rules(wire) if rule.get("ID") != RULE]
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
    return any("AbortIncompleteMultipartUpload" in rule for rule in _rules(wire) if rule["Status"] == "Enabled")


def deleting_rules(wire: S3Wire) -> list[str]:
    """The names of the lifecycle rules that delete timesteps, whether they are on tape or not.

    Those for tagged objects are left to who made them: surf-archiver tags what it has archived.

    Raises:
        ObjectStoreError: if the store can't be asked.
    """
    return [
        rule.get("ID", "without a name")
        for rule in _rules(wire)
        if rule["Status"] == "Enabled"
        and {"Days", "Date"} & rule.get("Expiration", {}).keys()
        and not {"Tag", "Tags"} & {*rule.get("Filter", {}), *rule.get("Filter", {}).get("And", {})}
        and _is_for_timesteps(rule)
    ]


def _is_for_timesteps(rule: "LifecycleRuleOutputTypeDef") -> bool:
    """Whether the keys that a rule is for can be those of timesteps."""
    chosen = rule.get("Filter", {})
    prefix = chosen.get("Prefix") or chosen.get("And", {}).get("Prefix") or rule.get("Prefix") or ""
    homes = [f"{type.prefix}/" for type in TimestepType if type is not TimestepType.FLIGHT_CHECK]
    return any(home.startswith(prefix) or prefix.startswith(home) for home in homes)


def _rules(wire: S3Wire) -> "list[LifecycleRuleOutputTypeDef]":
    try:
        answer = wire.call(
            f"reading the lifecycle of {wire.location}",
            wire.client.get_bucket_lifecycle_configuration,
            Bucket=wire.bucket,
        )
    except Refused as error:
        if error.code == "NoSuchLifecycleConfiguration":
            return []
        raise
    return answer["Rules"]


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
