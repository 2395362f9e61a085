"""A system whose timesteps are uploaded and recorded, so that their files can be purged at once."""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine

from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.messages import Archived, Ingested, LogEvent, Uploaded
from blocks.object_store import ObjectStore
from blocks.purgeable import Outcome, PurgeableTimesteps
from blocks.settings import Settings
from blocks.staging import Staging
from flows.outcome import take_in
from flows.purge import SourcePurge
from flows.purge_staging import StagingPurge
from flows.record import record_waiting
from flows.upload import upload
from tests.events import document
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
        self.put_images(images, img_dir)
        known = {"timestep_id": str(timestep_id), "img_count": images, "img_dir": img_dir}
        event = document(**(known | fields))
        event_file = f"events/{name or timestep_id.hex}.json"
        (self.home / event_file).write_text(json.dumps(event))
        seen = self.system.fingerprint(event_file)
        return take_in(self.system, event_file, self.system.read_event(event_file), seen, self.log)

    def put_images(self, images: int = 3, img_dir: str = "") -> str:
        """Images that nobody announces yet; returns their directory."""
        img_dir = img_dir or f"20261101_004/{uuid4().hex}"
        (self.home / img_dir / "Img").mkdir(parents=True, exist_ok=True)
        for number in range(images):
            (self.home / img_dir / "Img" / f"{number}.tif").write_bytes(tiff(os.urandom(2000)))
        return img_dir

    def announce(self, event: ImagingEvent) -> str:
        """Write an event file; returns its path below the system's directory."""
        event_file = f"events/{uuid4().hex}.json"
        (self.home / event_file).write_text(json.dumps(event.document()))
        return event_file

    def upload(self, timestep: Ingested, *, archive: bool = True, record: bool = True) -> Uploaded:
        uploaded = upload(timestep, self.settings, self.store, self.log)
        self.log.append(LogEvent.of(uploaded, "test"))
        if archive:
            self.archive(timestep)
        if record:
            self.record()
        return uploaded

    def archive(self, timestep: Ingested) -> None:
        """The tape archive tells that it has what is in the bucket now."""
        notice = Archived(
            timestep_id=None, job_id=uuid4(), date=date(2026, 11, 24), archive="/tape/1.tar", key=timestep.event.key
        )
        self.log.append(LogEvent.of(notice, "test"))

    def arrived(self, **fields: Any) -> Ingested:
        timestep = self.drop(**fields)
        self.upload(timestep)
        return timestep

    def record(self) -> None:
        record_waiting(self.log, self.engine, "state-manager", limit=100, linger_seconds=0.001)

    def stage(self, timestep: Ingested) -> Path:
        """Copy it to staging, as its ingestion does."""
        source = self.home / timestep.event.img_dir
        return self.staging.stage(timestep.system, timestep.timestep_id, source, timestep.digest)

    def purge(self, *, do_it: bool = True, run_id: UUID | None = None, **policy: Any) -> list[Outcome]:
        system = self.system.model_copy(update=policy)
        timesteps = PurgeableTimesteps(self.engine)
        outcomes = list(SourcePurge(system, timesteps, self.store, self.log, do_it=do_it, run_id=run_id).run())
        self.record()
        return outcomes

    def purge_staging(self, *, do_it: bool = True, **policy: Any) -> list[Outcome]:
        system = self.system.model_copy(update={"staging_retention_hours": 0, **policy})
        timesteps = PurgeableTimesteps(self.engine)
        outcomes = list(StagingPurge(system, timesteps, self.store, self.log, self.staging, do_it=do_it).run())
        self.record()
        return outcomes

    @property
    def staging(self) -> Staging:
        return Staging.from_settings(self.settings)

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


# --- what may happen to a timestep


def image_of(lab: Lab, timestep: Ingested, number: int = 1) -> Path:
    return lab.home / timestep.event.img_dir / "Img" / f"{number}.tif"


def overwrite_object(lab: Lab, timestep: Ingested) -> None:
    """Another object of the same size, which says that it is the same."""
    key, client = timestep.event.key, lab.store.client
    found = client.get_object(Bucket=lab.store.bucket_name, Key=key)
    content = bytearray(found["Body"].read())
    content[len(content) // 2] ^= 1
    client.put_object(Bucket=lab.store.bucket_name, Key=key, Body=bytes(content), Metadata=found["Metadata"])
