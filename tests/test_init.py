"""`archiver init` on a real Prefect server: what it leaves there, and what it keeps."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate

from blocks.imaging_system import ImagingSystem, WrongBlock
from blocks.object_store import ObjectStore
from flows.init import PREFECT_YAML
from flows.upload import OBJECT_STORE

pytest_plugins = ["tests.prefect_server"]

DESCRIBED: dict[str, Any] = yaml.safe_load(PREFECT_YAML.read_text())


# Name, pool, tags, the hours, and how many at a time.
DEPLOYMENTS = {
    one["entrypoint"]: (
        one["name"],
        one["work_pool"]["name"],
        one["tags"],
        [schedule["cron"] for schedule in one.get("schedules", [])],
        one.get("concurrency_limit"),
    )
    for one in DESCRIBED["deployments"]
}


async def _deployments() -> dict[str | None, tuple[object, ...]]:
    async with get_client() as client:
        return {
            deployment.entrypoint: (
                deployment.name,
                deployment.work_pool_name,
                deployment.tags,
                [getattr(one.schedule, "cron", None) for one in deployment.schedules],
                deployment.global_concurrency_limit and deployment.global_concurrency_limit.limit,
            )
            for deployment in await client.read_deployments()
        }


def test_pools_and_deployments_are_those_of_prefect_yaml(prefect: str) -> None:
    async def test() -> None:
        async with get_client() as client:
            pools = {pool.name: pool for pool in await client.read_work_pools()}
        for name, described in DESCRIBED["definitions"]["work_pools"].items():
            assert pools[name].type == described["type"]
            assert pools[name].concurrency_limit == described["concurrency_limit"]
        assert await _deployments() == DEPLOYMENTS

    asyncio.run(test())


@pytest.mark.long
def test_prefect_deploys_all_by_itself(prefect: str, tmp_path: Path) -> None:
    async def delete() -> None:
        async with get_client() as client:
            for deployment in await client.read_deployments():
                await client.delete_deployment(deployment.id)

    asyncio.run(delete())
    env = {**os.environ, "PREFECT_API_URL": prefect, "PREFECT_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    deployed = subprocess.run(
        command, cwd=PREFECT_YAML.parent.parent, env=env, capture_output=True, text=True, timeout=120
    )
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    assert asyncio.run(_deployments()) == DEPLOYMENTS


def test_no_key_of_the_object_storage_is_stored_in_prefect(prefect: str) -> None:
    async def test() -> dict[str, Any]:
        async with get_client() as client:
            document = await client.read_block_document_by_name(OBJECT_STORE, "object-store", include_secrets=True)
        return document.data

    stored = asyncio.run(test())
    assert stored["bucket_name"]
    assert "test-secret" not in str(stored)


def test_how_the_store_is_used_is_taken_from_its_block(prefect: str, object_store: ObjectStore) -> None:
    async def test() -> ObjectStore:
        changed = object_store.without_keys().model_copy(update={"part_size": 6 << 20})
        await changed.asave("changed", overwrite=True)
        return object_store.tuned_like(cast(ObjectStore, await ObjectStore.aload("changed")))

    store = asyncio.run(test())
    assert store.part_size == 6 << 20
    assert store.credentials == object_store.credentials


def test_a_block_that_is_wrong_is_not_taken_for_none(prefect: str, tmp_path: Path) -> None:
    async def test() -> str:
        id = await ImagingSystem(time_zone="UTC").asave("martian", overwrite=True)
        async with get_client() as client:  # as somebody does in the UI
            await client.update_block_document(id, BlockDocumentUpdate(data={"time_zone": "Mars/Olympus_Mons"}))
        with pytest.raises(WrongBlock) as error:
            await ImagingSystem.configured("martian", tmp_path)
        return str(error.value)

    sentence = asyncio.run(test())
    assert "block of martian" in sentence
    assert "there is no time zone 'Mars/Olympus_Mons'" in sentence


@pytest.mark.parametrize("zone", ["UTC", "Europe/Amsterdam"])
def test_a_block_of_its_name_configures_a_system(prefect: str, tmp_path: Path, zone: str) -> None:
    async def test() -> ImagingSystem:
        if zone != "UTC":
            await ImagingSystem(time_zone=zone, watching="polling").asave("zoned", overwrite=True)
        return await ImagingSystem.configured("zoned", tmp_path)

    system = asyncio.run(test())
    assert (system.name, system.root, system.time_zone) == ("zoned", tmp_path, zone)
    (tmp_path / "zoned" / "events").mkdir(parents=True)
    (tmp_path / "zoned" / "events" / "1.json").write_text(
        '{"timestep_id": "7a2f2f6e-3b1f-4f3b-8a9a-1f2f3f4f5f6f", "plate": 4, "cross_date": "2026-11-01", '
        '"position": 1, "timestamp": "2026-11-23T00:30:00", "img_count": 1, "img_dir": "t"}'
    )
    key = system.read_event("events/1.json").key
    assert key.split("/")[2] == ("20261123" if zone == "UTC" else "20261122")
