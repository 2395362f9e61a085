"""The bucket that holds the timesteps' tars."""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, ClassVar, Self
from uuid import UUID

from prefect_aws import AwsCredentials, S3Bucket
from prefect_aws.client_parameters import AwsClientParameters
from pydantic import Field

from blocks import bucket, s3_object
from blocks.bundle import Bundle
from blocks.deposit import StoredObject, deposit
from blocks.multipart import Sending
from blocks.object_errors import BucketMissing, KeyTaken, NotStored, ObjectStoreError
from blocks.pace import shared_pace
from blocks.presign import Presigner
from blocks.proven_object import Image
from blocks.retry import Patience
from blocks.s3_object import ObjectHead
from blocks.s3_wire import S3Wire
from blocks.settings import Settings
from blocks.upload_journal import UploadJournal
from blocks.verification import find_differences

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

__all__ = ["BucketMissing", "KeyTaken", "NotStored", "ObjectHead", "ObjectStore", "ObjectStoreError", "StoredObject"]

# Newer checksum headers and trailers are refused or corrupted by Ceph; signed payloads are checked by every endpoint.
_CLIENT_CONFIG = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "connect_timeout": 10,
    "retries": {"mode": "standard", "max_attempts": 5},
    # The older signature, which botocore gives URLs by default, is switched off on many a server.
    "signature_version": "s3v4",
    "s3": {"addressing_style": "path", "payload_signing_enabled": True},
}


# How a store is used, as opposed to where it is.
_TUNING = ("part_size", "parts_in_flight", "check_md5", "bytes_per_second", "timeout_seconds", "patience_seconds")


class ObjectStore(S3Bucket):
    """A bucket on S3-compatible storage, and how timesteps are sent there.

    All methods defined here are plain functions that block; call them from threads in async code.

    Example:
        ```python
        from blocks.object_store import ObjectStore

        store = ObjectStore.load("timesteps")
        head = store.head("images/20261123_001/20261123/120000_0f0f0f0f.tar")
        ```
    """

    _block_type_name: ClassVar[str] = "Object Store"
    _block_type_slug: ClassVar[str] = "object-store"
    _description: ClassVar[str] = "A bucket on S3-compatible storage that holds timesteps as tars."

    credentials: AwsCredentials = Field(description="Keys, endpoint and client configuration of the storage.")
    part_size: int = Field(16 << 20, ge=5 << 20, description="Bytes per part of an upload; at least 5 MiB.")
    parts_in_flight: int = Field(4, ge=1, le=64, description="Parts of one upload that are sent at the same time.")
    check_md5: bool = Field(
        False,
        description="Compute the MD5 sum of every part and compare it with its ETag: for storage that does not check "
        "signed payloads. MD5 takes more processor time than SHA-256.",
    )
    bytes_per_second: int | None = Field(
        None, ge=1, description="Limit on what one worker process sends; none if empty."
    )
    timeout_seconds: float = Field(60, gt=0, description="Without any progress for so long, a request has failed.")
    patience_seconds: float = Field(120, ge=0, description="How long failed requests are tried again.")

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The store that the settings name.

        Raises:
            MissingSetting: if the access keys are not set.
        """
        settings.require("aws_access_key_id", "aws_secret_access_key")
        return cls(
            bucket_name=settings.bucket,
            credentials=AwsCredentials(
                aws_access_key_id=settings.aws_access_key_id,
                aws_secret_access_key=settings.aws_secret_access_key,
                region_name=settings.aws_region,
                aws_client_parameters=AwsClientParameters(
                    endpoint_url=settings.aws_endpoint_url, config=_CLIENT_CONFIG
                ),
            ),
        )

    def tuned_like(self, other: Self) -> Self:
        """This store, used the way the other one is."""
        return self.model_copy(update={name: getattr(other, name) for name in _TUNING})

    def of_bucket(self, bucket: str) -> Self:
        """This storage's other bucket, where an object was recorded: new ones may go to another by now."""
        return self.model_copy(update={"bucket_name": bucket})

    def within(self, seconds: float) -> Self:
        """This store, for who would rather be told that the storage is away than wait for it any longer than that."""
        parameters = self.credentials.aws_client_parameters
        bounds = {"connect_timeout": seconds, "read_timeout": seconds, "retries": {"total_max_attempts": 1}}
        hasty = parameters.model_copy(update={"config": _CLIENT_CONFIG | bounds})
        credentials = self.credentials.model_copy(update={"aws_client_parameters": hasty})
        return self.model_copy(
            update={"credentials": credentials, "timeout_seconds": seconds, "patience_seconds": seconds / 2}
        )

    def without_keys(self) -> Self:
        """This store for keeping: who loads it takes the keys from the environment."""
        keys = {"aws_access_key_id": None, "aws_secret_access_key": None}
        return self.model_copy(update={"credentials": self.credentials.model_copy(update=keys)})

    @property
    def wire(self) -> S3Wire:
        """The connections to the bucket, shared by all stores of this process that are configured alike."""
        return _open_wire(
            self.credentials,
            self.bucket_name,
            self.bytes_per_second,
            self.timeout_seconds,
            self.patience_seconds,
        )

    @property
    def client(self) -> "S3Client":
        """The boto3 client; thread-safe, one per process and credentials."""
        return self.credentials.get_s3_client()

    def check(self) -> None:
        """Make sure that the bucket is there and these credentials may use it.

        Raises:
            BucketMissing: if there is no such bucket.
            ObjectStoreError: naming bucket, endpoint and cause.
        """
        bucket.check(self.wire)

    def ensure_bucket(self) -> None:
        """Create the bucket unless it is there.

        Raises:
            ObjectStoreError: if it can't be created or used.
        """
        bucket.ensure(self.wire)

    def head(self, key: str) -> ObjectHead | None:
        """What the store says about an object; None if there is none.

        Raises:
            ObjectStoreError: if the store can't be asked.
        """
        return s3_object.head(self.wire, key)

    def upload(
        self,
        bundle: Bundle,
        key: str,
        timestep_id: UUID,
        journal: UploadJournal | None = None,
        fence: Callable[[], None] = lambda: None,
    ) -> StoredObject:
        """Send a bundle, unless it is stored already, and prove that it is.

        Args:
            journal: remembers what was sent, for the next attempt should this one die.
            fence: raises when this process may no longer write, e.g. a lease's `check`; asked before every write.

        Raises:
            KeyTaken: if the key holds something else.
            BundleError: if a source file can't be read or changed meanwhile; nothing becomes visible then.
            ObjectStoreError: if the store fails, or does not hold what was sent.
        """
        sending = Sending(self.part_size, self.parts_in_flight, self.check_md5, journal, fence)
        return deposit(self.wire, bundle, key, timestep_id, sending)

    def read_range(self, key: str, start: int, stop: int, if_match: str | None = None) -> Iterator[bytes]:
        """The object's bytes from `start` up to `stop`, in chunks of at most 1 MiB.

        Args:
            if_match: fail unless the object has this ETag.

        Raises:
            NotStored: if there is no such object, its ETag is another, or it ends before `stop`.
            ObjectStoreError: if it can't be read.
        """
        return s3_object.read(self.wire, key, start, stop, if_match)

    def verify(
        self,
        key: str,
        images: Iterable[Image],
        sha256: str | None = None,
        progress: Callable[[int], None] = lambda size: None,
    ) -> list[str]:
        """Read an object back and compare every image, and the whole, with the stored hashes.

        Args:
            images: what the object must contain.
            sha256: of the whole object; None if that isn't known.
            progress: called with the number of bytes, whenever some were read.

        Returns:
            A sentence for everything that differs; nothing if all is as it should be.

        Raises:
            ObjectStoreError: if the object can't be read.
        """
        found = self.head(key)
        if found is None:
            return [f"there is no {key} in {self.wire.location}"]
        return find_differences(self.read_range(key, 0, found.size, found.etag), images, sha256, progress)

    def presigned_url(self, key: str, seconds: int = 3600) -> str:
        """A URL that anyone can read the object from for a while, without credentials."""
        return self.presigner.url(key, seconds)

    @property
    def presigner(self) -> Presigner:
        """Makes many such URLs at little cost."""
        return self.wire.presigner

    def tags(self, key: str) -> dict[str, str]:
        """The object's tags; surf-archiver sets `archived=true` when an object is on tape.

        Raises:
            ObjectStoreError: if there is no such object or it can't be asked.
        """
        answer = self.wire.call(
            f"reading the tags of {key}", self.client.get_object_tagging, Bucket=self.bucket_name, Key=key
        )
        return {tag["Key"]: tag["Value"] for tag in answer["TagSet"]}

    def put_tags(self, key: str, tags: dict[str, str]) -> None:
        """Replace the object's tags.

        Raises:
            ObjectStoreError: if there is no such object or it can't be changed.
        """
        self.wire.call(
            f"tagging {key}",
            self.client.put_object_tagging,
            Bucket=self.bucket_name,
            Key=key,
            Tagging={"TagSet": [{"Key": name, "Value": value} for name, value in tags.items()]},
        )


@lru_cache(maxsize=8)
def _open_wire(
    credentials: AwsCredentials,
    bucket: str,
    bytes_per_second: int | None,
    timeout: float,
    patience: float,
) -> S3Wire:
    return S3Wire(
        credentials.get_s3_client(),
        credentials,
        bucket,
        timeout=timeout,
        patience=Patience(give_up_after=patience),
        pace=shared_pace(bytes_per_second) if bytes_per_second else None,
    )
