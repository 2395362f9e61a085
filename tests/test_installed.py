"""What the wheel contains. That it works is shown by tests/test_end_to_end.py, which runs it."""

import os
import subprocess
import zipfile
from pathlib import Path

pytest_plugins = ["tests.installed"]

ROOT = Path(__file__).parent.parent
PACKAGES = ("api", "blocks", "flows", "migrations")


def test_it_contains_every_file_of_the_packages(wheel: Path) -> None:
    described = {"flows/prefect.yaml"}
    for package in PACKAGES:
        files = (path for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
        described |= {str(path.relative_to(ROOT)) for path in files}
    with zipfile.ZipFile(wheel) as archive:
        contained = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert archive.read("flows/prefect.yaml") == (ROOT / "prefect.yaml").read_bytes()
    assert contained == described
    assert any(name.endswith(".html") for name in contained)
    assert any(name.startswith("migrations/versions/") for name in contained)


def test_away_from_the_checkout_it_is_what_runs(installed: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "python"), "-c", "import flows; print(flows.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert Path(found).is_relative_to(installed.parent)
    script = subprocess.run([str(installed / "archiver"), "--help"], cwd=tmp_path, env=env, capture_output=True)
    assert script.returncode == 0
    assert b"upload-worker" in script.stdout
