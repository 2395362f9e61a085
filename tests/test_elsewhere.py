"""Purge and audit on hosts that reach some of the systems each."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import cast
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun

from blocks.event_log import EventLog
from blocks.settings import Settings, get_settings
from blocks.system_seen import Disk, SystemSeen
from flows import purge
from flows.elsewhere import say_elsewhere, seen_elsewhere
from flows.watch import event_ingester
from tests.working import flow_runs, when, working

pytest_plugins = ["tests.prefect_server"]


def see(log: EventLog, name: str, minutes_ago: float = 0) -> None:
    """Some event-ingester watches a system."""
    disk = Disk(device="another host:1", directory=f"/data/{name}", free=10**12, total=10**12)
    at = datetime.now(UTC) - timedelta(minutes=minutes_ago)
    log.systems.tell(SystemSeen(name=name, display_name=name, at=at, source=disk, staging=None))


@pytest.fixture
def two_hosts(run_settings: Settings, event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """This host reaches prince, though it has a directory for another system too; another host has aretha."""
    for system in ("prince", "aretha"):
        (cast(Path, run_settings.data_dir) / system / "events").mkdir(parents=True)
    see(event_log, "prince")
    see(event_log, "aretha")
    see(event_log, "miles", minutes_ago=60)
    monkeypatch.setenv("ARCHIVER_SYSTEMS", "prince")
    get_settings.cache_clear()
    return run_settings.model_copy(update={"systems": ("prince",)})


def test_only_what_is_reached_is_looked_at_and_the_rest_is_named(two_hosts: Settings, event_log: EventLog) -> None:
    systems = asyncio.run(purge.configured_systems(two_hosts))
    assert [system.name for system in systems] == ["prince"]
    assert seen_elsewhere(event_log, {"prince"}) == ["aretha"]
    said: list[str] = []
    say_elsewhere(two_hosts, systems, said.append)
    assert said == ["not looked at, because another host has it: aretha; run this there too"]
    # What nobody has seen for long is on no host.
    everything = two_hosts.model_copy(update={"systems": ()})
    said.clear()
    say_elsewhere(everything, asyncio.run(purge.configured_systems(everything)), said.append)
    assert said == []
    # Copies in staging are looked at though the share is away.
    for name in ("prince", "aretha"):
        (cast(Path, two_hosts.staging_dir) / name / uuid4().hex).mkdir(parents=True)
    (cast(Path, two_hosts.data_dir) / "prince" / "events").rmdir()
    assert asyncio.run(purge.configured_systems(two_hosts)) == []
    assert [system.name for system in asyncio.run(purge.staged_systems(two_hosts))] == ["prince"]


@pytest.mark.parametrize("name", ["purge-timesteps/event-ingester", "audit/event-ingester"])
def test_a_scheduled_run_asks_for_runs_where_the_other_systems_are(
    two_hosts: Settings, event_log: EventLog, name: str
) -> None:
    async def test() -> list[FlowRun]:
        async with working(event_ingester, settings=two_hosts), get_client() as client:
            deployment = await client.read_deployment_by_name(name)
            run = await client.create_flow_run_from_deployment(deployment.id)

            async def is_done() -> bool:
                state = (await client.read_flow_run(run.id)).state
                return state is not None and state.is_completed()

            await when(is_done, name)
            # Nobody here polls the queue of the other system.
            return [one for one in await flow_runs() if one.id != run.id]

    (asked,) = asyncio.run(test())
    assert (asked.work_queue_name, asked.parameters["system"]) == ("aretha", "aretha")
    assert asked.name.endswith("of aretha")
    assert asked.state is not None
    assert asked.state.is_scheduled()
