"""Bundles in the object store, over moto and over a RADOS Gateway."""

import asyncio
import hashlib
import subprocess
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import pytest
from pydantic import SecretStr

from blocks.bundle import Bundle, SourceChanged
from blocks.object_store import KeyTaken, NotStored, ObjectStore, ObjectStoreError
from blocks.settings import MissingSetting, Settings
from tests.conftest import make_store
from tests.images import KEY, SEVERAL_PARTS, TIMESTEP, make_images


@pytest.fixture
def store(any_s3: str) -> ObjectStore:
    return make_store(any_s3)


@pytest.mark.parametrize("sizes", [[70_000, 0, 12], SEVERAL_PARTS], ids=["single request", "many parts"])
def test_an_uploaded_bundle_is_a_tar_that_proves_its_images(
    store: ObjectStore, tmp_path: Path, sizes: list[int]
) -> None:
    source = make_images(tmp_path / "source", sizes)
    bundle = Bundle.of(source, b"{}")

    stored = store.upload(bundle, KEY, TIMESTEP)

    url = store.presigned_url(KEY)
    assert "X-Amz-Algorithm=AWS4-HMAC-SHA256" in url
    with urllib.request.urlopen(url) as answer:
        content = answer.read()
    assert hashlib.sha256(content).hexdigest() == stored.sha256
    assert len(content) == stored.size == bundle.size
    assert any("ETag" in check for check in stored.proof.checks)
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-x", "-C", unpacked], input=content, check=True)
    subprocess.run(["sha256sum", "--strict", "--quiet", "-c", "manifest-sha256.txt"], cwd=unpacked, check=True)
    for image in stored.images:
        original = (source / image.name).read_bytes()
        assert (unpacked / image.name).read_bytes() == original
        assert b"".join(store.read_range(KEY, image.offset, image.offset + image.size)) == original
    assert store.verify(KEY, stored.images, stored.sha256) == []


def test_a_stored_bundle_is_recognised_and_not_sent_again(store: ObjectStore, tmp_path: Path) -> None:
    bundle = Bundle.of(make_images(tmp_path / "source", [1000]), b"{}")
    first = store.upload(bundle, KEY, TIMESTEP)
    last_modified = store.client.head_object(Bucket=store.bucket_name, Key=KEY)["LastModified"]

    second = store.upload(bundle, KEY, TIMESTEP)

    assert (second.sha256, second.etag, second.images) == (first.sha256, first.etag, first.images)
    assert store.client.head_object(Bucket=store.bucket_name, Key=KEY)["LastModified"] == last_modified


def test_several_uploads_at_once_keep_their_connections(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = Bundle.of(make_images(tmp_path / "source", SEVERAL_PARTS), b"{}")
    with ThreadPoolExecutor(3) as pool:
        stored = pool.map(lambda number: store.upload(bundle, f"{number}.tar", TIMESTEP), range(3))
        assert [one.sent for one in stored] == [bundle.size] * 3
    assert [record.message for record in caplog.records if "pool is full" in record.message] == []


def test_another_object_is_never_overwritten(store: ObjectStore, tmp_path: Path) -> None:
    bundle = Bundle.of(make_images(tmp_path / "source", [1000]), b"{}")
    store.upload(bundle, KEY, TIMESTEP)
    with pytest.raises(KeyTaken, match="timestep-id"):
        store.upload(bundle, KEY, uuid4())
    store.client.put_object(Bucket=store.bucket_name, Key="other", Body=b"something")
    with pytest.raises(KeyTaken):
        store.upload(bundle, "other", TIMESTEP)
    assert b"".join(store.read_range("other", 0, 9)) == b"something"


def test_verify_tells_what_differs(store: ObjectStore, tmp_path: Path) -> None:
    stored = store.upload(Bundle.of(make_images(tmp_path / "source", [1000, 2000]), b"{}"), KEY, TIMESTEP)
    content = bytearray(b"".join(store.read_range(KEY, 0, stored.size)))
    content[stored.images[1].offset] ^= 1
    store.client.put_object(Bucket=store.bucket_name, Key=KEY, Body=bytes(content))

    assert store.verify(KEY, stored.images[:1]) == []
    image, whole = store.verify(KEY, stored.images, stored.sha256)

    assert stored.images[1].name in image
    assert str(stored.sha256) in whole
    store.client.put_object(Bucket=store.bucket_name, Key=KEY, Body=bytes(content[: stored.images[1].offset + 1]))
    (missing,) = store.verify(KEY, stored.images)
    assert "is missing" in missing


def test_what_is_not_there_is_said(store: ObjectStore, any_s3: str) -> None:
    assert store.head("missing") is None
    with pytest.raises(NotStored, match="missing"):
        list(store.read_range("missing", 0, 1))
    elsewhere = store.model_copy(update={"bucket_name": "no-such-bucket"})
    with pytest.raises(ObjectStoreError, match=f"no-such-bucket at {any_s3}.*does not exist"):
        elsewhere.check()


def test_secrets_are_not_told(store: ObjectStore) -> None:
    parameters = {"aws_access_key_id": "unknown", "aws_secret_access_key": SecretStr("very-secret")}
    elsewhere = store.model_copy(
        update={"credentials": store.credentials.model_copy(update=parameters), "bucket_name": "no-such-bucket"}
    )
    with pytest.raises(ObjectStoreError) as refused:
        elsewhere.check()
    told = f"{refused.value!r} {refused.value.__cause__!r} {elsewhere!r} {elsewhere.wire!r}"
    assert "very-secret" not in told


def test_keys_are_required() -> None:
    settings = Settings(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    with pytest.raises(MissingSetting, match="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
        ObjectStore.from_settings(settings)


def test_a_source_that_changes_while_it_is_read_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    source = make_images(tmp_path / "source", SEVERAL_PARTS)
    bundle = Bundle.of(source, b"{}")
    changed = source / "Img" / "Img_r04_c00.tif"
    changed.write_bytes(changed.read_bytes() + b"more")

    with pytest.raises(SourceChanged, match=changed.name):
        store.upload(bundle, KEY, TIMESTEP)

    assert store.head(KEY) is None
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=store.bucket_name)


def test_tags_are_read_and_written(store: ObjectStore) -> None:
    store.client.put_object(Bucket=store.bucket_name, Key=KEY, Body=b"")
    assert store.tags(KEY) == {}
    store.put_tags(KEY, {"archived": "true"})
    assert store.tags(KEY) == {"archived": "true"}


def test_it_works_inside_an_event_loop(store: ObjectStore, tmp_path: Path) -> None:
    bundle = Bundle.of(make_images(tmp_path / "source", [1000]), b"{}")

    async def upload() -> int:
        return store.upload(bundle, KEY, TIMESTEP).size

    assert asyncio.run(upload()) == bundle.size


def test_the_rate_limit_holds(store: ObjectStore, tmp_path: Path) -> None:
    bundle = Bundle.of(make_images(tmp_path / "source", SEVERAL_PARTS), b"{}")
    limited = store.model_copy(update={"bytes_per_second": 15_000_000})
    started = time.monotonic()
    limited.upload(bundle, KEY, TIMESTEP)
    # All but the last chunks have had to wait for those before them.
    assert time.monotonic() - started > 0.9 * bundle.size / 15_000_000
