"""The way of one synthetic timestep: every step takes a bounded time, or says where the way is broken."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID, uuid4

from blocks import synthetic_files
from blocks.entry import UnreadableEntry
from blocks.messages import EventData, Failed, Ingested, Rejected, Uploaded
from blocks.synthetic_object import NotAsSent, check_identity, read_back
from blocks.synthetic_timestep import announcement
from blocks.tables import Timestep, TimestepState
from flows.bounded import Broken, until, work
from flows.withdrawal import Places, withdraw, withdraw_leftovers


@dataclass(frozen=True)
class Limits:
    """What each stage may take (seconds)."""

    ingest: float
    upload: float
    record: float


class Flight:
    """One timestep on its way, watched from outside: by the stream, the database and the bucket."""

    def __init__(self, places: Places, limits: Limits, say: Callable[[str], None], run_id: UUID | None = None) -> None:
        self._places = places
        self._limits = limits
        self._say = say
        self._run_id = run_id
        self._timestep_id = uuid4()
        self._read_up_to = ""
        self._heard: list[EventData] = []

    async def clear(self) -> None:
        """Have a place to send from, and remove what former flights have left.

        Raises:
            NotPossible: when there can't be such a place.
            Broken: when something can't be removed.
        """
        await work(synthetic_files.prepare, self._places.root)
        await work(withdraw_leftovers, self._places, self._say, self._run_id)

    async def go(self) -> float:
        """Send it, and take it back, whether it arrived or not; returns the seconds until it had arrived.

        Raises:
            NotPossible: when it can't be sent.
            Broken: when it did not arrive, not as it was sent, or can't be removed.
        """
        began = time.monotonic()
        uploaded: Uploaded | None = None
        try:
            await self._send()
            await self._ingested()
            uploaded = await self._uploaded()
            row = await self._recorded()
            await self._prove(uploaded, row)
        except Exception:
            try:
                await self._take_back(uploaded, "as it had not arrived as it should")
            except Exception as error:
                self._say(f"what is left is removed by the next flight check: {error}")
            raise
        arrived = time.monotonic()
        await self._take_back(uploaded, "as it had arrived")
        await self._gone()
        return arrived - began

    # --- the steps

    async def _send(self) -> None:
        self._read_up_to = await asyncio.to_thread(self._places.log.newest)
        await work(synthetic_files.drop, self._places.home, self._timestep_id)
        self._say(f"timestep {self._timestep_id} is in {self._places.home}")

    async def _ingested(self) -> None:
        def look() -> bool:
            for data in self._hear():
                if isinstance(data, Rejected):
                    raise Broken(f"the timestep was not taken in: {data.reason}")
            return any(isinstance(data, Ingested) for data in self._heard)

        seconds, home = self._limits.ingest, self._places.home
        await until(
            look,
            seconds,
            f"the timestep was written to {home}, but not ingested within {seconds:g} s: does an event-ingester watch "
            f"{home / 'events'}, is the work pool event-ingester paused, see the runs of ingest-timestep",
        )
        self._say("it is ingested")

    async def _uploaded(self) -> Uploaded:
        def look() -> Uploaded | None:
            for data in self._hear():
                if isinstance(data, Failed):
                    raise Broken(f"the timestep was ingested, but its upload was given up: {data.reason}")
            return next((data for data in self._heard if isinstance(data, Uploaded)), None)

        seconds = self._limits.upload
        uploaded = await until(
            look,
            seconds,
            f"the timestep was ingested, but not uploaded within {seconds:g} s: is an upload-worker running, does it "
            f"see {self._places.home}, is the work pool upload-worker paused, see the runs of upload-timestep",
        )
        self._say(f"it is uploaded: {uploaded.key}")
        return uploaded

    async def _recorded(self) -> Timestep:
        def look() -> Timestep | None:
            row = self._places.row(self._timestep_id)
            return row if row and row.uploaded_at else None

        seconds = self._limits.record
        row = await until(
            look,
            seconds,
            f"the timestep was uploaded, but not recorded within {seconds:g} s: is a state-manager running, is the "
            "work pool state-manager paused, see the runs of record-events",
        )
        self._say("it is recorded")
        return row

    async def _prove(self, uploaded: Uploaded, row: Timestep) -> None:
        try:
            await work(prove, self._places, uploaded, row)
        except NotAsSent as error:
            raise Broken(
                f"{error}. It stays there: find out who else writes to the bucket, or whether the storage is damaged"
            ) from error
        self._say("every byte of it was read back")

    async def _take_back(self, uploaded: Uploaded | None, reason: str) -> None:
        await work(withdraw, self._places, self._timestep_id, uploaded, reason, self._run_id)

    async def _gone(self) -> None:
        seconds = self._limits.record
        await until(
            lambda: self._places.row(self._timestep_id) is None,
            seconds,
            f"the timestep was withdrawn, but its row did not go within {seconds:g} s: is a state-manager running, see "
            "the runs of record-events",
        )

    # --- how

    def _hear(self) -> list[EventData]:
        """All that the stream has said of it since it was sent."""
        event_file = synthetic_files.event_file(self._timestep_id)
        for page in self._places.log.pages(1000, f"({self._read_up_to}"):
            for entry in page:
                self._read_up_to = entry.id
                if entry.fields.get("timestep_id") != str(self._timestep_id) and entry.type != Rejected.type:
                    continue
                try:
                    data = entry.decode().data
                except UnreadableEntry:
                    continue
                if data.timestep_id == self._timestep_id or getattr(data, "event_file", None) == event_file:
                    self._heard.append(data)
        return self._heard


def prove(places: Places, uploaded: Uploaded, row: Timestep) -> None:
    """Read back every byte, and compare it with what was sent, with what was said, and with what is recorded.

    Raises:
        NotAsSent: when anything differs.
        ObjectStoreError: when it can't be read.
    """
    stored = read_back(places.store, uploaded.timestep_id)
    if stored is None:
        raise NotAsSent(f"{uploaded.key} is not in the bucket any more")
    check_identity(stored, uploaded, "was uploaded")
    check_identity(stored, row, "is recorded")
    if row.state != TimestepState.UPLOADED or row.announced != announcement(row.id).document():
        raise NotAsSent(f"timestep {row.id} is recorded as {row.state}, or not as it was announced")
    if places.store.tags(uploaded.key).get("archived"):
        raise NotAsSent(f"{uploaded.key} has the tag `archived`, and nobody has archived it")
