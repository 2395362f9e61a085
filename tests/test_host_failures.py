"""Several hosts, as network namespaces: some are lost in the middle, and every timestep arrives exactly once."""

import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.compose import ROOT
from tests.network import missing, plain_environment, sandbox


@pytest.mark.soak
@pytest.mark.timeout(400)
def test_hosts_are_lost_and_every_timestep_arrives_exactly_once() -> None:
    if reason := missing():
        pytest.skip(reason)
    # Not below pytest's own directory, which is closed to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="archiver-hosts-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o711)
        command = sandbox("tests.host_failures", directory)
        done = subprocess.run(command, cwd=ROOT, env=plain_environment(), capture_output=True, text=True, timeout=390)
        logs = "".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in Path(directory).rglob("logs/*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
