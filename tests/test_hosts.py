"""The examples for several hosts: the same parts, with the same promises, as compose.yml."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.compose import OURS, PRODUCTION, ROOT, Compose, merged, read_by


@pytest.fixture
def production(tmp_path: Path) -> Compose:
    return merged(tmp_path, *PRODUCTION)


def test_the_central_host_publishes_its_servers_on_the_private_network(tmp_path: Path, production: Compose) -> None:
    central = merged(tmp_path, *PRODUCTION, "deploy/hosts/central.yml", PRIVATE_ADDRESS="10.0.0.1")
    published = {name: service.pop("ports") for name, service in central.services.items() if "ports" in service}
    assert published == {
        "postgres": ["10.0.0.1:5432:5432"],
        "redis": ["10.0.0.1:6379:6379"],
        "prefect": ["10.0.0.1:4200:4200"],
        "traefik": ["127.0.0.1:80:80"],
    }


@pytest.mark.parametrize(
    ("file", "names"), [("upload-host.yml", {"upload-worker"}), ("state-host.yml", {"state-manager", "api"})]
)
def test_a_role_is_what_it_is_on_one_host(tmp_path: Path, production: Compose, file: str, names: set[str]) -> None:
    role = merged(tmp_path, f"deploy/hosts/{file}", PRIVATE_ADDRESS="10.0.0.2", CENTRAL_ADDRESS="10.0.0.1")
    assert role.services.keys() == names
    for name, service in role.services.items():
        same = production.services[name]
        for key in (
            "command",
            "user",
            "cap_drop",
            "security_opt",
            "read_only",
            "tmpfs",
            "mem_limit",
            "restart",
            "image",
        ):
            assert service[key] == same[key], key
        assert service["healthcheck"]["test"] == same["healthcheck"]["test"]
        for variable, value in service["environment"].items():
            assert variable in OURS
            assert value == same["environment"][variable]
        assert set(service["secrets"]) <= role.document["secrets"].keys()
        assert all(Path(secret["file"]).parent.name == "secrets" for secret in role.document["secrets"].values())
        hosts = service["extra_hosts"]
        assert {"redis", "prefect"} <= {*hosts} if isinstance(hosts, dict) else {host.split(":")[0] for host in hosts}
        assert service.get("volumes", []) == [volume for volume in same.get("volumes", []) if ":/src" not in volume]


def test_the_pods_are_upload_workers(production: Compose) -> None:
    document: dict[str, Any] = yaml.safe_load((ROOT / "deploy/kubernetes/upload-worker.yml").read_text())
    pod = document["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    worker = production.services["upload-worker"]
    assert container["args"] == worker["command"]
    assert container["image"] == worker["image"]
    mounted = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert {mount["mountPath"] for mount in mounted.values() if not mount.get("readOnly")} == {"/tmp"}
    (secrets,) = [volume["secret"]["items"] for volume in pod["volumes"] if "secret" in volume]
    made = re.findall(r"[a-z_]+", (ROOT / "scripts/make-secrets.sh").read_text())
    assert {item["key"] for item in secrets} <= {*made}
    assert {item["path"] for item in secrets} == {*worker["secrets"]}
    given = [entry["name"] for entry in container["env"]] + [item["path"].upper() for item in secrets]
    assert {*given} & OURS.keys() == read_by("upload-worker")
