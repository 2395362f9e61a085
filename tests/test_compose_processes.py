"""The services of the compose files, run as processes, move timesteps."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.network import missing, run_in_sandbox

SECONDS = 580.0


@pytest.mark.soak
@pytest.mark.timeout(SECONDS + 20)
def test_the_services_move_timesteps() -> None:
    if not shutil.which("traefik", path=Path(sys.executable).parent):
        pytest.skip("needs Traefik, whose wheel is for Linux on x86-64")
    if reason := missing():
        pytest.skip(reason)
    run_in_sandbox("tests.compose_processes", SECONDS)
