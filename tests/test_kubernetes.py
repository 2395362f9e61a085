"""The example for Kubernetes is what Kubernetes and Prefect's worker there expect."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.compose import ROOT

# No part of the lock: sixteen thousand files that nothing else needs.
WITH = ("kubernetes-validate==1.37.0", "prefect-kubernetes==0.8.0")


@pytest.mark.soak
def test_the_example_is_valid(tmp_path: Path) -> None:
    uv = [str(Path(sys.executable).with_name("uv")), "--quiet"]
    python = str(tmp_path / "bin" / "python")
    subprocess.run([*uv, "venv", "--python", sys.executable, "--allow-existing", str(tmp_path)], check=True, timeout=60)
    # Everything else in the versions that are tested.
    constraints = str(ROOT / "requirements.lock")
    install = [*uv, "pip", "install", "--python", python, "--constraints", constraints, *WITH]
    subprocess.run(install, check=True, timeout=200)
    check = [python, "-m", "tests.kubernetes_check"]
    # Nobody is asked there.
    env = {"HOME": str(tmp_path), "PREFECT_API_URL": "http://prefect:4200/api"}
    done = subprocess.run(check, cwd=ROOT, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
