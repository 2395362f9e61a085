"""One attempt to upload a directory, as a process of its own that a test can kill.

Run as `python -m tests.interrupted_upload DIRECTORY BUCKET ENDPOINT REDIS_URL BYTES_PER_SECOND`.
"""

import sys
from pathlib import Path

import redis
from pydantic import SecretStr

from blocks.bundle import Bundle
from blocks.lease import hold
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.upload_journal import RedisJournal
from tests.images import KEY, TIMESTEP
from tests.rados_gateway import ACCESS_KEY, SECRET_KEY


def main(directory: str, bucket: str, endpoint: str, redis_url: str, bytes_per_second: str) -> None:
    settings = Settings(
        bucket=bucket,
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SecretStr(SECRET_KEY),
    )
    store = ObjectStore.from_settings(settings).model_copy(
        update={"part_size": 5 << 20, "parts_in_flight": 2, "bytes_per_second": int(bytes_per_second)}
    )
    client = redis.Redis.from_url(redis_url)
    with hold(client, f"lease:upload:{TIMESTEP}", seconds=2) as lease:
        journal = RedisJournal(client, bucket)
        store.upload(Bundle.of(Path(directory), b"{}"), KEY, TIMESTEP, journal, lease.check)


if __name__ == "__main__":
    main(*sys.argv[1:])
