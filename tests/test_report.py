"""The daily report, from a real database through a real Prefect block to a real receiver."""

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from prefect.blocks.notifications import CustomWebhookNotificationBlock
from pydantic import SecretStr
from sqlalchemy import Engine
from sqlmodel import Session

import flows.report
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from blocks.system_seen import Disk, SystemSeen
from flows.apply import apply_events
from flows.notification import NoNotificationBlock, notify
from flows.report import TITLE, report
from flows.upload import OBJECT_STORE
from tests.events import NOON, announced, archived, delivered, failed, ingested, rejected, said, uploaded
from tests.receiver import receiving

pytest_plugins = ["tests.prefect_server"]

HOURS = 3600


def test_the_report_says_what_happened_and_what_to_look_after(engine: Engine) -> None:
    new, old, on_tape, broken = (announced(position=position) for position in range(4))
    other = announced(position=9)
    with Session(engine) as session, session.begin():
        apply_events(
            session,
            delivered(
                said(ingested(new), -2 * HOURS),
                said(uploaded(new, size=1_500_000_000), -1 * HOURS),
                said(uploaded(old), -60 * HOURS),
                said(ingested(on_tape, event_file="events/2.json"), -25 * HOURS),
                said(uploaded(on_tape, size=2_500_000_000), -23 * HOURS),
                said(archived(on_tape.key), -3 * HOURS),
                said(failed(broken, "the share is away"), -30 * HOURS),
                said(ingested(other, system="aretha"), -100 * HOURS),
                *(said(rejected(f"events/bad{number}.json", f"bad {number}"), -number) for number in range(7)),
            ),
        )
    assert report(engine, NOON).splitlines() == [
        "from 2026-11-22 12:00 to 2026-11-23 12:00 UTC",
        "taken in: 1 (prince 1)",
        "uploaded: 2, 4.0 GB",
        "on tape: 1",
        "failed, and not uploaded since: 1",
        "- prince 20261101_004, position 3: the share is away",
        "rejected event files: 7",
        *(f"- bad {number}" for number in range(5)),
        "- and 2 more",
        "not on tape 48 hours after the upload: 1, the oldest since 2026-11-21",
        "early warnings: 0",
    ]


def test_the_report_calls_systems_as_people_do_and_tells_what_will_go_wrong(engine: Engine) -> None:
    hourly = [announced(timestamp=NOON - timedelta(hours=number)) for number in range(5, 12)]
    with Session(engine) as session, session.begin():
        apply_events(session, delivered(*(said(ingested(event), -5 * HOURS) for event in hourly)))
    disk = Disk(device="host:1", directory="/data/prince", free=10**11, total=10**12)
    seen = SystemSeen(name="prince", display_name="Prince, room 12", at=NOON, source=disk, staging=None)
    lines = report(engine, NOON, [seen]).splitlines()
    assert "taken in: 7 (Prince, room 12 7)" in lines
    assert lines[-2:] == [
        "early warnings: 1",
        "- Prince, room 12 is silent since 2026-11-23 07:00 UTC; as a rule, it takes images every 60 minutes",
    ]


def test_while_redis_is_away_the_report_says_what_it_can_not_tell(
    settings: Settings, object_store: ObjectStore, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Session(engine) as session, session.begin():
        apply_events(session, delivered(said(ingested(announced()), -1 * HOURS)))
    away = settings.model_copy(update={"redis_url": SecretStr("redis://127.0.0.1:1/0")})
    monkeypatch.setattr("flows.report.get_settings", lambda: away)
    lines = flows.report._report(NOON).splitlines()
    assert "taken in: 1 (prince 1)" in lines
    assert lines[-1].startswith("Redis can't be asked, so some warnings may be missing: what was seen of the systems")
    for what in ("the last flight check", "who uploads", "how full it is", "the last audits"):
        assert what in lines[-1]


def test_an_empty_database_has_a_report_too(engine: Engine) -> None:
    assert "taken in: 0" in report(engine, NOON + timedelta(days=1))


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with receiving() as receiver:
        yield receiver


def test_the_report_reaches_a_webhook_through_a_block_of_prefect(
    prefect: str, receiver: tuple[str, list[dict[str, Any]]]
) -> None:
    url, got = receiver

    async def test() -> None:
        block = CustomWebhookNotificationBlock(
            name="lab", url=url, json_data={"title": "{{subject}}", "text": "{{body}}"}
        )
        await block.asave("lab", overwrite=True)
        await notify("custom-webhook/lab", TITLE, "taken in: 3\nuploaded: 2")

    asyncio.run(test())
    assert got == [{"title": TITLE, "text": "taken in: 3\nuploaded: 2"}]


def test_a_block_that_is_not_there_or_tells_nobody_is_named(prefect: str, object_store: ObjectStore) -> None:
    async def test(name: str) -> None:
        await object_store.without_keys().asave(OBJECT_STORE, overwrite=True)
        await notify(name, TITLE, "text")

    with pytest.raises(NoNotificationBlock, match="slack-webhook/nobody, which Prefect does not have"):
        asyncio.run(test("slack-webhook/nobody"))
    with pytest.raises(NoNotificationBlock, match="is no notification block"):
        asyncio.run(test(f"object-store/{OBJECT_STORE}"))
