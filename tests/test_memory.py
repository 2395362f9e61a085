"""No service of compose.yml comes near its limit of memory while timesteps as large as in a lab go through."""

import json
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests import memory_groups
from tests.compose import ROOT
from tests.network import missing, plain_environment, sandbox


@pytest.mark.soak
@pytest.mark.timeout(500)
def test_limits_are_twice_what_is_held_at_most() -> None:
    if reason := missing() or memory_groups.missing():
        pytest.skip(reason)
    # Not below pytest's own directory, which is closed to the user that PostgreSQL runs as.
    with tempfile.TemporaryDirectory(prefix="archiver-memory-", ignore_cleanup_errors=True) as directory:
        Path(directory).chmod(0o711)
        command = sandbox("tests.storm_in_limits", directory)
        done = subprocess.run(command, cwd=ROOT, env=plain_environment(), capture_output=True, text=True, timeout=490)
        logs = "".join(f"--- {log}\n{log.read_text()[-3000:]}" for log in Path(directory).rglob("logs/*.log"))
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{logs}"
    held = json.loads(done.stdout.splitlines()[-1])
    said = re.findall(r"^\| `([\w-]+)` \| (\d+) \|", (ROOT / "docs" / "production.md").read_text(), re.MULTILINE)
    assert held.keys() >= {name for name, _ in said}
    for name, (peak, limit, kills) in held.items():
        assert kills == 0, name
        assert peak < limit / 2, f"{name}: {peak}"
    for name, megabytes in said:
        if name == "init":
            continue  # it has ended before anybody looks
        assert abs(held[name][0] / 1e6 - int(megabytes)) < 0.3 * int(megabytes), f"{name}: {held[name]}"
