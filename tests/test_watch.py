"""The watcher on real directories: whatever is done to event files, every one is dealt with, and once."""

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, cast

import httpx
import pytest
from prefect.client.schemas.objects import StateType
from redis.exceptions import ConnectionError as RedisConnectionError
from watchdog.observers.inotify_move_event_grouper import InotifyMoveEventGrouper

from blocks.discovery import is_system
from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.event_register import EventFileRegister
from blocks.fingerprint import Fingerprint
from blocks.image_survey import Survey
from blocks.imaging_system import ImagingSystem, WrongBlock
from blocks.messages import Rejected
from flows import pending, system_watch, verdicts, watch
from flows.outcome import with_images
from tests.images import tiff
from tests.watching import PATIENCE, Ingest, Microscope, rejected, said, taken_in, until, watching

SETTLE_SECONDS = 2.0


# --- where event files come from


Kind = Literal["native", "polling"]
both_ways = pytest.mark.parametrize("kind", ["native", "polling"])


@both_ways
def test_files_from_before_the_start_and_each_way_a_file_can_come(
    root: Path, event_log: EventLog, ingest: Ingest, tmp_path: Path, kind: Kind
) -> None:
    ingest.watching = kind
    prince = Microscope(root)
    prince.drop("before.json")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "before.json"), "taking in what was there")
        prince.drop("between.json")
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "between.json"), "taking in what came while nobody watched")
            prince.drop("created.json")
            (prince.events / ".hidden.json").write_text(prince.event())
            (prince.events / ".hidden.json").rename(prince.events / "renamed.json")
            (tmp_path / "elsewhere").write_text(prince.event())
            (tmp_path / "elsewhere").rename(prince.events / "moved in.json")
            (prince.events / "part").write_text(prince.event())
            os.link(prince.events / "part", prince.events / "linked.json")
            (prince.events / "overwritten.json").write_text("{")
            await asyncio.sleep(0.3)
            (prince.events / "overwritten.json").write_text(prince.event())
            names = ["created.json", "renamed.json", "moved in.json", "linked.json", "overwritten.json"]
            await until(taken_in(event_log, *names), "taking in each of them")
            prince.drop("created.json")
            await until(lambda: ingest.runs["prince/events/created.json"] == 2, "taking in what it says now")
            late = Microscope(root, "aretha")
            late.drop("new system.json")
            await until(taken_in(event_log, "new system.json"), "taking in of a new system")

    asyncio.run(test())
    assert sorted(said(event_log).count(one) for one in set(said(event_log))) == [1] * 7 + [2]
    assert sum(ingest.runs.values()) == len(said(event_log)) == 9


def test_hidden_files_and_other_files_are_left_alone(root: Path, event_log: EventLog, ingest: Ingest) -> None:
    prince = Microscope(root)
    odd = os.fsdecode(b"\xff\xfe.json")

    async def test() -> None:
        prince.drop(odd)
        async with watching(root, event_log, ingest):
            for name in (".a.json", "a.json~", "b.json.tmp", os.fsdecode(b"\xfe.json")):
                prince.drop(name)
            prince.drop("last.json")
            await until(taken_in(event_log, "last.json"), "taking in the one event file")
            await asyncio.sleep(1.2)  # a rescan

    asyncio.run(test())
    assert ingest.runs == {"prince/events/last.json": 1}


def test_a_file_is_taken_in_at_once_when_something_happens_to_it(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 3600.0)
    prince = Microscope(root)
    prince.drop("before.json")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "before.json"), "taking in what was there")
            prince.drop("hinted.json")
            await until(taken_in(event_log, "hinted.json"), "taking in before any rescan")

    asyncio.run(test())


def test_a_hint_waits_for_nothing_that_was_moved_away_before(
    root: Path, event_log: EventLog, ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 3600.0)
    # So long watchdog would wait for where a file went, with all that comes after it.
    monkeypatch.setattr(InotifyMoveEventGrouper, "delay", 10 * PATIENCE)
    prince = Microscope(root)
    prince.drop("before.json")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "before.json"), "taking in what was there")
            (prince.events / "before.json").rename(tmp_path / "away.json")
            (prince.events / ".1.json").write_text(prince.event())
            (prince.events / ".1.json").rename(prince.events / "1.json")
            (tmp_path / "2.json").write_text(prince.event())
            (tmp_path / "2.json").rename(prince.events / "2.json")
            await until(taken_in(event_log, "1.json", "2.json"), "taking in what was renamed into place")

    asyncio.run(test())


def test_a_hint_waits_for_no_rescan(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prince = Microscope(root)
    prince.drop("before.json")
    begun, go_on = threading.Event(), threading.Event()
    list_files = ImagingSystem.event_files

    def hang(*about: Any) -> Iterator[tuple[str, os.stat_result]]:
        listed = list(list_files(*about))
        begun.set()
        assert go_on.wait(2 * PATIENCE)
        return iter(listed)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "before.json"), "taking in what was there")
            monkeypatch.setattr(ImagingSystem, "event_files", hang)
            try:
                await until(begun.is_set, "another rescan")
                prince.drop("hinted.json")
                (prince.events / "wrong.json").write_text("{")
                await until(taken_in(event_log, "hinted.json"), "taking in while it is rescanned")
            finally:
                go_on.set()
                monkeypatch.setattr(ImagingSystem, "event_files", list_files)
            # That rescan has not seen it, which is no reason to forget that it has to settle.
            await until(rejected(event_log, "wrong.json"), "rejection")

    asyncio.run(test())
    assert set(ingest.runs.values()) == {1}


def test_polling_sees_a_change_too(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 3600.0)
    ingest.watching = "polling"
    prince = Microscope(root)
    prince.drop("before.json")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "before.json"), "taking in what was there")
            prince.drop("polled.json")
            await until(taken_in(event_log, "polled.json"), "taking in before any rescan")

    asyncio.run(test())


def descriptors() -> int:
    """How many files this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def test_trying_to_watch_what_is_not_there_costs_nothing(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 0.05)
    prince = Microscope(root)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await asyncio.sleep(0.5)
            prince.events.rename(root / "unmounted")
            await asyncio.sleep(0.5)
            before = descriptors()
            await asyncio.sleep(2)
            # Each try that were not cleaned up would keep three.
            assert descriptors() <= before + 5

    asyncio.run(test())


# --- files that are not finished, or wrong


@both_ways
def test_a_file_that_is_written_slowly_is_never_rejected(
    root: Path, event_log: EventLog, ingest: Ingest, kind: Kind
) -> None:
    ingest.watching = kind
    prince = Microscope(root)
    content = prince.event()

    async def test() -> None:
        async with watching(root, event_log, ingest):
            with (prince.events / "slow.json").open("w", buffering=1) as file:
                for start in range(0, len(content), len(content) // 6):
                    file.write(content[start : start + len(content) // 6])
                    file.flush()
                    await asyncio.sleep(SETTLE_SECONDS * 0.4)
            await until(taken_in(event_log, "slow.json"), "taking it in")

    asyncio.run(test())
    assert said(event_log) == [("ingested", "events/slow.json")]


@both_ways
def test_what_a_writer_left_half_way_is_rejected_and_taken_in_once_it_is_whole(
    root: Path, event_log: EventLog, ingest: Ingest, kind: Kind
) -> None:
    ingest.watching = kind
    prince = Microscope(root)
    content, path = prince.event(), prince.events / "1.json"
    half = f"import os, signal; f = open({str(path)!r}, 'w'); f.write({content[:60]!r}); f.flush()"

    async def test() -> None:
        async with watching(root, event_log, ingest):
            command = [sys.executable, "-c", f"{half}; os.kill(os.getpid(), signal.SIGKILL)"]
            writer = await asyncio.to_thread(subprocess.run, command, check=False)
            assert writer.returncode == -signal.SIGKILL
            await until(rejected(event_log, "1.json"), "rejection")
            with path.open("a") as file:
                file.write(content[60:])
            await until(taken_in(event_log, "1.json"), "taking it in")

    asyncio.run(test())
    assert ingest.runs == {"prince/events/1.json": 2}


def test_a_wrong_file_is_rejected_once_and_taken_in_once_mended(
    root: Path, event_log: EventLog, ingest: Ingest
) -> None:
    prince = Microscope(root)
    (prince.events / "wrong.json").write_text('{"timestep_id": ')
    (prince.events / "directory.json").mkdir()
    (prince.events / "link.json").symlink_to("/dev/zero")
    (prince.events / "empty.json").touch()

    async def test() -> None:
        async with watching(root, event_log, ingest):
            prince.drop("sound.json")
            await until(taken_in(event_log, "sound.json"), "taking in the sound one", seconds=SETTLE_SECONDS)
            for name in ("wrong.json", "directory.json", "link.json", "empty.json"):
                await until(rejected(event_log, name), f"rejection of {name}")
            await asyncio.sleep(2.5)  # rescans
            assert ingest.runs["prince/events/wrong.json"] == 1
            (prince.events / "new").write_text(prince.event())
            (prince.events / "new").replace(prince.events / "wrong.json")
            await until(taken_in(event_log, "wrong.json"), "taking in the mended one")

    asyncio.run(test())
    assert max(ingest.runs.values()) == 2


def test_images_that_come_after_a_rejection_are_noticed(root: Path, event_log: EventLog, ingest: Ingest) -> None:
    prince = Microscope(root)
    prince.drop("early.json", img_dir="late")
    few = json.loads(prince.drop("few.json", img_count=2).read_text())["img_dir"]

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(rejected(event_log, "early.json"), "rejection")
            await until(rejected(event_log, "few.json"), "rejection")
            (prince.directory / "late").mkdir()
            (prince.directory / "late" / "a.tif").write_bytes(tiff())
            (prince.directory / few / "Img" / "1.tif").write_bytes(tiff())
            await until(taken_in(event_log, "early.json", "few.json"), "taking both in")

    asyncio.run(test())


# --- once, and again after a change


def test_a_file_that_was_dealt_with_gets_no_further_run(root: Path, event_log: EventLog, ingest: Ingest) -> None:
    prince = Microscope(root)
    dropped = prince.drop("1.json")

    async def test() -> None:
        for _ in range(2):  # also after a restart
            async with watching(root, event_log, ingest):
                await until(taken_in(event_log, "1.json"), "taking it in")
                await asyncio.sleep(1.5)
                assert ingest.runs == {"prince/events/1.json": 1}
        async with watching(root, event_log, ingest):
            dropped.chmod(0o600)
            os.utime(prince.directory)
            await asyncio.sleep(1.5)
            assert ingest.runs == {"prince/events/1.json": 1}
            dropped.write_text(prince.event())
            await until(lambda: len(said(event_log)) == 2, "taking in what it says now")
            await asyncio.sleep(1.5)
        assert ingest.runs == {"prince/events/1.json": 2}

    asyncio.run(test())
    assert len(set(ingest.keys)) == 2


def test_a_file_that_is_removed_and_comes_back_is_not_taken_in_twice(
    root: Path, event_log: EventLog, ingest: Ingest
) -> None:
    prince = Microscope(root)
    dropped = prince.drop("1.json")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "1.json"), "taking it in")
            content = dropped.read_text()
            dropped.unlink()
            await asyncio.sleep(1.2)
            dropped.write_text(content)
            await until(lambda: ingest.runs["prince/events/1.json"] == 2, "another look")

    asyncio.run(test())
    assert said(event_log) == [("ingested", "events/1.json")]


def test_what_changed_during_the_verdict_is_looked_at_again(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share that is away for just that moment: afterwards all is as it was before."""
    prince = Microscope(root)
    prince.drop("1.json")
    survey = ImagingSystem.survey

    def away_for_a_moment(system: ImagingSystem, event: ImagingEvent, *, headers: bool = True) -> Survey:
        if not headers:  # the look before the run
            return survey(system, event, headers=False)
        monkeypatch.setattr(ImagingSystem, "survey", survey)
        (prince.directory / event.img_dir).rename(prince.directory / "away")
        return survey(system, event)

    monkeypatch.setattr(ImagingSystem, "survey", away_for_a_moment)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(rejected(event_log, "1.json"), "rejection")
            event = json.loads((prince.events / "1.json").read_text())
            (prince.directory / "away").rename(prince.directory / event["img_dir"])
            await until(taken_in(event_log, "1.json"), "taking it in")

    asyncio.run(test())


def test_a_file_put_in_the_place_of_one_that_was_being_read_is_taken_in_too(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prince = Microscope(root)
    dropped = prince.drop("1.json")
    other = prince.event()

    def after_a_replacement(seen: Fingerprint, *about: Any) -> Fingerprint:
        monkeypatch.setattr("tests.watching.with_images", with_images)
        (prince.events / ".1.json").write_text(other)
        (prince.events / ".1.json").rename(dropped)
        return with_images(seen, *about)

    monkeypatch.setattr("tests.watching.with_images", after_a_replacement)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(lambda: len(said(event_log)) == 2, "taking in of both")

    asyncio.run(test())


def test_what_could_not_be_read_for_want_of_a_right_is_tried_again_though_nothing_changed(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.outcome.NOT_ALLOWED_SECONDS", 0.5)
    monkeypatch.setattr(system_watch, "LOOK_AGAIN_SECONDS", 0.1)
    Microscope(root).drop("1.json")
    survey_of = Survey.of

    def ticket_expired(*_args: object, **_options: object) -> Survey:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Survey, "of", ticket_expired)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(rejected(event_log, "1.json"), "rejection")
            monkeypatch.setattr(Survey, "of", survey_of)
            await until(taken_in(event_log, "1.json"), "taking it in")

    asyncio.run(test())


def test_a_cancelled_run_is_told_and_a_file_that_is_asked_for_again_gets_another(
    root: Path, event_log: EventLog, ingest: Ingest
) -> None:
    prince = Microscope(root)
    prince.drop("1.json")
    ingest.cancels = 1

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(rejected(event_log, "1.json"), "rejection")
            event_log.register.ask_again("prince", "events/1.json")
            await until(taken_in(event_log, "1.json"), "taking it in")

    asyncio.run(test())


# --- what goes away and comes back


def test_an_events_directory_that_vanishes_and_comes_back(
    root: Path, event_log: EventLog, ingest: Ingest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prince, aretha = Microscope(root), Microscope(root, "aretha")
    prince.drop("1.json")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "1.json"), "taking it in")
            shutil.move(prince.directory, tmp_path / "away")
            aretha.drop("2.json")
            await until(taken_in(event_log, "2.json"), "taking in of the other system")
            await asyncio.sleep(1.2)  # a rescan without the directory
            shutil.move(tmp_path / "away", prince.directory)
            prince.drop("3.json")
            await until(taken_in(event_log, "3.json"), "taking in after it came back")
            shutil.rmtree(prince.events)
            await asyncio.sleep(1.2)
            prince.events.mkdir()
            await asyncio.sleep(2.2)  # a rescan with it: the observer is there again
            monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 3600.0)
            await asyncio.sleep(1.2)
            prince.drop("4.json")
            await until(taken_in(event_log, "4.json"), "taking in by a hint")

    asyncio.run(test())
    assert set(ingest.runs.values()) == {1}


def test_what_redis_forgot_is_taken_in_again(root: Path, event_log: EventLog, ingest: Ingest) -> None:
    prince = Microscope(root)
    prince.drop("1.json")
    prince.drop("2.json")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "1.json", "2.json"), "taking them in")
            await asyncio.sleep(1.2)  # a rescan, by which their conclusions are known
            event_log.register.forget("prince", "events/1.json")
            await until(lambda: ingest.runs["prince/events/1.json"] == 2, "another look")

    asyncio.run(test())
    assert ingest.runs["prince/events/2.json"] == 1


def test_the_whole_root_may_come_late(root: Path, event_log: EventLog, ingest: Ingest) -> None:
    root.rmdir()

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await asyncio.sleep(0.5)
            Microscope(root).drop("1.json")
            await until(taken_in(event_log, "1.json"), "taking it in")

    asyncio.run(test())


def test_files_wait_while_a_service_is_away(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prince = Microscope(root)
    prince.drop("1.json")
    ingest.failures = [httpx.ConnectError("Prefect is away"), RedisConnectionError("Redis is away")]
    conclusions, failures = EventFileRegister.conclusions, [RedisConnectionError("Redis is away")]

    def away_at_first(register: EventFileRegister, system: str) -> Iterator[tuple[str, str]]:
        if failures:
            raise failures.pop()
        return conclusions(register, system)

    monkeypatch.setattr(EventFileRegister, "conclusions", away_at_first)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            prince.drop("2.json")
            await until(taken_in(event_log, "1.json", "2.json"), "taking them in")

    asyncio.run(test())
    assert set(ingest.runs.values()) == {1}


def test_one_file_that_cannot_be_read_does_not_hold_up_the_others(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prince = Microscope(root)
    for number in range(10):
        prince.drop(f"{number}.json")
    read = ImagingSystem.read_event

    def stale(system: ImagingSystem, event_file: str) -> ImagingEvent:
        if event_file == "events/3.json":
            raise OSError(116, "Stale file handle")
        return read(system, event_file)

    monkeypatch.setattr(ImagingSystem, "read_event", stale)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            others = [f"{number}.json" for number in range(10) if number != 3]
            await until(taken_in(event_log, *others), "taking in the others")
            monkeypatch.setattr(ImagingSystem, "read_event", read)
            await until(taken_in(event_log, "3.json"), "taking it in after all")

    asyncio.run(test())
    assert Rejected.type not in {type for type, _ in said(event_log)}


@pytest.fixture
def disk(root: Path, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Mounts and unmounts an ext4 of its own as the directory of prince."""
    image, place = tmp_path / "disk", root / "prince"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(8 << 20)
    commands = {
        "make": ["mkfs.ext4", "-q", "-F", str(image)],
        "mount": ["mount", "-o", "loop", str(image), str(place)],
        "unmount": ["umount", str(place)],
    }

    def do(what: str) -> None:
        done = subprocess.run(commands[what], capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{what} is not possible here: {done.stderr}")

    if not shutil.which("mkfs.ext4"):
        pytest.skip("there is no mkfs.ext4")
    do("make")
    do("mount")
    yield do
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@both_ways
def test_a_share_that_is_unmounted_and_mounted_again(
    root: Path,
    event_log: EventLog,
    ingest: Ingest,
    disk: Callable[[str], None],
    kind: Kind,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ingest.watching = kind
    prince = Microscope(root)
    prince.drop("before.json")
    (prince.events / "wrong.json").write_text("{")

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "before.json"), "taking it in")
            await until(rejected(event_log, "wrong.json"), "rejection")
            disk("unmount")
            await asyncio.sleep(1.5)  # a rescan without it
            # What lies beneath may look like a share on which all was removed.
            prince.events.mkdir()
            (prince.events / "stale.json").write_text("{")
            await asyncio.sleep(1.5)
            (prince.events / "stale.json").unlink()
            disk("mount")
            (prince.events / "wrong.json").rename(prince.events / "wrong, and renamed.json")
            await until(rejected(event_log, "wrong, and renamed.json"), "rejection")
            prince.drop("between.json")
            await until(taken_in(event_log, "between.json"), "taking in after it came back")
            await asyncio.sleep(1.2)  # a rescan with it: the observer is there again
            monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 3600.0 if kind == "native" else 1.0)
            await asyncio.sleep(1.2)
            prince.drop("after.json")
            await until(taken_in(event_log, "after.json"), "taking in, if watched natively by a hint")

    asyncio.run(test())
    assert sorted(said(event_log)) == [
        # It was removed, by a rescan that saw the others where they were.
        ("cleared", "events/wrong.json"),
        *(("ingested", f"events/{name}.json") for name in ("after", "before", "between")),
        ("rejected", "events/wrong, and renamed.json"),
        ("rejected", "events/wrong.json"),
    ]


def test_a_share_that_numbers_its_files_anew_costs_no_runs(root: Path, event_log: EventLog, ingest: Ingest) -> None:
    prince = Microscope(root)
    paths = [prince.drop(f"{number}.json") for number in range(3)]

    def renumber(path: Path, content: str) -> None:
        before = path.stat()
        path.with_suffix(".new").write_text(content)
        os.utime(path.with_suffix(".new"), ns=(before.st_atime_ns, before.st_mtime_ns))
        path.with_suffix(".new").rename(path)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, "0.json", "1.json", "2.json"), "taking them in")
            for path in paths[:2]:
                renumber(path, path.read_text())
            # This one only looks the same.
            renumber(paths[2], paths[2].read_text().replace('"position": 7', '"position": 8'))
            await until(lambda: ingest.runs["prince/events/2.json"] == 2, "another look")
            await asyncio.sleep(1.5)

    asyncio.run(test())
    assert sorted(ingest.runs.values()) == [1, 1, 2]


def test_of_very_many_files_each_is_looked_at_closely_in_turn(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verdicts, "CLOSELY", 3)
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 0.2)
    ingest.watching = "polling"
    prince = Microscope(root)
    paths = [prince.drop(f"{number}.json") for number in range(12)]

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, *(path.name for path in paths)), "taking them in")
            for path in paths:
                path.write_text(prince.event())
            await until(lambda: set(ingest.runs.values()) == {2}, "taking in what they say now")
            prince.drop("new.json")
            (prince.events / "new").write_text(prince.event())
            (prince.events / "new").rename(paths[0])
            await until(lambda: ingest.runs["prince/events/0.json"] == 3, "taking in what was put in its place")

    asyncio.run(test())


# --- many at once


def test_a_new_file_need_not_wait_for_a_backlog(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "BACKLOG_RUNS", 5)
    prince = Microscope(root)
    backlog = [f"{number:04}.json" for number in range(60)]
    for name in backlog:
        prince.drop(name)
    ingest.seconds = 0.5

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(lambda: len(ingest.runs) == 5, "the first runs")
            prince.drop("new.json")
            await until(taken_in(event_log, "new.json"), "taking in the new one")
            assert len(said(event_log)) < 40
            assert ingest.most_at_once <= 6
            ingest.seconds = 0
            await until(taken_in(event_log, *backlog), "taking in all")

    asyncio.run(test())
    assert set(ingest.runs.values()) == {1}


def test_runs_that_wait_for_their_images_for_long_hold_up_no_backlog(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "BACKLOG_RUNS", 2)
    monkeypatch.setattr(pending, "BACKLOG_RUN_SECONDS", 1.0)
    monkeypatch.setattr(system_watch, "LOOK_AGAIN_SECONDS", 0.5)
    prince = Microscope(root)
    for number in range(6):
        prince.drop(f"{number}.json")
    ingest.seconds = 3600.0

    def waited() -> timedelta:
        (seen,) = event_log.systems.all()
        assert (seen.waiting, seen.waiting_since is None) == (6, False)
        return seen.at - cast(datetime, seen.waiting_since)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(lambda: len(ingest.runs) == 6, "a run for each of them")
            await until(lambda: waited() >= timedelta(seconds=1), "telling for how long they wait")

    asyncio.run(test())


def test_runs_that_nobody_begins_are_not_followed_by_more(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pending, "BACKLOG_RUNS", 2)
    monkeypatch.setattr(pending, "BACKLOG_RUN_SECONDS", 1.0)
    monkeypatch.setattr(system_watch, "LOOK_AGAIN_SECONDS", 0.2)
    prince = Microscope(root)
    for number in range(6):
        prince.drop(f"{number}.json")
    ingest.seconds = 3600.0

    async def test() -> None:
        async with watching(root, event_log, ingest):
            for state_type in (StateType.SCHEDULED, StateType.PENDING):
                ingest.state_type = state_type
                await until(lambda: len(ingest.runs) == 2, "the first runs")
                await asyncio.sleep(2.5)
                assert len(ingest.runs) == 2
            ingest.state_type = StateType.RUNNING
            await until(lambda: len(ingest.runs) == 6, "a run for each of them")

    asyncio.run(test())


# --- names that look alike


def test_event_files_whose_names_look_alike_are_each_taken_in(root: Path, event_log: EventLog, ingest: Ingest) -> None:
    prince = Microscope(root)
    names = [
        "a.json",
        "A.json",
        "a.JSON",
        "Zo\u00eb.json",
        "Zoe\u0308.json",
        "\uff4a.json",
        "a\n.json",
        " .json",
        "'$(x).json",
    ]
    for name in names:
        prince.drop(name)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            await until(taken_in(event_log, *names), "taking in each")

    asyncio.run(test())
    assert len(said(event_log)) == len(names)
    assert set(ingest.runs.values()) == {1}


# --- what must not stop the others


def test_a_system_whose_share_hangs_keeps_no_other_from_being_found(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch
) -> None:
    prince, hangs = Microscope(root), Microscope(root, "aretha")
    hangs.drop("late.json")
    is_back = threading.Event()

    def look_at_a_share(place: Path) -> bool:
        return is_system(place) if place.name == "prince" else is_back.wait(PATIENCE) and is_system(place)

    monkeypatch.setattr(watch, "is_system", look_at_a_share)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            prince.drop("1.json")
            await until(taken_in(event_log, "1.json"), "taking in from the share that answers")
            assert not taken_in(event_log, "late.json")()
            is_back.set()
            await until(taken_in(event_log, "late.json"), "taking in from the share that is back")

    try:
        asyncio.run(test())
    finally:
        is_back.set()


def test_a_block_that_is_wrong_leaves_its_system_as_it_was(
    root: Path, event_log: EventLog, ingest: Ingest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    prince = Microscope(root)

    async def wrong(name: str, root: Path) -> ImagingSystem:
        raise WrongBlock(f"the block of {name} can't be used")

    monkeypatch.setattr(ingest, "configured", wrong)

    async def test() -> None:
        async with watching(root, event_log, ingest):
            prince.drop("1.json")
            await until(taken_in(event_log, "1.json"), "taking in with what was known")

    asyncio.run(test())
    assert "prince stays as it was: the block of prince can't be used" in caplog.text
