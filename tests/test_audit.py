"""The audit finds what is missing on either side, and has it go its way again."""

import asyncio
import errno
import hashlib
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from datetime import date, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, delete, func, text, update
from sqlmodel import Session, col, select

from blocks import disk_outlook, incomplete_uploads
from blocks.event_log import EventLog
from blocks.findings import Finding
from blocks.fingerprint import Fingerprint
from blocks.imaging_system import ImagingSystem
from blocks.lease import hold
from blocks.listing import list_objects
from blocks.messages import Archived, Failed, Ingested, LogEvent, Uploaded
from blocks.object_store import ObjectStore, ObjectStoreError
from blocks.settings import Settings
from blocks.staging import Staging
from blocks.system_seen import SystemSeen
from blocks.tables import Timestep, TimestepEvent
from flows.audit import audit_and_tell, find, report
from flows.audit_bucket import audit_bucket, audit_timesteps
from flows.audit_disk import audit_disk
from flows.audit_stream import audit_stream
from flows.rebuild import _objects
from flows.reconcile import announcement
from flows.record import record_waiting
from flows.upload import lease_name, upload
from tests.images import tiff
from tests.watching import Ingest, Microscope

AGO = timedelta(seconds=-1)  # nothing is too young


class Lab:
    """One system, its bucket and its database."""

    def __init__(self, settings: Settings, store: ObjectStore, log: EventLog, engine: Engine) -> None:
        self.settings, self.store, self.log, self.engine = settings, store, log, engine
        self.root = cast(Path, settings.data_dir)
        self.prince = Microscope(self.root)
        self.ingest = Ingest(self.root, log)

    def take_in(self, name: str, **fields: Any) -> Ingested:
        """A timestep that was dropped and taken in."""
        self.prince.drop(name, **fields)
        self.ingest_file(name)
        return self.last(Ingested)

    def ingest_file(self, name: str) -> None:
        parameters = {"system": "prince", "event_file": f"events/{name}"}
        asyncio.run(self.ingest.drive("", "", parameters))

    def last(self, kind: type[Ingested]) -> Ingested:
        entries = cast(list[tuple[str, dict[str, str]]], self.log.redis.xrevrange(self.log.stream))
        events = (LogEvent.model_validate_json(fields["event"]).data for _, fields in entries)
        return next(event for event in events if isinstance(event, kind))

    def upload(self, timestep: Ingested) -> None:
        self.log.append(LogEvent.of(upload(timestep, self.settings, self.store, self.log), "test"))

    def found(self, grace: timedelta = AGO) -> list[Finding]:
        record_waiting(self.log, self.engine, "state-manager", limit=100, linger_seconds=0.001)
        for entry in self.log.read("upload-worker", "test", count=100, wait_seconds=0.001):
            self.log.acknowledge("upload-worker", entry.id)
        return list(find([ImagingSystem(name="prince", root=self.root)], self.settings, grace, AGO))

    def kinds(self) -> list[str]:
        return [finding.kind for finding in self.found()]


@pytest.fixture
def lab(settings: Settings, object_store: ObjectStore, event_log: EventLog, engine: Engine) -> Lab:
    return Lab(settings, object_store, event_log, engine)


def test_where_all_is_as_it_should_be_nothing_is_found(lab: Lab) -> None:
    for name in ("1.json", "2.json"):
        lab.upload(lab.take_in(name))
    (lab.prince.events / "wrong.json").write_text("{")
    lab.ingest_file("wrong.json")
    (lab.prince.events / "again.json").write_text((lab.prince.events / "1.json").read_text())
    assert lab.found() == []


def test_a_timestep_without_an_object_is_uploaded_again(lab: Lab) -> None:
    timestep = lab.take_in("1.json")
    lab.prince.drop("young.json")
    assert lab.found(timedelta(hours=1)) == []
    (lab.prince.events / "young.json").unlink()
    (finding,) = [one for one in lab.found() if one.kind == "timestep without an object"]
    assert str(timestep.timestep_id) in finding.subject
    assert finding.fix is not None
    finding.fix()
    (entry,) = lab.log.read("upload-worker", "test", count=10, wait_seconds=0.1)
    assert entry.decode().data == timestep


def test_a_lost_timestep_is_told_also_while_others_are_under_way(lab: Lab) -> None:
    lost = lab.take_in("1.json")
    assert len(lab.found()) == 1
    lab.take_in("2.json", position=2)
    (held,) = lab.log.read("upload-worker", "test", count=10, wait_seconds=0.1)
    lab.take_in("3.json", position=3)
    record_waiting(lab.log, lab.engine, "state-manager", limit=100, linger_seconds=0.001)

    def told() -> list[Finding]:
        return list(audit_timesteps(lab.log, lab.engine, AGO))

    (finding,) = told()
    assert finding.subject == f"prince {lost.timestep_id}"
    assert finding.fix is not None
    finding.fix()
    assert told() == []
    # Its object is not recorded yet.
    lab.upload(cast(Ingested, held.decode().data))
    lab.log.acknowledge("upload-worker", held.id)
    assert told() == []


def test_an_event_file_without_a_timestep_is_read_again_also_by_a_running_watcher(lab: Lab) -> None:
    name = "events/lost.json"
    state = ImagingSystem(name="prince", root=lab.root)
    lab.prince.drop("lost.json")
    lab.log.register.conclude("prince", name, state.fingerprint(name).model_dump_json())
    (finding,) = lab.found()
    assert (finding.kind, finding.subject) == ("event file without a timestep", str(lab.prince.directory / name))
    said: list[str] = []
    assert report([finding], said.append, fix=True) == ({}, 1)
    assert lab.log.register.conclusion("prince", name) is None
    assert lab.log.register.take_requests("prince") == {name}
    assert lab.log.register.take_requests("prince") == set()


def test_what_an_audit_leaves_is_told_until_one_leaves_nothing(lab: Lab) -> None:
    systems = [ImagingSystem(name="prince", root=lab.root)]
    # Another host looked at it before.
    lab.log.audits.tell({"images that no event announces": 1}, "prince")
    away = lab.prince.directory.rename(lab.root / "away")
    assert audit_and_tell(systems, lab.settings, lambda _sentence: None, fix=True) == (1, 0)
    (told,) = lab.log.audits.last()
    assert (told.system, told.left) == (None, {"disk that can't be read": 1})
    away.rename(lab.prince.directory)
    lab.log.audits.tell({"images that no event announces": 2}, "aretha")
    assert audit_and_tell(systems, lab.settings, lambda _sentence: None, fix=True) == (0, 0)
    assert [outcome.left for outcome in lab.log.audits.last()] == [{}, {"images that no event announces": 2}]


def test_an_event_file_put_in_the_place_of_one_with_a_timestep_is_found(lab: Lab) -> None:
    name = "events/1.json"
    lab.upload(lab.take_in("1.json"))
    before = lab.log.register.conclusion("prince", name)
    lab.prince.drop("1.json")
    assert [finding.kind for finding in lab.found()] == ["event file without a timestep"]
    assert before == lab.log.register.conclusion("prince", name)


def _overwrite(lab: Lab, timestep: Ingested) -> None:
    lab.store.client.put_object(Bucket=lab.store.bucket_name, Key=timestep.event.key, Body=b"other")


# --- stream and history


def entries(lab: Lab) -> list[str]:
    return [entry.id for page in lab.log.pages(100) for entry in page]


def test_an_event_that_the_database_lacks_is_said_again(lab: Lab) -> None:
    timesteps = [lab.take_in(f"{number}.json", position=number) for number in range(3)]
    for timestep in timesteps:
        lab.upload(timestep)
    lab.log.repeat(LogEvent.of(timesteps[0], "test"))  # said twice, and recorded once
    assert lab.found() == []
    with Session(lab.engine) as session, session.begin():
        session.execute(delete(TimestepEvent).where(col(TimestepEvent.type) == Uploaded.type))
        session.execute(delete(Timestep).where(col(Timestep.id) == timesteps[1].timestep_id))
    findings = [finding for finding in lab.found() if finding.kind == "event that the database lacks"]
    assert [finding.subject for finding in findings] == [
        f"timestep.uploaded {entry} of {timestep.timestep_id}"
        for entry, timestep in zip(entries(lab)[3:6], timesteps, strict=True)
    ]
    for finding in findings:
        assert finding.fix is not None
        finding.fix()
    assert lab.found() == []
    with Session(lab.engine) as session:
        assert session.exec(select(func.count()).select_from(Timestep)).one() == 3


def test_what_the_stream_lost_is_told_and_what_was_trimmed_is_not(lab: Lab) -> None:
    for number in range(4):
        lab.upload(lab.take_in(f"{number}.json", position=number))
    assert lab.found() == []
    ids = entries(lab)
    lab.log.redis.xtrim(lab.log.stream, minid=ids[2], approximate=False)
    assert lab.found() == []
    lab.log.redis.xdel(lab.log.stream, ids[3], ids[4], ids[6])
    several, one = lab.found()
    assert {several.kind, one.kind} == {"event that the stream lost"}
    assert f"2 events, from timestep.uploaded {ids[3]}" in several.subject
    assert f"timestep.ingested {ids[6]}" in one.subject
    # Of a Redis that lost everything behind an entry, as one that was restored.
    lab.log.redis.xdel(lab.log.stream, ids[7])
    assert f"2 events, from timestep.ingested {ids[6]}" in lab.found()[1].subject
    # A stream that holds nothing any more may have been trimmed.
    lab.log.redis.xdel(lab.log.stream, *ids)
    assert lab.found() == []


def test_what_is_on_its_way_to_the_database_is_not_missed(lab: Lab) -> None:
    timestep = lab.take_in("1.json")
    lab.upload(timestep)
    assert lab.found() == []
    failed = Failed(
        timestep_id=timestep.timestep_id, system="prince", stage="upload", reason="it rained", event=timestep.event
    )
    lab.log.append(LogEvent.of(failed, "test"))
    assert list(audit_stream(lab.log, lab.engine, AGO)) == []
    (held,) = lab.log.read("state-manager", "another", count=10, wait_seconds=0.1)
    assert list(audit_stream(lab.log, lab.engine, AGO)) == []
    lab.log.acknowledge("state-manager", held.id)
    assert list(audit_stream(lab.log, lab.engine, timedelta(hours=1))) == []
    assert [finding.kind for finding in audit_stream(lab.log, lab.engine, AGO)] == ["event that the database lacks"]
    lab.log.dead_letters("state-manager").add(held, "it was wet")
    assert list(audit_stream(lab.log, lab.engine, AGO)) == []


def test_an_entry_that_nobody_can_read_is_told(lab: Lab) -> None:
    event = LogEvent.of(lab.take_in("1.json"), "test")
    # As another program may write it.
    lab.log.redis.xadd(lab.log.stream, {"event": event.model_dump_json(indent=1), "type": event.type})
    assert lab.found(timedelta(hours=1)) == []
    assert list(audit_stream(lab.log, lab.engine, AGO)) == []
    id = cast(str, lab.log.redis.xadd(lab.log.stream, {"what": "?"}))
    for entry in lab.log.read("state-manager", "another", count=10, wait_seconds=0.1):
        lab.log.acknowledge("state-manager", entry.id)
    assert [str(finding) for finding in audit_stream(lab.log, lab.engine, AGO)] == [
        f"entry that can't be read: entry {id} (see who else writes to the stream)"
    ]


# --- bucket


BUCKET: dict[str, tuple[Callable[[Lab, Ingested], object], str, bool]] = {
    "gone": (
        lambda lab, it: lab.store.client.delete_object(Bucket=lab.store.bucket_name, Key=it.event.key),
        "object gone before it was archived",
        True,
    ),
    "changed": (_overwrite, "object changed before it was archived", False),
    "unknown": (
        lambda lab, it: lab.store.client.put_object(
            Bucket=lab.store.bucket_name, Key="images/20260101_001/20260101/010101_0123abcd.tar", Body=b"?"
        ),
        "object without a row",
        False,
    ),
    "left over": (
        lambda lab, it: lab.store.client.create_multipart_upload(
            Bucket=lab.store.bucket_name, Key=f"images/20260101_001/20260101/010101_{uuid4().hex[:8]}.tar"
        ),
        "upload never completed",
        True,
    ),
}


@pytest.mark.parametrize(("change", "kind", "can_be_fixed"), BUCKET.values(), ids=BUCKET)
def test_what_is_wrong_in_the_bucket_is_found(
    lab: Lab, change: Callable[[Lab, Ingested], object], kind: str, can_be_fixed: bool
) -> None:
    timesteps = [lab.take_in(f"{number}.json", position=number) for number in range(3)]
    for timestep in timesteps:
        lab.upload(timestep)
    assert lab.found() == []
    change(lab, timesteps[1])
    (finding,) = lab.found()
    assert (finding.kind, finding.fix is not None) == (kind, can_be_fixed)
    if kind == "object gone before it was archived" and finding.fix is not None:
        finding.fix()
        (entry,) = lab.log.read("upload-worker", "test", count=10, wait_seconds=0.1)
        lab.upload(cast(Ingested, entry.decode().data))
        assert lab.found() == []
    if kind == "upload never completed":
        # Others come to it meanwhile; each finding is about its own upload.
        (upload,) = incomplete_uploads.find(lab.store.wire)
        said: list[str] = []
        with hold(lab.log.redis, lease_name(lab.log, upload.key)):
            assert report(iter([finding]), said.append, fix=True) == ({kind: 1}, 0)
        assert said[-1] == "  left: somebody goes on with it"
        change(lab, timesteps[1])
        assert report(iter([finding]), said.append, fix=True) == ({}, 1)
        (left,) = incomplete_uploads.find(lab.store.wire)
        assert left != upload


def test_a_tag_alone_excuses_no_object_that_is_gone_unless_its_system_trusts_it(lab: Lab) -> None:
    tagged, announced = (lab.take_in(f"{number}.json", position=number) for number in range(2))
    for timestep in (tagged, announced):
        lab.upload(timestep)
        head = lab.store.head(timestep.event.key)
        assert head is not None
        lab.log.append(LogEvent.of(announcement(head.key, timestep.timestep_id, head.etag), "reconcile-archive"))
    notice = Archived(
        timestep_id=None, job_id=uuid4(), date=date(2026, 11, 24), archive="/tape/1.tar", key=announced.event.key
    )
    lab.log.append(LogEvent.of(notice, "test"))
    assert lab.found() == []
    for timestep in (tagged, announced):
        lab.store.client.delete_object(Bucket=lab.store.bucket_name, Key=timestep.event.key)
    told = [(finding.kind, finding.subject, finding.fix) for finding in lab.found()]
    assert told == [("object gone or changed that a tag alone says is on tape", tagged.event.key, None)]
    assert list(audit_bucket(lab.store, lab.log, lab.engine, AGO, {"prince"})) == []
    # As another host tells of its system.
    trusting = ImagingSystem(name="prince", root=lab.root, purge_trusts_tags=True)
    lab.log.systems.tell(SystemSeen.of(trusting, lab.settings))
    assert lab.found() == []
    # A notice of what was there before is none of what is there now.
    row = {"etag": "another", "sha256": "0" * 64}
    with Session(lab.engine) as session, session.begin():
        session.execute(update(Timestep).where(col(Timestep.id) == announced.timestep_id).values(**row))
    assert len(list(audit_bucket(lab.store, lab.log, lab.engine, AGO))) == 2


def test_a_bucket_is_listed_page_by_page_and_its_refusal_is_told_as_ours(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = lab.store.client
    keys = [f"images/{number}.tar" for number in range(5)]
    for key in keys:
        client.put_object(Bucket=lab.store.bucket_name, Key=key, Body=b"?")
    real = client.list_objects_v2
    monkeypatch.setattr(client, "list_objects_v2", lambda **which: real(**which, MaxKeys=2))
    pages = list(list_objects(lab.store.wire, "images/"))
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [found.key for page in pages for found in page] == keys
    gone = lab.store.model_copy(update={"bucket_name": "no-such-bucket"})
    for ask in (audit_bucket(gone, lab.log, lab.engine, AGO), _objects(gone)):
        with pytest.raises(ObjectStoreError, match="in bucket no-such-bucket"):
            list(ask)


def test_images_that_no_event_announces_are_found_wherever_they_lie(lab: Lab) -> None:
    home = lab.prince.directory
    for directory in ("20261101/a", "20261101/b/Img", "other", "empty"):
        (home / directory).mkdir(parents=True)
    (home / "20261101/a/1.tif").write_bytes(tiff())
    (home / "20261101/b/Img/1.tif").touch()
    (home / "other/x.TIFF").touch()
    (home / "link").symlink_to(home / "20261101")
    event = json.loads(lab.prince.event(images=0))
    (lab.prince.events / "1.json").write_text(json.dumps(event | {"img_dir": "20261101/a"}))
    lab.ingest_file("1.json")
    lab.upload(lab.last(Ingested))

    found = lab.found()
    assert [finding.subject for finding in found] == [f"{home / '20261101/b'}: 1", f"{home / 'other'}: 1"]
    assert {finding.kind for finding in found} == {"images that no event announces"}
    # An event file that was just dropped announces them.
    again = {"img_dir": "other", "timestep_id": str(uuid4())}
    (lab.prince.events / "2.json").write_text(json.dumps(event | again))
    assert lab.kinds().count("images that no event announces") == 1


def test_images_that_a_wrong_event_file_names_are_announced(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    (lab.prince.directory / "t1").mkdir(parents=True)
    (lab.prince.directory / "t1" / "1.tif").write_bytes(tiff())
    event_file = lab.prince.events / "1.json"
    event_file.write_text('{"img_count": -2, "img_dir": "t1"}')
    lab.ingest_file("1.json")
    assert lab.kinds() == []
    event_file.write_text("{}")
    assert lab.kinds() == ["images that no event announces"]
    os_open = os.open

    def refuse(path: Any, *rest: Any, **options: Any) -> int:
        if path == event_file:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return os_open(path, *rest, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert lab.kinds() == ["event file that can't be read"]


def test_what_comes_into_a_directory_after_its_upload_is_told(lab: Lab) -> None:
    timesteps = [lab.take_in(f"{number}.json", position=number) for number in range(3)]
    for timestep in timesteps:
        lab.upload(timestep)
    assert lab.found() == []
    late, replaced = (lab.prince.directory / timestep.event.img_dir for timestep in timesteps[:2])
    (late / "Img" / "deep").mkdir(parents=True, exist_ok=True)
    (late / "Img" / "deep" / "late.tif").write_bytes(tiff())
    assert lab.found(timedelta(hours=1)) == []
    image = next(path for path in sorted(replaced.rglob("*")) if path.is_file())
    image.rename(image.with_name("before"))
    image.write_bytes(b"another")
    image.with_name("before").unlink()
    found = {finding.subject: finding for finding in lab.found()}
    assert {finding.kind for finding in found.values()} == {"files that are not in the object"}
    first, second = sorted(found, key=lambda subject: str(late) not in subject)
    assert first.startswith(f"{late}: 1 of ")
    assert first.endswith("as 'Img/deep/late.tif'")
    assert second.startswith(f"{replaced}: 1 of ")
    assert all(finding.fix is None for finding in found.values())
    # Until an event file announces what is new, and what is new below belongs to that.
    shutil.rmtree(late / "Img" / "deep")
    assert len(lab.found()) == 1


def test_what_is_back_after_a_purge_is_told(lab: Lab) -> None:
    timestep = lab.take_in("1.json")
    lab.upload(timestep)
    directory = lab.prince.directory / timestep.event.img_dir
    image = next(path for path in directory.rglob("*") if path.is_file())
    content = image.read_bytes()
    assert lab.found() == []
    with Session(lab.engine) as session, session.begin():
        session.execute(update(Timestep).values(source_purged_at=func.now()))
    shutil.rmtree(directory)
    (lab.prince.events / "1.json").unlink()
    assert lab.found() == []
    image.parent.mkdir(parents=True)
    assert lab.found() == []
    image.write_bytes(content)
    assert lab.found(timedelta(hours=1)) == []
    (finding,) = lab.found()
    name = str(image.relative_to(directory))
    assert finding.kind == "files of a purged timestep are back"
    assert finding.subject == f"{directory}: 1, as {name!a}"
    assert finding.fix is None
    image.write_bytes(b"another")
    (finding,) = lab.found()
    assert finding.subject.endswith(f"1 of them are not in the object, as {name!a}")


def test_copies_that_nothing_will_delete_are_told(lab: Lab) -> None:
    staging = Staging.from_settings(lab.settings)
    timestep = lab.take_in("1.json")
    source = lab.prince.directory / timestep.event.img_dir
    staging.stage("prince", timestep.timestep_id, source, timestep.digest)
    lab.upload(timestep)
    assert lab.found() == []
    # Its system's share is away, or it is of another system.
    unknown = staging.stage("aretha", timestep.timestep_id, source)
    (unknown / "more").touch()
    assert lab.found(timedelta(hours=1)) == []
    next(path for path in sorted(source.rglob("*")) if path.is_file()).write_bytes(tiff(b"altered"))
    staging.stage("aretha", timestep.timestep_id, source)
    (aside,) = staging.replaced("aretha")
    assert [(finding.kind, finding.subject) for finding in lab.found()] == [
        ("copy that no timestep tells of", str(unknown)),
        ("copy that was set aside", str(aside)),
    ]
    assert lab.found(timedelta(hours=1)) == []
    only = find([ImagingSystem(name="prince", root=lab.root)], lab.settings, AGO, AGO, only_disks=True)
    assert list(only) == []


MANY = 6_000
_TIMESTEPS = """
insert into timestep (id, system, experiment_id, plate, cross_date, position, type, timestamp, image_count, image_dir,
    announced, event_file, ingested_at, uploaded_at, archived_at, bucket, key, size, etag)
select md5(n::text)::uuid, 'prince', '20261101_004', 4, '2026-11-01', 1, 'stitch', now(), 1, 'many/t' || n, '{}',
    'events/' || n || '.json', now(), now(), now(), :bucket, 'images/20261101_004/20261101/' || n || '.tar', 1, n
from generate_series(1, :many) as n
"""
_HISTORY = """
insert into timestep_event (id, entry_id, type, source, time, timestep_id, system, event_file, data)
select md5('event' || n)::uuid, 1700000000000 + n || '-0', 'timestep.ingested', 'test', now(), md5(n::text)::uuid,
    'prince', 'events/' || n || '.json', '{}'
from generate_series(1, :many) as n
"""


def test_of_many_timesteps_an_audit_holds_few_at_a_time(lab: Lab) -> None:
    system = ImagingSystem(name="prince", root=lab.root)
    with Session(lab.engine) as session, session.begin():
        session.execute(text(_TIMESTEPS), {"many": MANY, "bucket": lab.store.bucket_name})
        session.execute(text(_HISTORY), {"many": MANY})
        session.execute(
            update(TimestepEvent).where(col(TimestepEvent.entry_id) == "1700000000007-0").values(id=uuid4())
        )
    with lab.log.redis.pipeline(transaction=False) as pipeline:
        for number in range(1, MANY + 1):
            (lab.prince.events / f"{number}.json").touch()
            (lab.prince.directory / "many" / f"t{number}").mkdir(parents=True)
            id = UUID(hashlib.md5(f"event{number}".encode()).hexdigest())
            event = f'{{"specversion":"1.0","id":"{id}","more":"{"x" * 1000}"}}'
            pipeline.xadd(lab.log.stream, {"event": event, "type": "timestep.ingested"}, f"{1700000000000 + number}-0")
        for name, status in system.event_files():
            verdict = Fingerprint(file=Fingerprint.state_of(status)).model_dump_json()
            pipeline.hset(f"{lab.log.stream}:event-files:prince", name, verdict)
        pipeline.execute()
        lab.log.redis.xgroup_setid(lab.log.stream, "state-manager", "$")
        lab.log.redis.xgroup_setid(lab.log.stream, "upload-worker", "$")
    (lab.prince.events / f"{MANY + 1}.json").touch()
    (lab.prince.directory / "many" / "unknown").mkdir()
    (lab.prince.directory / "many" / "unknown" / "1.tif").touch()
    tracemalloc.start()
    try:
        # Without the bucket: its client takes more than all of these.
        findings = chain(audit_disk(system, lab.log, lab.engine, -1), audit_stream(lab.log, lab.engine, AGO))
        kinds = sorted(finding.kind for finding in findings)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kinds == [
        "event file without a timestep",
        "event that the database lacks",
        "event that the stream lost",
        "images that no event announces",
    ]
    assert peak < 4 << 20, f"{peak / MANY:.0f} bytes per timestep"


def test_a_disk_that_is_away_hides_nothing_else(lab: Lab) -> None:
    lab.upload(lab.take_in("1.json"))
    lab.prince.directory.rename(lab.root / "away")
    _overwrite(lab, lab.last(Ingested))
    assert lab.kinds() == ["disk that can't be read", "object changed before it was archived"]


def test_a_disk_that_will_be_full_is_told(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.upload(lab.take_in("1.json"))
    monkeypatch.setattr(disk_outlook, "_SOON", timedelta(days=365_000_000))
    (finding,) = lab.found()
    assert finding.kind == "disk that will be full"
    assert "0.0 GB come and 0.0 GB leave per hour" in finding.subject
