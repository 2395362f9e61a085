"""A share that hangs: what reads from it can't be ended, and must not keep what other systems need."""

import asyncio
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolUpdate

from blocks.event_log import EventLog
from blocks.image_directory import SystemAway
from blocks.imaging_system import ImagingSystem
from blocks.lease import hold
from blocks.messages import Failed, Ingested, Rejected, Uploaded
from blocks.object_store import ObjectStore
from blocks.settings import Settings, get_settings
from blocks.staging import Staging
from flows import again, ingest, shares, system_watch, upload
from flows.dispatch import upload_worker
from flows.shares import check_answers, while_it_answers
from flows.upload import lease_name, until_stopped
from flows.watch import event_ingester
from tests.working import announced, assert_stored, drop, is_done, said, until, working

pytest_plugins = ["tests.prefect_server"]

HANGING = 6  # timesteps; more than there are places for uploads


class Share:
    """A FUSE mount, whose server can stop to answer."""

    def __init__(self, server: Path, mount: Path) -> None:
        self.mount = mount
        self._process = subprocess.Popen(["bindfs", "-f", "-o", "attr_timeout=0,entry_timeout=0", server, mount])
        deadline = time.monotonic() + 10
        while not mount.is_mount():
            if self._process.poll() is not None:
                pytest.skip("a FUSE mount is not possible here")
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def hang(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def answer(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """While it hangs: a test that fails would wait for its threads otherwise."""
        self.hang()
        try:
            yield
        finally:
            self.answer()

    def detach(self) -> None:
        subprocess.run(["umount", "-l", str(self.mount)], capture_output=True, check=False)

    def end(self) -> None:
        self.answer()
        self.detach()
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture
def share(tmp_path: Path) -> Iterator[Share]:
    if os.geteuid() != 0 or not shutil.which("bindfs"):
        pytest.skip("a FUSE mount needs root, and the program bindfs")
    (tmp_path / "server").mkdir()
    (tmp_path / "data" / "prince").mkdir(parents=True)
    share = Share(tmp_path / "server", tmp_path / "data" / "prince")
    yield share
    share.end()


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shares, "ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(shares, "BUSY_SECONDS", 0.5)
    monkeypatch.setattr(shares, "ASK_SECONDS", 0.2)
    monkeypatch.setattr(system_watch, "RESCAN_SECONDS", 1.0)


def asking(share: Share) -> int:
    """How many threads wait for its answer."""
    return [thread.name for thread in threading.enumerate()].count(f"asks {share.mount}")


def test_a_share_is_asked_by_one_thread_however_often_it_hangs(share: Share) -> None:
    async def test() -> None:
        await check_answers(share.mount)
        await check_answers(share.mount / "what is not there")
        await until(lambda: not asking(share), "the end of the threads")
        share.hang()
        for _ in range(3):
            with pytest.raises(SystemAway, match=r"has not answered for 0\.5 s: does its share hang\?"):
                await check_answers(share.mount)
        assert asking(share) == 1
        await check_answers(share.mount.parent)
        share.answer()
        await until(lambda: not asking(share), "the end of the thread")
        await check_answers(share.mount)

    asyncio.run(test())


def test_a_share_that_has_not_answered_for_long_is_not_waited_for_again(
    share: Share, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "ANSWER_SECONDS", 2.0)

    async def test() -> None:
        share.hang()
        with pytest.raises(SystemAway):
            await check_answers(share.mount)
        for _ in range(2):
            async with asyncio.timeout(0.5):
                with pytest.raises(SystemAway):
                    await check_answers(share.mount)
        share.answer()
        await until(lambda: not asking(share), "its answer")
        share.hang()
        began = time.monotonic()
        with pytest.raises(SystemAway):
            await check_answers(share.mount)
        assert time.monotonic() - began > 1.9

    asyncio.run(test())


def test_a_share_that_is_mounted_anew_answers_while_the_former_mount_still_hangs(share: Share, tmp_path: Path) -> None:
    async def test() -> None:
        with share.hanging(), ExitStack() as stack:
            with pytest.raises(SystemAway):
                await check_answers(share.mount)
            share.detach()
            stack.callback(Share(tmp_path / "server", share.mount).end)
            await check_answers(share.mount)

    asyncio.run(test())


def test_work_is_waited_for_while_its_share_answers(share: Share) -> None:
    (share.mount / "image.tif").write_bytes(b"bytes")

    def read(seconds: float) -> bytes:
        time.sleep(seconds)
        return (share.mount / "image.tif").read_bytes()

    async def test() -> None:
        long = asyncio.ensure_future(asyncio.to_thread(read, 2.0))
        assert await while_it_answers(long, share.mount) == b"bytes"
        hanging = asyncio.ensure_future(asyncio.to_thread(read, 1.0))
        share.hang()
        with pytest.raises(SystemAway):
            await while_it_answers(hanging, share.mount)
        assert not hanging.done()
        share.answer()
        assert await while_it_answers(hanging, share.mount) == b"bytes"

    asyncio.run(test())


def test_the_lease_of_an_upload_that_hangs_runs_out_once_nobody_waits_for_it(
    share: Share, settings: Settings, event_log: EventLog, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload, "hold", partial(hold, seconds=1.0))
    settings = settings.model_copy(update={"data_dir": share.mount.parent})
    event = drop(settings)
    timestep = Ingested(timestep_id=event.timestep_id, system="prince", event_file="events/1.json", event=event)
    lease = lease_name(event_log, event.key)
    ended = threading.Event()

    def hanging(*args: Any) -> Uploaded:
        try:
            return upload.upload(*args)
        finally:
            ended.set()

    async def test() -> None:
        with share.hanging():
            run = asyncio.ensure_future(until_stopped(hanging, timestep, settings, object_store, event_log))
            await until(lambda: event_log.redis.exists(lease), "taking the lease")
            with pytest.raises(SystemAway):
                await run
            await asyncio.sleep(1.5)
            assert not event_log.redis.exists(lease)
            assert not ended.is_set()
            stack.enter_context(hold(event_log.redis, lease))
        await until(ended.is_set, "the end of the thread")
        assert event_log.redis.exists(lease), "it gave back what is another's"

    with ExitStack() as stack:
        asyncio.run(test())
    assert object_store.client.list_objects_v2(Bucket=object_store.bucket_name).get("Contents") is None


@asynccontextmanager
async def places(pool: str, limit: int) -> AsyncIterator[None]:
    """A work pool has so many for a while."""
    async with get_client() as client:
        before = (await client.read_work_pool(pool)).concurrency_limit
        await client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=limit))
        try:
            yield
        finally:
            await client.update_work_pool(pool, WorkPoolUpdate(concurrency_limit=before))


@pytest.mark.soak
def test_an_ingest_that_began_before_its_share_hung_keeps_no_place(
    share: Share, run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    began: set[UUID] = set()
    copy = Staging.stage

    def begins(staging: Staging, system: str, timestep_id: UUID, *which: Any) -> Path:
        if system == "prince" and timestep_id not in began:
            share.hang()
            began.add(timestep_id)
        return copy(staging, system, timestep_id, *which)

    monkeypatch.setattr(Staging, "stage", begins)
    monkeypatch.setattr(ingest, "LONGEST_PAUSE", 1.0)
    ImagingSystem(staging="always").save("prince", overwrite=True)
    hanging = [drop(run_settings) for _ in range(3)]

    async def test() -> None:
        async with AsyncExitStack() as stack:
            stack.callback(share.answer)  # a test that fails would wait for its threads otherwise
            await stack.enter_async_context(places("event-ingester", 1))
            await stack.enter_async_context(working(event_ingester, settings=run_settings))
            await until(lambda: began, "beginning to copy")
            other = drop(run_settings, "aretha")
            await until(lambda: said(event_log, Ingested), "taking in that of the other system")
            assert [event.timestep_id for event in said(event_log, Ingested)] == [other.timestep_id]
            monkeypatch.setattr(Staging, "stage", copy)
            share.answer()
            await until(lambda: len(said(event_log, Ingested)) == len(hanging) + 1, "taking in all")

    asyncio.run(test())
    assert {event.timestep_id for event in said(event_log, Ingested)} > {event.timestep_id for event in hanging}
    assert said(event_log, Rejected) == []


def test_a_staging_directory_that_hangs_is_told_and_waited_for_without_a_place(
    share: Share,
    run_settings: Settings,
    event_log: EventLog,
    object_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ARCHIVER_STAGING_DIR", str(share.mount))
    get_settings.cache_clear()
    monkeypatch.setattr(again, "FIRST_PAUSE", 1.0)
    event = drop(run_settings, "aretha")
    announced(event_log, event, "aretha")

    def reason() -> str:
        wait = event_log.waits.find(event.timestep_id)
        return wait.reason if wait else ""

    async def test() -> None:
        with share.hanging():
            async with working(upload_worker, settings=run_settings):
                await until(lambda: f"{share.mount} has not answered" in reason(), "giving its place back")
        async with working(upload_worker, settings=run_settings):
            await until(lambda: said(event_log, Uploaded), "the upload")

    asyncio.run(test())


def test_the_timesteps_of_other_systems_arrive_meanwhile_and_its_own_when_it_answers(
    share: Share, run_settings: Settings, event_log: EventLog, object_store: ObjectStore
) -> None:
    assert share.mount == cast(Path, run_settings.data_dir) / "prince"
    waiting = [drop(run_settings) for _ in range(HANGING)]
    not_ingested = drop(run_settings)
    for event in waiting:
        announced(event_log, event)

    async def test() -> None:
        share.hang()
        async with working(event_ingester, upload_worker, settings=run_settings):
            others = [drop(run_settings, "aretha") for _ in range(2)]
            await until(lambda: len(said(event_log, Uploaded)) == len(others), "uploading those of the other system")
            assert {event.timestep_id for event in said(event_log, Uploaded)} == {one.timestep_id for one in others}
            share.answer()
            await until(lambda: len(said(event_log, Uploaded)) == len(others) + HANGING + 1, "uploading all")
            await until(lambda: is_done(event_log), "acknowledging all")

    asyncio.run(test())
    for event in (*waiting, not_ingested):
        assert_stored(run_settings, object_store, event)
    assert said(event_log, Failed) == []
    assert not_ingested.timestep_id in {event.timestep_id for event in said(event_log, Ingested)}
