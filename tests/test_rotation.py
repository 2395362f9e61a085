"""Secrets are rotated as the runbook says, and every timestep arrives."""

import asyncio
import os
import subprocess
from pathlib import Path

import aio_pika
import pytest
from aiormq.exceptions import AMQPConnectionError

from tests import rabbitmq, rados_gateway
from tests.containers import make_secrets
from tests.network import missing, run_in_sandbox
from tests.rotation import DOORS, steps

# In the broker's container, its own programs; its services run.
DOCKER = f"""#!/bin/sh
[ "$2" = up ] || {{ shift 4; PATH={rabbitmq.PROGRAM.parent}:$PATH exec "$@"; }}
"""


def test_every_kind_of_secret_is_rotated() -> None:
    assert steps().keys() == DOORS.keys() | {"RabbitMQ's"}


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_timesteps_arrive_while_secrets_are_rotated() -> None:
    if reason := missing() or ", ".join(rados_gateway.missing_programs()):
        pytest.skip(reason)
    run_in_sandbox("tests.rotation", 890)


@pytest.mark.soak
def test_rabbitmq_is_given_another_password(tmp_path: Path) -> None:
    if reason := ", ".join(rabbitmq.missing_programs()):
        pytest.skip(reason)
    make_secrets(tmp_path)
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o755)
    (tmp_path / "broker").mkdir()

    async def connect(user: str) -> None:
        await (await aio_pika.connect(f"amqp://{user}@{broker.url.partition('@')[2]}", timeout=20)).close()

    with rabbitmq.RabbitMQ.running(tmp_path / "broker") as broker:
        env = broker.environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        begin = "docker compose exec -T rabbitmq rabbitmqctl"
        first = f"{begin} add_user archiver old; {begin} set_permissions archiver '.*' '.*' '.*'"
        for script in (first, steps()["RabbitMQ's"]):
            command = ["bash", "-euo", "pipefail", "-c", script]
            done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0, done.stdout + done.stderr
        url = (tmp_path / "secrets" / "archiver_rabbitmq_url").read_text().strip()
        asyncio.run(connect(url.removeprefix("amqp://").removesuffix("@rabbitmq:5672/")))
        with pytest.raises(AMQPConnectionError, match="ACCESS_REFUSED"):
            asyncio.run(connect("archiver:old"))
