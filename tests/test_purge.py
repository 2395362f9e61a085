"""Deleting files: what goes is in the bucket at that moment, and nothing else is touched."""

import errno
import os
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlmodel import Session, select

from blocks.deletion import delete_files
from blocks.event_log import EventLog
from blocks.image_directory import SystemAway
from blocks.messages import LogEvent, SourcePurged
from blocks.purgeable import Outcome
from blocks.tables import Timestep, TimestepEvent
from flows.purge import purge
from flows.reconcile import announcement
from tests.purging import KilledError, Lab

pytest_plugins = ["tests.purging"]


# --- what goes


def test_a_proven_timestep_goes_and_nothing_else_does(lab: Lab) -> None:
    other = lab.drop()
    timestep = lab.arrived()
    others = {name for name in lab.files() if other.timestep_id.hex in name}

    would = lab.purge(do_it=False)
    assert len(lab.files()) == 8
    assert lab.purge() == would
    assert [(outcome.files, outcome.kept) for outcome in would] == [(4, "")]
    assert str(would[0]) == f"{lab.system.name} 20261101_004 2026-11-23 10:42:07: 4 files, {would[0].bytes} bytes"

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
    assert lab.log.register.conclusion(lab.system.name, timestep.event_file) is None
    assert lab.purge() == []


def test_a_tag_alone_is_no_tape_copy_unless_the_system_trusts_it(lab: Lab) -> None:
    """surf-archiver tags objects, and leaves the tags where it then takes their archive back."""
    timestep = lab.drop()
    lab.upload(timestep, archive=False)
    head = lab.store.head(timestep.event.key)
    assert head is not None
    lab.log.append(LogEvent.of(announcement(timestep.event.key, timestep.timestep_id, head.etag), "reconcile-archive"))
    lab.record()
    (kept,) = lab.purge()
    assert "known from its tag alone" in kept.kept
    assert lab.purge(do_it=False, purge_trusts_tags=True)[0].kept == ""
    assert lab.purge(do_it=False, purge_needs_tape=False)[0].kept == ""
    lab.archive(timestep)
    lab.record()
    assert [outcome.files for outcome in lab.purge()] == [4]


def test_a_purge_is_about_one_system_and_needs_its_share(lab: Lab, make_lab: Callable[[], Lab]) -> None:
    other = make_lab()
    lab.arrived()
    other.arrived()
    assert len(lab.purge()) == 1
    assert len(other.files()) == 4
    other.home.rename(other.home.with_name("away"))
    with pytest.raises(SystemAway):
        other.purge()


def test_copies_go_though_their_share_is_away_and_another_one_can_not_be_deleted(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    timesteps = [lab.drop() for _ in range(3)]
    for timestep in timesteps:
        lab.stage(timestep)
        lab.upload(timestep)
    lab.home.rename(lab.home.with_name("away"))
    stuck, *others = sorted(timestep.timestep_id for timestep in timesteps)

    def delete(home: Path, directory: str, *rest: Any) -> None:
        if directory == stuck.hex:
            raise OSError(errno.EIO, "Input/output error", str(home / directory))
        delete_files(home, directory, *rest)

    monkeypatch.setattr("flows.purge_staging.delete_files", delete)
    outcomes: list[Outcome] = []
    system = lab.system.model_copy(update={"staging_retention_hours": 0})
    purge(lab.settings, [system], [system], outcomes.append, do_it=True)
    assert [bool(outcome.kept) for outcome in outcomes] == [True] + [False] * len(others)
    assert "Input/output error" in outcomes[0].kept
    assert lab.staging.copies(system.name) == [stuck]


def test_an_event_file_that_redis_forgot_claims_no_more_than_its_own_timestep(lab: Lab) -> None:
    timestep = lab.arrived()
    lab.log.register.forget(lab.system.name, timestep.event_file)
    assert [outcome.kept for outcome in lab.purge()] == [""]


def test_directories_of_the_same_name_in_two_systems_are_two(lab: Lab, make_lab: Callable[[], Lab]) -> None:
    for one in (lab, make_lab()):
        one.arrived(img_dir="t1")
    assert [outcome.kept for outcome in lab.purge()] == [""]


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
    assert "all times they had before the upload" in how[str(timestep.timestep_id)]
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

    again_at = datetime.now(UTC)
    (outcome,) = lab.purge(run_id=uuid4())
    assert (outcome.files, outcome.kept) == (4, "")
    assert lab.files() == {}
    assert lab.purge() == []
    with Session(lab.engine) as session:
        (said,) = session.exec(select(TimestepEvent.data).where(TimestepEvent.type == SourcePurged.type)).all()
    assert (said["files"], datetime.fromisoformat(said["proof"]["verified_at"]) > again_at) == (4, True)
    # Each attempt went by a proof of its own.
    counts = {int(found[1]) for one in said["proof"]["checks"] if (found := re.search(r"Each of its (\d) files", one))}
    assert counts == ({3, 3 - crash_at} if crash_at < 3 else {3})
    assert ("None of its files is there any more." in said["proof"]["checks"]) == (crash_at >= 3)


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
