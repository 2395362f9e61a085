"""Synthetic timesteps are taken back to the last trace, wherever they are and wherever it was killed; others never."""

import asyncio
import io
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import numpy
import pytest
import tifffile
from sqlalchemy import Engine
from sqlmodel import Session, select

from blocks import synthetic_files
from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.event_log import EventLog
from blocks.messages import Ingested, LogEvent, Withdrawn
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.synthetic_object import NotAsSent, delete_object, read_back
from blocks.synthetic_timestep import SYSTEM, announcement, images, is_synthetic
from blocks.tables import RejectedEventFile, Timestep, TimestepImage
from blocks.tiff import check_tiff
from flows.ingest import check_not_reserved
from flows.record import record_waiting
from flows.upload import NotWanted, conclude, upload
from flows.withdrawal import Places, withdraw, withdraw_leftovers
from tests.events import announced
from tests.images import make_images
from tests.mortal import Mortal, let_leases_run_out
from tests.watching import Ingest
from tests.working import said

REASON = "as it was a test"


class Way:
    """What the entrypoints do, one step after the other."""

    def __init__(self, settings: Settings, store: ObjectStore, engine: Engine, log: EventLog) -> None:
        self.settings, self.store, self.engine, self.log = settings, store, engine, log
        self.root = cast(Path, settings.data_dir)
        self.root.mkdir(exist_ok=True)
        self.places = Places.of(settings, engine, log)
        self._ingest = Ingest(self.root, log)

    def send(self) -> UUID:
        timestep_id = uuid4()
        synthetic_files.drop(synthetic_files.prepare(self.root), timestep_id)
        return timestep_id

    def ingest(self) -> None:
        known = self.log.register.concluded(SYSTEM)
        for path in (self.places.home / "events").glob("*.json"):
            if f"events/{path.name}" not in known:
                parameters = {"system": SYSTEM, "event_file": f"events/{path.name}"}
                asyncio.run(self._ingest.drive("", "", parameters))

    def upload(self) -> None:
        for entry in self.log.read("upload-worker", "test", count=100, wait_seconds=0.001):
            data = entry.decode().data
            with suppress(NotWanted):
                if isinstance(data, Ingested):
                    self.log.append(LogEvent.of(upload(data, self.settings, self.store, self.log), "test"))
            self.log.acknowledge("upload-worker", entry.id)

    def record(self) -> None:
        record_waiting(self.log, self.engine, "test", limit=100, linger_seconds=0.001)

    def go_on(self) -> None:
        """Whatever is still to be done."""
        let_leases_run_out(self.log)
        for step in (self.ingest, self.upload, self.record):
            step()

    def left(self) -> dict[str, list[str]]:
        return left(self.settings, self.store, self.engine, self.log)


def left(settings: Settings, store: ObjectStore, engine: Engine, log: EventLog) -> dict[str, list[str]]:
    """All that there is of flight checks, but for their history."""
    home = cast(Path, settings.data_dir) / SYSTEM
    listed = store.client.list_objects_v2(Bucket=store.bucket_name).get("Contents", [])
    keys = cast(list[str], log.redis.keys("*"))
    with Session(engine) as session:
        rows: list[Any] = [
            *session.exec(select(Timestep.id)),
            *session.exec(select(TimestepImage.name)),
            *session.exec(select(RejectedEventFile.event_file)),
        ]
    copies = cast(Path, settings.staging_dir) / SYSTEM
    remembered = {f"{log.stream}:{name}" for name in ("identities", f"event-files:{SYSTEM}", f"rejected:{SYSTEM}")}
    found = {
        "files": [str(path) for path in [*home.rglob("*"), *copies.rglob("*")] if path != home / "events"],
        "objects": [one["Key"] for one in listed],
        "rows": [str(row) for row in rows],
        "remembered": [key for key in keys if key in remembered],
    }
    return {what: names for what, names in found.items() if names}


@pytest.fixture
def way(settings: Settings, object_store: ObjectStore, engine: Engine, event_log: EventLog) -> Way:
    return Way(settings, object_store, engine, event_log)


@pytest.fixture
def mortal(monkeypatch: pytest.MonkeyPatch) -> Mortal:
    return Mortal(monkeypatch)


# --- what is synthetic


def test_all_of_it_follows_from_its_id_and_its_images_can_be_read(tmp_path: Path) -> None:
    one, other = uuid4(), uuid4()
    assert images(one) == images(one)
    assert not {*images(one).values()} & {*images(other).values()}
    for name, content in images(one).items():
        path = tmp_path / Path(name).name
        path.write_bytes(content)
        check_tiff(path)
        pixels = tifffile.imread(io.BytesIO(content))
        assert pixels.shape == (128, 128)
        assert pixels.dtype == numpy.uint8
        assert len(numpy.unique(pixels)) > 200
    assert is_synthetic(SYSTEM, announcement(one))
    assert not is_synthetic("prince", announcement(one))
    assert not is_synthetic(SYSTEM, announced(one))


# --- killed anywhere


def _ingested(way: Way) -> None:
    way.ingest()


def _uploaded(way: Way) -> None:
    way.ingest()
    way.upload()


def _recorded(way: Way) -> None:
    _uploaded(way)
    way.record()


@pytest.mark.parametrize("so_far", [_ingested, _uploaded])
def test_a_withdrawal_that_is_killed_at_any_step_is_finished_by_the_next(
    way: Way, mortal: Mortal, so_far: Callable[[Way], None]
) -> None:
    step = 1
    while True:
        timestep_id = way.send()
        so_far(way)
        with mortal.killed_at(step):
            withdraw(way.places, timestep_id, None, REASON)
        was_killed = mortal.steps >= step
        way.go_on()
        withdraw_leftovers(way.places, lambda _: None)
        way.go_on()
        assert way.left() == {}, f"killed at step {step}"
        if not was_killed:
            break
        step += 1
    assert step > 15


def test_what_is_left_of_one_that_was_killed_while_it_was_written_is_found(way: Way, mortal: Mortal) -> None:
    step, was_killed = 1, True
    while was_killed:
        with mortal.killed_at(step):
            way.send()
        was_killed = mortal.steps >= step
        way.ingest()
        synthetic_files.prepare(way.root)
        withdraw_leftovers(way.places, lambda _: None)
        way.go_on()
        assert way.left() == {}, f"killed at step {step}"
        step += 1
    assert step > 5


def test_what_nobody_remembers_is_found_by_its_row_or_its_object(way: Way) -> None:
    for forget in (way.log.redis.flushall, lambda: None):
        timestep_id = way.send()
        _recorded(way)
        synthetic_files.delete_event_file(way.places.home, timestep_id)
        synthetic_files.delete_images(way.places.home, timestep_id)
        forget()
        way.log.ensure_groups()
        withdraw_leftovers(way.places, lambda _: None)
        way.record()
        assert way.left() == {}


def test_a_copy_in_staging_goes_too(way: Way) -> None:
    timestep_id = way.send()
    assert way.places.staging
    way.places.staging.stage(SYSTEM, timestep_id, way.places.home / timestep_id.hex)
    way.ingest()
    withdraw(way.places, timestep_id, None, REASON)
    way.record()
    assert way.left() == {}


def test_an_upload_that_comes_after_the_withdrawal_does_nothing(way: Way) -> None:
    timestep_id = way.send()
    way.ingest()
    withdraw(way.places, timestep_id, None, REASON)
    way.upload()
    way.record()
    assert way.left() == {}
    assert way.log.backlog("upload-worker").in_progress == 0
    assert [one.timestep_id for one in said(way.log, Withdrawn)] == [timestep_id]


# --- nothing else is ever deleted


def test_an_object_that_is_not_what_was_sent_stays_for_somebody_to_look_at(way: Way) -> None:
    timestep_id = way.send()
    _recorded(way)
    key = announcement(timestep_id).key
    content = bytearray(way.store.client.get_object(Bucket=way.store.bucket_name, Key=key)["Body"].read())
    content[len(content) // 2] ^= 1
    metadata = way.store.client.head_object(Bucket=way.store.bucket_name, Key=key)["Metadata"]
    way.store.client.put_object(Bucket=way.store.bucket_name, Key=key, Body=bytes(content), Metadata=metadata)
    with pytest.raises(NotAsSent, match="is not what was sent"):
        withdraw(way.places, timestep_id, None, REASON)
    told: list[str] = []
    withdraw_leftovers(way.places, told.append)
    way.record()
    assert way.left() == {"objects": [key]}
    assert any("stays for somebody to look at" in sentence for sentence in told)


def test_an_object_that_its_upload_stated_otherwise_stays(way: Way) -> None:
    timestep_id = way.send()
    _recorded(way)
    row = way.places.row(timestep_id)
    assert row
    row.etag = "another"
    with pytest.raises(NotAsSent, match="its etag is"):
        delete_object(way.store, timestep_id, row, lambda: None)
    assert read_back(way.store, timestep_id)


def test_images_of_a_microscope_are_never_deleted_whatever_they_claim_to_be(way: Way, tmp_path: Path) -> None:
    """Real images, uploaded under the reserved name past all checks, with all that a flight check says of its own."""
    event = announcement(uuid4())
    home = synthetic_files.prepare(way.root)
    for path in make_images(home / event.img_dir, [3000, 3000, 3000]).rglob("*.tif"):
        path.rename(path.with_name(f"Img_r01_c{int(path.stem[5:7]) + 1:02d}.tif"))
    real = sorted((home / event.img_dir).rglob("*.tif"))
    assert {str(path.relative_to(home / event.img_dir)) for path in real} == images(event.timestep_id).keys()
    timestep = Ingested(timestep_id=event.timestep_id, system=SYSTEM, event_file="events/1.json", event=event)
    upload(timestep, way.settings, way.store, way.log)
    withdraw_leftovers(way.places, lambda _: None)
    assert way.store.head(event.key)
    assert sorted((home / event.img_dir).rglob("*.tif")) == real


@pytest.mark.parametrize(
    ("system", "event"),
    [(SYSTEM, announced()), ("prince", announced(event_type=SYSTEM)), ("prince", announcement(UUID(int=1)))],
)
def test_no_microscope_can_use_what_is_reserved(system: str, event: ImagingEvent) -> None:
    with pytest.raises(InvalidEventFile, match="are kept for the flow of that name"):
        check_not_reserved(system, event)
    check_not_reserved(SYSTEM, announcement(UUID(int=1)))
    check_not_reserved("prince", announced())


def test_rows_of_a_microscope_are_no_leftovers(way: Way) -> None:
    event = announced()
    make_images(way.root / SYSTEM / event.img_dir, [100, 200])
    timestep = Ingested(timestep_id=event.timestep_id, system=SYSTEM, event_file="events/1.json", event=event)
    synthetic_files.prepare(way.root)
    conclude(upload(timestep, way.settings, way.store, way.log), None, way.log)
    way.record()
    withdraw_leftovers(way.places, lambda _: None)
    way.record()
    assert way.store.head(event.key)
    assert way.places.row(event.timestep_id)
    assert said(way.log, Withdrawn) == []
