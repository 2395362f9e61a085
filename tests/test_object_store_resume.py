"""What an attempt that died has sent is not sent again."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from blocks.bundle import Bundle
from blocks.lease import LeaseLost, LeaseTaken, give_back_all, hold
from blocks.object_store import KeyTaken, ObjectStore, ObjectStoreError
from blocks.upload_journal import RedisJournal
from tests.conftest import make_store
from tests.faulty_proxy import FaultyProxy, Refuse
from tests.images import KEY, MIB, TIMESTEP, make_images

IMAGES = [4 * MIB] * 7 + [123]
PARTS = 6


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_images(tmp_path / "source", IMAGES)


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def store(proxy: FaultyProxy) -> ObjectStore:
    return make_store(proxy.url)


@pytest.fixture
def journal(client: redis.Redis, store: ObjectStore) -> RedisJournal:
    return RedisJournal(client, store.bucket_name)


@contextmanager
def attempt(source: Path, store: ObjectStore, redis_url: str) -> Iterator[subprocess.Popen[bytes]]:
    """An attempt in a process of its own, at 10 MB/s."""
    parameters = store.credentials.aws_client_parameters
    arguments = [str(source), store.bucket_name, str(parameters.endpoint_url), redis_url, "10000000"]
    process = subprocess.Popen([sys.executable, "-m", "tests.interrupted_upload", *arguments])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def sent_parts(proxy: FaultyProxy, after: int = 0) -> list[str]:
    """The parts that arrived, of all requests but the first so many."""
    requests = proxy.requests[after:]
    return [request.line for request in requests if "partNumber=" in request.line and request.answered == 200]


def wait_until_parts_are_recorded(journal: RedisJournal, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(journal.parts(KEY)) < count:
        assert time.monotonic() < deadline, "the attempt sent too little"
        time.sleep(0.02)


def test_after_sigkill_only_what_is_missing_is_sent(
    source: Path, store: ObjectStore, proxy: FaultyProxy, journal: RedisJournal, redis_url: str
) -> None:
    with attempt(source, store, redis_url) as process:
        wait_until_parts_are_recorded(journal, 3)
        process.kill()
        process.wait()
    recorded = len(journal.parts(KEY))
    # The proxy may still pass on what the killed process had given it.
    before = len(proxy.requests)
    bundle = Bundle.of(source, b"{}")

    stored = store.upload(bundle, KEY, TIMESTEP, journal)

    assert len(sent_parts(proxy, after=before)) == PARTS - recorded
    assert store.verify(KEY, stored.images, stored.sha256) == []
    assert any("earlier attempt" in check for check in stored.proof.checks)
    assert journal.find(KEY) is None
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket_name)


def test_a_changed_layout_starts_anew(
    source: Path, store: ObjectStore, proxy: FaultyProxy, journal: RedisJournal
) -> None:
    proxy.plan(Refuse(403, "AccessDenied"), "partNumber=5")
    with pytest.raises(ObjectStoreError, match="403 AccessDenied"):
        store.upload(Bundle.of(source, b"{}"), KEY, TIMESTEP, journal)
    first = journal.find(KEY)
    assert first
    os.utime(source / "Img" / "Img_r00_c00.tif", (1, 1))

    stored = store.upload(Bundle.of(source, b"{}"), KEY, TIMESTEP, journal)

    later = [line for line in sent_parts(proxy) if first.upload_id not in line]
    assert len(later) == PARTS
    assert store.verify(KEY, stored.images, stored.sha256) == []
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket_name)


def test_content_that_changed_behind_the_same_layout_is_sent(
    source: Path, store: ObjectStore, proxy: FaultyProxy, journal: RedisJournal
) -> None:
    proxy.plan(Refuse(403, "AccessDenied"), "POST /" + store.bucket_name + "/" + KEY + "?uploadId")
    with pytest.raises(ObjectStoreError, match="403 AccessDenied"):
        store.upload(Bundle.of(source, b"{}"), KEY, TIMESTEP, journal)
    image = source / "Img" / "Img_r00_c00.tif"
    status = image.stat()
    with image.open("r+b") as file:
        file.write(b"other bytes")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    sent_before = len(sent_parts(proxy))

    stored = store.upload(Bundle.of(source, b"{}"), KEY, TIMESTEP, journal)

    # The part with the image, and the one with the manifest.
    assert len(sent_parts(proxy)) - sent_before == 2
    assert store.verify(KEY, stored.images, stored.sha256) == []
    assert b"".join(store.read_range(KEY, stored.images[0].offset, stored.images[0].offset + 11)) == b"other bytes"


def test_an_upload_that_the_store_forgot_starts_anew(
    source: Path, store: ObjectStore, proxy: FaultyProxy, journal: RedisJournal
) -> None:
    proxy.plan(Refuse(403, "AccessDenied"), "partNumber=5")
    with pytest.raises(ObjectStoreError, match="403 AccessDenied"):
        store.upload(Bundle.of(source, b"{}"), KEY, TIMESTEP, journal)
    (upload,) = store.client.list_multipart_uploads(Bucket=store.bucket_name)["Uploads"]
    store.client.abort_multipart_upload(Bucket=store.bucket_name, Key=KEY, UploadId=upload["UploadId"])
    stored = store.upload(Bundle.of(source, b"{}"), KEY, TIMESTEP, journal)
    assert store.verify(KEY, stored.images, stored.sha256) == []


def test_a_key_that_is_taken_meanwhile_is_not_overwritten(
    source: Path, store: ObjectStore, journal: RedisJournal
) -> None:
    def take_key() -> None:
        store.client.put_object(Bucket=store.bucket_name, Key=KEY, Body=b"another")

    with pytest.raises(KeyTaken):
        store.upload(Bundle.of(source, b"{}"), KEY, TIMESTEP, journal, fence=take_key)

    assert b"".join(store.read_range(KEY, 0, 7)) == b"another"
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket_name)


def test_the_same_bundle_sent_meanwhile_is_recognised(
    source: Path, store: ObjectStore, proxy: FaultyProxy, journal: RedisJournal
) -> None:
    def send_meanwhile() -> None:
        if store.head(KEY) is None:
            store.upload(Bundle.of(source, b"{}"), KEY, TIMESTEP)

    stored = store.upload(Bundle.of(source, b"{}"), KEY, TIMESTEP, journal, fence=send_meanwhile)

    assert any("read back completely" in check for check in stored.proof.checks)
    assert store.verify(KEY, stored.images, stored.sha256) == []
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket_name)


def test_two_workers_on_one_timestep(
    source: Path, store: ObjectStore, proxy: FaultyProxy, journal: RedisJournal, client: redis.Redis, redis_url: str
) -> None:
    name = f"lease:upload:{TIMESTEP}"
    with attempt(source, store, redis_url) as process:
        wait_until_parts_are_recorded(journal, 1)
        with pytest.raises(LeaseTaken, match=name), hold(client, name):
            pytest.fail("two workers hold the lease")
        # The first one loses it, as if it had been asleep for too long.
        client.set(name, "another worker")
        assert process.wait(60) != 0
    assert store.head(KEY) is None
    assert len(sent_parts(proxy)) < PARTS


def test_a_lease_is_prolonged_and_given_back(client: redis.Redis) -> None:
    with hold(client, "lease:test", seconds=0.6) as lease:
        time.sleep(1.5)
        lease.check()
        with pytest.raises(LeaseTaken), hold(client, "lease:test"):
            pytest.fail("two hold the lease")
    with hold(client, "lease:test", seconds=0.6):
        pass
    assert client.keys("lease:*") == []


def test_a_process_that_ends_gives_its_leases_back_and_writes_no_more(client: redis.Redis) -> None:
    with hold(client, "lease:one", seconds=60) as one, hold(client, "lease:two", seconds=60) as two:
        give_back_all()
        for lease in (one, two):
            with pytest.raises(LeaseLost, match=f"{lease.name} was given back"):
                lease.check()
        with hold(client, "lease:one") as another:
            one._give_back()
            another.check()
            assert client.exists("lease:one")


def test_a_lease_that_cannot_be_prolonged_is_lost_in_time(redis_url: str, client: redis.Redis) -> None:
    with hold(client, "lease:test", seconds=0.6) as lease:
        lease.check()
        client.set("lease:test", "another worker", px=10_000)
        time.sleep(0.5)
        with pytest.raises(LeaseLost, match="lease:test"):
            lease.check()
    assert client.get("lease:test") == b"another worker"
