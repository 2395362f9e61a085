"""The bucket itself: whether it is there and may be used, and its creation."""

from botocore.exceptions import BotoCoreError, ClientError

from blocks.object_errors import BucketMissing, ObjectStoreError
from blocks.s3_wire import S3Wire


def check(wire: S3Wire) -> None:
    """Make sure that the bucket is there and its wire's credentials may use it.

    Raises:
        BucketMissing: if there is no such bucket.
        ObjectStoreError: naming bucket, endpoint and cause.
    """
    # Not with the wire's patience: who asks wants to know how it is now.
    try:
        wire.client.head_bucket(Bucket=wire.bucket)
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "an unknown error")
        if code == "404":
            raise BucketMissing(f"{wire.location} can't be used: it does not exist") from error
        cause = "these credentials may not use it" if code == "403" else f"the endpoint answered {code}"
        raise ObjectStoreError(f"{wire.location} can't be used: {cause}") from error
    except BotoCoreError as error:
        raise ObjectStoreError(f"{wire.location} can't be reached: {error}") from error


def ensure(wire: S3Wire) -> None:
    """Create the bucket unless it is there.

    Raises:
        ObjectStoreError: if it can't be created or used.
    """
    try:
        check(wire)
    except BucketMissing:
        _create(wire)
        check(wire)


def _create(wire: S3Wire) -> None:
    # The region that S3 was made for is the one it does not want to hear of.
    region = wire.client.meta.region_name
    place = {} if region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": region}}
    try:
        wire.client.create_bucket(Bucket=wire.bucket, **place)  # type: ignore[arg-type]
    except (ClientError, BotoCoreError) as error:
        raise ObjectStoreError(f"{wire.location} can't be created: {error}") from error
