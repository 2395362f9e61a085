"""Prepares everything the entrypoints need. Repeatable: what is there already stays."""

import asyncio
import logging
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.exceptions import ObjectNotFound

from blocks.database import migrate
from blocks.errors import ArchiverError
from blocks.event_log import EventLog
from blocks.imaging_system import ImagingSystem
from blocks.incomplete_uploads import expire_by_rule
from blocks.object_errors import ObjectStoreError
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from flows.upload import OBJECT_STORE
from flows.worker import InProcessWorker

logger = logging.getLogger(__name__)

# In a checkout a link to that of the root, where Prefect's own command looks for it; in a wheel the file itself.
PREFECT_YAML = Path(__file__).with_name("prefect.yaml")


class DeployFailed(ArchiverError):
    """`prefect deploy` failed; the message is what it printed."""


def initialize(settings: Settings, abort_incomplete_days: int | None = None) -> None:
    """Directories, migrations, consumer groups, bucket, blocks, work pools and deployments.

    Args:
        abort_incomplete_days: the bucket gets a rule to abort uploads that are not completed after so
            many days; None leaves its rules as they are.

    Raises:
        MissingSetting: with all settings that are needed and not there.
        DeployFailed: when Prefect refused a deployment.
    """
    settings.require("data_dir", "database_url", "redis_url", "prefect_api_url")
    store = ObjectStore.from_settings(settings)

    for directory in filter(None, (settings.data_dir, settings.staging_dir)):
        # The source may be mounted read-only; then it is there already.
        if not directory.is_dir():
            directory.mkdir(parents=True)
    logger.info("Directories are there")
    migrate(settings)
    logger.info("The database is at its newest migration")
    with closing(EventLog.from_settings(settings)) as log:
        log.ensure_groups()
        if not log.is_durable():
            logger.warning("Redis keeps no append-only file: with it, the last events are lost. Set appendonly yes")
    logger.info("The stream and its consumer groups are there")
    store.ensure_bucket()
    logger.info("The bucket %s is there", settings.bucket)
    if abort_incomplete_days is not None:
        expire_incomplete_uploads(store, abort_incomplete_days)
    asyncio.run(_prepare_prefect(store))
    deploy()
    logger.info("Blocks, work pools and deployments are there")


def expire_incomplete_uploads(store: ObjectStore, days: int) -> None:
    """Give the bucket the rule, or say that it takes none: nothing else depends on it."""
    try:
        expire_by_rule(store.wire, days)
    except ObjectStoreError as error:
        logger.warning("The bucket takes no rule; our own uploads are aborted by the daily flow run: %s", error)
    else:
        logger.info("The bucket aborts uploads, whoever began them, that are not completed after %d days", days)


async def _prepare_prefect(store: ObjectStore) -> None:
    for block in (ObjectStore, ImagingSystem, EventLog):
        await block.aregister_type_and_schema()
    # How the store is used may have been set in the UI. Its keys stay out of Prefect's database:
    # whoever loads the block takes them from the environment, as the flows do.
    with suppress(ValueError):
        store = store.tuned_like(await ObjectStore.aload(OBJECT_STORE))
    await store.without_keys().asave(OBJECT_STORE, overwrite=True)
    async with get_client() as client:
        for name, pool in yaml.safe_load(PREFECT_YAML.read_text())["definitions"]["work_pools"].items():
            await _ensure_pool(client, name, pool)


async def _ensure_pool(client: PrefectClient, name: str, pool: dict[str, Any]) -> None:
    # Its limit may have been changed since: it is for all hosts together, so it depends on how many there are.
    try:
        await client.read_work_pool(name)
    except ObjectNotFound:
        template = InProcessWorker.get_default_base_job_template()
        await client.create_work_pool(WorkPoolCreate(name=name, base_job_template=template, **pool))


def deploy() -> None:
    """Deploy every flow of prefect.yaml, with Prefect's own command.

    Raises:
        DeployFailed: when it did not end well.
    """
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_YAML)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=PREFECT_YAML.parent.parent, check=False)  # noqa: S603 -- no part of the command comes from outside
    if result.returncode != 0:
        raise DeployFailed(f"prefect deploy ended with {result.returncode}:\n{result.stdout}{result.stderr}")
