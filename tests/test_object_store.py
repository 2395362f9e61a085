"""The object store against moto's S3 server, over HTTP."""

import hashlib
import random
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from moto.server import ThreadedMotoServer
from pydantic import SecretStr

from blocks.bundle import Bundle
from blocks.object_store import KeyTaken, NotStored, ObjectStore, ObjectStoreError
from blocks.settings import MissingSetting, Settings

TIMESTEP = UUID("6a0ecf0c-4a5b-4a49-9cb3-0c7a86a4e2a1")
KEY = "images/20261123_004/20261123/104207_6a0ecf0c.tar"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def store(endpoint: str) -> ObjectStore:
    settings = Settings(
        bucket=f"timesteps-{uuid4().hex[:8]}",
        AWS_ENDPOINT_URL=endpoint,
        AWS_ACCESS_KEY_ID="test",
        AWS_SECRET_ACCESS_KEY=SecretStr("test-secret"),
    )
    store = ObjectStore.from_settings(settings).model_copy(update={"part_size": 5 << 20})
    store.ensure_bucket()
    return store


def make_images(directory: Path, sizes: list[int]) -> Path:
    (directory / "Img").mkdir(parents=True)
    for number, size in enumerate(sizes):
        (directory / "Img" / f"Img_r{number:02}_c00.tif").write_bytes(random.Random(number).randbytes(size))
    return directory


@pytest.mark.parametrize("sizes", [[70_000, 0, 12], [4 << 20] * 5 + [123]], ids=["single request", "many parts"])
def test_an_uploaded_bundle_is_a_tar_that_proves_its_images(
    store: ObjectStore, tmp_path: Path, sizes: list[int]
) -> None:
    source = make_images(tmp_path / "source", sizes)
    bundle = Bundle.of(source, b"{}")

    stored = store.upload(bundle, KEY, TIMESTEP)

    with urllib.request.urlopen(store.presigned_url(KEY)) as answer:
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
    assert store.verify(KEY, stored.images) == []


def test_a_stored_bundle_is_recognised_and_not_sent_again(store: ObjectStore, tmp_path: Path) -> None:
    bundle = Bundle.of(make_images(tmp_path / "source", [1000]), b"{}")
    first = store.upload(bundle, KEY, TIMESTEP)
    last_modified = store.client.head_object(Bucket=store.bucket_name, Key=KEY)["LastModified"]

    second = store.upload(bundle, KEY, TIMESTEP)

    assert (second.sha256, second.etag, second.images) == (first.sha256, first.etag, first.images)
    assert store.client.head_object(Bucket=store.bucket_name, Key=KEY)["LastModified"] == last_modified


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

    (difference,) = store.verify(KEY, stored.images)

    assert stored.images[1].name in difference


def test_what_is_not_there_is_said(store: ObjectStore, endpoint: str) -> None:
    assert store.head("missing") is None
    with pytest.raises(NotStored, match="missing"):
        list(store.read_range("missing", 0, 1))
    elsewhere = store.model_copy(update={"bucket_name": "no-such-bucket"})
    with pytest.raises(ObjectStoreError, match=f"no-such-bucket at {endpoint}.*does not exist"):
        elsewhere.check()


def test_keys_are_required() -> None:
    settings = Settings(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)
    with pytest.raises(MissingSetting, match="AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"):
        ObjectStore.from_settings(settings)
