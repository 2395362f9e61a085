"""The bucket that holds the timesteps' tars."""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, ClassVar, Self
from uuid import UUID

from botocore.exceptions import BotoCoreError, ClientError
from prefect_aws import AwsCredentials, S3Bucket
from prefect_aws.client_parameters import AwsClientParameters
from pydantic import Field

from blocks.bundle import Bundle
from blocks.messages import Image, Proof
from blocks.multipart import send_parts, send_whole
from blocks.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_MD5_ETAG = re.compile(r"[0-9a-f]{32}(-\d+)?")
_READ_BYTES = 1 << 20
_TIMESTEP_ID = "timestep-id"
_LAYOUT_DIGEST = "layout-digest"

# Newer checksum headers and trailers are refused or corrupted by Ceph; signed payloads are checked by every endpoint.
_CLIENT_CONFIG = {
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "retries": {"mode": "standard", "max_attempts": 5},
    "s3": {"addressing_style": "path", "payload_signing_enabled": True},
}


class ObjectStoreError(Exception):
    """Object storage can't do what was asked; the message names bucket, endpoint or key."""


class KeyTaken(ObjectStoreError):
    """Another object has the key. It is never overwritten."""


class NotStored(ObjectStoreError):
    """There is no such object, or what is stored is not what was sent."""


@dataclass(frozen=True)
class ObjectHead:
    """What the store says about an object."""

    key: str
    size: int
    etag: str
    metadata: dict[str, str]


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
        try:
            answer = self.client.head_object(Bucket=self.bucket_name, Key=key)
        except ClientError as error:
            if _code(error) == "404":
                return None
            raise ObjectStoreError(f"{key} in {self.location} can't be looked up: {_code(error)}") from error
        except BotoCoreError as error:
            raise ObjectStoreError(f"{self.location} can't be reached: {error}") from error
        return ObjectHead(key, answer["ContentLength"], answer["ETag"].strip('"'), answer["Metadata"])

    def upload(self, bundle: Bundle, key: str, timestep_id: UUID) -> StoredObject:
        """Send a bundle, unless it is stored already, and prove that it is.

        Raises:
            KeyTaken: if the key holds something else.
            BundleError: if a source file can't be read or changed meanwhile; nothing becomes visible then.
            ObjectStoreError: if the store fails, or does not hold what was sent.
        """
        identity = {_TIMESTEP_ID: str(timestep_id), _LAYOUT_DIGEST: bundle.layout_digest}
        if found := self.head(key):
            return self._recognise(found, bundle, identity)
        reader = bundle.reader()
        try:
            if bundle.size <= self.part_size:
                etag = send_whole(self.client, self.bucket_name, key, reader, identity)
            else:
                etag = send_parts(
                    self.client, self.bucket_name, key, reader, identity, self.part_size, self.parts_in_flight
                )
        except (ClientError, BotoCoreError) as error:
            raise ObjectStoreError(f"{key} could not be sent to {self.location}: {error}") from error
        checks = ["Every request's body was signed with its SHA-256, which the store compares with what it received."]
        found = self.head(key)
        if found is None:
            raise NotStored(f"{key} is not in {self.location} after its upload was completed")
        self._compare_identity(found, bundle, identity)
        checks.append(f"Looked up again, the object has the bundle's size of {bundle.size} bytes.")
        checks.append("The object's metadata names the timestep and the layout digest.")
        if _MD5_ETAG.fullmatch(found.etag):
            if found.etag != etag:
                raise NotStored(f"{key} in {self.location} has the ETag {found.etag}, sent was {etag}")
            checks.append("The object's ETag is the one that follows from the MD5 sums of what was sent.")
        return self._stored(found, reader.sha256, bundle, reader.images, checks)

    def _recognise(self, found: ObjectHead, bundle: Bundle, identity: dict[str, str]) -> StoredObject:
        """Prove that an object found under the key is this bundle, from the source and the stored bytes."""
        self._compare_identity(found, bundle, identity)
        reader = bundle.reader()
        buffer = bytearray(_READ_BYTES)
        while reader.readinto(buffer):
            pass
        stored = hashlib.sha256()
        for chunk in self.read_range(found.key, 0, found.size, if_match=found.etag):
            stored.update(chunk)
        if stored.hexdigest() != reader.sha256:
            raise KeyTaken(f"{found.key} in {self.location} has this timestep's identity but other bytes")
        checks = [
            "The object was there already; its metadata names the timestep and the layout digest.",
            "It was read back completely and has the SHA-256 of the source files' bundle.",
        ]
        return self._stored(found, reader.sha256, bundle, reader.images, checks)

    def _compare_identity(self, found: ObjectHead, bundle: Bundle, identity: dict[str, str]) -> None:
        differing = [
            f"its {name} is {found.metadata.get(name, 'not set')}, this one's is {value}"
            for name, value in identity.items()
            if found.metadata.get(name) != value
        ]
        if found.size != bundle.size:
            differing.append(f"it has {found.size} bytes, this one has {bundle.size}")
        if differing:
            raise KeyTaken(f"{found.key} in {self.location} holds another object: {'; '.join(differing)}")

    @staticmethod
    def _stored(found: ObjectHead, sha256: str, bundle: Bundle, images: list[Image], checks: list[str]) -> StoredObject:
        proof = Proof(verified_at=datetime.now(UTC), checks=checks)
        return StoredObject(found.key, found.size, found.etag, sha256, bundle.layout_digest, images, proof)

    def read_range(self, key: str, start: int, stop: int, if_match: str | None = None) -> Iterator[bytes]:
        """The object's bytes from `start` up to `stop`, in chunks of at most 1 MiB.

        Args:
            if_match: fail unless the object has this ETag.

        Raises:
            NotStored: if there is no such object, its ETag is another, or it ends before `stop`.
            ObjectStoreError: if it can't be read.
        """
        if start >= stop:
            return
        condition = {"IfMatch": f'"{if_match}"'} if if_match else {}
        try:
            answer = self.client.get_object(
                Bucket=self.bucket_name,
                Key=key,
                Range=f"bytes={start}-{stop - 1}",
                **condition,  # type: ignore[arg-type]
            )
            left = stop - start
            with answer["Body"] as body:
                while left and (chunk := body.read(min(left, _READ_BYTES))):
                    left -= len(chunk)
                    yield chunk
        except ClientError as error:
            causes = {
                "NoSuchKey": "there is no such object",
                "PreconditionFailed": f"its ETag is no longer {if_match}",
                "InvalidRange": f"it ends before byte {start}",
            }
            if cause := causes.get(_code(error)):
                raise NotStored(f"{key} in {self.location} can't be read: {cause}") from error
            raise ObjectStoreError(f"{key} in {self.location} can't be read: {_code(error)}") from error
        except BotoCoreError as error:
            raise ObjectStoreError(f"{key} in {self.location} can't be read: {error}") from error
        if left:
            raise NotStored(f"{key} in {self.location} ends {left} bytes before byte {stop}")

    def verify(
        self, key: str, images: Iterable[Image], progress: Callable[[int], None] = lambda size: None
    ) -> list[str]:
        """Read an object back and compare every image with its stored hash.

        Args:
            images: what the object must contain.
            progress: called with the bytes of every image read.

        Returns:
            A sentence for everything that differs; nothing if all is as it should be.
        """
        differences = []
        for image in images:
            digest = hashlib.sha256()
            try:
                for chunk in self.read_range(key, image.offset, image.offset + image.size):
                    digest.update(chunk)
            except NotStored as error:
                differences.append(f"{image.name}: {error}")
                continue
            if digest.hexdigest() != image.sha256:
                differences.append(f"{image.name} in {key} has SHA-256 {digest.hexdigest()}, not {image.sha256}")
            progress(image.size)
        return differences

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


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "an unknown error"))
