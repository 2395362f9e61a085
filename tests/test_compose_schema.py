"""Docker Compose refuses what the schema of the Compose specification does not allow; podman-compose does not."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jsonschema.validators import validator_for  # type: ignore[import-untyped]

from tests.compose import DEVELOPMENT, PRODUCTION, ROOT, merged

# No part of the lock: it is needed for its copy of the schema alone.
CARRIER = "check-jsonschema==0.39.0"
SCHEMA = "check_jsonschema/builtin_schemas/vendor/compose-spec.json"

CENTRAL = (*PRODUCTION, "deploy/hosts/central.yml")
UPLOAD, INGEST = "deploy/hosts/upload-host.yml", "deploy/hosts/ingest-host.yml"
# What is started together, and the Prefect servers of the site.
COMBINATIONS = [
    (PRODUCTION, 1),
    (DEVELOPMENT, 1),
    (CENTRAL, 1),
    ((*CENTRAL, "deploy/hosts/prefect-replicas.yml"), 2),
    (("deploy/hosts/prefect-host.yml",), 2),
    *(
        (roles, servers)
        for roles in ((UPLOAD,), (INGEST,), (UPLOAD, INGEST), ("deploy/hosts/state-host.yml",))
        for servers in (1, 2)
    ),
]
every_combination = pytest.mark.parametrize(("files", "servers"), COMBINATIONS)


def document(directory: Path, files: tuple[str, ...], servers: int) -> dict[str, Any]:
    addresses = {"PRIVATE_ADDRESS": "10.0.0.2", "CENTRAL_ADDRESS": "10.0.0.1", "ARCHIVER_SYSTEMS": "prince"}
    if servers > 1:
        addresses["SECOND_PREFECT_ADDRESS"] = "10.0.0.4"
    return merged(directory, *files, profiles=("rabbitmq",), **addresses).document


@every_combination
def test_no_list_has_the_same_twice(tmp_path: Path, files: tuple[str, ...], servers: int) -> None:
    for name, service in document(tmp_path, files, servers)["services"].items():
        lists = {key: value for key, value in service.items() if isinstance(value, list) and key != "command"}
        assert {"cap_drop", "security_opt", "tmpfs"} <= lists.keys()
        for key, entries in lists.items():
            assert len({json.dumps(entry) for entry in entries}) == len(entries), f"{name}: {key} {entries}"


def test_these_are_the_files_that_the_pages_name_for_each_role() -> None:
    page, example = ((ROOT / file).read_text() for file in ("docs/production.md", ".env.example"))
    named = set(re.findall(r"^\| [\w -]+ \| `((?:[\w./-]+\.yml:?)+)` \|", page, re.MULTILINE))
    assert named == {":".join(files) for files, _ in COMBINATIONS if files not in (PRODUCTION, DEVELOPMENT)}
    assert set(re.findall(r"^# COMPOSE_FILE=(.*)$", example, re.MULTILINE)) <= named
    # A file that is named beside these would be another set than the host's.
    pages = "".join(file.read_text() for file in (ROOT / "docs").glob("*.md"))
    given = set(re.findall(r"docker compose (?:--env-file \S+ )?((?:-f \S+ )+)", pages))
    assert given == {"-f compose.yml -f compose.dev.yml "}


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("carrier")
    uv = [str(Path(sys.executable).with_name("uv")), "--quiet", "pip", "install", "--python", sys.executable]
    subprocess.run([*uv, "--no-deps", "--target", str(directory), CARRIER], check=True, timeout=100)
    return json.loads((directory / SCHEMA).read_text())


@pytest.mark.soak
@every_combination
def test_it_is_valid(tmp_path: Path, schema: Any, files: tuple[str, ...], servers: int) -> None:
    faults = validator_for(schema)(schema).iter_errors(document(tmp_path, files, servers))
    assert [f"{list(fault.absolute_path)}: {fault.message}" for fault in faults] == []
