"""The object of a synthetic timestep: read back whole, and the only kind of object that is ever deleted.

The key, the system and the event inside, and every pixel have to be those that follow from the timestep's id.
No microscope's images can pass for that, whatever stream and database say.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from uuid import UUID

from blocks.event_file import TimestepType
from blocks.messages import Uploaded
from blocks.object_store import ObjectStore
from blocks.stored_timestep import NotATimestep, read_stored
from blocks.synthetic_timestep import announcement, images, is_synthetic
from blocks.tables import Timestep

# What two readings of the same object have in common.
IDENTITY = ("key", "size", "etag", "sha256", "layout_digest")


class NotAsSent(Exception):
    """What is stored is not what a flight check has sent; the message says in what."""


def read_back(store: ObjectStore, timestep_id: UUID) -> Uploaded | None:
    """What the object holds, every byte of it read and found to be as it was sent; None if there is no object.

    Raises:
        NotAsSent: when anything of it differs.
        ObjectStoreError: when it can't be read.
    """
    key = announcement(timestep_id).key
    head = store.head(key)
    if head is None:
        return None
    try:
        stored = read_stored(store, key, head.modified_at, whole=True)
    except NotATimestep as error:
        raise NotAsSent(f"{key} is not what was sent: {error}") from error
    if stored.timestep_id != timestep_id or not is_synthetic(stored.system, stored.event):
        raise NotAsSent(f"{key} is not what was sent: it announces {stored.system} {stored.timestep_id}")
    sent = {name: hashlib.sha256(content).hexdigest() for name, content in images(timestep_id).items()}
    held = {image.name: image.sha256 for image in stored.images}
    if differing := sorted(name for name in sent.keys() | held.keys() if sent.get(name) != held.get(name)):
        raise NotAsSent(f"{key} is not what was sent: {', '.join(differing)} differ")
    return stored


def check_identity(stored: Uploaded, stated: Uploaded | Timestep, who: str) -> None:
    """Make sure that what was stated of an object, in the stream or the database, is what it is.

    Raises:
        NotAsSent: when it is not.
    """
    for name in IDENTITY:
        if getattr(stored, name) != getattr(stated, name):
            raise NotAsSent(
                f"{stored.key} is not what {who}: its {name.replace('_', ' ')} is {getattr(stored, name)}, "
                f"stated was {getattr(stated, name)}"
            )


def delete_object(
    store: ObjectStore, timestep_id: UUID, stated: Uploaded | Timestep | None, fence: Callable[[], None]
) -> None:
    """Delete the object of a synthetic timestep, if there is one and it is that.

    Args:
        stated: what its upload said of it, where that is known.
        fence: raises when this process may no longer delete; asked right before.

    Raises:
        NotAsSent: when it is anything else; it stays.
        ObjectStoreError: when the store fails, or does not let us delete.
    """
    stored = read_back(store, timestep_id)
    if stored is None:
        return
    if stated:
        check_identity(stored, stated, "was uploaded")
    fence()
    store.wire.call(f"deleting {stored.key}", store.client.delete_object, Bucket=store.bucket_name, Key=stored.key)


def found(store: ObjectStore) -> Iterator[UUID]:
    """The timesteps of the objects that are there.

    Raises:
        ObjectStoreError: when the store can't be asked.
    """
    prefix = f"{TimestepType.FLIGHT_CHECK.prefix}/"
    page = store.wire.call(
        f"listing {prefix}", store.client.list_objects_v2, Bucket=store.bucket_name, Prefix=prefix, MaxKeys=100
    )
    for listed in page.get("Contents", []):
        head = store.head(listed["Key"])
        with suppress(ValueError):
            timestep_id = UUID(head.metadata.get("timestep-id", "")) if head else None
            if timestep_id and announcement(timestep_id).key == listed["Key"]:
                yield timestep_id
