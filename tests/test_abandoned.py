"""What dead uploads leave in the bucket: removed in time, and never under the hands of a living one."""

import asyncio
import logging
from datetime import timedelta
from pathlib import Path
from typing import cast
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.deployments import arun_deployment

from blocks.bundle import Bundle
from blocks.event_log import EventLog
from blocks.incomplete_uploads import abort, expire_by_rule, find
from blocks.lease import hold
from blocks.object_errors import ObjectStoreError
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.upload_journal import RedisJournal
from flows.abandoned import abort_abandoned
from flows.dispatch import upload_worker
from flows.init import expire_incomplete_uploads
from flows.upload import lease_name
from tests.conftest import make_store
from tests.faulty_proxy import FaultyProxy, Refuse
from tests.images import KEY, SEVERAL_PARTS, TIMESTEP, make_images
from tests.rados_gateway import RadosGateway

pytest_plugins = ["tests.prefect_server"]

# Everything that exists was begun before a minute from now.
ANY_AGE = timedelta(minutes=-1)


@pytest.fixture
def store(proxy: FaultyProxy) -> ObjectStore:
    return make_store(proxy.url)


def begin(store: ObjectStore, key: str) -> str:
    return store.client.create_multipart_upload(Bucket=store.bucket_name, Key=key)["UploadId"]


def open_uploads(store: ObjectStore) -> list[str]:
    return [upload.key for upload in find(store.wire)]


def test_what_nobody_goes_on_with_is_aborted(store: ObjectStore, event_log: EventLog) -> None:
    begin(store, KEY)
    others = [f"backups/{uuid4()}.tar", KEY + ".part"]
    for key in others:
        begin(store, key)

    assert abort_abandoned(store, event_log, ANY_AGE) == [KEY]

    assert sorted(open_uploads(store)) == sorted(others)
    assert abort_abandoned(store, event_log, ANY_AGE) == []
    assert event_log.redis.keys("*lease*") == []


def test_what_is_young_may_still_be_wanted(rados_gateway: RadosGateway, event_log: EventLog) -> None:
    store = make_store(rados_gateway.url)
    begin(store, KEY)
    assert abort_abandoned(store, event_log, timedelta(hours=1)) == []
    assert open_uploads(store) == [KEY]


def test_an_upload_that_somebody_works_on_stays(store: ObjectStore, event_log: EventLog) -> None:
    begin(store, KEY)
    with hold(event_log.redis, lease_name(event_log, KEY)) as lease:
        assert abort_abandoned(store, event_log, ANY_AGE) == []
        lease.check()
    assert open_uploads(store) == [KEY]


def test_what_the_next_attempt_will_go_on_with_stays(
    store: ObjectStore, proxy: FaultyProxy, event_log: EventLog, tmp_path: Path
) -> None:
    bundle = Bundle.of(make_images(tmp_path / "source", SEVERAL_PARTS), b"{}")
    journal = RedisJournal(event_log.redis, store.bucket_name)
    proxy.plan(Refuse(403, "AccessDenied"), "partNumber=5")
    with pytest.raises(ObjectStoreError):
        store.upload(bundle, KEY, TIMESTEP, journal)
    forgotten = begin(store, KEY)

    assert abort_abandoned(store, event_log, ANY_AGE) == [KEY]

    (kept,) = find(store.wire)
    assert kept.upload_id != forgotten
    assert store.upload(bundle, KEY, TIMESTEP, journal).sent < bundle.size
    assert open_uploads(store) == []


def test_an_upload_that_ended_meanwhile_is_no_error(store: ObjectStore) -> None:
    begin(store, KEY)
    (upload,) = find(store.wire)
    abort(store.wire, upload)
    abort(store.wire, upload)


def test_the_rule_against_incomplete_uploads_leaves_other_rules_alone(store: ObjectStore) -> None:
    other = {"ID": "other", "Filter": {"Prefix": "logs/"}, "Status": "Enabled", "Expiration": {"Days": 3}}
    store.client.put_bucket_lifecycle_configuration(
        Bucket=store.bucket_name,
        LifecycleConfiguration={"Rules": [other]},  # type: ignore[list-item]
    )
    expire_by_rule(store.wire, days=5)
    expire_by_rule(store.wire, days=7)

    rules = store.client.get_bucket_lifecycle_configuration(Bucket=store.bucket_name)["Rules"]

    days = {rule["ID"]: rule.get("AbortIncompleteMultipartUpload", {}).get("DaysAfterInitiation") for rule in rules}
    assert days == {"other": None, "abort-incomplete-uploads": 7}


def test_a_store_without_rules_is_good_enough(
    store: ObjectStore, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.plan(Refuse(501, "NotImplemented"), "?lifecycle")
    with caplog.at_level(logging.INFO):
        expire_incomplete_uploads(store, 7)
        assert "takes no rule" in caplog.messages[-1]
        assert "501 NotImplemented" in caplog.messages[-1]
        expire_incomplete_uploads(store, 7)
        assert "not completed after 7 days" in caplog.messages[-1]


def test_the_upload_worker_does_it(run_settings: Settings, event_log: EventLog, object_store: ObjectStore) -> None:
    begin(object_store, KEY)  # 2010, says moto

    async def test() -> None:
        worker = asyncio.create_task(upload_worker(run_settings))
        try:
            run = await arun_deployment(
                "abort-abandoned-uploads/upload-worker", timeout=60, poll_interval=0.2, as_subflow=False
            )
            assert run.state
            assert run.state.is_completed()
            async with get_client() as client:
                deployment = await client.read_deployment(cast(UUID, run.deployment_id))
            assert [schedule.active for schedule in deployment.schedules] == [True]
        finally:
            worker.cancel()
            await asyncio.wait([worker], timeout=20)

    asyncio.run(test())
    assert open_uploads(object_store) == []
