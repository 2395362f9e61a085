"""What is remembered of an unfinished upload, so that the next attempt sends only what is missing."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import redis
from pydantic import AwareDatetime, BaseModel, ConfigDict

log = logging.getLogger(__name__)

# Nobody comes back to it after so long: what the store holds of the upload may be removed then.
_REMEMBER_SECONDS = 7 * 24 * 3600


class OpenUpload(BaseModel):
    """A multipart upload that was begun."""

    model_config = ConfigDict(frozen=True)
    upload_id: str
    metadata: dict[str, str]
    """The object's, which names the timestep and the layout. It can't be changed once the upload has begun."""
    part_size: int
    begun_at: AwareDatetime


class SentPart(BaseModel):
    """A part that the store has confirmed."""

    model_config = ConfigDict(frozen=True)
    sha256: str
    etag: str


class UploadJournal(Protocol):
    """Remembers the open upload of an object. Losing an entry costs only the sending of those bytes again."""

    def begin(self, key: str, upload: OpenUpload) -> None:
        """Remember a new upload instead of whatever was remembered for the key."""

    def find(self, key: str) -> OpenUpload | None:
        """The upload that was begun for the key and neither finished nor given up."""

    def record(self, key: str, number: int, part: SentPart) -> None:
        """Remember a part that the store has confirmed."""

    def parts(self, key: str) -> dict[int, SentPart]:
        """The recorded parts by their numbers."""

    def forget(self, key: str) -> None:
        """The upload is finished or given up."""


class RedisJournal:
    """A journal in Redis: one hash per object.

    Args:
        scope: tells apart equal keys in different buckets, e.g. the bucket's name.
    """

    def __init__(self, client: redis.Redis, scope: str) -> None:
        self._redis = client
        self._prefix = f"upload:{scope}/"

    def begin(self, key: str, upload: OpenUpload) -> None:
        with self._redis.pipeline() as transaction:
            transaction.delete(self._prefix + key)
            transaction.hset(self._prefix + key, "upload", upload.model_dump_json())
            transaction.expire(self._prefix + key, _REMEMBER_SECONDS)
            transaction.execute()

    def find(self, key: str) -> OpenUpload | None:
        upload = self._redis.hget(self._prefix + key, "upload")
        return OpenUpload.model_validate_json(upload) if upload else None

    def record(self, key: str, number: int, part: SentPart) -> None:
        with _tolerated(key):
            self._redis.hset(self._prefix + key, f"part {number}", part.model_dump_json())

    def parts(self, key: str) -> dict[int, SentPart]:
        fields: dict[bytes | str, bytes | str] = self._redis.hgetall(self._prefix + key)
        named = {name.decode() if isinstance(name, bytes) else name: part for name, part in fields.items()}
        return {
            int(name.removeprefix("part ")): SentPart.model_validate_json(part)
            for name, part in named.items()
            if name.startswith("part ")
        }

    def forget(self, key: str) -> None:
        with _tolerated(key):
            self._redis.delete(self._prefix + key)


@contextmanager
def _tolerated(key: str) -> Iterator[None]:
    # The bytes are in the store by now: that must not fail because its trace can't be kept or removed.
    try:
        yield
    except redis.RedisError as error:
        log.warning("%s: the journal of its upload can't be written: %s", key, error)
