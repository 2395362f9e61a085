"""Whether a timestep's object is still the one that was recorded."""

from blocks.object_store import ObjectStore
from blocks.tables import Timestep


def find_difference(timestep: Timestep, store: ObjectStore) -> str | None:
    """What became of an object since its upload, asked now; None where it is as it was.

    Args:
        store: the one that has the object's bucket, whichever its own is.

    Raises:
        ObjectStoreError: when the storage can't be asked.
    """
    key, bucket = timestep.key or "", timestep.bucket or ""
    head = store.of_bucket(bucket).head(key)
    if head is None:
        return f"its object {key} is gone from the bucket {bucket}"
    differing = [
        f"{what} is {found}, was {recorded}"
        for what, found, recorded in (
            ("size", head.size, timestep.size),
            ("ETag", head.etag, timestep.etag),
            ("timestep-id", head.metadata.get("timestep-id"), str(timestep.id)),
            ("layout-digest", head.metadata.get("layout-digest"), timestep.layout_digest),
        )
        if found != recorded
    ]
    return f"its object {key} is not what was uploaded: {', '.join(differing)}" if differing else None
