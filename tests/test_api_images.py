"""Single images, read out of a tar in S3."""

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from fastapi.testclient import TestClient
from httpx import Response
from sqlalchemy import Engine

from api.app import create_app
from blocks.bundle import Bundle
from blocks.event_log import EventLog
from blocks.object_store import ObjectStore, StoredObject
from blocks.settings import Settings
from tests.events import announced, archived, ingested, uploaded
from tests.gateway import pages, problem, record

SIZES = {"Img/Img_r00_c00.tif": 2_500_000, "Img/Img_r00_c01.tif": 1000, "Img/empty.tif": 0, "Img/notes.html": 20}


@dataclass(frozen=True)
class Sent:
    """A timestep that is really in the bucket."""

    path: str
    key: str
    contents: dict[str, bytes]
    stored: StoredObject


@pytest.fixture
def sent(tmp_path: Path, object_store: ObjectStore, engine: Engine, event_log: EventLog) -> Sent:
    directory = tmp_path / "source"
    (directory / "Img").mkdir(parents=True)
    contents = {name: random.Random(name).randbytes(size) for name, size in SIZES.items()}
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    event = announced(img_count=len(contents))
    stored = object_store.upload(Bundle.of(directory, b"{}"), event.key, event.timestep_id)
    facts: dict[str, Any] = {"size": stored.size, "etag": stored.etag, "sha256": stored.sha256, "images": stored.images}
    record(engine, event_log, ingested(event), uploaded(event, bucket=object_store.bucket_name, **facts))
    return Sent(f"/api/1/timesteps/{event.timestep_id}/images", event.key, contents, stored)


def test_images_are_listed_with_their_places(client: TestClient, sent: Sent, object_store: ObjectStore) -> None:
    rows = [row for page in pages(client, sent.path, limit=3) for row in page]
    listed = {row["name"]: row for row in rows if row["name"] in sent.contents}
    assert listed.keys() == sent.contents.keys()
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    for name, row in listed.items():
        stored = b"".join(object_store.read_range(sent.key, row["offset"], row["offset"] + row["size"]))
        assert stored == sent.contents[name]
        assert hashlib.sha256(stored).hexdigest() == row["sha256"]


@pytest.mark.parametrize("name", SIZES)
def test_an_image_comes_as_it_was_dropped(client: TestClient, sent: Sent, name: str) -> None:
    answer = client.get(f"{sent.path}/{name}")
    assert answer.status_code == 200
    assert answer.content == sent.contents[name]
    assert answer.headers["content-length"] == str(SIZES[name])
    assert answer.headers["etag"] == f'"{hashlib.sha256(answer.content).hexdigest()}"'
    assert answer.headers["content-type"] == ("image/tiff" if name.endswith(".tif") else "application/octet-stream")
    head = client.head(f"{sent.path}/{name}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(SIZES[name])


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-19", 10, 20),
        ("bytes=990-", 990, 1000),
        ("bytes=990-5000", 990, 1000),
        ("bytes=-10", 990, 1000),
        ("bytes=-5000", 0, 1000),
        ("BYTES=10-19", 10, 20),
        (" bytes=10-19 ", 10, 20),
        (f"bytes=10-{10**17}", 10, 1000),
    ],
)
def test_a_part_of_an_image(client: TestClient, sent: Sent, asked: str, start: int, stop: int) -> None:
    name = "Img/Img_r00_c01.tif"
    answer = client.get(f"{sent.path}/{name}", headers={"Range": asked})
    assert answer.content == sent.contents[name][start:stop]
    if (start, stop) == (0, 1000):
        assert answer.status_code == 200
    else:
        assert answer.status_code == 206
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/1000"


@pytest.mark.parametrize("asked", ["bytes=1000-", "bytes=5000-6000", "bytes=-0", f"bytes={10**17}-"])
def test_a_part_that_is_not_there(client: TestClient, sent: Sent, asked: str) -> None:
    answer = client.get(f"{sent.path}/Img/Img_r00_c01.tif", headers={"Range": asked})
    problem(answer, 416)
    assert answer.headers["content-range"] == "bytes */1000"


@pytest.mark.parametrize(
    "asked",
    [
        "bytes=0-1,5-6",
        "lines=1-2",
        "bytes=abc",
        "bytes=9-3",
        "bytes=",
        "",
        f"bytes=0-{'9' * 5000}",
        "bytes=1-2-3",
        "bytes=+1-2",
    ],
)
def test_a_range_we_do_not_know_gives_the_whole(client: TestClient, sent: Sent, asked: str) -> None:
    answer = client.get(f"{sent.path}/Img/Img_r00_c01.tif", headers={"Range": asked})
    assert (answer.status_code, answer.content) == (200, sent.contents["Img/Img_r00_c01.tif"])


def test_a_range_counts_for_get_only(client: TestClient, sent: Sent) -> None:
    for asked in ("bytes=0-9", "bytes=5000-"):
        head = client.head(f"{sent.path}/Img/Img_r00_c01.tif", headers={"Range": asked})
        assert (head.status_code, head.headers["content-length"], head.content) == (200, "1000", b"")


def test_an_image_one_has_is_not_sent_again(client: TestClient, sent: Sent) -> None:
    url = f"{sent.path}/Img/Img_r00_c01.tif"
    etag = client.get(url).headers["etag"]
    for header in (etag, f'"other", W/{etag}', "*"):
        answer = client.get(url, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    assert client.get(url, headers={"If-None-Match": '"other"'}).status_code == 200
    # What one has is not sent again whatever part of it is asked for; a weak tag and a date prove no part.
    assert client.get(url, headers={"If-None-Match": etag, "Range": "bytes=5000-"}).status_code == 304
    assert client.head(url, headers={"If-None-Match": etag}).status_code == 304
    for of in ('"other"', f"W/{etag}", "Mon, 23 Nov 2026 12:00:00 GMT"):
        answer = client.get(url, headers={"Range": "bytes=0-1", "If-Range": of})
        assert (answer.status_code, len(answer.content)) == (200, 1000)
    assert client.get(url, headers={"Range": "bytes=0-1", "If-Range": etag}).status_code == 206


@pytest.mark.parametrize(
    "name",
    [
        "../../../../../etc/passwd",
        "..%2F..%2F..%2Fetc%2Fpasswd",
        "%2Fetc%2Fpasswd",
        "Img//Img_r00_c01.tif",
        "%2E%2FImg%2FImg_r00_c01.tif",
        "Img/Img_r00_c01.tif%00",
        "Img/%FF%FE",
        "Img/Img_r00_c01.TIF",
        "%27%20or%201=1--",
        "x" * 5000,
        # Twins of slash, letter and name, and characters that nobody sees.
        "Img%E2%88%95Img_r00_c01.tif",
        "Img/Img_r00_c01.t%C4%B1f",
        "Img/Img_r00_c01.tif%E2%80%8B",
        "%EF%BC%A9mg/Img_r00_c01.tif",
        "Img%5CImg_r00_c01.tif",
        "Img/%C0%AE%C0%AE/Img_r00_c01.tif",
    ],
)
def test_only_the_names_in_the_tar_are_images(client: TestClient, sent: Sent, name: str) -> None:
    problem(client.get(f"{sent.path}/{name}"), 404)


def test_an_image_of_no_timestep(client: TestClient) -> None:
    problem(client.get(f"/api/1/timesteps/{uuid4()}/images/Img/a.tif"), 404)


def test_an_altered_object_is_never_passed_on_as_an_image(
    client: TestClient, sent: Sent, object_store: ObjectStore
) -> None:
    content = bytearray(b"".join(object_store.read_range(sent.key, 0, sent.stored.size)))
    place = next(image for image in sent.stored.images if image.name == "Img/Img_r00_c00.tif")
    content[place.offset] ^= 1
    object_store.client.put_object(Bucket=object_store.bucket_name, Key=sent.key, Body=bytes(content))
    assert "operator" in problem(client.get(f"{sent.path}/Img/Img_r00_c00.tif"), 502)


def test_an_altered_image_breaks_off(
    client: TestClient, sent: Sent, engine: Engine, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the storage had changed the bytes and kept the ETag.
    read_range = ObjectStore.read_range

    def altered(store: ObjectStore, *args: object, **kwargs: object) -> object:
        chunks = [bytearray(chunk) for chunk in read_range(store, *args, **kwargs)]  # type: ignore[arg-type]
        chunks[-1][-1] ^= 1
        return iter(bytes(chunk) for chunk in chunks)

    monkeypatch.setattr(ObjectStore, "read_range", altered)
    got = _fetch(client, f"{sent.path}/Img/Img_r00_c00.tif")
    assert len(got) < SIZES["Img/Img_r00_c00.tif"]


def _fetch(client: TestClient, url: str) -> bytes:
    received = b""
    answer: Response
    with client.stream("GET", url) as answer:
        for chunk in answer.iter_raw():
            received += chunk
    return received


def test_what_was_uploaded_into_another_bucket_is_found_there(
    settings: Settings, sent: Sent, object_store: ObjectStore
) -> None:
    with TestClient(create_app(settings.model_copy(update={"bucket": f"{settings.bucket}-new"}))) as client:
        assert client.get(f"{sent.path}/Img/Img_r00_c01.tif").content == sent.contents["Img/Img_r00_c01.tif"]
        (export,) = client.get("/api/1/exports").json()["data"]
        redirect = client.get(f"{sent.path.removesuffix('images')}download", follow_redirects=False)
    for url in (export["url"], redirect.headers["location"]):
        assert hashlib.sha256(httpx.get(url).content).hexdigest() == sent.stored.sha256


def test_a_missing_object_is_said(client: TestClient, sent: Sent, object_store: ObjectStore) -> None:
    object_store.client.delete_object(Bucket=object_store.bucket_name, Key=sent.key)
    problem(client.get(f"{sent.path}/Img/Img_r00_c01.tif"), 502)


def test_an_object_that_was_deleted_since_it_is_on_tape_is_no_fault(
    client: TestClient,
    sent: Sent,
    engine: Engine,
    event_log: EventLog,
    object_store: ObjectStore,
    caplog: pytest.LogCaptureFixture,
) -> None:
    record(engine, event_log, archived(sent.key, "images/on/tape.tar"))
    url = f"{sent.path}/Img/Img_r00_c01.tif"
    object_store.client.put_object(Bucket=object_store.bucket_name, Key=sent.key, Body=b"another")
    problem(client.get(url), 502)
    caplog.clear()
    object_store.client.delete_object(Bucket=object_store.bucket_name, Key=sent.key)
    assert problem(client.get(url), 404) == (
        "Its object is no longer in the bucket; it is on tape in images/on/tape.tar."
    )
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []
