"""`archiver init --check`: what is wrong with a configuration, said before anything starts. Changes nothing."""

import os
import shutil
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.console import Console
from rich.markup import escape

from blocks.errors import ArchiverError
from blocks.settings import Settings
from blocks.synthetic_timestep import SYSTEM as FLIGHT_CHECK
from flows import check_services
from flows.check_services import INIT, Wrong

# Characters; a secret that people reach must not be shorter, nor made of few different ones.
SECRET_LENGTH = 16

Ask = Callable[[Settings], str]


@dataclass(frozen=True)
class Finding:
    """What came out of one check: a fault, a piece of advice, or neither."""

    about: str
    fault: str = ""
    advice: str = ""


def check_and_report(settings: Settings, console: Console, entrypoint: str = "init") -> int:
    """Check everything and print it; returns 0 when nothing is wrong, else 1."""
    findings = check(settings, entrypoint)
    for finding in findings:
        verdict = "[red]wrong[/red]" if finding.fault else "[yellow]works[/yellow]" if finding.advice else "good "
        said = escape(finding.fault or finding.advice)
        console.print(f"{finding.about:<18}  {verdict}  {said}".rstrip(), highlight=False, soft_wrap=True)
    return 1 if any(finding.fault for finding in findings) else 0


def check(settings: Settings, entrypoint: str = "init") -> list[Finding]:
    """Check all that an entrypoint needs, at the same time; what `init` needs is what all of them need."""
    checks = {
        about: ask
        for about, (setting, ask) in _CHECKS.items()
        if setting is None or settings.is_read_by(entrypoint, setting)
    }
    if entrypoint not in _WRITE_COPIES and "staging directory" in checks:
        checks["staging directory"] = _copies
    with ThreadPoolExecutor(len(checks)) as pool:
        return list(pool.map(lambda about: _find(about, checks[about], settings), checks))


def _find(about: str, ask: Ask, settings: Settings) -> Finding:
    try:
        return Finding(about, advice=ask(settings))
    except (ArchiverError, OSError) as error:
        return Finding(about, fault=str(error))
    except Exception as error:
        # Whatever it is, the other findings are told. It is a library's sentence, which may show an address.
        where = traceback.extract_tb(error.__traceback__)[-1]
        return Finding(
            about,
            fault=f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}, "
            "whose sentence is left out: there may be a secret in it",
        )


def _data(settings: Settings) -> str:
    settings.require("data_dir")
    directory = cast(Path, settings.data_dir)
    if not directory.is_dir():
        raise Wrong(f"there is no directory {directory}: mount it, or set ARCHIVER_DATA_DIR")
    if not _may(directory, os.R_OK | os.X_OK):
        raise Wrong(f"{directory} can't be read by this user")
    systems = [path for path in directory.iterdir() if path.is_dir() and settings.reaches(path.name)]
    if unknown := set(settings.systems) - {FLIGHT_CHECK} - {path.name for path in systems}:
        raise Wrong(f"ARCHIVER_SYSTEMS names {', '.join(sorted(unknown))}, which {directory} does not have: mount it")
    # What is in a directory is not to be asked for before the directory is open.
    for inside in ("", "/events"):
        paths = [Path(f"{path}{inside}") for path in systems]
        if closed := [path for path in paths if path.is_dir() and not _may(path, os.R_OK | os.X_OK)]:
            names = ", ".join(sorted(str(path.relative_to(directory)) for path in closed))
            raise Wrong(f"this user can't read {names} in {directory}")
    microscopes = [path for path in systems if path.name != FLIGHT_CHECK]
    return "" if any((path / "events").is_dir() for path in microscopes) else f"no system in {directory} has events yet"


def _copies(settings: Settings) -> str:
    directory = settings.staging_dir
    if directory is None or not directory.exists():
        return "" if directory is None else f"{directory} is not there yet: {INIT}"
    if not _may(directory, os.R_OK | os.X_OK):
        raise Wrong(f"{directory} can't be read by this user")
    return ""


def _staging(settings: Settings) -> str:
    directory = settings.staging_dir
    if directory is None or not directory.exists():
        return _copies(settings)
    if not _may(directory, os.R_OK | os.W_OK | os.X_OK):
        raise Wrong(f"this user can't write to {directory}")
    budget, there = settings.staging_budget_bytes, shutil.disk_usage(directory).total
    if budget and budget > there:
        return f"ARCHIVER_STAGING_BUDGET_BYTES is {budget}, but the disk of {directory} is for {there}: it counts alone"
    return ""


def _may(directory: Path, mode: int) -> bool:
    return os.access(directory, mode, effective_ids=True)


def _secrets(settings: Settings) -> str:
    given = {
        "ARCHIVER_API_TOKEN": settings.api_token,
        "ARCHIVER_WEBHOOK_TOKEN": settings.webhook_token,
    }
    secrets = {name: secret.get_secret_value() for name, secret in given.items() if secret is not None}
    # Prefect's own, user:password.
    if prefect := os.environ.get("PREFECT_API_AUTH_STRING"):
        secrets["PREFECT_API_AUTH_STRING"] = prefect.partition(":")[2]
    if weak := [name for name, secret in secrets.items() if _can_be_guessed(secret)]:
        raise Wrong(f"{' and '.join(weak)} can be guessed: `openssl rand -hex 32` makes a better one")
    if settings.api_token and settings.api_token == settings.webhook_token:
        raise Wrong(
            "ARCHIVER_API_TOKEN is ARCHIVER_WEBHOOK_TOKEN, so who may read may also say what is on tape: change one"
        )
    return ""


def _can_be_guessed(secret: str) -> bool:
    return len(secret) < SECRET_LENGTH or len(set(secret)) < SECRET_LENGTH / 2


def _webhook(settings: Settings) -> str:
    return "" if settings.webhook_token else "closed for surf-archiver until ARCHIVER_WEBHOOK_TOKEN is set"


# Those that make the copies of timesteps, or their directory; to others it is mounted read-only.
_WRITE_COPIES = ("init", "event-ingester")

# Each raises an ArchiverError, or an OSError, if something is wrong, and returns a piece of advice or nothing.
# It is asked for those that read the setting.
_CHECKS: dict[str, tuple[str | None, Ask]] = {
    "data directory": ("data_dir", _data),
    "staging directory": ("staging_dir", _staging),
    "database": ("database_url", check_services.database),
    "stream": ("redis_url", check_services.stream),
    "object storage": ("bucket", check_services.storage),
    "clock": ("bucket", check_services.clock),
    "Prefect": ("prefect_api_url", check_services.prefect),
    "RabbitMQ": ("rabbitmq_url", check_services.rabbitmq),
    "secrets": (None, _secrets),
    "webhook": ("webhook_token", _webhook),
}
