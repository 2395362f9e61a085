"""The bucket that holds the timesteps' tars."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from typing import TYPE_CHECKING, ClassVar, Self
from uuid import UUID

from botocore.exceptions import BotoCoreError, ClientError
from prefect_aws import AwsCredentials, S3Bucket
from prefect_aws.client_parameters import AwsClientParameters
from pydantic import Field

from blocks import s3_object
from blocks.bundle import Bundle, BundleReader
from blocks.messages import Image, Proof
from blocks.multipart import MultipartUpload, send_whole
from blocks.object_errors import KeyTaken, NotStored, ObjectStoreError, Refused
from blocks.pace import shared_pace
from blocks.retry import Patience
from blocks.s3_object import ObjectHead
from blocks.s3_wire import S3Wire
from blocks.settings import Settings
from blocks.upload_journal import UploadJournal
from blocks.verification import find_differences

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import LifecycleRuleTypeDef

__all__ = ["KeyTaken", "NotStored", "ObjectHead", "ObjectStore", "ObjectStoreError", "Refused", "StoredObject"]

_MD5_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")
_READ_BYTES = 1 << 20
_ABORT_RULE = "abort-incomplete-uploads"

# Newer checksum headers and trailers are refused or corrupted by Ceph; signed payloads are checked by every endpoint.
_CLIENT_CONFIG = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "retries": {"mode": "standard", "max_attempts": 5},
    "s3": {"addressing_style": "path", "payload_signing_enabled": True},
}


@dataclass(frozen=True)
class StoredObject:
    """A bundle that is in the store, and what proves it."""

    key: str
    size: int
    etag: str
    sha256: str
    layout_digest: str
    images: list[Image]
    proof: Proof
    sent: int
    """Bytes that this attempt had to send."""


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

    @property
    def wire(self) -> S3Wire:
        """The connections to the bucket, shared by all stores of this process that are configured alike."""
        return _open_wire(
            self.credentials,
            self.bucket_name,
            self.parts_in_flight,
            self.bytes_per_second,
            self.timeout_seconds,
            self.patience_seconds,
        )

    @property
    def client(self) -> "S3Client":
        """The boto3 client; thread-safe, one per process and credentials."""
        return self.credentials.get_s3_client()

    @property
    def location(self) -> str:
        """Bucket and endpoint, for messages to people."""
        return f"bucket {self.bucket_name} at {self.client.meta.endpoint_url}"

    def check(self) -> None:
        """Make sure that the bucket is there and these credentials may use it.

        Raises:
            ObjectStoreError: naming bucket, endpoint and cause.
        """
        try:
            self.client.head_bucket(Bucket=self.bucket_name)
        except ClientError as error:
            causes = {"404": "it does not exist", "403": "these credentials may not use it"}
            cause = causes.get(_code(error), f"the endpoint answered {_code(error)}")
            raise ObjectStoreError(f"{self.location} can't be used: {cause}") from error
        except BotoCoreError as error:
            raise ObjectStoreError(f"{self.location} can't be reached: {error}") from error

    def ensure_bucket(self) -> None:
        """Create the bucket unless it is there.

        Raises:
            ObjectStoreError: if it can't be created or used.
        """
        try:
            self.client.head_bucket(Bucket=self.bucket_name)
        except ClientError as error:
            if _code(error) == "404":
                self._create_bucket()
        except BotoCoreError:
            pass  # check() says it better
        self.check()

    def _create_bucket(self) -> None:
        region = self.credentials.region_name
        try:
            if region in (None, "us-east-1"):
                self.client.create_bucket(Bucket=self.bucket_name)
            else:
                self.client.create_bucket(
                    Bucket=self.bucket_name,
                    CreateBucketConfiguration={"LocationConstraint": region},  # type: ignore[typeddict-item]
                )
        except (ClientError, BotoCoreError) as error:
            raise ObjectStoreError(f"{self.location} can't be created: {error}") from error

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
        identity = {"timestep-id": str(timestep_id), "layout-digest": bundle.layout_digest}
        reader = bundle.reader()
        if found := self.head(key):
            return self._recognise(found, reader, identity)
        if bundle.size <= self.part_size:
            fence()
            receipt = send_whole(self.wire, key, reader, identity)
        else:
            receipt = MultipartUpload(
                self.wire, key, identity, self.part_size, self.parts_in_flight, journal, fence
            ).send(reader)
        found = self.head(key)
        if found is None:
            raise NotStored(f"{key} is not in {self.location} although its upload was completed")
        self._compare(found, reader, identity)
        checks = [
            "Every request's body was signed with its SHA-256; the store refuses a body that does not match.",
            f"Looked up again, the object has the {bundle.size} bytes of the bundle.",
            "Looked up again, its metadata names the timestep and the layout digest.",
        ]
        if receipt.kept:
            checks.append(
                f"{receipt.kept} bytes were there from an earlier attempt; the SHA-256 of these parts, recorded "
                "when the store confirmed them, equals that of the source now."
            )
        if receipt.etag and _MD5_ETAG.fullmatch(found.etag):
            if found.etag != receipt.etag:
                raise NotStored(f"{key} in {self.location} has the ETag {found.etag}, not {receipt.etag} as was sent")
            checks.append("Its ETag is the one that follows from the MD5 sums of what was sent.")
        return self._stored(found, reader, checks, receipt.sent)

    def _recognise(self, found: ObjectHead, reader: BundleReader, identity: dict[str, str]) -> StoredObject:
        """Prove that an object found under the key is this bundle, from the source and the stored bytes."""
        self._compare(found, reader, identity)
        buffer = bytearray(_READ_BYTES)
        while reader.readinto(buffer):
            pass
        stored = hashlib.sha256()
        for chunk in self.read_range(found.key, 0, found.size, found.etag):
            stored.update(chunk)
        if stored.hexdigest() != reader.sha256:
            raise KeyTaken(f"{found.key} in {self.location} has this timestep's identity, but other bytes")
        checks = [
            "The object was there already; its metadata names the timestep and the layout digest.",
            "It was read back completely and has the SHA-256 of the bundle of the source files.",
        ]
        return self._stored(found, reader, checks, sent=0)

    def _compare(self, found: ObjectHead, reader: BundleReader, identity: dict[str, str]) -> None:
        differing = [
            f"its {name} is {found.metadata.get(name, 'not set')}, expected was {value}"
            for name, value in identity.items()
            if found.metadata.get(name) != value
        ]
        if found.size != reader.bundle.size:
            differing.append(f"it has {found.size} bytes, expected were {reader.bundle.size}")
        if differing:
            raise KeyTaken(f"{found.key} in {self.location} holds another object: {'; '.join(differing)}")

    @staticmethod
    def _stored(found: ObjectHead, reader: BundleReader, checks: list[str], sent: int) -> StoredObject:
        return StoredObject(
            key=found.key,
            size=found.size,
            etag=found.etag,
            sha256=reader.sha256,
            layout_digest=reader.bundle.layout_digest,
            images=reader.images,
            proof=Proof(verified_at=datetime.now(UTC), checks=checks),
            sent=sent,
        )

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
            return [f"there is no {key} in {self.location}"]
        return find_differences(self.read_range(key, 0, found.size, found.etag), images, sha256, progress)

    def presigned_url(self, key: str, seconds: int = 3600) -> str:
        """A URL that anyone can read the object from for a while, without credentials."""
        return self.client.generate_presigned_url(
            "get_object", Params={"Bucket": self.bucket_name, "Key": key}, ExpiresIn=seconds
        )

    def tags(self, key: str) -> dict[str, str]:
        """The object's tags; surf-archiver sets `archived=true` when an object is on tape.

        Raises:
            ObjectStoreError: if there is no such object or it can't be asked.
        """
        try:
            answer = self.client.get_object_tagging(Bucket=self.bucket_name, Key=key)
        except (ClientError, BotoCoreError) as error:
            raise ObjectStoreError(f"the tags of {key} in {self.location} can't be read: {error}") from error
        return {tag["Key"]: tag["Value"] for tag in answer["TagSet"]}

    def put_tags(self, key: str, tags: dict[str, str]) -> None:
        """Replace the object's tags.

        Raises:
            ObjectStoreError: if there is no such object or it can't be changed.
        """
        tag_set = [{"Key": name, "Value": value} for name, value in tags.items()]
        try:
            self.client.put_object_tagging(Bucket=self.bucket_name, Key=key, Tagging={"TagSet": tag_set})  # type: ignore[typeddict-item]
        except (ClientError, BotoCoreError) as error:
            raise ObjectStoreError(f"{key} in {self.location} can't be tagged: {error}") from error

    def expire_incomplete_uploads(self, days: int = 7) -> None:
        """Have the store remove what is left of uploads that were never completed; other rules stay.

        Raises:
            ObjectStoreError: if the rule can't be set.
        """
        rule: LifecycleRuleTypeDef = {
            "ID": _ABORT_RULE,
            "Filter": {"Prefix": ""},
            "Status": "Enabled",
            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": days},
        }
        what = f"setting the lifecycle of {self.location}"
        try:
            answer = self.wire.call(
                what, partial(self.client.get_bucket_lifecycle_configuration, Bucket=self.bucket_name)
            )
            rules = [known for known in answer["Rules"] if known.get("ID") != _ABORT_RULE]
        except Refused as error:
            if error.code != "NoSuchLifecycleConfiguration":
                raise
            rules = []
        self.wire.call(
            what,
            partial(
                self.client.put_bucket_lifecycle_configuration,
                Bucket=self.bucket_name,
                LifecycleConfiguration={"Rules": [*rules, rule]},
            ),
        )

    def abort_abandoned(self, older_than: timedelta) -> list[str]:
        """Abort uploads that were begun long ago and never completed; returns their keys.

        Raises:
            ObjectStoreError: if the store fails.
        """
        pages = self.client.get_paginator("list_multipart_uploads").paginate(Bucket=self.bucket_name)
        begun_before = datetime.now(UTC) - older_than
        abandoned = self.wire.call(
            f"listing the open uploads of {self.location}",
            lambda: [
                upload for page in pages for upload in page.get("Uploads", []) if upload["Initiated"] < begun_before
            ],
        )
        for upload in abandoned:
            self.wire.call(
                f"aborting the upload of {upload['Key']}",
                partial(
                    self.client.abort_multipart_upload,
                    Bucket=self.bucket_name,
                    Key=upload["Key"],
                    UploadId=upload["UploadId"],
                ),
            )
        return [upload["Key"] for upload in abandoned]


@lru_cache(maxsize=8)
def _open_wire(
    credentials: AwsCredentials,
    bucket: str,
    parts_in_flight: int,
    bytes_per_second: int | None,
    timeout: float,
    patience: float,
) -> S3Wire:
    return S3Wire(
        credentials.get_s3_client(),
        credentials,
        bucket,
        connections=parts_in_flight + 1,
        timeout=timeout,
        patience=Patience(give_up_after=patience),
        pace=shared_pace(bytes_per_second) if bytes_per_second else None,
    )


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "an unknown error"))
