"""The examples for several hosts: the same parts, with the same promises, as compose.yml."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import prefect
import pytest
import yaml
from prefect.settings import get_current_settings
from prefect.utilities.templating import find_placeholders

from tests.compose import PRODUCTION, ROOT, Compose, merged

MADE = {*re.findall(r"[a-z_]+", (ROOT / "scripts/make-secrets.sh").read_text())}
DEPLOYED = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
# What a service is, wherever it runs.
PROMISED = ("command", "user", "cap_drop", "security_opt", "read_only", "tmpfs", "mem_limit", "restart", "image")


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


def test_a_central_host_without_shares_has_no_workers(tmp_path: Path) -> None:
    for number in ("1", "0"):
        given = {"PRIVATE_ADDRESS": "10.0.0.1"} | ({"CENTRAL_WORKERS": "0"} if number == "0" else {})
        services = merged(tmp_path, *PRODUCTION, "deploy/hosts/central.yml", profiles=(), **given).services
        scales = {name: service["scale"] for name, service in services.items() if "scale" in service}
        assert scales == {"event-ingester": number, "upload-worker": number}


def test_the_second_prefect_server_is_as_the_first_one(tmp_path: Path) -> None:
    addresses = {"PRIVATE_ADDRESS": "10.0.0.1", "SECOND_PREFECT_ADDRESS": "10.0.0.4", "CENTRAL_ADDRESS": "10.0.0.1"}
    files = (*PRODUCTION, "deploy/hosts/central.yml", "deploy/hosts/prefect-replicas.yml")
    central = merged(tmp_path, *files, profiles=(), **addresses)
    other = merged(tmp_path, "deploy/hosts/prefect-host.yml", profiles=(), **addresses)
    first, second = central.services["prefect"], other.services["prefect"]
    for key in PROMISED:
        assert first[key] == second[key], key
    assert second["environment"].pop("PREFECT_SERVER_DATABASE_MIGRATE_ON_START") == "false"
    assert first["environment"] == second["environment"]
    assert {*first["secrets"]} == {*second["secrets"]}
    for secret in second["secrets"]:
        files_of = {Path(one.document["secrets"][secret]["file"]).name for one in (central, other)}
        assert len(files_of) == 1
        assert files_of <= MADE
    # Whatever keeps something in the memory of one server is kept in Redis.
    in_memory = {name for name, module in _modules() if module.endswith(".memory")}
    assert in_memory <= first["environment"].keys()
    assert "prefect_server_docket_url" in first["secrets"]
    both = ["prefect:10.0.0.1", "prefect:10.0.0.4"]
    for name in ("init", "event-ingester", "upload-worker", "state-manager", "api"):
        assert central.services[name]["extra_hosts"] == both, name


def _modules() -> Iterator[tuple[str, str]]:
    """Prefect's settings that name a module, by their variables, with their defaults."""
    server = get_current_settings().server
    for part, prefix in (
        (server.events, "PREFECT_SERVER_EVENTS_"),
        (server.concurrency, "PREFECT_SERVER_CONCURRENCY_"),
        (server.worker_channel, "PREFECT_SERVER_WORKER_CHANNEL_"),
    ):
        for name, field in type(part).model_fields.items():
            if isinstance(field.default, str) and field.default.startswith("prefect."):
                variable = f"{prefix}{name}".upper().replace("SERVER_EVENTS_MESSAGING", "MESSAGING")
                yield variable, field.default


@pytest.mark.parametrize(
    ("file", "names"),
    [
        ("ingest-host.yml", {"event-ingester"}),
        ("upload-host.yml", {"upload-worker"}),
        ("state-host.yml", {"state-manager", "api"}),
    ],
)
def test_a_role_is_what_it_is_on_one_host(tmp_path: Path, file: str, names: set[str]) -> None:
    variables = {"ARCHIVER_SYSTEMS": "prince", "PRIVATE_ADDRESS": "10.0.0.2", "CENTRAL_ADDRESS": "10.0.0.1"}
    production = merged(tmp_path, *PRODUCTION, profiles=(), **variables)
    role = merged(tmp_path, f"deploy/hosts/{file}", profiles=(), **variables)
    assert role.services.keys() == names
    for name, service in role.services.items():
        same = production.services[name]
        for key in PROMISED:
            assert service[key] == same[key], key
        assert service["environment"] == same["environment"]
        assert {*service["secrets"]} == {*same["secrets"]}
        assert service["healthcheck"]["test"] == same["healthcheck"]["test"]
        assert all(Path(secret["file"]).parent.name == "secrets" for secret in role.document["secrets"].values())
        names_known = [re.split("[:=]", host)[0] for host in service["extra_hosts"]]
        assert names_known == ["postgres", "redis", "prefect", "prefect"]
        assert service.get("volumes", []) == [volume for volume in same.get("volumes", []) if ":/src" not in volume]


def test_hosts_find_both_prefect_servers_where_there_are_two(tmp_path: Path) -> None:
    one = {"ARCHIVER_SYSTEMS": "prince", "CENTRAL_ADDRESS": "10.0.0.1"}
    for addresses in ({}, {"SECOND_PREFECT_ADDRESS": "10.0.0.4"}):
        worker = merged(tmp_path, "deploy/hosts/upload-host.yml", profiles=(), **one, **addresses).services[
            "upload-worker"
        ]
        second = addresses.get("SECOND_PREFECT_ADDRESS", "10.0.0.1")
        assert worker["extra_hosts"][2:] == ["prefect:10.0.0.1", f"prefect={second}"]


def test_the_pods_are_upload_workers(production: Compose) -> None:
    pod = _pod("upload-worker.yml")
    (container,) = pod["containers"]
    worker = production.services["upload-worker"]
    assert container["args"] == worker["command"]
    assert container["image"] == worker["image"]
    mounted = {mount["name"]: mount for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert {mount["mountPath"] for mount in mounted.values() if not mount.get("readOnly")} == {"/tmp"}
    (secrets,) = [volume["secret"]["items"] for volume in pod["volumes"] if "secret" in volume]
    assert {item["key"] for item in secrets} <= MADE
    assert {item["path"] for item in secrets} <= {*worker["secrets"]}


def test_the_pods_find_the_central_host_under_its_names_and_ports(tmp_path: Path) -> None:
    central = merged(tmp_path, *PRODUCTION, "deploy/hosts/central.yml", PRIVATE_ADDRESS="192.0.2.1")
    documents = [*yaml.safe_load_all((ROOT / "deploy/kubernetes/central.yml").read_text())]
    services = {one["metadata"]["name"]: one for one in documents if one["kind"] == "Service"}
    slices = {one["metadata"]["labels"]["kubernetes.io/service-name"]: one for one in documents if "endpoints" in one}
    assert services.keys() == slices.keys() == {"redis", "prefect"}
    for name, service in services.items():
        assert service["spec"]["ports"] == slices[name]["ports"]
        ((address,), (port,)) = slices[name]["endpoints"][0]["addresses"], service["spec"]["ports"]
        assert central.services[name]["ports"] == [f"{address}:{port['port']}:{port['port']}"]
    assert {one["metadata"]["namespace"] for one in documents} == {"archiver"}


def test_the_secret_of_the_pods_is_made_from_all_files_that_they_read() -> None:
    page = (ROOT / "docs/production.md").read_text()
    made = {file for _, file in re.findall(r"--from-file=(secrets/)?(\w+)", page)}
    text = "".join(path.read_text() for path in (ROOT / "deploy/kubernetes").glob("*-worker.yml"))
    assert made == set(re.findall(r"\bkey: (\w+)", text))
    by_variable = set(re.findall(r"secretKeyRef: \{name: archiver, key: (\w+)\}", text))
    assert by_variable == set(re.findall(r"--from-file=(\w+)=<\(tr -d '\\n' <secrets/\1\)", page))


def test_the_jobs_of_a_kubernetes_work_pool_are_as_the_pods() -> None:
    template = json.loads((ROOT / "deploy/kubernetes/job-template.json").read_text())
    job = template["job_configuration"]["job_manifest"]
    pod, theirs = job["spec"]["template"]["spec"], _pod("upload-worker.yml")
    (container,), (worker,) = pod["containers"], theirs["containers"]
    # Everything that is filled in has a name, and what the pool's operator does not give has a value.
    properties = template["variables"]["properties"]
    used = {found.name for found in find_placeholders(template["job_configuration"])}
    assert used == properties.keys()
    assert {name for name, variable in properties.items() if "default" not in variable} == {"command", "name", "labels"}
    assert (job["kind"], pod["restartPolicy"], job["spec"]["backoffLimit"]) == ("Job", "Never", 0)
    # Prefect's worker takes no other job.
    assert (container["name"], pod["parallelism"], pod["completions"]) == ("prefect-job", 1, 1)
    assert (container["args"], container["env"]) == ("{{ command }}", "{{ env }}")
    assert properties["image"]["default"] == worker["image"]
    env = {entry["name"]: entry["value"] for entry in worker["env"] if "value" in entry}
    given = properties["env"]["default"]
    # Prefect gives its own address to the job; and a job reads no stream, and logs through Prefect.
    assert {**given, "PREFECT_API_URL": env["PREFECT_API_URL"], "ARCHIVER_LOG_FORMAT": "json"} == env
    for key in ("securityContext", "automountServiceAccountToken", "volumes"):
        assert pod[key] == theirs[key], key
    for key in ("securityContext", "volumeMounts"):
        assert container[key] == worker[key], key


def test_a_kubernetes_worker_may_make_jobs_and_no_more() -> None:
    documents = [*yaml.safe_load_all((ROOT / "deploy/kubernetes/job-worker.yml").read_text())]
    by_kind = {document["kind"]: document for document in documents}
    names = {(document["metadata"]["name"], document["metadata"]["namespace"]) for document in documents}
    assert names == {("upload-jobs", "archiver")}
    writable = {
        resource
        for rule in by_kind["Role"]["rules"]
        for resource in rule["resources"]
        if {"create", "delete", "patch"} & {*rule["verbs"]}
    }
    assert writable == {"jobs"}
    pod = by_kind["Deployment"]["spec"]["template"]["spec"]
    assert pod["serviceAccountName"] == by_kind["ServiceAccount"]["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["image"].split(":")[1].startswith(prefect.__version__)
    (deployment,) = yaml.safe_load((ROOT / "deploy/kubernetes/prefect.yaml").read_text())["deployments"]
    assert container["args"][:5] == ["prefect", "worker", "start", "--pool", deployment["work_pool"]["name"]]
    (ours,) = [one for one in DEPLOYED if one["entrypoint"] == deployment["entrypoint"]]
    assert {**ours, "work_pool": deployment["work_pool"]} == deployment


def _pod(file: str) -> dict[str, Any]:
    documents = yaml.safe_load_all((ROOT / "deploy/kubernetes" / file).read_text())
    (pod,) = [document["spec"]["template"]["spec"] for document in documents if "template" in document.get("spec", {})]
    return cast(dict[str, Any], pod)
