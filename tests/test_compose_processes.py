"""The services of the compose files, run as processes, move timesteps."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.compose import ROOT
from tests.network import plain_environment


@pytest.mark.long
def test_the_services_move_timesteps() -> None:
    if not shutil.which("traefik", path=Path(sys.executable).parent):
        pytest.skip("needs Traefik, whose wheel is for Linux on x86-64")
    if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("ip"):
        pytest.skip("needs root, unshare (util-linux) and ip (iproute2), for namespaces of its own")
    # Not below pytest's own directory, which is closed to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="archiver-compose-") as directory:
        Path(directory).chmod(0o711)
        command = ["unshare", "--net", "--mount", "--propagation", "private"]
        command += [sys.executable, "-m", "tests.compose_processes", directory]
        done = subprocess.run(command, cwd=ROOT, env=plain_environment(), capture_output=True, text=True, timeout=280)
        logs = "".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in Path(directory, "logs").glob("*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
