"""What the pages for operators tell them to do exists: commands, options, services, alarms and metrics."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from fastapi.testclient import TestClient

from flows.cli import app
from tests.compose import ROOT

PAGES = ("runbook.md", "production.md", "upgrade-and-backup.md")
COMPOSE = yaml.safe_load((ROOT / "compose.yml").read_text())
ALARMS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alarms.yml").read_text())["groups"][0]["rules"]

_VERBS = "logs|stop|start|restart|ps|exec|run|up"
_COMPOSE = re.compile(rf"docker compose (?:-f \S+ )*(?:{_VERBS})(?: -{{1,2}}[a-zA-Z-]+)*((?: [a-z-]+)*)")


def _code(page: str) -> list[str]:
    """Every line of code in a page."""
    return _code_of((ROOT / "docs" / page).read_text())


def _code_of(text: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    return [line.partition(" #")[0] for block in blocks for line in block.splitlines()] + inline


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    commands: dict[str, Any] = typer.main.get_group(app).commands  # type: ignore[assignment]
    found = 0
    for line in _code(page):
        match = re.search(r"(?:^| )archiver ([a-z][a-z-]+)(.*)$", line)
        if not match:
            continue
        command = commands[match[1]]
        known = {option for parameter in command.params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", match[2])) <= known, line
        found += 1
    assert found


@pytest.mark.parametrize("page", PAGES)
def test_services_and_files_exist(page: str) -> None:
    services = COMPOSE["services"]
    for line in _code(page):
        if match := _COMPOSE.match(line):
            named = match[1].split()
            if " exec" in line or " run" in line:
                named = named[:1]
            assert set(named) <= services.keys(), line
        for path in re.findall(r"(?:scripts|deploy|tests)/[\w./-]+", line):
            assert (ROOT / path).exists(), line


@pytest.mark.parametrize("page", [path.name for path in (ROOT / "docs").glob("*.md")])
def test_a_command_of_an_operator_waits_for_no_service(page: str) -> None:
    # Else Compose has postgres, redis and prefect healthy first, and runs init, when it is asked what is wrong.
    for line in _code(page):
        if "docker compose run" in line:
            assert "docker compose run --rm --no-deps " in line


def test_it_tells_how_to_rotate_every_secret() -> None:
    section = (ROOT / "docs" / "runbook.md").read_text().partition("\n## Rotate credentials")[2].partition("\n## ")[0]
    documents = [yaml.safe_load(path.read_text()) for path in (ROOT / "compose.yml", *ROOT.glob("deploy/hosts/*.yml"))]
    files = {Path(one["file"]).name for document in documents for one in document.get("secrets", {}).values()}
    assert set(re.findall(r"secrets/(\w+)", "\n".join(_code_of(section)))) == files


def test_every_alarm_has_its_section() -> None:
    sections = re.findall(r"^### (\w+)$", (ROOT / "docs" / "runbook.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(rule["alert"] for rule in ALARMS)


def test_every_alarm_is_about_a_metric(client: TestClient) -> None:
    metrics = client.get("/metrics").text
    for rule in ALARMS:
        for metric in re.findall(r"archiver_\w+", rule["expr"]):
            assert re.search(rf"^(# TYPE )?{metric}[ {{]", metrics, re.MULTILINE), metric


@pytest.mark.parametrize("page", [path.name for path in (ROOT / "docs").glob("*.md")])
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / "docs" / page).read_text()
    for target, anchor in re.findall(r"\]\(([\w./-]*)(?:#([\w-]+))?\)", text):
        path = Path(ROOT / "docs" / (target or page))
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}, anchor
