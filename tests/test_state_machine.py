"""The state-manager under everything a log may do to it: deliveries twice, out of order, and lost on the way.

What was said is kept beside, and the database must agree with it, as plainly as the rules can be told.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from sqlalchemy import Engine
from sqlmodel import Session

import flows.record
from blocks.event_file import ImagingEvent
from blocks.event_log import EventLog
from blocks.messages import Archived, EventData, Failed, Ingested, LogEvent, SourcePurged, StagingPurged, Uploaded
from blocks.proven_object import Image
from blocks.synthetic_timestep import SYSTEM, announcement
from flows.apply import apply_events
from flows.record import GROUP, record_waiting
from tests.events import NOON, announced, archived, failed, ingested, purged, uploaded, withdrawn
from tests.test_record import empty, rows

SYNTHETIC = announcement(UUID(int=3 << 96))
EVENTS = [*(announced(UUID(int=number << 96), position=number) for number in (1, 2)), SYNTHETIC]


ANOTHER: dict[str, Any] = {
    "sha256": "cd" * 32,
    "etag": "another",
    "images": [Image(name="Img/Img_r00_c00.tif", offset=512, size=999, sha256="ab" * 32)],
}


def system_of(event: ImagingEvent) -> str:
    return SYSTEM if event is SYNTHETIC else "prince"


SAYINGS: st.SearchStrategy[EventData] = st.sampled_from(EVENTS).flatmap(
    lambda event: st.sampled_from(
        [
            ingested(event, system_of(event), event_file=f"events/{event.position}.json"),
            uploaded(event, system_of(event)),
            uploaded(event, system_of(event), **ANOTHER),
            uploaded(event, system_of(event), sha256=None),  # found in the bucket
            uploaded(event, system_of(event), **{**ANOTHER, "sha256": None}),
            failed(event, system=system_of(event)),
            failed(event, system=system_of(event), attempt=2),
            withdrawn(event),  # which counts only for what is synthetic
            archived(event.key),
            archived(event.key, job=2),
            archived(event.key, job=3, etag="another"),  # a tag's
            purged(event, SourcePurged),
            purged(event, StagingPurged),
        ]
    )
)
SECONDS = st.integers(0, 20)
CONSUMERS = st.sampled_from(["one", "two"])


class Deliveries(RuleBasedStateMachine):
    """One log, two consumers that die at any moment, and what the log says."""

    engine: Engine
    log: EventLog

    def __init__(self) -> None:
        super().__init__()
        empty(self.engine)
        self.log.redis.flushall()
        self.log.ensure_groups()
        self.first: dict[UUID, LogEvent] = {}

    @rule(data=SAYINGS, seconds=SECONDS, twice=st.booleans())
    def say(self, data: EventData, seconds: int, twice: bool) -> None:
        """Clocks differ, so times are in no order. A writer that died says it again, past the guard against it."""
        event = LogEvent.of(data, "test").model_copy(update={"time": NOON + timedelta(seconds=seconds)})
        if isinstance(data, Uploaded) and (known := self.first.get(event.id)):
            # Not earlier than before: the history has no images, from which those of an upload in between could be had.
            event = event.model_copy(update={"time": max(event.time, known.time)})
        for _ in range(1 + twice):
            self.log.redis.xadd(self.log.stream, {"event": event.model_dump_json(), "type": event.type})
        known = self.first.get(event.id)
        if known is None or event.time < known.time:
            self.first[event.id] = event

    @rule(event=st.sampled_from(EVENTS), seconds=SECONDS, back=st.booleans())
    def replace(self, event: ImagingEvent, seconds: int, back: bool) -> None:
        """An object is archived, and replaced by another, which is archived too; said in either order."""
        system = system_of(event)
        other = uploaded(event, system, **ANOTHER)
        told = [uploaded(event, system), archived(event.key), other, archived(event.key, job=3, etag="another")]
        for offset, data in list(enumerate(told))[:: -1 if back else 1]:
            self.say(data, seconds + offset, False)

    @rule(consumer=CONSUMERS, limit=st.integers(1, 4))
    def deliver(self, consumer: str, limit: int) -> None:
        self._record(consumer, limit)

    @rule(consumer=CONSUMERS, limit=st.integers(1, 4))
    def lose(self, consumer: str, limit: int) -> None:
        """Delivered, and the process dies before it did anything."""
        self.log.read(GROUP, consumer, count=limit, wait_seconds=0.001)

    @rule(consumer=CONSUMERS, limit=st.integers(1, 4))
    def die_before_the_commit(self, consumer: str, limit: int) -> None:
        entries = self.log.read(GROUP, consumer, count=limit, wait_seconds=0.001)
        with Session(self.engine) as session:
            apply_events(session, entries)
            session.rollback()

    @rule(consumer=CONSUMERS, limit=st.integers(1, 4))
    def die_before_the_acknowledgement(self, consumer: str, limit: int) -> None:
        entries = self.log.read(GROUP, consumer, count=limit, wait_seconds=0.001)
        with Session(self.engine) as session, session.begin():
            apply_events(session, entries)

    @rule()
    def deliver_all_again(self) -> None:
        """An operator sets the group back to the beginning."""
        self.log.redis.xgroup_setid(self.log.stream, GROUP, "0")

    @invariant()
    def nothing_is_known_that_was_not_said(self) -> None:
        found = rows(self.engine)
        assert {row["id"] for row in found["TimestepEvent"]} <= self.first.keys()

    def teardown(self) -> None:
        """In the end all is delivered, and the database says what the log says."""
        self._record("one", 100)
        found = rows(self.engine)
        assert {row["id"]: row["time"] for row in found["TimestepEvent"]} == {
            id: event.time for id, event in self.first.items()
        }
        expected = self._expected()
        assert {row["id"]: told(row) for row in found["Timestep"]} == expected
        images = {(row["timestep_id"], Image.model_validate(row)) for row in found["TimestepImage"]}
        assert images == {(id, image) for id in expected for image in self._images_of(id)}
        path_of = {row["id"]: row["path"] for row in found["Archive"]}
        assert {
            (path_of[row["archive_id"]], row["key"]): (row["archived_at"], row["job_id"])
            for row in found["ArchiveMember"]
        } == self._expected_members()
        backlog = self.log.backlog(GROUP)
        assert (backlog.waiting, backlog.in_progress, backlog.set_aside) == (0, 0, 0)

    def _record(self, consumer: str, limit: int) -> None:
        record_waiting(self.log, self.engine, consumer, limit, linger_seconds=0.001)

    def _images_of(self, timestep_id: UUID) -> Sequence[Image]:
        uploads = [
            (said.time, said.id, said.data.images)
            for said in self.first.values()
            if isinstance(said.data, Uploaded) and said.data.timestep_id == timestep_id
        ]
        return max(uploads)[2] if uploads else ()

    def _expected_members(self) -> dict[tuple[str, str], tuple[datetime, UUID]]:
        notices = [(said.time, said.data) for said in self.first.values() if isinstance(said.data, Archived)]
        first: dict[tuple[str, str], tuple[datetime, UUID]] = {}
        for at, notice in notices:
            place = (notice.archive, notice.key)
            first[place] = min((at, notice.job_id), first.get(place, (at, notice.job_id)))
        return first

    def _on_tape(self, event: ImagingEvent) -> list[datetime]:
        """When archives got the present object: where there was another before, only by what names this one's ETag."""
        uploads = [
            (said.time, said.id, said.data.etag)
            for said in self.first.values()
            if isinstance(said.data, Uploaded) and said.data.timestep_id == event.timestep_id
        ]
        since, _, present = max(uploads)
        is_replaced = len({etag for _, _, etag in uploads}) > 1
        notices = [
            (said.time, said.data.etag)
            for said in self.first.values()
            if isinstance(said.data, Archived) and said.data.key == event.key
        ]
        return [at for at, etag in notices if not is_replaced or (at > since and etag == present)]

    def _expected(self) -> dict[UUID, dict[str, Any]]:
        expected = {}
        for event in EVENTS:
            times = {
                kind: [
                    said.time
                    for said in self.first.values()
                    if isinstance(said.data, kind)
                    and event.timestep_id == (said.data.timestep_id or event.timestep_id)
                    and getattr(said.data, "key", event.key) == event.key
                ]
                for kind in (Ingested, Uploaded, Failed, Archived, SourcePurged, StagingPurged)
            }
            if not (times[Ingested] or times[Uploaded] or times[Failed]):
                continue
            if event is SYNTHETIC and withdrawn(event) in [said.data for said in self.first.values()]:
                continue
            last = {kind: max(said, default=None) for kind, said in times.items()}
            at, until = last[Failed], last[Uploaded]
            on_tape = min(self._on_tape(event), default=None) if until else None
            failed_at = at if at and not (until and until >= at) else None
            expected[event.timestep_id] = {
                "state": "archived" if on_tape else "uploaded" if until else "failed" if at else "ingested",
                "ingested_at": min(times[Ingested], default=None),
                "uploaded_at": until,
                "failed_at": failed_at,
                "archived_at": on_tape,
                "source_purged_at": last[SourcePurged],
                "staging_purged_at": last[StagingPurged],
            }
        return expected


def told(row: dict[str, Any]) -> dict[str, Any]:
    times = ("ingested_at", "uploaded_at", "failed_at", "archived_at", "source_purged_at", "staging_purged_at")
    return {"state": str(row["state"]), **{name: row[name] for name in times}}


def test_whatever_happens_to_deliveries_the_end_is_the_same(
    engine: Engine, event_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whoever looks takes over what the other left lying.
    monkeypatch.setattr(flows.record, "TAKE_OVER_SECONDS", 0)
    machine = type("Machine", (Deliveries,), {"engine": engine, "log": event_log})
    run_state_machine_as_test(
        machine,
        settings=hypothesis_settings(
            max_examples=15, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
