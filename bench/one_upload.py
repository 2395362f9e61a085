"""Upload one directory in a process of its own, to see its memory, or to kill it.

Run as `one_upload.py DIRECTORY KEY TIMESTEP_ID REDIS_URL`, with the S3 server in the environment. Prints one JSON
object: bytes sent, and the process's resident memory in bytes before the upload and at its peak.
"""

import json
import sys
from pathlib import Path
from uuid import UUID

import redis

from blocks.bundle import Bundle
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.upload_journal import RedisJournal


def memory(field: str) -> int:
    """A field of this process's memory status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def main(directory: str, key: str, timestep_id: str, redis_url: str) -> None:
    store = ObjectStore.from_settings(Settings())
    store.check()
    journal = RedisJournal(redis.Redis.from_url(redis_url), store.bucket_name)
    journal.find(key)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    idle = memory("VmRSS")
    stored = store.upload(Bundle.of(Path(directory), b"{}\n"), key, UUID(timestep_id), journal)
    print(json.dumps({"sent": stored.sent, "size": stored.size, "idle": idle, "peak": memory("VmHWM")}))


if __name__ == "__main__":
    main(*sys.argv[1:])
