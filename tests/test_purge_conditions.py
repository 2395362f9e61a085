"""Each condition of a purge by itself: what it alone keeps from being deleted."""

import asyncio
import errno
import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr
from sqlalchemy import or_, update
from sqlmodel import Session, col
from typer.testing import CliRunner

from blocks import mounts
from blocks.deletion import delete_empty_directories, delete_files
from blocks.imaging_system import ImagingSystem
from blocks.lease import Lease, LeaseLost
from blocks.messages import Archived, EventData, Ingested
from blocks.purgeable import PurgeableTimesteps
from blocks.settings import Settings
from blocks.source_file import find_sources
from blocks.tables import Timestep, TimestepEvent, TimestepImage
from flows import cli
from flows.outcome import take_in
from flows.purge import SourcePurge, configured_systems, staged_systems
from flows.upload import lease_name
from tests.images import alter
from tests.purging import Lab, image_of

pytest_plugins = ["tests.purging"]


def _set(lab: Lab, **values: Any) -> None:
    with Session(lab.engine) as session, session.begin():
        session.execute(update(Timestep).values(**values))


def _lose_lease_after(patch: pytest.MonkeyPatch, checks: int) -> None:
    left = iter(range(checks))

    def lost(_: Lease) -> None:
        if next(left, None) is None:
            raise LeaseLost("another process may have it")

    patch.setattr(Lease, "check", lost)


def _names(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


# --- which systems, and whether at all


def test_on_the_command_line_nothing_is_deleted_unless_that_is_said(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    timestep = lab.drop()
    copy = lab.stage(timestep)
    lab.upload(timestep)
    before = lab.files()
    system = lab.system.model_copy(update={"staging_retention_hours": 0})

    async def systems(*_which: object) -> list[ImagingSystem]:
        return [system]

    monkeypatch.setattr("flows.purge.configured_systems", systems)
    monkeypatch.setattr("flows.purge.staged_systems", systems)
    monkeypatch.setattr(cli, "get_settings", lambda: lab.settings)
    told = CliRunner().invoke(cli.app, ["purge"])
    assert told.exit_code == 0, told.output
    assert "would delete 7 files" in told.output
    assert lab.files() == before
    assert len(_names(copy)) == 3
    told = CliRunner().invoke(cli.app, ["purge", "--do-it"])
    assert "deleted 7 files" in told.output
    assert lab.files() == {}
    assert not copy.exists()


def test_who_asks_for_one_system_gets_that_one(
    lab: Lab, make_lab: Callable[[], Lab], monkeypatch: pytest.MonkeyPatch
) -> None:
    for one in (lab, make_lab()):
        one.stage(one.drop())

    async def configured(name: str, root: Path) -> ImagingSystem:
        return ImagingSystem(name=name, root=root)

    monkeypatch.setattr(ImagingSystem, "configured", configured)
    settings: Settings = lab.settings.model_copy(update={"prefect_api_url": SecretStr("http://127.0.0.1:1/api")})
    for find in (configured_systems, staged_systems):
        assert len(asyncio.run(find(settings))) == 2
        assert [system.name for system in asyncio.run(find(settings, lab.system.name))] == [lab.system.name]


def test_a_dry_run_tells_of_copies_and_leaves_them(lab: Lab) -> None:
    timestep = lab.drop()
    copy = lab.stage(timestep)
    lab.upload(timestep)
    assert [(outcome.files, outcome.kept) for outcome in lab.purge_staging(do_it=False)] == [(3, "")]
    assert len(_names(copy)) == 3
    assert [(outcome.files, outcome.kept) for outcome in lab.purge_staging()] == [(3, "")]
    assert not copy.exists()


def test_what_is_left_of_copies_goes_after_a_day_and_not_in_a_dry_run(lab: Lab) -> None:
    home = lab.staging.home(lab.system.name)
    old, young = (home / f".{uuid4().hex}.partial" for _ in range(2))
    for partial, hours in ((old, 24.1), (young, 23.9)):
        partial.mkdir(parents=True)
        os.utime(partial, times=(time.time() - hours * 3600,) * 2)
    lab.purge_staging(do_it=False)
    assert old.exists()
    lab.purge_staging()
    assert not old.exists()
    assert young.exists()


# --- who else has to do with it


def test_two_timesteps_of_the_same_images_keep_them(lab: Lab) -> None:
    timestep = lab.arrived()
    event = timestep.event.model_copy(update={"timestep_id": uuid4()})
    event_file = lab.announce(event)
    again = take_in(lab.system, event_file, event, lab.system.fingerprint(event_file), lab.log)
    lab.record()
    (outcome,) = lab.purge()
    assert outcome.kept == f"timestep {again.timestep_id} has its images in {event.img_dir} too"


def test_the_tape_copy_of_another_timestep_is_none(lab: Lab) -> None:
    timestep, other = lab.drop(), lab.drop()
    for one in (timestep, other):
        lab.upload(one, archive=False)
    lab.archive(other)
    lab.record()
    _set(lab, archived_at=datetime.now(UTC) - timedelta(days=1))
    kept = sorted(outcome.kept for outcome in lab.purge())
    assert kept == ["", "it is not known to be on tape"]
    assert image_of(lab, timestep).exists()
    assert not image_of(lab, other).exists()


def test_a_notice_from_before_its_object_was_known_to_be_on_tape_is_about_another(lab: Lab) -> None:
    lab.arrived()
    _set(lab, archived_at=datetime.now(UTC) + timedelta(days=1))
    (outcome,) = lab.purge()
    assert outcome.kept == "it is not known to be on tape"


def test_a_copy_that_somebody_may_be_reading_stays(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    timestep = lab.drop()
    copy = lab.stage(timestep)
    lab.upload(timestep)
    lease = lease_name(lab.log, timestep.event.key)
    lab.log.redis.set(lease, "somebody", ex=60)
    (outcome,) = lab.purge_staging()
    assert "held by another process" in outcome.kept
    assert len(_names(copy)) == 3
    lab.log.redis.delete(lease)
    with monkeypatch.context() as patch:
        _lose_lease_after(patch, 1)
        (outcome,) = lab.purge_staging()
    assert "another process may have it" in outcome.kept
    assert len(_names(copy)) == 2


def test_who_lost_the_lease_leaves_the_event_file(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    timestep = lab.arrived()
    _lose_lease_after(monkeypatch, 3)
    (outcome,) = lab.purge()
    assert "another process may have it" in outcome.kept
    assert list(lab.files()) == [timestep.event_file]


# --- the object


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"bucket": None}, "it is not uploaded"),
        ({"key": None}, "it is not uploaded"),
        ({"verified_at": None}, "its upload was not proven"),
    ],
)
def test_an_upload_of_which_something_is_not_recorded_proves_nothing(
    lab: Lab, values: dict[str, Any], reason: str
) -> None:
    lab.arrived()
    before = lab.files()
    _set(lab, **values)
    assert [outcome.kept for outcome in lab.purge()] == [reason]
    assert lab.files() == before


def test_a_dry_run_asks_for_the_object_too(lab: Lab) -> None:
    timestep = lab.drop()
    lab.stage(timestep)
    lab.upload(timestep)
    lab.store.client.delete_object(Bucket=lab.store.bucket_name, Key=timestep.event.key)
    for outcome in (*lab.purge(do_it=False), *lab.purge_staging(do_it=False)):
        assert "is gone from the bucket" in outcome.kept


def _expire(lab: Lab, days: int) -> None:
    rule: Any = {"ID": "old", "Status": "Enabled", "Filter": {"Prefix": "images/"}, "Expiration": {"Days": days}}
    lab.store.client.put_bucket_lifecycle_configuration(
        Bucket=lab.store.bucket_name, LifecycleConfiguration={"Rules": [rule]}
    )


def test_a_copy_whose_object_expires_soon_stays_unless_the_source_has_all_images_or_a_tape(lab: Lab) -> None:
    there, gone = lab.drop(), lab.drop()
    for timestep in (there, gone):
        lab.stage(timestep)
        lab.upload(timestep, archive=False)
    image_of(lab, gone).unlink()
    _expire(lab, 2)
    kept, deleted = sorted(lab.purge_staging(), key=lambda outcome: not outcome.kept)
    assert "and the bucket deletes its object in 2 days" in kept.kept
    assert deleted.kept == ""
    assert lab.staging.copies(lab.system.name) == [gone.timestep_id]
    lab.archive(gone)
    lab.record()
    assert [outcome.kept for outcome in lab.purge_staging()] == [""]


def test_a_copy_under_the_name_of_another_system_is_none_of_the_timestep(lab: Lab, make_lab: Callable[[], Lab]) -> None:
    timestep, other = lab.arrived(), make_lab()
    copy = other.staging.stage(other.system.name, timestep.timestep_id, lab.home / timestep.event.img_dir)
    assert other.purge_staging() == []
    assert copy.exists()


@pytest.mark.parametrize("type", [Ingested, Archived])
def test_a_history_that_can_not_be_read_keeps_one_timestep_and_no_other(lab: Lab, type: type[EventData]) -> None:
    timestep, other = lab.arrived(), lab.arrived()
    with Session(lab.engine) as session, session.begin():
        key = timestep.event.key
        is_its = or_(col(TimestepEvent.timestep_id) == timestep.timestep_id, col(TimestepEvent.key) == key)
        session.execute(update(TimestepEvent).where(is_its, col(TimestepEvent.type) == type.type).values(data={}))
    kept, deleted = sorted(lab.purge(), key=lambda outcome: not outcome.kept)
    assert "its history can't be read" in kept.kept
    assert deleted.kept == ""
    assert image_of(lab, timestep).exists()
    assert not image_of(lab, other).exists()


def test_a_stray_directory_in_staging_keeps_no_copy(lab: Lab) -> None:
    timestep = lab.drop()
    copy = lab.stage(timestep)
    lab.upload(timestep)
    stray = copy.with_name("not-a-timestep-but-as-long-as-it")
    assert len(stray.name) == 32
    stray.mkdir()
    assert [outcome.kept for outcome in lab.purge_staging()] == [""]
    assert stray.is_dir()


# --- the files


def test_the_directory_above_stays_though_nothing_is_left_in_it(lab: Lab) -> None:
    timestep = lab.arrived()
    (outcome,) = lab.purge()
    assert outcome.kept == ""
    directory = lab.home / timestep.event.img_dir
    assert not directory.exists()
    assert directory.parent.is_dir()
    assert lab.files() == {}


def test_copies_are_read_where_policy_or_the_file_system_asks_for_it(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    timestep = lab.drop()
    lab.stage(timestep)
    time.sleep(1.2)
    lab.upload(timestep)
    # As if a disk had turned a bit, which changes no time.
    with Session(lab.engine) as session, session.begin():
        session.execute(update(TimestepImage).values(sha256="0" * 64))
    (outcome,) = lab.purge_staging(purge_compares="content")
    assert "another content" in outcome.kept
    with monkeypatch.context() as patch:
        (tmp_path / "mountinfo").write_text("1 0 0:1 / / rw - fuse.sshfs host:/ rw\n")
        patch.setattr(mounts, "MOUNTS", tmp_path / "mountinfo")
        (outcome,) = lab.purge_staging()
    assert "another content" in outcome.kept
    (outcome,) = lab.purge_staging()
    assert outcome.kept == ""


def test_an_image_that_changes_while_it_is_read_stays(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.arrived()
    digest = hashlib.file_digest

    def meanwhile(file: Any, how: str) -> Any:
        found = digest(file, how)
        alter(Path(f"/proc/self/fd/{file.fileno()}").readlink())
        return found

    monkeypatch.setattr("blocks.purge_proof.hashlib.file_digest", meanwhile)
    before = set(lab.files())
    (outcome,) = lab.purge(purge_compares="content")
    assert "changed since its directory was read" in outcome.kept
    assert set(lab.files()) == before


def test_images_go_also_when_somebody_removed_their_event_file(lab: Lab) -> None:
    timestep = lab.arrived()
    (lab.home / timestep.event_file).unlink()
    assert [(outcome.files, outcome.kept) for outcome in lab.purge()] == [(3, "")]
    assert lab.files() == {}


def test_a_home_that_is_a_link_is_not_entered(tmp_path: Path) -> None:
    home = tmp_path / "prince"
    (home / "t1").mkdir(parents=True)
    (home / "t1" / "1.tif").touch()
    files = find_sources(home / "t1")
    home.rename(tmp_path / "elsewhere")
    home.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        delete_files(home, "t1", files)
    with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
        delete_empty_directories(home, "t1", files)
    assert _names(tmp_path / "elsewhere") == ["t1/1.tif"]


@pytest.fixture
def tmpfs(lab: Lab) -> Iterator[Callable[..., None]]:
    """Mounts a file system of its own in place of the system's directory."""

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", *options, "archiver-test", str(lab.home)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting is not permitted here")

    yield mount
    subprocess.run(["umount", "-l", str(lab.home)], capture_output=True, check=False)


def test_a_mount_that_turns_read_only_ends_the_pass(lab: Lab, tmpfs: Callable[..., None]) -> None:
    tmpfs()
    timesteps: list[Ingested] = [lab.arrived() for _ in range(3)]
    outcomes = SourcePurge(lab.system, PurgeableTimesteps(lab.engine), lab.store, lab.log, do_it=True).run()
    assert next(outcomes).kept == ""
    before = lab.files()
    tmpfs("-o", "remount,ro")
    with pytest.raises(OSError, match="Read-only") as refused:
        next(outcomes)
    assert refused.value.errno == errno.EROFS
    assert lab.files() == before
    assert sum((lab.home / one.event_file).exists() for one in timesteps) == 2
