"""`archiver up`: the servers that are missing, then the entrypoints, until a signal."""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass

from pydantic import SecretStr
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from blocks.settings import Settings
from flows.stack.embedded import has_object_storage, require_object_storage, start_servers
from flows.stack.entrypoints import entrypoints, init
from flows.stack.environment import process_environment, shell_environment
from flows.stack.home import Home
from flows.stack.service import Service
from flows.stack.supervisor import Supervisor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stack:
    """A running stack.

    `settings` has nothing missing; `env` is the same as environment variables, secrets in the clear.
    `supervisor` can stop one of the `entrypoints` by its name and start it again by its service.
    """

    settings: Settings
    env: Mapping[str, str]
    entrypoints: Mapping[str, Service]
    supervisor: Supervisor

    @property
    def api_url(self) -> str:
        """The address of the REST gateway and of the web page."""
        return self.settings.local_api_url

    @property
    def docs_url(self) -> str:
        """The address of the documentation of the REST gateway."""
        return f"{self.api_url}/docs"

    @property
    def prefect_ui_url(self) -> str:
        """The address of Prefect's web interface."""
        return str(self.settings.prefect_api_url).removesuffix("/").removesuffix("/api")


@asynccontextmanager
async def running_stack(settings: Settings, *, trial: bool = False) -> AsyncIterator[Stack]:
    """Run the whole system on this machine for as long as the context is open.

    While it is ready, and only then, `settings.home / "env"` holds its settings for a shell.

    Args:
        settings: what is set is used; for what is not, embedded servers are started below `settings.home`.
        trial: allows the embedded object storage, whose objects are gone when it stops.

    Raises:
        MissingSetting: there is no object storage and this is not a trial.
        StartError: another stack runs in this home, or a part did not start; all others are stopped.
    """
    own_object_storage = not has_object_storage(settings)
    if not trial:
        require_object_storage(settings)
    home = Home(settings.home)
    with home.locked():
        logger.info("Starting in %s", home.path)
        home.env_file.unlink(missing_ok=True)
        async with Supervisor(home.directory("logs")) as supervisor:
            settings = await start_servers(await _with_defaults(settings, home), home, supervisor)
            env = process_environment(settings, own_object_storage=own_object_storage)
            stack = Stack(settings, shell_environment(settings), entrypoints(settings, env), supervisor)
            await supervisor.run(init(env))
            await supervisor.start(*stack.entrypoints.values())
            home.write_env(stack.env)
            try:
                yield stack
            finally:
                home.env_file.unlink(missing_ok=True)


async def up(settings: Settings, *, trial: bool = False) -> None:
    """Run the stack in the foreground, say where everything is, and stop it on SIGINT, SIGTERM or SIGHUP.

    Raises:
        MissingSetting, StartError: see `running_stack`.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("flows.stack").setLevel(logging.INFO)
    console = Console()
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    stopping = asyncio.Event()

    def stop() -> None:
        if task and not stopping.is_set():
            stopping.set()
            console.print("Stopping.")
            task.cancel()

    for signal_number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(signal_number, stop)
    try:
        if trial and not has_object_storage(settings):
            console.print(_TRIAL_WARNING)
        async with running_stack(settings, trial=trial) as stack:
            console.print(_addresses(stack))
            await asyncio.Event().wait()
    except asyncio.CancelledError:
        if not stopping.is_set():
            raise
        console.print("Stopped.")


_TRIAL_WARNING = Panel(
    "The object storage of this trial lives in memory: [bold]every object is gone when it stops[/bold].\n"
    "Give it copies of timesteps only, and a new ARCHIVER_HOME for the next trial.",
    title="TRIAL",
    border_style="bold red",
)


def _addresses(stack: Stack) -> Table:
    settings = stack.settings
    table = Table(show_header=False, title="The archiver runs. Stop it with Ctrl-C.", title_justify="left")
    table.add_row("Web page", stack.api_url)
    table.add_row("REST documentation", stack.docs_url)
    table.add_row("Prefect", stack.prefect_ui_url)
    table.add_row("Object storage", f"{settings.aws_endpoint_url}, bucket {settings.bucket}")
    table.add_row("Imaging systems in", str(settings.data_dir))
    table.add_row("Settings for a shell", f". {settings.home / 'env'}")
    table.add_row("Logs", str(settings.home / "logs"))
    return table


async def _with_defaults(settings: Settings, home: Home) -> Settings:
    """Fill in what needs no server: directories, the webhook's token, the port of the API."""
    defaults: dict[str, object] = {}
    for name, directory in (("data_dir", home.path / "data"), ("staging_dir", home.path / "staging")):
        if getattr(settings, name) is None:
            directory.mkdir(exist_ok=True)
            defaults[name] = directory
    if settings.webhook_token is None:
        defaults["webhook_token"] = SecretStr(home.secret("webhook-token"))
    wanted = settings.api_port if "api_port" in settings.model_fields_set else 0
    defaults["api_port"] = await home.port("api", host=settings.api_host, wanted=wanted)
    settings = settings.model_copy(update=defaults)
    # Of this stack, whatever the caller's other commands talk to.
    return settings.model_copy(update={"api_url": settings.local_api_url})
