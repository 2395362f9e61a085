"""The real surf-archivers, where `tests/surf_archiver/install.sh` has installed them; and what 0.1.3 says."""

import json
import os
import subprocess
from pathlib import Path
from uuid import UUID, uuid4

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel

from blocks.settings import Settings
from flows.bridge import EXCHANGE

HOME = Path(__file__).parent.parent.parent / ".surf-archiver"
SECONDS = 120.0


def archive(version: str, settings: Settings, target: Path, job_id: UUID, broker: str | None = None) -> None:
    """Have surf-archiver put everything from before today that is not on tape into archives below `target`."""
    program = HOME / version / "bin" / "surf-archiver-cli"
    if not program.exists():
        pytest.skip(f"no surf-archiver {version}: tests/surf_archiver/install.sh installs it")
    assert settings.aws_endpoint_url is not None
    assert settings.aws_secret_access_key is not None
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(target.parent),
        "AWS_ENDPOINT_URL": settings.aws_endpoint_url,
        "AWS_ACCESS_KEY_ID": settings.aws_access_key_id or "",
        "AWS_SECRET_ACCESS_KEY": settings.aws_secret_access_key.get_secret_value(),
        "AWS_DEFAULT_REGION": settings.aws_region,
        "SURF_ARCHIVER_BUCKET": settings.bucket,
        "SURF_ARCHIVER_TARGET_DIR": str(target),
        **({"SURF_ARCHIVER_CONNECTION_URL": broker} if broker else {}),
    }
    command = [str(program), "archive", f"--job-id={job_id}", "--mode=images"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False)
    log = target.parent / ".surf-archiver" / "app.log"
    assert done.returncode == 0, done.stdout + done.stderr + (log.read_text() if log.exists() else "")


def notice(*archives: object, job: UUID | None = None) -> bytes:
    """As 0.1.3 writes it: indented."""
    content = {"job_id": str(job or uuid4()), "date": "2026-11-23", "archives": list(archives)}
    return json.dumps(content, indent=4).encode()


async def publish(channel: AbstractChannel, *bodies: bytes) -> None:
    """As 0.1.3 does: persistent messages, to a fanout exchange that is not durable."""
    exchange = await channel.declare_exchange(EXCHANGE, aio_pika.ExchangeType.FANOUT)
    for body in bodies:
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await exchange.publish(message, "archiving-cron")
