"""`archiver demo`: timesteps travel from a mock microscope to object storage and tape, on one machine."""

import asyncio
import hashlib
import shutil
import tarfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import httpx
import urllib3
from pydantic import SecretStr
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from blocks.settings import Settings
from flows.stack.embedded import has_object_storage
from flows.stack.home import Home
from flows.stack.mock_microscope import Dropped, Plan, drop_timesteps
from flows.stack.up import Stack, running_stack

# How long it may take (seconds), beside the time for its data at a rate any machine reaches (bytes per second).
PATIENCE = 120.0
SLOWEST_RATE = 2_000_000
POLL_SECONDS = 0.5
READ_BYTES = 1 << 20
MANIFEST = "manifest-sha256.txt"


class Lost(Exception):
    """An image is missing or altered; the message says which."""


@dataclass
class Travel:
    """How far one timestep got, and what the gateway says of its object."""

    dropped: Dropped
    state: str = "dropped"
    export: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """From the event file to the proven object."""
        return (datetime.fromisoformat(self.export["uploaded_at"]) - self.dropped.at).total_seconds()


async def demo(settings: Settings, plan: Plan) -> int:
    """Run the demonstration, with a home of its own below `settings.home`.

    Returns:
        0 when every timestep arrived, was verified and is archived, else 1.
    """
    home = _fresh(settings.home / "demo")
    # The mock's images never go where real ones are.
    settings = settings.model_copy(update={"home": home, "data_dir": home / "data", "staging_dir": home / "staging"})
    for system in plan.systems:
        (home / "data" / system / "events").mkdir(parents=True)
    console = Console()
    console.print(f"Starting the stack in {home}")
    async with running_stack(settings, trial=not has_object_storage(settings)) as stack, _gateway(stack) as gateway:
        journey = Journey(stack, gateway, plan, console)
        patience = PATIENCE + plan.timesteps * plan.images * plan.image_bytes / SLOWEST_RATE
        fault = None
        try:
            async with asyncio.timeout(patience):
                await journey.run()
        except TimeoutError:
            fault = f"Not done within {patience:.0f} s."
        except Lost as error:
            fault = str(error)
        console.print(journey.table())
        console.print(f"Prefect UI  {stack.prefect_ui_url}\nAPI docs    {stack.docs_url}\nPage        {stack.api_url}/")
        missing = journey.missing()
        if fault or missing:
            console.print(*filter(None, [fault, *missing, f"The logs are in {home / 'logs'}."]), sep="\n", style="red")
            return 1
        console.print(f"All {plan.timesteps} timesteps are in object storage, verified, and archived.", style="green")
        return 0


class Journey:
    """The timesteps of a demonstration on their way."""

    def __init__(self, stack: Stack, gateway: httpx.AsyncClient, plan: Plan, console: Console) -> None:
        self._stack = stack
        self._gateway = gateway
        self._plan = plan
        columns = (SpinnerColumn(), TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn())
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console)
        self._bars = {
            step: self._progress.add_task(step, total=plan.timesteps)
            for step in ("dropped", "uploaded", "verified", "archived")
        }
        self._travels: list[Travel] = []

    async def run(self) -> None:
        """Drop the timesteps and go with each until it is archived.

        Raises:
            Lost: when an object does not hold what was dropped.
        """
        with self._progress:
            dropping = asyncio.create_task(self._drop())
            try:
                while not dropping.done() or self._in_state("dropped"):
                    await self._take_exports()
                    await asyncio.sleep(POLL_SECONDS)
                await dropping
            finally:
                dropping.cancel()
            await self._announce_archive()
            while self._in_state("verified"):
                await self._take_archived()
                await asyncio.sleep(POLL_SECONDS)

    def missing(self) -> list[str]:
        """A sentence for every timestep that is not archived."""
        short = [f"{travel.dropped.event_file} is only {travel.state}." for travel in self._travels]
        short = [line for line, travel in zip(short, self._travels, strict=True) if travel.state != "archived"]
        if len(self._travels) < self._plan.timesteps:
            short.append(f"Only {len(self._travels)} of {self._plan.timesteps} timesteps were dropped.")
        return short

    def table(self) -> Table:
        """What became of each timestep."""
        table = Table(Column("timestep", overflow="fold"), "system", "images", "bytes", "event → object", "state")
        for travel in self._travels:
            dropped = travel.dropped
            seconds = f"{travel.seconds:.1f} s" if travel.export else ""
            row = (str(dropped.timestep_id), dropped.system, str(dropped.images), f"{dropped.bytes:,}", seconds)
            table.add_row(*row, travel.state)
        return table

    def _in_state(self, state: str) -> list[Travel]:
        return [travel for travel in self._travels if travel.state == state]

    def _advance(self, travel: Travel, state: str) -> None:
        travel.state = state
        self._progress.advance(self._bars[state])

    async def _drop(self) -> None:
        drops = drop_timesteps(cast(Path, self._stack.settings.data_dir), self._plan)
        while (dropped := await asyncio.to_thread(next, drops, None)) is not None:
            self._travels.append(Travel(dropped))
            self._progress.advance(self._bars["dropped"])

    async def _take_exports(self) -> None:
        exports = {export["timestep_id"]: export for export in await _all(self._gateway, "exports")}
        for travel in self._in_state("dropped"):
            if export := exports.get(str(travel.dropped.timestep_id)):
                travel.export = export
                self._advance(travel, "uploaded")
                await asyncio.to_thread(verify, export["url"], travel.dropped)
                self._advance(travel, "verified")

    async def _announce_archive(self) -> None:
        keys = [travel.export["key"] for travel in self._travels]
        today = datetime.now(UTC).date().isoformat()
        body = {
            "job_id": str(uuid4()),
            "date": today,
            "archives": [{"path": f"images/demo/{today}.tar", "src_keys": keys}],
        }
        token = cast(SecretStr, self._stack.settings.webhook_token).get_secret_value()
        answer = await self._gateway.post(
            "webhooks/surf-archiver", json=body, headers={"Authorization": f"Bearer {token}"}
        )
        answer.raise_for_status()

    async def _take_archived(self) -> None:
        archived = {timestep["timestep_id"] for timestep in await _all(self._gateway, "timesteps", state="archived")}
        for travel in self._in_state("verified"):
            if str(travel.dropped.timestep_id) in archived:
                self._advance(travel, "archived")


def verify(url: str, dropped: Dropped) -> None:
    """Fetch a timestep's object and compare it with its own manifest and with the files on disk.

    Raises:
        Lost: when a byte differs, or an image is missing.
    """
    found: dict[str, str] = {}
    manifest = ""
    with (
        urllib3.request("GET", url, preload_content=False, timeout=60.0) as answer,
        tarfile.open(fileobj=answer, mode="r|") as tar,
    ):
        for member in tar:
            content = tar.extractfile(member)
            if content is None:
                raise Lost(f"{member.name} of timestep {dropped.timestep_id} is not a file.")
            if member.name.removeprefix("./") == MANIFEST:
                manifest = content.read().decode()
                continue
            digest = hashlib.sha256()
            while chunk := content.read(READ_BYTES):
                digest.update(chunk)
            found[member.name.removeprefix("./")] = digest.hexdigest()
    listed = {line[66:].removeprefix("./"): line[:64] for line in manifest.splitlines()}
    if listed != found:
        raise Lost(f"The object of timestep {dropped.timestep_id} does not hold what its manifest says.")
    for image in sorted(dropped.image_dir.rglob("*.tif")):
        name = str(image.relative_to(dropped.image_dir))
        with image.open("rb") as file:
            if found.get(name) != hashlib.file_digest(file, "sha256").hexdigest():
                raise Lost(f"{image} is missing or altered in the object of timestep {dropped.timestep_id}.")


async def _all(gateway: httpx.AsyncClient, path: str, **query: str) -> list[dict[str, Any]]:
    """Every item of a list of the gateway, page by page."""
    items: list[dict[str, Any]] = []
    cursor: str | None = None
    while True:
        answer = await gateway.get(path, params={"limit": "100", **query, **({"cursor": cursor} if cursor else {})})
        answer.raise_for_status()
        page = answer.json()
        items += page["data"]
        cursor = page["next"]
        if cursor is None:
            return items


@asynccontextmanager
async def _gateway(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    token = stack.settings.api_token
    headers = {"Authorization": f"Bearer {token.get_secret_value()}"} if token else {}
    async with httpx.AsyncClient(base_url=f"{stack.api_url}/api/1/", headers=headers, trust_env=False) as client:
        yield client


def _fresh(path: Path) -> Path:
    """An empty home: a demonstration starts from nothing."""
    home = Home(path)
    with home.locked():
        for entry in path.iterdir():
            if entry.name == "lock":
                continue  # it is held
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
    return path
