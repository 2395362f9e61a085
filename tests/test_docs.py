"""What isn't documented doesn't exist: settings, commands and routes are in the documentation."""

from pathlib import Path

import pytest
import typer.main
from prefect_aws import S3Bucket

from api.app import create_app
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from flows.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_documented(name: str) -> None:
    assert f"| `{Settings.variable(name)}` |" in (ROOT / "docs" / "settings.md").read_text()


@pytest.mark.parametrize("field", sorted(ObjectStore.model_fields.keys() - S3Bucket.model_fields.keys()))
def test_every_way_to_tune_the_object_storage_is_documented(field: str) -> None:
    assert f"| `{field}` |" in (ROOT / "docs" / "uploads.md").read_text()


@pytest.mark.parametrize("command", sorted(typer.main.get_group(app).commands))
def test_every_command_is_documented(command: str) -> None:
    assert f"archiver {command}" in DOCS


def test_every_route_is_in_the_readme(settings: Settings) -> None:
    paths = create_app(settings).openapi()["paths"]
    assert len(paths) > 10
    assert [path for path in paths if f"| `{path}` |" not in README] == []
