"""Keeps the stream from growing for ever."""

import asyncio
from contextlib import closing
from datetime import UTC, datetime, timedelta

from prefect import flow, get_run_logger

from blocks.backlog import remove_unneeded
from blocks.event_log import EventLog
from blocks.settings import Settings, get_settings


@flow(name="trim-stream", flow_run_name="trim the stream")
async def trim_stream() -> int:
    """Remove what is old from the stream, unless somebody still needs it; returns how many entries."""
    removed = await asyncio.to_thread(trim, get_settings())
    get_run_logger().info("removed %d entries from the stream", removed)
    return removed


def trim(settings: Settings) -> int:
    """Remove the entries that are older than the settings' `stream_days` and that no group needs."""
    with closing(EventLog.from_settings(settings)) as log:
        return remove_unneeded(log.redis, log.stream, datetime.now(UTC) - timedelta(days=settings.stream_days))
