"""Copies in staging: whole or not there, within their budget, and gone once they are uploaded."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine
from sqlmodel import Session, select

from blocks import staging as staging_module
from blocks.bundle import Bundle, BundleError, SourceChanged
from blocks.event_file import InvalidEventFile
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.messages import Ingested, LogEvent, StagingPurged
from blocks.object_store import ObjectStore
from blocks.purgeable import PurgeableTimesteps
from blocks.settings import Settings
from blocks.staging import CopyOfAnother, NeverFits, Staging, StagingFull
from blocks.tables import Timestep, TimestepEvent
from flows.purge_staging import StagingPurge
from flows.record import record_waiting
from flows.upload import upload
from tests.events import announced, ingested
from tests.images import make_images


class KilledError(BaseException):
    """The process ends here."""


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "staging")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_images(tmp_path / "source", [3000, 2 << 20, 0, 5])


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def found(staging: Staging, timestep_id: UUID, source: Path) -> Path | None:
    copy = staging.find("prince", timestep_id, source)
    return copy.directory if copy else None


def test_a_copy_has_the_same_content_and_gives_the_same_bundle(staging: Staging, source: Path) -> None:
    timestep_id = uuid4()
    copy = staging.stage("prince", timestep_id, source)
    assert contents(copy) == contents(source)
    assert Bundle.of(copy, b"{}").layout_digest == Bundle.of(source, b"{}").layout_digest
    assert found(staging, timestep_id, source) == copy
    assert staging.copies("prince") == [timestep_id]
    assert staging.used() == sum(map(len, contents(source).values()))
    shutil.rmtree(source)
    assert staging.stage("prince", timestep_id, source) == copy


@pytest.mark.parametrize("crash_at", range(8))
def test_a_copy_that_is_killed_is_not_there_and_the_next_one_is_whole(
    staging: Staging, source: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timestep_id, left, fsync = uuid4(), iter(range(crash_at)), os.fsync

    def dying(descriptor: int) -> None:
        if next(left, None) is None:
            raise KilledError
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", dying)
        # What a killed process can't do either.
        patch.setattr(shutil, "rmtree", lambda *_args, **_options: None)
        with pytest.raises(KilledError):
            staging.stage("prince", timestep_id, source)
    if (copy := found(staging, timestep_id, source)) is not None:
        assert contents(copy) == contents(source)
    assert contents(staging.stage("prince", timestep_id, source)) == contents(source)
    assert staging.reserved() == 0


def test_a_source_that_changes_while_it_is_copied_leaves_no_copy(
    staging: Staging, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    utime = os.utime

    def meanwhile(path: Path, *rest: Any, **options: Any) -> None:
        (source / "Img" / "Img_r01_c00.tif").write_bytes(b"other")
        utime(path, *rest, **options)

    monkeypatch.setattr(os, "utime", meanwhile)
    timestep_id = uuid4()
    with pytest.raises(SourceChanged):
        staging.stage("prince", timestep_id, source)
    assert staging.find("prince", timestep_id, source) is None
    assert staging.used() + staging.reserved() == 0


def test_what_a_copy_consists_of_is_on_disk_before_the_copy_is_there(
    staging: Staging, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timestep_id = uuid4()
    home = staging.home("prince")
    synced: list[tuple[str, int, bool]] = []
    fsync = os.fsync

    def remember(descriptor: int) -> None:
        path, status = Path(f"/proc/self/fd/{descriptor}").readlink(), os.fstat(descriptor)
        size = status.st_size if path.is_file() else 0
        name = str(path.relative_to(home)) if path.is_relative_to(home) else str(path.relative_to(home.parent.parent))
        synced.append((name, size, (home / timestep_id.hex).exists()))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", remember)
    staging.stage("prince", timestep_id, source)
    partial = f".{timestep_id.hex}.partial"
    before = {(path, size) for path, size, is_there in synced if not is_there}
    assert {(f"{partial}/files/{name}", len(content)) for name, content in contents(source).items()} <= before
    assert {(f"{partial}/files/Img", 0), (f"{partial}/files", 0)} <= before
    assert (f".{timestep_id.hex}.json.new", (home / f"{timestep_id.hex}.json").stat().st_size) in before
    # The directory of its system, which is new.
    assert ("staging", 0, False) in synced
    # That it was renamed as well, before anybody is told.
    assert synced[-1] == (".", 0, True)


def test_a_damaged_copy_is_passed_over_and_kept_until_it_is_replaced(staging: Staging, source: Path) -> None:
    damages: list[Callable[[Path], object]] = [
        lambda copy: (copy / "Img" / "Img_r00_c00.tif").write_bytes(bytes(3000)),
        lambda copy: (copy / "Img" / "Img_r00_c00.tif").unlink(),
        lambda copy: (copy / "more").touch(),
        lambda copy: (copy / "link").symlink_to("/etc/passwd"),
    ]
    for damage in damages:
        timestep_id = uuid4()
        copy = staging.stage("prince", timestep_id, source)
        damage(copy)
        # Of an attempt that died while it replaced a copy.
        (copy.with_name(f".{timestep_id.hex}.damaged") / "Img").mkdir(parents=True)
        assert staging.find("prince", timestep_id, source) is None
        assert copy.exists()
        staging.used()
        assert staging.stage("prince", timestep_id, source) == copy
        assert contents(copy) == contents(source)
        assert [path.name for path in copy.parent.glob(f".{timestep_id.hex}*")] == []


def test_a_damaged_copy_is_all_that_is_left_and_stays(staging: Staging, source: Path) -> None:
    timestep_id = uuid4()
    copy = staging.stage("prince", timestep_id, source)
    shutil.rmtree(source)
    (copy / "more").touch()
    with pytest.raises(BundleError):
        staging.stage("prince", timestep_id, source)
    (copy / "more").unlink()
    assert found(staging, timestep_id, source) == copy


def test_a_copy_that_can_not_be_read_is_not_judged(
    staging: Staging, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timestep_id = uuid4()
    copy = staging.stage("prince", timestep_id, source)

    def failing(*_args: Any, **_options: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    for call in ("scandir", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            with pytest.raises(OSError, match="Too many open files"):
                staging.find("prince", timestep_id, source)
    assert found(staging, timestep_id, source) == copy


def test_a_copy_of_a_source_that_was_repaired_since_is_stale(staging: Staging, source: Path) -> None:
    timestep_id = uuid4()
    copy = staging.stage("prince", timestep_id, source)
    (source / "Img" / "Img_r00_c00.tif").write_bytes(b"repaired".ljust(3000))
    assert staging.find("prince", timestep_id, source) is None
    assert contents(staging.stage("prince", timestep_id, source)) == contents(source)
    (source / "Img" / "Img_r00_c00.tif").unlink()  # what is being cleaned away is no matter
    assert found(staging, timestep_id, source) == copy


def test_copies_made_at_the_same_time_respect_the_budget(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(map(len, contents(source).values()))
    staging = Staging(tmp_path / "staging", budget=3 * size + 1)
    reserved = Staging.reserved

    def count_slowly(staging: Staging) -> int:
        found = reserved(staging)
        time.sleep(0.05)  # enough for all others, if they could come between
        return found

    monkeypatch.setattr(Staging, "reserved", count_slowly)

    def stage(timestep_id: UUID) -> bool:
        try:
            staging.stage("prince", timestep_id, source)
        except StagingFull:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        done = list(threads.map(stage, [uuid4() for _ in range(8)]))
    assert sum(done) == 3
    assert staging.used() == 3 * size


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "archiver-test", str(place)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


def test_the_disk_is_never_filled(small_disk: Path, source: Path) -> None:
    staging = Staging(small_disk / "staging")
    reserve = shutil.disk_usage(small_disk).total // 20

    def stage(timestep_id: UUID) -> str:
        try:
            staging.stage("prince", timestep_id, source)
        except StagingFull as error:
            return str(error)
        return ""

    # Several at once, so that what is reserved has to count too.
    with ThreadPoolExecutor(4) as threads:
        said = list(threads.map(stage, [uuid4() for _ in range(12)]))
    assert all("would not leave enough" in one for one in said if one)
    while not stage(uuid4()):
        pass
    assert len(staging.copies("prince")) == 7  # of 2 MiB and a bit
    assert shutil.disk_usage(small_disk).free >= reserve
    # What somebody else writes there counts as well, and what is deleted makes room.
    shutil.rmtree(staging.home("prince") / staging.copies("prince")[0].hex)
    (small_disk / "other").write_bytes(bytes(2 << 20))
    assert "would not leave enough" in stage(uuid4())
    (small_disk / "other").unlink()
    assert stage(uuid4()) == ""


def test_a_source_that_is_about_to_run_full_is_staged_where_policy_says_auto(small_disk: Path) -> None:
    (small_disk / "prince" / "events").mkdir(parents=True)
    system = ImagingSystem(name="prince", root=small_disk, staging="auto")
    assert not system.is_staged
    (small_disk / "prince" / "image.tif").write_bytes(bytes(15 << 20))
    assert system.is_staged
    assert not system.model_copy(update={"staging": "never"}).is_staged
    (small_disk / "prince" / "image.tif").unlink()
    assert not system.is_staged
    assert system.model_copy(update={"staging": "always"}).is_staged


def test_what_would_not_even_fit_into_an_empty_staging_is_not_waited_for(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NeverFits):
        Staging(tmp_path / "staging", budget=1000).stage("prince", uuid4(), source)
    monkeypatch.setattr(staging_module, "_RESERVE", 1.0)
    with pytest.raises(NeverFits):
        Staging(tmp_path / "staging").stage("prince", uuid4(), source)


def test_a_copy_of_what_another_event_announced_is_neither_used_nor_replaced(staging: Staging, source: Path) -> None:
    timestep_id, other = uuid4(), make_images(source.with_name("other"), [3000, 2 << 20, 0, 5])
    copy = staging.stage("prince", timestep_id, source, "this one")
    before = contents(copy)
    for place in (other, source.with_name("gone")):
        assert staging.find("prince", timestep_id, place, "the other one") is None
        with pytest.raises(CopyOfAnother, match=f"is the copy of {source}"):
            staging.stage("prince", timestep_id, place, "the other one")
    (copy / "more").touch()
    with pytest.raises(CopyOfAnother):
        staging.stage("prince", timestep_id, other, "the other one")
    (copy / "more").unlink()
    shutil.rmtree(source)
    sound = staging.find("prince", timestep_id, source, "this one")
    assert sound
    assert contents(sound.directory) == before


def test_a_copy_of_an_older_release_serves_whoever_asks(staging: Staging, source: Path) -> None:
    timestep_id = uuid4()
    copy = staging.stage("prince", timestep_id, source)
    record = copy.with_name(f"{timestep_id.hex}.json")
    record.write_text(json.dumps(json.loads(record.read_text())["files"]))
    found = staging.find("prince", timestep_id, source, "what was announced")
    assert found
    assert found.directory == copy


def test_a_copy_that_holds_what_its_source_has_lost_is_set_aside_and_stays(staging: Staging, source: Path) -> None:
    timestep_id, image, lost = uuid4(), "Img/Img_r00_c00.tif", "Img/Img_r01_c00.tif"
    copy = staging.stage("prince", timestep_id, source)
    before = contents(copy)
    (copy / "more").touch()
    (source / lost).unlink()
    staging.stage("prince", timestep_id, source)
    (aside,) = staging.replaced("prince")
    assert before.items() <= contents(aside).items()
    assert staging.used() == sum(map(len, [*before.values(), *contents(source).values()]))
    # Altered at the source, so that nobody else has what was copied first; and once more.
    for content in (b"altered".ljust(3000), b"again".ljust(3000)):
        (source / image).write_bytes(content)
        staging.stage("prince", timestep_id, source)
    kept = staging.replaced("prince")
    assert len(kept) == 3
    assert before[image] in [contents(path).get(image) for path in kept]
    staging.clean("prince", older_than=0)
    assert staging.replaced("prince") == kept
    # Somebody has a part of it, and at last all of it.
    hashes = [hashlib.sha256(content).hexdigest() for path in kept for content in contents(path).values()]
    staging.drop_replaced("prince", timestep_id, hashes[:1])
    assert staging.replaced("prince") == kept
    staging.drop_replaced("prince", timestep_id, hashes)
    assert staging.replaced("prince") == []
    assert sorted(path.name for path in copy.parent.iterdir()) == [timestep_id.hex, f"{timestep_id.hex}.json"]


@pytest.mark.parametrize("crash_at", range(4))
def test_a_damaged_copy_is_there_until_the_new_one_is_whole_whenever_that_dies(
    staging: Staging, source: Path, crash_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    timestep_id = uuid4()
    copy = staging.stage("prince", timestep_id, source)
    (copy / "more").touch()
    left, rename = iter(range(crash_at)), Path.rename

    def dying(path: Path, target: Path) -> Path:
        if next(left, None) is None:
            raise KilledError
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(KilledError):
            staging.stage("prince", timestep_id, source)
    assert [path for path in copy.parent.iterdir() if (path / "more").exists()]
    assert contents(staging.stage("prince", timestep_id, source)) == contents(source)


def test_what_died_is_cleaned_up_after_a_while(staging: Staging, source: Path) -> None:
    timestep_id = uuid4()
    copy = staging.stage("prince", timestep_id, source)
    partial = copy.with_name(f".{uuid4().hex}.partial")
    (partial / "files").mkdir(parents=True)
    orphan = copy.with_name(f"{uuid4().hex}.json")
    orphan.write_text("{}")
    # Long under way, and still written to.
    (partial / "files" / "image.tif").touch()
    os.utime(partial / "files", (0, 0))
    os.utime(partial, (0, 0))
    staging.clean("prince", older_than=60)
    assert partial.exists()
    time.sleep(0.01)
    staging.clean("prince", older_than=0)
    assert not partial.exists()
    assert not orphan.exists()
    assert found(staging, timestep_id, source) == copy


# --- from the copy into the bucket, and away


@pytest.fixture
def timestep(settings: Settings, event_log: EventLog) -> Ingested:
    """A timestep of two images, as it was taken in."""
    assert settings.data_dir is not None
    make_images(settings.data_dir / "prince" / "t1", [3000, 4000])
    (settings.data_dir / "prince" / "events").mkdir()
    timestep = ingested(announced(img_dir="t1"))
    event_log.append(LogEvent.of(timestep, "test"))
    return timestep


def test_the_upload_reads_the_copy_where_it_is_sound_and_the_source_where_not(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, timestep: Ingested
) -> None:
    assert settings.data_dir is not None
    source = settings.data_dir / "prince" / "t1"
    copy = Staging.from_settings(settings).stage("prince", timestep.timestep_id, source)
    (copy / "Img" / "Img_r00_c00.tif").write_bytes(bytes(3000))
    from_source = upload(timestep, settings, object_store, event_log)
    object_store.client.delete_object(Bucket=object_store.bucket_name, Key=timestep.event.key)

    Staging.from_settings(settings).stage("prince", timestep.timestep_id, source)
    shutil.rmtree(source)
    from_copy = upload(timestep, settings, object_store, event_log)
    assert (from_copy.sha256, from_copy.layout_digest) == (from_source.sha256, from_source.layout_digest)


def test_a_copy_without_the_announced_images_is_passed_over(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, timestep: Ingested
) -> None:
    assert settings.data_dir is not None
    source = settings.data_dir / "prince" / "t1"
    staging = Staging.from_settings(settings)
    for sizes in ([3000], [3000, 4000, 5]):
        shutil.rmtree(source)
        make_images(source, sizes)
        copy = staging.stage("prince", timestep.timestep_id, source, timestep.digest)
        shutil.rmtree(source)
        with pytest.raises(InvalidEventFile, match="can't be read"):
            upload(timestep, settings, object_store, event_log)
        make_images(source, sizes)
        shutil.rmtree(copy)
    # With the one more that was accepted.
    copy = staging.stage("prince", timestep.timestep_id, source, timestep.digest)
    shutil.rmtree(source)
    warned = timestep.model_copy(update={"warnings": ["one more"]})
    assert len(upload(warned, settings, object_store, event_log).images) == 3


def test_a_bit_that_flips_after_the_copy_was_found_is_not_uploaded(
    settings: Settings,
    object_store: ObjectStore,
    event_log: EventLog,
    timestep: Ingested,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert settings.data_dir is not None
    Staging.from_settings(settings).stage("prince", timestep.timestep_id, settings.data_dir / "prince" / "t1")
    find = Staging.find

    def flipping(staging: Staging, *which: Any) -> Any:
        if copy := find(staging, *which):
            image = copy.directory / "Img" / "Img_r00_c00.tif"
            mtime, content = image.stat().st_mtime_ns, bytearray(image.read_bytes())
            content[100] ^= 1
            image.write_bytes(content)
            os.utime(image, ns=(mtime, mtime))
        return copy

    with monkeypatch.context() as patch:
        patch.setattr(Staging, "find", flipping)
        with pytest.raises(SourceChanged, match="with another content"):
            upload(timestep, settings, object_store, event_log)
    assert object_store.head(timestep.event.key) is None
    # The next attempt passes the copy over.
    assert upload(timestep, settings, object_store, event_log).copy_state is None


def test_a_copy_goes_once_its_upload_is_proven(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, engine: Engine, timestep: Ingested
) -> None:
    assert settings.data_dir is not None
    staging = Staging.from_settings(settings)
    source = settings.data_dir / "prince" / "t1"
    copy = staging.stage("prince", timestep.timestep_id, source)

    def purge(hours: float = 0.0) -> list[str]:
        record_waiting(event_log, engine, "state-manager", limit=100, linger_seconds=0.001)
        system = ImagingSystem(name="prince", root=settings.data_dir, staging_retention_hours=hours)
        pass_ = StagingPurge(system, PurgeableTimesteps(engine), object_store, event_log, staging, do_it=True)
        return [outcome.kept for outcome in pass_.run()]

    unknown = staging.stage("prince", uuid4(), source)
    assert purge() == []
    assert unknown.exists()
    shutil.rmtree(unknown)
    staging.forget("prince", UUID(unknown.name))
    event_log.append(LogEvent.of(upload(timestep, settings, object_store, event_log), "test"))
    assert purge(hours=1) == []
    content = object_store.client.get_object(Bucket=object_store.bucket_name, Key=timestep.event.key)
    object_store.client.delete_object(Bucket=object_store.bucket_name, Key=timestep.event.key)
    (kept,) = purge()
    assert "is gone from the bucket" in kept
    assert copy.exists()
    object_store.client.put_object(
        Bucket=object_store.bucket_name,
        Key=timestep.event.key,
        Body=content["Body"].read(),
        Metadata=content["Metadata"],
    )
    assert purge() == [""]
    assert contents(staging.home("prince")) == {}
    assert len(contents(source)) == 2
    assert purge() == []
    with Session(engine) as session:
        assert session.exec(select(Timestep.staging_purged_at)).one() is not None
        said = session.exec(select(TimestepEvent.type)).all()
    assert said.count(StagingPurged.type) == 1
