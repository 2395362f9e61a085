"""What the Prefect UI shows of an upload."""

from uuid import UUID

import httpx
from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.runtime import flow_run as current_run

from blocks.messages import Uploaded
from blocks.settings import Settings


async def publish(uploaded: Uploaded, settings: Settings) -> None:
    """Show in the Prefect UI what was uploaded, with a link to the timestep."""
    seconds = max((uploaded.proof.verified_at - uploaded.started_at).total_seconds(), 1e-3)
    rate = uploaded.size / seconds / 1e6
    url = f"{settings.api_url or settings.local_api_url}/timesteps/{uploaded.timestep_id}"
    get_run_logger().info("%s: %d bytes in %.1f s, %.1f MB/s, proven", uploaded.key, uploaded.size, seconds, rate)
    facts = {
        "timestep": f"[{uploaded.timestep_id}]({url})",
        "key": f"`{uploaded.bucket}/{uploaded.key}`",
        "bytes": f"{uploaded.size:,}",
        "images": str(len(uploaded.images)),
        "seconds": f"{seconds:.2f}",
        "MB/s": f"{rate:.1f}",
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    artifact = ArtifactCreate(
        type="markdown", data=f"| | |\n|---|---|\n{table}", flow_run_id=UUID(current_run.id), description=uploaded.key
    )
    try:
        async with get_client() as client:
            await client.create_artifact(artifact)
    except httpx.HTTPError as error:
        # The upload is proven and said in the stream: that doesn't fail for want of its table.
        get_run_logger().warning("the run has no artifact: %s", error)
