"""How much more two upload hosts move than one, where the link of each has a limit.

The hosts are network namespaces with the services of their roles in `deploy/hosts`, so it needs root. First one of them
uploads the timesteps of a system, then both do. One JSON object comes last: `rate_ratio` is the rate of both over
that of the one.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import cast

from blocks.messages import Uploaded
from flows.stack.mock_microscope import drop_timestep
from tests.host_failures import INGEST, UPLOAD, Watch, add_share_host
from tests.hosts import Site
from tests.network import missing, plain_environment, sandbox

SYSTEM = "prince"
START = datetime(2026, 11, 23, 12, tzinfo=UTC)
# A process imports what it needs for its first upload: those of each host don't count.
WARM_UP = 6

numbers = count()


async def rate(watch: Watch, share: Path, timesteps: int, images: int, image_bytes: int) -> float:
    """Megabytes per second, from the first byte of so many timesteps until the last of them is proven."""
    wanted = set()
    for _, number in zip(range(timesteps), numbers, strict=False):
        at = START + timedelta(minutes=number)
        dropped = await asyncio.to_thread(
            drop_timestep, share, SYSTEM, images=images, image_bytes=image_bytes, timestamp=at, position=number + 1
        )
        wanted.add(dropped.timestep_id)
        total = number + 1
    await watch.until(Uploaded, lambda uploaded: uploaded == total, "uploaded")
    uploads = [cast(Uploaded, event.data) for event in watch.said(Uploaded) if event.data.timestep_id in wanted]
    seconds = max(one.proof.verified_at for one in uploads) - min(one.started_at for one in uploads)
    return sum(one.size for one in uploads) / seconds.total_seconds() / 1e6


async def bench(directory: Path, given: Namespace) -> dict[str, float]:
    """Run all of it; returns the figures."""
    async with Site(directory) as site:
        hosts = [
            await add_share_host(site, "one", SYSTEM, files=(INGEST, UPLOAD)),
            await add_share_host(site, "other", SYSTEM, files=(UPLOAD,)),
        ]
        watch, rates = Watch(site), []
        for host in hosts:
            await host.start()
            host.host.limit(given.megabits)
            await rate(watch, directory / "shares", WARM_UP, images=2, image_bytes=3000)
            rates.append(
                await rate(watch, directory / "shares", given.timesteps, images=4, image_bytes=given.image_bytes)
            )
    one, both = rates
    return {
        "link_mb_per_second": given.megabits / 8,
        "one_host_mb_per_second": round(one, 2),
        "two_hosts_mb_per_second": round(both, 2),
        "rate_ratio": round(both / one, 2),
    }


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--timesteps", type=int, default=16, help="of four images, for one host and for two")
    parser.add_argument("--image-bytes", type=int, default=5_000_000)
    parser.add_argument("--megabits", type=float, default=32.0, help="that each host may send per second")
    parser.add_argument("--directory", type=Path, help="of a run in a sandbox")
    given = parser.parse_args()
    if given.directory:
        print(json.dumps(asyncio.run(bench(given.directory, given))))
        return
    if reason := missing():
        sys.exit(reason)
    # Below /tmp, because PostgreSQL runs as a user of its own.
    with tempfile.TemporaryDirectory(prefix="archiver-hosts-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o711)
        command = sandbox("bench.hosts", *sys.argv[1:], "--directory", directory)
        sys.exit(subprocess.run(command, env=plain_environment(), check=False).returncode)


if __name__ == "__main__":
    main()
