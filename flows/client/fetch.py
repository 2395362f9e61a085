"""`archiver fetch`: an experiment's objects, several at a time, each proven."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from blocks.settings import Settings
from flows.client.download import Downloader, DownloadError
from flows.client.gateway import Gateway, GatewayError, RemoteTimestep


def fetch(settings: Settings, query: Mapping[str, Any], directory: Path, parallel: int, console: Console) -> int:
    """Fetch what a query over /exports finds; returns the exit code: 0 when all of it is here, proven.

    Raises:
        MissingSetting: when the API's address is not set.
        GatewayError: when the API can't be asked what there is.
    """
    with closing(Gateway.from_settings(settings)) as gateway:
        timesteps = list(gateway.exports(query))
        if not timesteps:
            console.print("There is nothing of that in object storage.")
            return 1
        failed = _fetch_all(gateway, timesteps, directory, parallel, console)
    for timestep, reason in failed:
        console.print(f"[red]failed[/red] {timestep.timestep_id} {escape(reason)}", soft_wrap=True, highlight=False)
    here = len(timesteps) - len(failed)
    console.print(f"{here} of {len(timesteps)} timesteps are in {directory}, each proven by what is recorded of it.")
    return 1 if failed else 0


def _fetch_all(
    gateway: Gateway, timesteps: list[RemoteTimestep], directory: Path, parallel: int, console: Console
) -> list[tuple[RemoteTimestep, str]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    failed: list[tuple[RemoteTimestep, str]] = []
    with Progress(*columns, console=console) as bar, ThreadPoolExecutor(parallel) as pool:
        total = bar.add_task(f"0/{len(timesteps)}", total=sum(timestep.size for timestep in timesteps))
        downloader = Downloader(gateway, directory, progress=lambda size: bar.advance(total, size))
        fetching = {pool.submit(downloader.fetch, timestep): timestep for timestep in timesteps}
        try:
            for number, future in enumerate(as_completed(fetching), 1):
                try:
                    future.result()
                except (DownloadError, GatewayError, OSError) as error:
                    failed.append((fetching[future], str(error)))
                bar.update(total, description=f"{number}/{len(timesteps)}")
        except BaseException:
            # What has begun goes on to its end; all else stays where it is.
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed
