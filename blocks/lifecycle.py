"""What a bucket does with its objects and uploads by itself, as the storage tells it."""

from typing import TYPE_CHECKING

from blocks.object_errors import Refused
from blocks.s3_wire import S3Wire

if TYPE_CHECKING:
    from mypy_boto3_s3.type_defs import LifecycleRuleOutputTypeDef


def read_lifecycle(wire: S3Wire) -> "list[LifecycleRuleOutputTypeDef]":
    """The bucket's lifecycle rules, also those that are switched off; none where it never had any.

    Raises:
        Refused: if we may not know, or the storage has no such thing.
        ObjectStoreError: if it can't be asked.
    """
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
