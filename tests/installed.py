"""The system as it is installed: a wheel in an environment of its own.

For modules that declare `pytest_plugins = ["tests.installed"]`; built once for all of them.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def build(directory: Path, *options: str) -> Path:
    """Build this checkout into a directory; returns the wheel."""
    uv = str(Path(sys.executable).with_name("uv"))
    command = [uv, "build", "--quiet", "--offline", "--no-build-isolation", "--python", sys.executable, *options]
    subprocess.run([*command, "--out-dir", str(directory), str(ROOT)], check=True, timeout=120)
    (wheel,) = directory.glob("*.whl")
    return wheel


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    # By way of the source distribution, so that this has all that belongs into it too.
    return build(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with nothing of ours but the wheel."""
    environment = tmp_path_factory.mktemp("installed")
    uv = [str(Path(sys.executable).with_name("uv")), "--quiet", "--offline"]
    subprocess.run([*uv, "venv", "--allow-existing", "--python", sys.executable, str(environment)], check=True)
    python = environment / "bin" / "python"
    subprocess.run([*uv, "pip", "install", "--no-deps", "--python", str(python), str(wheel)], check=True)
    # What it depends on is here already. A link to the checkout that lies there is not followed from here.
    site_packages = next(environment.glob("lib/python*/site-packages"))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"
