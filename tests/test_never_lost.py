"""Whatever happens, no image is deleted that can't be fetched from the bucket at that moment."""

import hashlib
import multiprocessing
import os
import shutil
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from sqlmodel import Session, select

from blocks import source_file
from blocks.bundle import BundleError
from blocks.event_file import ImagingEvent, InvalidEventFile
from blocks.imaging_system import ImagesMissing, ImagingSystem
from blocks.messages import Ingested, SourcePurged
from blocks.object_errors import ObjectStoreError
from blocks.settings import Settings
from blocks.staging import CopyOfAnother
from blocks.tables import TimestepEvent
from flows.outcome import identify, take_in
from flows.purge import purge
from tests.images import alter, tiff
from tests.purging import KilledError, Lab, image_of, overwrite_object

pytest_plugins = ["tests.purging"]
pytestmark = pytest.mark.long

DEEDS = [
    "purge",
    "purge",
    "killed-purge",
    "purge-staging",
    "killed-purge-staging",
    "arrive",
    "arrive-staged",
    "arrive-staged-and-altered-meanwhile",
    "stage",
    "killed-stage",
    "announce-same-dir",
    "announce-id-with-other-dir",
    "upload-without-source",
    "upload-again",
    "upload-again-unarchived",
    "upload-again-unrecorded",
    "archive",
    "object-gone",
    "object-overwritten",
    "altered",
    "replaced",
    "longer",
    "removed",
    "added",
    "linked",
    "copy-altered",
    "event-file-rewritten",
]

# What a person, or a failing disk, may do: what is gone then is no loss of ours.
TAMPERING = {
    "object-gone",
    "object-overwritten",
    "altered",
    "replaced",
    "longer",
    "removed",
    "linked",
    "copy-altered",
}

REFUSALS = (ImagesMissing, InvalidEventFile, BundleError, ObjectStoreError, CopyOfAnother)


@hypothesis_settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    deeds=st.lists(st.tuples(st.sampled_from(DEEDS), st.integers(0, 5)), max_size=12),
    compares=st.sampled_from(["state", "content"]),
    needs_tape=st.booleans(),
    fresh=st.sampled_from([0, 1]),
)
def test_no_image_is_ever_deleted_that_can_not_be_fetched_at_that_moment(
    make_lab: Callable[[], Lab],
    deeds: list[tuple[str, int]],
    compares: str,
    needs_tape: bool,
    fresh: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With 0, the state of files that are as old as the upload decides; with 1, their content.
    monkeypatch.setattr(source_file, "FRESH_SECONDS", fresh)
    history = History(make_lab(), {"purge_compares": compares, "purge_needs_tape": needs_tape})
    history.arrive()
    history.arrive()
    for deed, number in [*deeds, ("purge", 0), ("purge-staging", 0)]:
        history.do(deed, number)


class History:
    """What happens to one system: its timesteps, and what tape archives got of each."""

    def __init__(self, lab: Lab, policy: dict[str, Any]) -> None:
        self._lab = lab
        self._policy = policy
        self._timesteps: list[Ingested] = []
        self._on_tape: dict[UUID, set[str]] = {}
        self._seen_in: defaultdict[str, set[str]] = defaultdict(set)

    def arrive(self, *, staged: bool = False, altered: bool = False) -> None:
        timestep = self._lab.drop()
        self._see(timestep)
        if staged:
            self._stage(timestep)
        if altered:
            alter(image_of(self._lab, timestep))
        self._timesteps.append(timestep)
        self._upload(timestep)

    def do(self, deed: str, number: int) -> None:
        """Do a deed, and make sure that it lost no image, unless it was a person who took it."""
        before = self._files()
        self._do(deed, number)
        for timestep in self._timesteps:
            self._see(timestep)
        if deed not in TAMPERING:
            self._check(before, at_source=deed in ("purge", "killed-purge"))

    def _do(self, deed: str, number: int) -> None:
        lab, timestep = self._lab, self._timesteps[number % len(self._timesteps)]
        image = image_of(lab, timestep, number % 3)
        copied = self._copy(timestep) / image.relative_to(lab.home / timestep.event.img_dir)
        match deed:
            case "purge" | "purge-staging":
                self._purge(deed == "purge-staging", None)
            case "killed-purge" | "killed-purge-staging":
                self._purge(deed == "killed-purge-staging", number)
            case "arrive" | "arrive-staged" | "arrive-staged-and-altered-meanwhile":
                self.arrive(staged=deed != "arrive", altered="altered" in deed)
            case "stage":
                with suppress(*REFUSALS):
                    self._stage(timestep)
            case "killed-stage":
                with killed_after(2 * number), suppress(*REFUSALS, KilledError):
                    self._stage(timestep)
            case "announce-same-dir":
                self._announce(timestep.event.model_copy(update={"timestep_id": uuid4()}))
            case "announce-id-with-other-dir":
                img_dir = lab.put_images()
                self._announce(timestep.event.model_copy(update={"img_dir": img_dir}))
            case "upload-without-source" if (source := lab.home / timestep.event.img_dir).is_dir():
                lab.store.client.delete_object(Bucket=lab.store.bucket_name, Key=timestep.event.key)
                source.rename(lab.home / "away")
                self._upload(timestep)
                (lab.home / "away").rename(source)
            case "upload-again":
                self._upload(timestep)
            case "upload-again-unarchived":
                self._upload(timestep, archive=False)
            case "upload-again-unrecorded":
                self._upload(timestep, archive=False, record=False)
            case "archive" if lab.in_bucket(timestep):
                self._archive(timestep)
            case "object-gone":
                lab.store.client.delete_object(Bucket=lab.store.bucket_name, Key=timestep.event.key)
            case "object-overwritten" if lab.in_bucket(timestep):
                overwrite_object(lab, timestep)
            case "altered" if image.is_file():
                alter(image)
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
            case "copy-altered" if copied.is_file():
                alter(copied)
            case "event-file-rewritten":
                (lab.home / timestep.event_file).write_text("{}")

    def _copy(self, timestep: Ingested) -> Path:
        return self._lab.staging.home(timestep.system) / timestep.timestep_id.hex

    def _stage(self, timestep: Ingested) -> None:
        self._lab.stage(timestep)

    def _announce(self, event: ImagingEvent) -> None:
        """By an event file of its own, of a system that stages: as its ingestion does it."""
        system, log = self._lab.system, self._lab.log
        event_file = self._lab.announce(event)
        with suppress(*REFUSALS):
            timestep = identify(system, event_file, event, log)
            self._lab.stage(timestep)
            self._timesteps.append(take_in(system, event_file, event, system.fingerprint(event_file), log))

    def _archive(self, timestep: Ingested) -> None:
        self._lab.archive(timestep)
        self._lab.record()
        self._on_tape[timestep.timestep_id] = self._lab.in_bucket(timestep)

    def _upload(self, timestep: Ingested, *, archive: bool = True, record: bool = True) -> None:
        seen = self._see(timestep)
        with suppress(*REFUSALS):
            uploaded = self._lab.upload(timestep, archive=False, record=record)
            assert {image.sha256 for image in uploaded.images if image.name.endswith("tif")} <= seen, "foreign images"
            if archive:
                self._archive(timestep)

    def _see(self, timestep: Ingested) -> set[str]:
        """What was ever in its directory."""
        images = (self._lab.home / timestep.event.img_dir).rglob("*.tif")
        self._seen_in[timestep.event.img_dir] |= {_hash(path.read_bytes()) for path in images if path.is_file()}
        return self._seen_in[timestep.event.img_dir]

    def _files(self) -> dict[Path, bytes]:
        """Every image, at the source and in staging."""
        homes = [self._lab.home, self._lab.staging.home(self._lab.system.name)]
        files = [path for home in homes for path in home.rglob("*.tif") if path.is_file() and not path.is_symlink()]
        return {path: path.read_bytes() for path in files if ".partial" not in str(path)}

    def _purge(self, staging: bool, killed_after: int | None) -> None:
        calls = iter(range(killed_after)) if killed_after is not None else None
        os_unlink = os.unlink

        def unlink(*args: Any, **options: Any) -> None:
            if calls is not None and next(calls, None) is None:
                raise KilledError
            os_unlink(*args, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "unlink", unlink)
            try:
                (self._lab.purge_staging if staging else self._lab.purge)(**self._policy)
            except KilledError:
                self._lab.record()

    def _check(self, before: dict[Path, bytes], *, at_source: bool) -> None:
        after = self._files()
        images = set[str]().union(*self._seen_in.values())
        left = {_hash(content) for content in after.values()}
        fetched = {one.timestep_id: self._lab.in_bucket(one) for one in self._timesteps}
        for path, content in before.items():
            sha256 = _hash(content)
            if after.get(path) == content or sha256 not in images:
                continue  # it is there, or was no image, but what became of a copy
            at = [one for one in self._timesteps if path.is_relative_to(self._lab.home / one.event.img_dir)]
            if not at:
                ids = [one.timestep_id for one in self._timesteps if one.timestep_id.hex in str(path)]
                assert sha256 in left or any(sha256 in fetched[id] for id in ids), f"{path} is lost"
                continue
            assert at_source, f"{path} was taken"
            assert any(sha256 in fetched[one.timestep_id] for one in at), f"{path} is lost"
            if self._policy["purge_needs_tape"]:
                on_tape = set[str]().union(*(self._on_tape.get(one.timestep_id, set()) for one in at))
                assert sha256 in on_tape, f"{path} is not on tape"


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def killed_after(steps: int) -> Iterator[None]:
    """The process ends after so many things that it made durable or renamed, and then does nothing more."""
    left, fsync, rename, rmtree = iter(range(steps)), os.fsync, Path.rename, shutil.rmtree
    is_killed = False

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def do(*args: Any) -> Any:
            nonlocal is_killed
            if next(left, None) is None:
                is_killed = True
                raise KilledError
            return call(*args)

        return do

    def remove(*args: Any, **options: Any) -> None:
        if not is_killed:
            rmtree(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", counted(fsync))
        patch.setattr(Path, "rename", counted(rename))
        patch.setattr(shutil, "rmtree", remove)
        yield


def test_a_purge_that_is_really_killed_loses_nothing_and_goes_on(lab: Lab) -> None:
    timesteps = [lab.arrived(images=30) for _ in range(4)]
    before = lab.files()
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["flows.purge"])
    kills = 0
    for left in (120, 95, 62, 31, 30, 1, 0):
        process = processes.Process(target=_purge_for_real, args=(lab.settings, lab.system.name))
        process.start()
        deadline = time.monotonic() + 60
        while process.is_alive() and _count(lab.home) > left and time.monotonic() < deadline:
            time.sleep(0.001)
        if left and process.is_alive():
            os.kill(cast(int, process.pid), signal.SIGKILL)
        process.join(60)
        kills += process.exitcode == -signal.SIGKILL
        gone = before.keys() - lab.files().keys()
        for timestep in timesteps:
            in_bucket = lab.in_bucket(timestep)
            for name in (name for name in gone if name.startswith(timestep.event.img_dir)):
                assert hashlib.sha256(before[name]).hexdigest() in in_bucket
        # As after half a minute, when what the killed process held has run out.
        for lease in lab.log.redis.scan_iter(f"{lab.log.stream}:lease:*"):
            lab.log.redis.delete(lease)
    lab.record()
    assert kills >= 3
    assert lab.files() == {}
    with Session(lab.engine) as session:
        said = session.exec(select(TimestepEvent.data).where(TimestepEvent.type == SourcePurged.type)).all()
    assert {one["timestep_id"]: one["files"] for one in said} == {str(one.timestep_id): 31 for one in timesteps}


def _count(directory: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(directory))


def _purge_for_real(settings: Settings, system: str) -> None:
    source = ImagingSystem(name=system, root=cast(Path, settings.data_dir), source_retention_days=0)
    purge(settings, [source], [], lambda _: None, do_it=True)
