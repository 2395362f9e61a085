"""The compose files, read and merged by a compose implementation."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from blocks.settings import Settings

ROOT = Path(__file__).parent.parent
PRODUCTION = ("compose.yml",)
DEVELOPMENT = ("compose.yml", "compose.dev.yml")
ENTRYPOINTS = ("event-ingester", "upload-worker", "state-manager", "api")
OURS = {Settings.variable(name): field for name, field in Settings.model_fields.items()}


@dataclass(frozen=True)
class Compose:
    """A merged compose document."""

    document: dict[str, Any]

    @property
    def services(self) -> dict[str, dict[str, Any]]:
        services: dict[str, dict[str, Any]] = self.document["services"]
        return services

    def routes(self) -> dict[str, str]:
        """The address of the server to which Traefik sends the requests for a host."""
        traefik = self.services["traefik"]
        found = {}
        for mounted in traefik["volumes"]:
            source, target, *_ = mounted.split(":")
            if not target.startswith("/etc/traefik/routes/"):
                continue
            # Traefik fills in its templates before it reads the file.
            text = re.sub(
                r"\{\{ env \"(\w+)\" \}\}", lambda match: traefik["environment"][match[1]], (ROOT / source).read_text()
            )
            http = yaml.safe_load(text)["http"]
            for router in http["routers"].values():
                (host,) = re.findall(r"^Host\(`([\w.]+)`\)$", router["rule"])
                (server,) = http["services"][router["service"]]["loadBalancer"]["servers"]
                found[host] = server["url"]
        return found


def read_by(name: str) -> set[str]:
    """The settings that an entrypoint or init reads, says their class, and that the image does not set itself."""
    by_image = set(re.findall(r"^(?:ENV)?\s+([A-Z_]+)=", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    found = {Settings.variable(setting) for setting in Settings.model_fields if Settings.is_read_by(name, setting)}
    return found - by_image


def merged(tmp_path: Path, *files: str, profiles: tuple[str, ...] = (), **variables: str) -> Compose:
    """What the files say together, with .env.example and these variables."""
    # It asks podman for its version before it reads anything; no more of podman is needed to merge.
    podman = tmp_path / "bin" / "podman"
    podman.parent.mkdir(parents=True, exist_ok=True)
    podman.write_text("#!/bin/sh\necho podman version 5.0.0\n")
    podman.chmod(0o755)
    command = [sys.executable, "-m", "podman_compose", "--env-file", str(ROOT / ".env.example")]
    command += [part for profile in profiles for part in ("--profile", profile)]
    command += [part for file in files for part in ("-f", file)]
    env = {"PATH": f"{podman.parent}:{os.environ['PATH']}", **variables}
    result = subprocess.run([*command, "config"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    if result.returncode:
        pytest.fail(result.stderr)
    return Compose(yaml.safe_load(result.stdout))
