"""Timesteps as large as in a lab, through the services of compose.yml under their limits of memory.

`python -m tests.storm_in_limits DIRECTORY`, in a sandbox (tests/network.py).
"""

import asyncio
import json
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from blocks.messages import Uploaded
from flows.stack.mock_microscope import drop_timestep
from tests.compose import ENTRYPOINTS
from tests.containers import Containers
from tests.host_failures import Watch
from tests.hosts import Site

TIMESTEPS, IMAGES, IMAGE_BYTES = 6, 150, 2_000_000


async def sample(containers: Containers) -> None:
    """Look at what each service holds, again and again."""
    while True:
        for group in list(containers.memory.values()):
            group.sample()
        await asyncio.sleep(0.1)


async def run(directory: Path) -> None:
    """Prints, as its last line, what each service held at most (bytes), and how many of its processes were killed."""
    site = Site(directory, limited=True)
    try:
        async with site:
            sampling = asyncio.create_task(sample(site.containers))
            await site.containers.start(site.central, *ENTRYPOINTS)
            begin = time.monotonic()
            for number in range(TIMESTEPS):
                at = datetime(2026, 11, 23, 12, tzinfo=UTC) + timedelta(minutes=number)
                size = {"images": IMAGES, "image_bytes": IMAGE_BYTES}
                await asyncio.to_thread(drop_timestep, site.data, "prince", **size, timestamp=at, position=number + 1)
            await Watch(site).until(Uploaded, lambda count: count == TIMESTEPS, "uploaded")
            print(f"{time.monotonic() - begin:.0f} s", flush=True)
            sampling.cancel()
            groups = site.containers.memory
            print(json.dumps({name: (group.peak, group.limit, group.kills) for name, group in groups.items()}))
    finally:
        for group in site.containers.memory.values():
            group.remove()


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
