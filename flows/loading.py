"""The flows of deployments, loaded once per process."""

import asyncio
from copy import copy
from typing import Any

from prefect.filesystems import LocalFileSystem
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH

_flows: dict[str, Flow[..., Any]] = {}


async def load(entrypoint: str) -> Flow[..., Any]:
    """The flow of a deployment, ready to be executed many times."""
    if entrypoint not in _flows:
        # In a thread, because a flow imports all that it needs.
        flow: Flow[..., Any] = await asyncio.to_thread(
            load_flow_from_entrypoint, entrypoint, use_placeholder_flow=False
        )
        if flow.persist_result is False and flow.result_storage is None:
            # Prefect would ask the server where to store results, in each run, and let all others wait for the answer.
            flow = copy(flow)
            flow.result_storage = LocalFileSystem(basepath=str(PREFECT_LOCAL_STORAGE_PATH.value()))
        _flows[entrypoint] = flow
    return _flows[entrypoint]
