"""The commands for a whole system on one machine: `archiver up`, `demo`, `mock-microscope`."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from blocks.settings import get_settings

# What a mock microscope drops.
Timesteps = Annotated[int, typer.Option(min=1, help="How many timesteps in all.")]
Images = Annotated[int, typer.Option(min=1, help="Images per timestep.")]
ImageBytes = Annotated[int, typer.Option(min=1, help="Bytes of one image's pixels.")]
Systems = Annotated[str, typer.Option(help="Names of the imaging systems.")]


def up(
    trial: Annotated[bool, typer.Option(help="Keep objects in memory: they are gone when it stops.")] = False,
) -> None:
    """The whole system on this machine, in the foreground, until Ctrl-C."""
    from flows.stack.up import up as run_until_signal

    asyncio.run(run_until_signal(get_settings(), trial=trial))


def demo(
    timesteps: Timesteps = 4,
    images: Images = 10,
    image_bytes: ImageBytes = 200_000,
    systems: Systems = "prince,aretha",
) -> None:
    """Show on one machine how timesteps travel, end to end; exits with 1 if one does not arrive."""
    from flows.stack.demo import demo as demonstrate
    from flows.stack.mock_microscope import Plan

    sys.exit(asyncio.run(demonstrate(get_settings(), Plan(systems.split(","), timesteps, images, image_bytes))))


def mock_microscope(
    timesteps: Timesteps = 1,
    images: Images = 10,
    image_bytes: ImageBytes = 200_000,
    systems: Systems = "prince,aretha",
    interval: Annotated[float, typer.Option(min=0, help="Seconds between two timesteps.")] = 0.0,
) -> None:
    """Drop timesteps into ARCHIVER_DATA_DIR like a microscope does."""
    from flows.stack.mock_microscope import Plan, drop_timesteps

    settings = get_settings()
    settings.require("data_dir")
    plan = Plan(systems.split(","), timesteps, images, image_bytes)
    for dropped in drop_timesteps(cast(Path, settings.data_dir), plan, interval_seconds=interval):
        typer.echo(f"{dropped.event_file}: {dropped.images} images, {dropped.bytes} bytes")
