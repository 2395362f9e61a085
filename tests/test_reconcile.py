"""What surf-archiver only tags is learned from the tags; the real surf-archiver 0.1.5 is the judge."""

from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, col, select

import flows.reconcile
from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.object_errors import ObjectStoreError
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.surf_archiver import archive_of
from blocks.tables import Archive, ArchiveMember, Timestep
from flows.reconcile import Reconciled, reconcile
from tests.events import announced, archived, ingested, uploaded
from tests.faulty_proxy import FaultyProxy, Refuse
from tests.gateway import record
from tests.surf_archiver import archive


def stored(store: ObjectStore, position: int) -> ImagingEvent:
    """A timestep of long ago, whose object is in the bucket."""
    event = announced(timestamp=datetime(2020, 1, 1, 10, 42, 7, tzinfo=UTC), position=position)
    store.client.put_object(Bucket=store.bucket_name, Key=event.key, Body=b"a timestep")
    return event


def states(engine: Engine) -> dict[int, str]:
    with Session(engine) as session:
        return {position: str(state) for position, state in session.exec(select(Timestep.position, Timestep.state))}


def test_what_the_real_surf_archiver_did_is_learned_from_its_tags(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, engine: Engine, tmp_path: Path
) -> None:
    events = [stored(object_store, position=position) for position in (1, 2)]
    # It takes what is from before today only.
    today = announced(position=3, timestamp=datetime(2999, 1, 1, tzinfo=UTC))
    object_store.client.put_object(Bucket=settings.bucket, Key=today.key, Body=b"a timestep")
    for event in (*events, today):
        record(engine, event_log, uploaded(event, bucket=settings.bucket))
    archive("0.1.5", settings, tmp_path / "tape", uuid4())

    assert reconcile(settings, event_log) == Reconciled(asked=3, archived=2, gone=0)
    record(engine, event_log)
    assert states(engine) == {1: "archived", 2: "archived", 3: "uploaded"}
    with Session(engine) as session:
        (found,) = session.exec(select(Archive)).all()
        members = session.exec(select(ArchiveMember.key)).all()
    assert (tmp_path / "tape" / found.path).exists()
    assert set(members) == {event.key for event in events}
    assert reconcile(settings, event_log) == Reconciled(asked=1, archived=0, gone=0)


def test_only_what_is_tagged_is_said_and_only_once(
    settings: Settings,
    object_store: ObjectStore,
    event_log: EventLog,
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flows.reconcile, "PAGE", 2)
    tagged = [stored(object_store, position=position) for position in range(5)]
    other, told, gone = (stored(object_store, position=position) for position in (10, 11, 12))
    elsewhere, waiting, nowhere = (announced(position=position) for position in (13, 14, 15))
    former = object_store.of_bucket(f"{settings.bucket}-former")
    former.ensure_bucket()
    former.client.put_object(Bucket=former.bucket_name, Key=elsewhere.key, Body=b"a timestep")
    former.put_tags(elsewhere.key, {"archived": "true"})
    for event in tagged:
        object_store.put_tags(event.key, {"archived": "true", "more": "tags"})
    object_store.put_tags(other.key, {"archived": "false"})
    object_store.client.delete_object(Bucket=settings.bucket, Key=gone.key)
    for event in (*tagged, other, told, gone):
        record(engine, event_log, uploaded(event, bucket=settings.bucket))
    record(engine, event_log, uploaded(elsewhere, bucket=former.bucket_name), ingested(waiting), archived(told.key))
    record(engine, event_log, uploaded(nowhere, bucket=f"{settings.bucket}-deleted"))
    length = event_log.redis.xlen(event_log.stream)

    for _ in range(2):
        assert reconcile(settings, event_log) == Reconciled(asked=9, archived=6, gone=2)
    assert event_log.redis.xlen(event_log.stream) == length + 6
    record(engine, event_log)
    assert {position for position, state in states(engine).items() if state == "archived"} == {0, 1, 2, 3, 4, 11, 13}
    with Session(engine) as session:
        paths = session.exec(select(Archive.path).where(col(Archive.path).like("images/%"))).all()
    assert set(paths) == {"images/20261101_004/20200101.tar", "images/20261101_004/20261123.tar"}


def test_an_object_that_is_not_told_of_costs_the_others_nothing(
    settings: Settings,
    object_store: ObjectStore,
    event_log: EventLog,
    engine: Engine,
    s3_endpoint: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    deleted, denied, tagged = (stored(object_store, position=position) for position in range(3))
    for event in (deleted, denied, tagged):
        record(engine, event_log, uploaded(event, bucket=settings.bucket))
        object_store.put_tags(event.key, {"archived": "true"})
    with FaultyProxy.before(s3_endpoint) as proxy:
        behind = settings.model_copy(update={"aws_endpoint_url": proxy.url})
        # As of what was deleted from a bucket that keeps versions.
        proxy.plan(Refuse(405, "MethodNotAllowed"), f"{deleted.key}?tagging", times=2)
        proxy.plan(Refuse(403, "AccessDenied"), f"{denied.key}?tagging")
        with pytest.raises(ObjectStoreError, match=r"1 of 3 objects can't be asked .* 403 AccessDenied"):
            reconcile(behind, event_log)
        record(engine, event_log)
        assert states(engine) == {0: "uploaded", 1: "uploaded", 2: "archived"}
        (refusal,) = [line for line in caplog.messages if "403 AccessDenied" in line]
        assert refusal.startswith(f"Timestep {denied.timestep_id}")
        assert reconcile(behind, event_log) == Reconciled(asked=2, archived=1, gone=1)


@pytest.mark.parametrize("kind", ["stitch", "video", "overview"])
def test_the_archive_of_any_object_follows_from_its_key(kind: str) -> None:
    event = announced(event_type=kind)
    assert archive_of(event.key) == f"{event.event_type.prefix}/20261101_004/20261123.tar"


def test_an_object_that_took_anothers_place_is_on_tape_when_it_was_tagged_itself(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, engine: Engine
) -> None:
    event = stored(object_store, position=1)
    for content in ("one", "another"):
        record(engine, event_log, uploaded(event, bucket=settings.bucket, sha256=None, etag=content))
        assert states(engine) == {1: "uploaded"}
        assert reconcile(settings, event_log) == Reconciled(asked=1, archived=0, gone=0)
        object_store.put_tags(event.key, {"archived": "true"})
        assert reconcile(settings, event_log) == Reconciled(asked=1, archived=1, gone=0)
        record(engine, event_log)
        assert states(engine) == {1: "archived"}
        object_store.client.put_object(Bucket=settings.bucket, Key=event.key, Body=b"repaired")
