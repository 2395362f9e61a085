"""Deleting files: what goes is in the bucket at that moment, and nothing else is touched."""

import hashlib
import io
import json
import os
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlalchemy import Engine, update
from sqlmodel import Session, select

from blocks import deletion, purge_proof
from blocks.bundle import BundleError
from blocks.event_file import InvalidEventFile
from blocks.event_log import EventLog
from blocks.imaging_system import ImagesMissing, ImagingSystem
from blocks.messages import Archived, Ingested, LogEvent, SourcePurged
from blocks.object_errors import ObjectStoreError
from blocks.object_store import ObjectStore
from blocks.purgeable import Outcome, PurgeableTimesteps
from blocks.settings import Settings
from blocks.source_file import find_sources
from blocks.tables import Timestep, TimestepEvent
from flows.outcome import take_in
from flows.purge import SourcePurge
from flows.record import record_waiting
from flows.upload import upload
from tests.images import tiff


class KilledError(BaseException):
    """The process ends here."""


@dataclass
class Lab:
    """A system whose timesteps are uploaded and recorded, and purged at once."""

    system: ImagingSystem
    settings: Settings
    store: ObjectStore
    log: EventLog
    engine: Engine

    @property
    def home(self) -> Path:
        return self.system.directory

    def drop(self, images: int = 3, img_dir: str = "", name: str = "", **fields: Any) -> Ingested:
        """A complete timestep that was taken in."""
        timestep_id = uuid4()
        img_dir = img_dir or f"20261101_004/{timestep_id.hex}"
        (self.home / "events").mkdir(parents=True, exist_ok=True)
        (self.home / img_dir / "Img").mkdir(parents=True, exist_ok=True)
        for number in range(images):
            (self.home / img_dir / "Img" / f"{number}.tif").write_bytes(tiff(os.urandom(2000)))
        event = {
            "timestep_id": str(timestep_id),
            "plate": 4,
            "cross_date": "2026-11-01",
            "position": 7,
            "timestamp": "2026-11-23T10:42:07Z",
            "img_count": images,
            "img_dir": img_dir,
            **fields,
        }
        event_file = f"events/{name or timestep_id.hex}.json"
        (self.home / event_file).write_text(json.dumps(event))
        seen = self.system.fingerprint(event_file)
        return take_in(self.system, event_file, self.system.read_event(event_file), seen, self.log)

    def upload(self, timestep: Ingested, *, archive: bool = True) -> None:
        self.log.append(LogEvent.of(upload(timestep, self.settings, self.store, self.log), "test"))
        if archive:
            notice = Archived(
                timestep_id=None, job_id=uuid4(), date=date(2026, 11, 24), archive="/tape/1.tar", key=timestep.event.key
            )
            self.log.append(LogEvent.of(notice, "test"))
        self.record()

    def arrived(self, **fields: Any) -> Ingested:
        timestep = self.drop(**fields)
        self.upload(timestep)
        return timestep

    def record(self) -> None:
        record_waiting(self.log, self.engine, "state-manager", limit=100, linger_seconds=0.001)

    def purge(self, *, do_it: bool = True, run_id: UUID | None = None, **policy: Any) -> list[Outcome]:
        system = self.system.model_copy(update=policy)
        timesteps = PurgeableTimesteps(self.engine)
        outcomes = list(SourcePurge(system, timesteps, self.store, self.log, run_id).run(do_it=do_it))
        self.record()
        return outcomes

    def files(self) -> dict[str, bytes]:
        """Every file of the system with its content, links as what they point to."""
        return {
            str(path.relative_to(self.home)): str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
            for path in self.home.rglob("*")
            if path.is_symlink() or path.is_file()
        }

    def in_bucket(self, timestep: Ingested) -> set[str]:
        """The hashes of what can be fetched of a timestep now."""
        try:
            answer = self.store.client.get_object(Bucket=self.store.bucket_name, Key=timestep.event.key)
            with tarfile.open(fileobj=io.BytesIO(answer["Body"].read())) as tar:
                contents = [cast(io.BufferedReader, tar.extractfile(member)).read() for member in tar]
        except (self.store.client.exceptions.NoSuchKey, tarfile.TarError):
            return set()
        return {hashlib.sha256(content).hexdigest() for content in contents}


@pytest.fixture
def make_lab(settings: Settings, object_store: ObjectStore, event_log: EventLog, engine: Engine) -> Callable[[], Lab]:
    def make() -> Lab:
        system = ImagingSystem(
            name=f"prince-{uuid4().hex[:6]}", root=cast(Path, settings.data_dir), source_retention_days=0
        )
        (system.directory / "events").mkdir(parents=True)
        return Lab(system, settings, object_store, event_log, engine)

    return make


@pytest.fixture
def lab(make_lab: Callable[[], Lab]) -> Lab:
    return make_lab()


# --- what goes


def test_a_proven_timestep_goes_and_nothing_else_does(lab: Lab) -> None:
    other = lab.drop()
    timestep = lab.arrived()
    others = {name for name in lab.files() if other.timestep_id.hex in name}

    would = lab.purge(do_it=False)
    assert len(lab.files()) == 8
    assert lab.purge() == would
    assert [(outcome.files, outcome.kept) for outcome in would] == [(4, "")]

    assert set(lab.files()) == others
    assert not (lab.home / timestep.event.img_dir).exists()
    assert (lab.home / "20261101_004").exists()
    with Session(lab.engine) as session:
        row = session.exec(select(Timestep).where(Timestep.id == timestep.timestep_id)).one()
        query = select(TimestepEvent.data).where(TimestepEvent.type == SourcePurged.type)
        (said,) = session.exec(query).all()
    assert row.source_purged_at is not None
    assert (said["files"], said["timestep_id"]) == (4, str(timestep.timestep_id))
    assert len(said["proof"]["checks"]) == 4
    assert lab.purge() == []


def test_without_a_retention_time_nothing_goes(lab: Lab) -> None:
    lab.arrived()
    assert lab.purge(source_retention_days=None) == []
    assert lab.purge(source_retention_days=0.001) == []
    assert len(lab.files()) == 4


def test_state_is_enough_where_nothing_was_touched_since_the_upload_and_content_decides_otherwise(lab: Lab) -> None:
    timestep = lab.drop()
    time.sleep(1.2)  # what changed just before the upload is compared by content too
    lab.upload(timestep)
    touched = lab.arrived()
    lab.purge()
    with Session(lab.engine) as session:
        said = session.exec(select(TimestepEvent.data).where(TimestepEvent.type == SourcePurged.type)).all()
    how = {one["timestep_id"]: one["proof"]["checks"][-1] for one in said}
    assert "sizes and modification times" in how[str(timestep.timestep_id)]
    assert "has the SHA-256" in how[str(touched.timestep_id)]


@pytest.mark.parametrize("crash_at", range(6))
def test_a_purge_that_is_killed_goes_on_where_it_was_and_is_said_once(
    lab: Lab, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timestep = lab.arrived()
    with monkeypatch.context() as patch:
        left = iter(range(crash_at))

        def dying(call: Callable[..., None]) -> Callable[..., None]:
            def do(*args: Any, **options: Any) -> None:
                if next(left, None) is None:
                    raise KilledError
                call(*args, **options)

            return do

        patch.setattr(os, "unlink", dying(os.unlink))
        patch.setattr(os, "rmdir", dying(os.rmdir))
        with pytest.raises(KilledError):
            lab.purge(run_id=uuid4())
    assert (lab.home / timestep.event_file).exists()

    (outcome,) = lab.purge(run_id=uuid4())
    assert (outcome.files, outcome.kept) == (4, "")
    assert lab.files() == {}
    assert lab.purge() == []
    with Session(lab.engine) as session:
        assert len(session.exec(select(TimestepEvent).where(TimestepEvent.type == SourcePurged.type)).all()) == 1


def test_a_purge_that_is_killed_before_it_says_so_says_so_the_next_time(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.arrived()

    def killed(*_rest: object) -> str:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(EventLog, "append", killed)
        with pytest.raises(KilledError):
            lab.purge()
    assert lab.files() == {}
    assert [(outcome.files, outcome.kept) for outcome in lab.purge()] == [(4, "")]


# --- what stays


def _image(lab: Lab, timestep: Ingested, number: int = 1) -> Path:
    return lab.home / timestep.event.img_dir / "Img" / f"{number}.tif"


def _alter(path: Path) -> None:
    """Other content of the same size and modification time, in place."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _overwrite_object(lab: Lab, timestep: Ingested) -> None:
    """Another object of the same size, which says that it is the same."""
    key, client = timestep.event.key, lab.store.client
    found = client.get_object(Bucket=lab.store.bucket_name, Key=key)
    content = bytearray(found["Body"].read())
    content[len(content) // 2] ^= 1
    client.put_object(Bucket=lab.store.bucket_name, Key=key, Body=bytes(content), Metadata=found["Metadata"])


def _link_away(lab: Lab, timestep: Ingested) -> None:
    directory = lab.home / timestep.event.img_dir
    directory.rename(lab.home / "elsewhere")
    directory.symlink_to(lab.home / "elsewhere")


def _link_image(lab: Lab, image: Path) -> None:
    image.rename(lab.home / "moved")
    image.symlink_to(lab.home / "moved")


def _drop_in(lab: Lab, img_dir: str) -> None:
    lab.drop(img_dir=img_dir)
    lab.record()


def _announce_again(lab: Lab, timestep: Ingested) -> None:
    event = json.loads((lab.home / timestep.event_file).read_text())
    event["timestep_id"] = str(uuid4())
    (lab.home / "events" / "another.json").write_text(json.dumps(event))


def _rebuild(lab: Lab, timestep: Ingested) -> None:
    """As if the database had been lost, and the timestep had been announced again since."""
    with Session(lab.engine) as session, session.begin():
        session.execute(update(Timestep).values(sha256=None))


STAYS: dict[str, tuple[Callable[[Lab, Ingested], object], str]] = {
    "no object": (
        lambda lab, it: lab.store.client.delete_object(Bucket=lab.store.bucket_name, Key=it.event.key),
        "is gone from the bucket",
    ),
    "another object": (_overwrite_object, "ETag is"),
    "image altered in place": (lambda lab, it: _alter(_image(lab, it)), "another content"),
    "image of another size": (lambda lab, it: _image(lab, it).write_bytes(b"short"), "has 5 bytes, uploaded were"),
    "a file more": (lambda lab, it: (_image(lab, it).parent / "notes.txt").touch(), "holds what was not uploaded"),
    "an image is a link": (
        lambda lab, it: _link_image(lab, _image(lab, it)),
        "a symbolic link",
    ),
    "its directory is a link": (_link_away, "symbolic link"),
    "event file rewritten": (
        lambda lab, it: (lab.home / it.event_file).write_text("{}"),
        "is not the event file any more",
    ),
    "event file of another timestep": (
        lambda lab, it: (lab.home / lab.drop(name="later").event_file).rename(lab.home / it.event_file),
        "announces something else by now",
    ),
    "announced by another file": (_announce_again, "events/another.json announces"),
    "another timestep in it": (
        lambda lab, it: _drop_in(lab, f"{it.event.img_dir}/inner"),
        "has its images in",
    ),
    "another timestep above": (lambda lab, it: _drop_in(lab, "20261101_004"), "has its images in"),
    "found in the bucket, and not read": (_rebuild, "not read since"),
    "an upload under way": (
        lambda lab, it: lab.log.redis.set(f"{lab.log.stream}:lease:{it.event.key}", "somebody", ex=60),
        "held by another process",
    ),
}


@pytest.mark.parametrize(("change", "reason"), STAYS.values(), ids=STAYS)
def test_what_is_not_proven_stays_with_its_reason(
    lab: Lab, change: Callable[[Lab, Ingested], object], reason: str
) -> None:
    timestep = lab.arrived()
    change(lab, timestep)
    before = lab.files()
    (outcome,) = lab.purge()
    assert reason in outcome.kept
    assert lab.files() == before


def test_what_is_not_on_tape_stays_where_policy_says_so(lab: Lab) -> None:
    timestep = lab.drop()
    lab.upload(timestep, archive=False)
    (outcome,) = lab.purge()
    assert "not known to be on tape" in outcome.kept
    (outcome,) = lab.purge(purge_needs_tape=False)
    assert outcome.kept == ""
    assert lab.files() == {}


def test_a_file_that_takes_an_images_place_meanwhile_is_not_deleted(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    timestep = lab.arrived()
    real = deletion.delete_files

    def swap(home: Path, directory: str, *rest: Any) -> None:
        _image(lab, timestep, 2).unlink()
        _image(lab, timestep, 2).write_bytes(b"new")
        real(home, directory, *rest)

    monkeypatch.setattr("flows.purge.delete_files", swap)
    (outcome,) = lab.purge()
    assert "is not the file any more that was compared" in outcome.kept
    assert _image(lab, timestep, 2).read_bytes() == b"new"
    assert (lab.home / timestep.event_file).exists()


@pytest.mark.parametrize("outside", ["{other}", "../other"])
def test_nothing_outside_of_the_system_is_ever_deleted(tmp_path: Path, outside: str) -> None:
    home, other = tmp_path / "prince", tmp_path / "other"
    (home / "inside").mkdir(parents=True)
    other.mkdir()
    (other / "mine").write_bytes(b"mine")
    mine = find_sources(other)
    directory = outside.format(other=other)
    with pytest.raises(deletion.NotDeleted, match="leads out of"):
        deletion.delete_files(home, directory, mine)
    with pytest.raises(deletion.NotDeleted, match="leads out of"):
        deletion.delete_files(home, "inside", {f"{directory}/mine": mine["mine"], f"../{directory}": mine["mine"]})
    (other / "mine").rename(tmp_path / "mine")
    with pytest.raises(deletion.NotDeleted, match="leads out of"):
        deletion.delete_empty_directories(home, directory, [])
    assert other.is_dir()


@pytest.fixture
def tmpfs(lab: Lab) -> Iterator[Callable[..., None]]:
    """Mounts a file system of its own in place of the system's directory."""

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", *options, "archiver-test", str(lab.home)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")

    yield mount
    subprocess.run(["umount", "-l", str(lab.home)], capture_output=True, check=False)


def test_a_read_only_mount_is_left_alone_with_one_line(
    lab: Lab, tmpfs: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    tmpfs()
    for _ in range(3):
        lab.arrived()
    before = lab.files()
    tmpfs("-o", "remount,ro")
    assert lab.purge() == []
    assert [record.message for record in caplog.records if "read-only" in record.message] == [
        f"Nothing of {lab.system.name} is deleted: {lab.home} is mounted read-only"
    ]
    assert lab.files() == before
    assert len(lab.purge(do_it=False)) == 3


# --- whatever happens

DEEDS = [
    "purge",
    "purge",
    "killed-purge",
    "arrive",
    "upload-again",
    "object-gone",
    "object-overwritten",
    "altered",
    "replaced",
    "longer",
    "removed",
    "added",
    "linked",
    "event-file-rewritten",
]


@hypothesis_settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deeds=st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(0, 5)), max_size=10),
    compares=st.sampled_from(["state", "content"]),
    needs_tape=st.booleans(),
    coarse=st.sampled_from([0, 1]),
)
def test_no_image_is_ever_deleted_that_can_not_be_fetched_at_that_moment(
    make_lab: Callable[[], Lab],
    deeds: list[tuple[str, int]],
    compares: str,
    needs_tape: bool,
    coarse: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With 0, the state of files that are as old as the upload decides; with 1, their content.
    monkeypatch.setattr(purge_proof, "_CLOCK_SECONDS", coarse)
    lab = make_lab()
    policy = {"purge_compares": compares, "purge_needs_tape": needs_tape}
    timesteps = [lab.arrived(), lab.arrived()]
    for deed, number in [*deeds, ("purge", 0)]:
        timestep = timesteps[number % len(timesteps)]
        image = _image(lab, timestep, number % 3)
        match deed:
            case "purge":
                _purge_and_check(lab, timesteps, None, policy)
            case "killed-purge":
                _purge_and_check(lab, timesteps, number, policy)
            case "arrive":
                timesteps.append(lab.arrived())
            case "upload-again":
                _upload_again(lab, timestep)
            case "object-gone":
                lab.store.client.delete_object(Bucket=lab.store.bucket_name, Key=timestep.event.key)
            case "object-overwritten" if lab.in_bucket(timestep):
                _overwrite_object(lab, timestep)
            case "altered" if image.is_file():
                _alter(image)
            case "replaced" if image.parent.is_dir():
                (lab.home / "new").write_bytes(os.urandom(2000))
                (lab.home / "new").rename(image)
            case "longer" if image.is_file():
                with image.open("ab") as file:
                    file.write(b"more")
            case "removed":
                image.unlink(missing_ok=True)
            case "added" if image.parent.is_dir():
                (image.parent / "added.tif").write_bytes(tiff())
            case "linked" if image.is_file() and not (lab.home / f"{number}.kept").exists():
                image.rename(lab.home / f"{number}.kept")
                image.symlink_to(lab.home / f"{number}.kept")
            case "event-file-rewritten":
                (lab.home / timestep.event_file).write_text("{}")


def _upload_again(lab: Lab, timestep: Ingested) -> None:
    with suppress(ImagesMissing, InvalidEventFile, BundleError, ObjectStoreError):
        lab.upload(timestep)


def _purge_and_check(lab: Lab, timesteps: list[Ingested], killed_after: int | None, policy: dict[str, Any]) -> None:
    before = lab.files()
    calls = iter(range(killed_after)) if killed_after is not None else None

    def unlink(*args: Any, **options: Any) -> None:
        if calls is not None and next(calls, None) is None:
            raise KilledError
        os_unlink(*args, **options)

    os_unlink = os.unlink
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "unlink", unlink)
        try:
            lab.purge(**policy)
        except KilledError:
            lab.record()
    gone = {name: before[name] for name in before.keys() - lab.files().keys()}
    fetched = {timestep.event.img_dir: lab.in_bucket(timestep) for timestep in timesteps}
    event_files = {timestep.event_file for timestep in timesteps}
    for name, content in gone.items():
        if name not in event_files:
            (img_dir,) = [img_dir for img_dir in fetched if Path(name).is_relative_to(img_dir)]
            assert hashlib.sha256(content).hexdigest() in fetched[img_dir], f"{name} is lost"
