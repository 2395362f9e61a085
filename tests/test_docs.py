"""What isn't documented doesn't exist: settings, commands and routes are in the documentation."""

from pathlib import Path

import pytest
import typer.main

from api.app import create_app
from blocks.imaging_system import ImagingSystem
from blocks.settings import Settings
from blocks.settings_table import with_table
from flows.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = README + "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))


def test_every_setting_is_documented() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    assert page == with_table(page), "run: python -m blocks.settings_table docs/settings.md"
    for name, field in Settings.model_fields.items():
        assert f"| `{Settings.variable(name)}` |" in page
        assert field.description, name


def test_every_field_of_an_imaging_system_is_documented() -> None:
    page = (ROOT / "docs" / "settings.md").read_text()
    fields = {name for name, field in ImagingSystem.model_fields.items() if not field.exclude} - {"name", "root"}
    assert {name for name in fields if f"| `{name}` |" not in page} == set()


@pytest.mark.parametrize("command", sorted(typer.main.get_group(app).commands))
def test_every_command_is_documented(command: str) -> None:
    assert f"archiver {command}" in DOCS


def test_every_route_is_in_the_readme(settings: Settings) -> None:
    paths = create_app(settings).openapi()["paths"]
    assert len(paths) > 10
    assert [path for path in paths if f"| `{path}` |" not in README] == []
