"""A lost database is filled again, from the stream and from the bucket, over real servers."""

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from blocks.event_log import EventLog
from blocks.messages import Ingested, Uploaded
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.surf_archiver import archive_of
from flows.rebuild import LOST, NOT_READ, rebuild
from flows.upload import upload
from tests.events import announced, archived, failed, ingested, purged, rejected
from tests.faulty_proxy import FaultyProxy, Refuse
from tests.gateway import record
from tests.images import tiff
from tests.rados_gateway import ACCESS_KEY, SECRET_KEY
from tests.test_record import empty, rows

# What an object can't know of its timestep, or knows otherwise; its SHA-256 only when it is read whole.
NOT_IN_THE_BUCKET = {
    "sha256",
    "ingested_at",
    "event_file",
    "uploaded_at",
    "upload_started_at",
    "verified_at",
    "checks",
    "archived_at",
    "source_purged_at",
}


@pytest.fixture
def timesteps(settings: Settings, object_store: ObjectStore, event_log: EventLog, engine: Engine) -> list[Uploaded]:
    """Three timesteps with all that may happen to one; the first is on tape."""
    assert settings.data_dir is not None
    (settings.data_dir / "prince" / "events").mkdir(parents=True)
    done = []
    for number in range(3):
        event = announced(
            position=number, img_dir=f"t{number}", metadata={"note": "µm\n"}, objective="10x", img_count=3, plate=number
        )
        directory = settings.data_dir / "prince" / event.img_dir / "Img"
        directory.mkdir(parents=True)
        for name in ("1.tif", "odd\\name.tif", f"{'long' * 40}.tif"):
            (directory / name).write_bytes(tiff(name.encode() * 1000))
        taken_in = Ingested(
            timestep_id=event.timestep_id, system="prince", event_file=f"events/{number}.json", event=event
        )
        done.append(upload(taken_in, settings, object_store, event_log))
        record(engine, event_log, taken_in, failed(event), done[-1], purged(event))
    record(engine, event_log, archived(done[0].key, archive_of(done[0].key)), rejected(), ingested(announced()))
    object_store.put_tags(done[0].key, {"archived": "true"})
    return done


def in_the_bucket(engine: Engine) -> dict[str, list[dict[str, Any]]]:
    found = rows(engine)
    timesteps = sorted((row for row in found["Timestep"] if row["key"]), key=lambda row: row["position"])
    return {
        "Timestep": [{name: row[name] for name in row.keys() - NOT_IN_THE_BUCKET} for row in timesteps],
        "TimestepImage": found["TimestepImage"],
        "Archive": [{"id": row["id"], "path": row["path"]} for row in found["Archive"]],
        "ArchiveMember": [{"archive_id": row["archive_id"], "key": row["key"]} for row in found["ArchiveMember"]],
    }


def test_the_stream_gives_all_of_it_back(
    settings: Settings, engine: Engine, event_log: EventLog, timesteps: list[Uploaded]
) -> None:
    lost = rows(engine)
    event_log.redis.xadd(event_log.stream, {"event": "no JSON"})
    empty(engine)
    for _ in range(2):
        said = list(rebuild(settings))
        assert rows(engine) == lost
        assert any("can't be recorded" in sentence and "not an event" in sentence for sentence in said)
        assert said[-2:] == [
            "15 events were recorded from the stream",
            "0 timesteps were read from the bucket, 0 of them are on tape",
        ]


def test_the_bucket_gives_back_what_it_can_know(
    settings: Settings, engine: Engine, event_log: EventLog, object_store: ObjectStore, timesteps: list[Uploaded]
) -> None:
    lost = in_the_bucket(engine)
    event_log.redis.xtrim(event_log.stream, maxlen=0)
    empty(engine)
    assert list(rebuild(settings)) == [
        "0 events were recorded from the stream",
        "3 timesteps were read from the bucket, 1 of them are on tape",
        LOST,
        NOT_READ,
    ]
    assert in_the_bucket(engine) == lost
    assert {row["sha256"] for row in rows(engine)["Timestep"]} == {None}
    states = {row["position"]: row["state"] for row in rows(engine)["Timestep"]}
    assert states == {0: "archived", 1: "uploaded", 2: "uploaded"}
    assert list(rebuild(settings))[1] == "0 timesteps were read from the bucket, 0 of them are on tape"

    # What only the bytes can tell is made up for, once, and stands.
    said = list(rebuild(settings, read_whole=True))
    assert said[1:] == ["3 timesteps were read from the bucket, 1 of them are on tape", LOST]
    assert in_the_bucket(engine) == lost
    hashes = {row["position"]: row["sha256"] for row in rows(engine)["Timestep"]}
    assert hashes == {timestep.event.position: timestep.sha256 for timestep in timesteps}
    assert list(rebuild(settings, read_whole=True))[1].startswith("0 timesteps")


def test_few_bytes_are_read_of_each_object(
    settings: Settings, engine: Engine, event_log: EventLog, proxy: FaultyProxy
) -> None:
    assert settings.data_dir is not None
    keys = {"aws_access_key_id": ACCESS_KEY, "aws_secret_access_key": SecretStr(SECRET_KEY)}
    behind = settings.model_copy(update={"aws_endpoint_url": proxy.url, **keys})
    store = ObjectStore.from_settings(behind)
    store.ensure_bucket()
    (settings.data_dir / "prince" / "events").mkdir(parents=True)
    images = 20
    for number in range(2):
        event = announced(position=number, img_dir=f"t{number}", img_count=images)
        directory = settings.data_dir / "prince" / event.img_dir / "Img"
        directory.mkdir(parents=True)
        for column in range(images):
            # Sizes that differ within a block of the tar, and by blocks.
            name = f"{'long' * 40 if column == 3 else ''}{column:02}.tif"
            (directory / name).write_bytes(tiff(bytes(200_000 + 300 * column)))
        taken_in = Ingested(
            timestep_id=event.timestep_id, system="prince", event_file=f"events/{number}.json", event=event
        )
        record(engine, event_log, taken_in, upload(taken_in, behind, store, event_log))
    lost = in_the_bucket(engine)
    event_log.redis.xtrim(event_log.stream, maxlen=0)
    empty(engine)
    before = len(proxy.requests)
    assert list(rebuild(behind))[1] == "2 timesteps were read from the bucket, 0 of them are on tape"
    assert in_the_bucket(engine) == lost

    reads = [request for request in proxy.requests[before:] if re.fullmatch(r"GET [^?]*\.tar", request.line)]
    ranges = [re.search(rb"(?i)\r\nrange: bytes=(\d+)-(\d+)\r\n", read.head) for read in reads]
    asked = sum(int(found[2]) + 1 - int(found[1]) for found in ranges if found)
    assert all(ranges)
    # One per image, one for what comes before them, and two for the manifest.
    assert len(ranges) <= 2 * (images + 3)
    assert asked < 2 * (images + 3) * 3000 < sum(row["size"] for row in lost["Timestep"]) / 40


def test_a_tar_that_was_altered_outside_of_its_images_is_left_out(
    settings: Settings, engine: Engine, event_log: EventLog, object_store: ObjectStore, timesteps: list[Uploaded]
) -> None:
    event_log.redis.xtrim(event_log.stream, maxlen=0)
    empty(engine)
    client, bucket, key = object_store.client, settings.bucket, timesteps[0].key
    found = client.get_object(Bucket=bucket, Key=key)
    content = found["Body"].read()
    manifest = content.rindex(b"  ./metadata.json\n")
    size, checksum = slice(124, 136), slice(148, 156)
    # The header of the first image tells another size, and its checksum is right all the same.
    header = bytearray(content[timesteps[0].images[0].offset - 512 :][:512])
    header[size.stop - 2] ^= 1
    header[checksum] = b"%06o\0 " % (sum(header[: checksum.start]) + 8 * 32 + sum(header[checksum.stop :]))
    for place, altered, why in (
        (manifest - 5, b"!", "its manifest-sha256.txt is not one of the files in it"),
        (content.index(b'"plate"') + 1, b"P", "its headers are not those of its upload"),
        (timesteps[0].images[0].offset - 512, bytes(header), "its headers are not those of its upload"),
        (timesteps[0].images[0].offset - 512, b"!", "it has no manifest-sha256.txt"),
        (len(content), bytes(10240), f"it has {len(content) + 10240} bytes"),
        (0, b"!", "it is no tar"),
    ):
        body = content[:place] + altered + content[place + len(altered) :]
        client.put_object(Bucket=bucket, Key=key, Body=body, Metadata=found["Metadata"])
        said = list(rebuild(settings))
        assert any(sentence.startswith(f"{key} was left out: {why}") for sentence in said), (why, said)
    client.put_object(Bucket=bucket, Key=key, Body=content, Metadata=found["Metadata"])
    assert "1 timesteps were read from the bucket, 0 of them are on tape" in list(rebuild(settings))


def test_stream_and_bucket_complete_each_other(
    settings: Settings, engine: Engine, event_log: EventLog, timesteps: list[Uploaded]
) -> None:
    lost = in_the_bucket(engine)
    # All of the first timestep is forgotten, and that the second was taken in.
    event_log.redis.xtrim(event_log.stream, maxlen=15 - 5, approximate=False)
    empty(engine)
    assert "1 timesteps were read from the bucket, 1 of them are on tape" in list(rebuild(settings))
    assert in_the_bucket(engine) == lost


def test_what_is_no_timestep_or_damaged_is_left_out_and_said(
    settings: Settings,
    engine: Engine,
    event_log: EventLog,
    object_store: ObjectStore,
    timesteps: list[Uploaded],
    tmp_path: Path,
) -> None:
    event_log.redis.xtrim(event_log.stream, maxlen=0)
    empty(engine)
    client, bucket = object_store.client, settings.bucket
    client.put_object(Bucket=bucket, Key="images/somebody/else/s.tar", Body=b"x")
    flipped, moved, _ = timesteps
    for source, target, change in ((flipped, flipped.key, True), (moved, "images/moved/20200101/x.tar", False)):
        found = client.get_object(Bucket=bucket, Key=source.key)
        content = bytearray(found["Body"].read())
        if change:
            content[source.images[0].offset + 5] ^= 1
        client.put_object(Bucket=bucket, Key=target, Body=bytes(content), Metadata=found["Metadata"])
    said = list(rebuild(settings, read_whole=True))
    assert f"{flipped.key} was left out: what is in it differs from its manifest-sha256.txt" in said
    assert "images/somebody/else/s.tar was left out: its metadata names no timestep" in said
    assert any(
        sentence.startswith("images/moved/20200101/x.tar was left out: its metadata.json is") for sentence in said
    )
    assert "2 timesteps were read from the bucket, 0 of them are on tape" in said
    assert {row["position"] for row in rows(engine)["Timestep"]} == {1, 2}


def test_an_object_that_can_not_be_read_costs_the_others_nothing(
    settings: Settings, engine: Engine, event_log: EventLog, s3_endpoint: str, timesteps: list[Uploaded]
) -> None:
    event_log.redis.xtrim(event_log.stream, maxlen=0)
    empty(engine)
    frozen, deleted, denied = (timestep.key for timestep in timesteps)
    with FaultyProxy.before(s3_endpoint) as proxy:
        # In an archive of the storage, from which nothing is read at once; and deleted since it was listed.
        proxy.plan(Refuse(403, "InvalidObjectState"), f"GET /{settings.bucket}/{frozen}")
        proxy.plan(Refuse(404, "NoSuchKey"), f"GET /{settings.bucket}/{deleted}")
        proxy.plan(Refuse(403, "AccessDenied"), f"{denied}?tagging")
        behind = settings.model_copy(update={"aws_endpoint_url": proxy.url})
        said = "\n".join(rebuild(behind))
        for key, why in ((frozen, "InvalidObjectState"), (deleted, "no such object"), (denied, "AccessDenied")):
            assert re.search(f"^{key} was left out: .*{why}", said, re.MULTILINE), said
        assert "0 timesteps were read from the bucket" in said
        assert "3 timesteps were read from the bucket, 1 of them are on tape" in list(rebuild(behind))
