"""What dead uploads left in the bucket: removed once nobody can go on with it."""

import asyncio
import re
from contextlib import closing
from datetime import UTC, datetime, timedelta

from prefect import flow, get_run_logger

from blocks import incomplete_uploads
from blocks.event_file import TimestepType
from blocks.event_log import EventLog
from blocks.incomplete_uploads import IncompleteUpload
from blocks.lease import LeaseTaken, hold
from blocks.object_store import ObjectStore
from blocks.settings import get_settings
from blocks.upload_journal import RedisJournal
from flows.upload import lease_name

# Others may upload into the same bucket; what they do is none of our business.
OUR_KEY = re.compile(rf"({'|'.join(kind.prefix for kind in TimestepType)})/[^/]+/\d{{8}}/\d{{6}}_[0-9a-f]{{8}}\.tar")


@flow(name="abort-abandoned-uploads", flow_run_name="abort abandoned uploads", persist_result=False)
async def abort_abandoned_uploads(older_than_hours: float = 24) -> None:
    """Abort our uploads that were begun so long ago, that nobody works on and nobody remembers how to go on with."""
    settings = get_settings()
    store = ObjectStore.from_settings(settings)
    with closing(EventLog.from_settings(settings)) as log:
        aborted = await asyncio.to_thread(abort_abandoned, store, log, timedelta(hours=older_than_hours))
    get_run_logger().info("%d abandoned uploads aborted%s", len(aborted), "".join(f"\n{key}" for key in aborted))


def abort_abandoned(store: ObjectStore, log: EventLog, older_than: timedelta) -> list[str]:
    """Abort the abandoned uploads of timesteps; several processes may do so at once.

    Returns:
        Their keys.

    Raises:
        ObjectStoreError: if the store fails.
        redis.RedisError: if it can't be known whether somebody works on an upload.
    """
    begun_before = datetime.now(UTC) - older_than
    return [
        upload.key
        for upload in incomplete_uploads.find(store.wire)
        if OUR_KEY.fullmatch(upload.key) and upload.begun_at < begun_before and abort_unless_wanted(upload, store, log)
    ]


def abort_unless_wanted(upload: IncompleteUpload, store: ObjectStore, log: EventLog) -> bool:
    """Abort an upload, unless somebody works on it or remembers how to go on with it; returns whether it was aborted.

    Raises:
        ObjectStoreError: if the store fails.
        redis.RedisError: if it can't be known whether somebody works on it.
    """
    try:
        # As a worker would: so nobody begins to go on with it meanwhile.
        with hold(log.redis, lease_name(log, upload.key)) as lease:
            remembered = RedisJournal(log.redis, store.bucket_name).find(upload.key)
            if remembered and remembered.upload_id == upload.upload_id:
                return False
            lease.check()
            incomplete_uploads.abort(store.wire, upload)
            return True
    except LeaseTaken:
        return False
