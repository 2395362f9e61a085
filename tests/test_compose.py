"""What the compose files promise: pinned images, no root, nothing published but Traefik, secrets by file."""

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.settings import Settings as PrefectSettings

from flows.worker import GRACE_SECONDS
from tests.compose import DEVELOPMENT, ENTRYPOINTS, OURS, PRODUCTION, ROOT, Compose, merged, read_by

ONE_SHOT = {"init", "mock-microscope"}
# Settings that the files give a value of their own, because it depends on what else is in them.
OF_THE_FILES = {
    "ARCHIVER_API_HOST",
    "ARCHIVER_API_PORT",
    "ARCHIVER_API_URL",  # PUBLIC_SCHEME, API_HOSTNAME
    "ARCHIVER_DATA_DIR",  # where it is mounted
    "ARCHIVER_STAGING_DIR",
    "PREFECT_UI_URL",  # PUBLIC_SCHEME, PREFECT_HOSTNAME
}
# What the images of others read; ours read their own settings, Prefect's and boto3's.
OTHERS = {
    "API_HOSTNAME",
    "API_URL",
    "PREFECT_HOSTNAME",
    "POSTGRES_DB",
    "POSTGRES_PASSWORD_FILE",
    "POSTGRES_USER",
    "PYTHONPATH",
    "S3_IGNORE_SUBDOMAIN_BUCKETNAME",
    "TMPDIR",
}


@pytest.fixture(scope="module", params=[PRODUCTION, DEVELOPMENT], ids=["production", "development"])
def compose(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Compose:
    return merged(tmp_path_factory.mktemp("compose"), *request.param, profiles=("rabbitmq",))


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> Compose:
    return merged(tmp_path_factory.mktemp("compose"), *PRODUCTION, profiles=("rabbitmq",))


@pytest.fixture(scope="module")
def development(tmp_path_factory: pytest.TempPathFactory) -> Compose:
    return merged(tmp_path_factory.mktemp("compose"), *DEVELOPMENT)


def test_all_parts_are_there(production: Compose, development: Compose) -> None:
    entrypoints = {*ENTRYPOINTS, "init"}
    for compose in (production, development):
        assert len({compose.services[name]["image"] for name in entrypoints}) == 1
    servers = {"prefect", "postgres", "redis", "traefik"}
    assert set(production.services) == entrypoints | servers | {"rabbitmq"}
    assert set(development.services) == entrypoints | servers | {"s3", "mock-microscope"}


def test_every_image_is_pinned(compose: Compose) -> None:
    for name, service in compose.services.items():
        assert re.search(r":(v?\d+\.\d+|dev$)", service["image"]), name
    assert all(re.search(r":\d+\.\d+\.\d+-", line) for line in _lines("Dockerfile", r"FROM python"))


def test_nobody_is_root(compose: Compose) -> None:
    for name, service in compose.services.items():
        assert int(service["user"].partition(":")[0]) > 0, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_nothing_but_traefik_is_published_and_that_on_loopback(production: Compose) -> None:
    assert _published(production) == {"traefik": ["127.0.0.1:80:80"]}


def test_a_developer_reaches_the_servers_from_this_machine_alone(development: Compose) -> None:
    assert _published(development) == {
        "traefik": ["127.0.0.1:80:80"],
        "postgres": ["127.0.0.1:15432:5432"],
        "redis": ["127.0.0.1:16379:6379"],
        "prefect": ["127.0.0.1:14200:4200"],
    }


def _published(compose: Compose) -> dict[str, list[str]]:
    return {name: service["ports"] for name, service in compose.services.items() if service.get("ports")}


def test_every_service_has_limits_and_a_policy(compose: Compose) -> None:
    for name, service in compose.services.items():
        assert service["mem_limit"], name
        if name in ONE_SHOT:
            assert service["restart"] in ("no", "on-failure:5"), name
            assert service["healthcheck"] == {"disable": True}, name
        else:
            assert service["restart"] == "unless-stopped", name
            assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
            assert service["read_only"] is True or name == "rabbitmq", name


def test_the_entrypoints_wait_for_init(compose: Compose) -> None:
    for name in ENTRYPOINTS:
        assert compose.services[name]["depends_on"]["init"] == {"condition": "service_completed_successfully"}
    for service in compose.services.values():
        for other, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or compose.services[other]["healthcheck"], other


def test_only_the_event_ingester_may_write_to_the_source(compose: Compose) -> None:
    def writers(target: str) -> set[str]:
        """Who has this host directory mounted to write to; a named volume is the service's own."""
        return {name for name, modes in _modes(compose, target).items() if "ro" not in modes}

    # The mock plays the microscope; its /data is what the others see as the source. Redis' is its own.
    assert writers("/data") - {"mock-microscope", "redis"} == {"event-ingester"}
    assert writers("/staging") == {"event-ingester", "init"}


def _modes(compose: Compose, target: str) -> dict[str, list[str]]:
    """The services that have something mounted there, and how."""
    volumes = {name: service.get("volumes", []) for name, service in compose.services.items()}
    return {
        name: mode.split(",")
        for name, mounted in volumes.items()
        for _, at, mode in (f"{one}:".split(":")[:3] for one in mounted)
        if at == target
    }


def test_secrets_are_files(compose: Compose, tmp_path: Path) -> None:
    made = _made_secrets(tmp_path) | {"aws_access_key_id", "aws_secret_access_key"}  # the operator's own
    declared = {name: Path(secret["file"]).name for name, secret in compose.document["secrets"].items()}
    # That of several Prefect servers is for deploy/hosts.
    assert set(declared.values()) == made - {"prefect_redis_url"}
    used = {
        secret if isinstance(secret, str) else secret["source"]
        for service in compose.services.values()
        for secret in service.get("secrets", [])
    }
    assert used <= declared.keys()
    text = yaml.safe_dump({name: service.get("environment") for name, service in compose.services.items()})
    assert not re.search(r"(?i)(password|token|secret)(?!_FILE)\w*: (?!null)", text)
    assert not re.search(r"://[^/\s]*:[^/\s]*@", text)


def _made_secrets(directory: Path) -> set[str]:
    """The names of what scripts/make-secrets.sh makes; it keeps what is there, and lets nobody else in."""
    (directory / "scripts").mkdir()
    script = shutil.copy(ROOT / "scripts" / "make-secrets.sh", directory / "scripts")
    subprocess.run([script], check=True, timeout=60)
    before = {path.name: path.read_text() for path in (directory / "secrets").iterdir()}
    subprocess.run([script], check=True, timeout=60)
    assert {path.name: path.read_text() for path in (directory / "secrets").iterdir()} == before
    assert (directory / "secrets").stat().st_mode & 0o777 == 0o700
    assert before["pgpassword"] != before["archiver_api_token"]
    return set(before)


def _development_script(directory: Path) -> tuple[list[Path], dict[str, str], Path]:
    """The script in a checkout of its own, its environment, and the file that gets what it asks Docker for."""
    (directory / "scripts").mkdir()
    for script in ("init-dev.sh", "make-secrets.sh"):
        shutil.copy(ROOT / "scripts" / script, directory / "scripts")
    shutil.copy(ROOT / ".env.example", directory)
    calls = directory / "calls"
    for program, does in (("scripts/setup.sh", ""), ("docker", f'echo "$@" >>{calls}')):
        (directory / program).write_text(f"#!/bin/sh\n{does}\n")
        (directory / program).chmod(0o755)
    return [directory / "scripts" / "init-dev.sh"], {"PATH": f"{directory}:{os.environ['PATH']}"}, calls


def test_the_development_script_leaves_production_alone(tmp_path: Path) -> None:
    command, env, calls = _development_script(tmp_path)
    shares = tmp_path / "shares"
    shares.mkdir()
    example = (tmp_path / ".env.example").read_text()
    (tmp_path / ".env").write_text(re.sub("(?m)^ARCHIVER_DATA_DIR=.*", f"ARCHIVER_DATA_DIR={shares}", example))
    before, owner = sorted(tmp_path.rglob("*")), shares.stat().st_uid
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "its AWS_ENDPOINT_URL is not http://s3.localhost" in done.stderr
    assert (sorted(tmp_path.rglob("*")), shares.stat().st_uid) == (before, owner)
    assert not calls.exists()


def test_development_is_a_project_of_its_own(production: Compose, development: Compose) -> None:
    assert production.document["name"] != development.document["name"]
    endpoints = {development.services[name]["environment"]["AWS_ENDPOINT_URL"] for name in ("init", *ENTRYPOINTS)}
    assert endpoints == {"http://s3.localhost"}


def test_the_development_script_makes_what_compose_asks_for(tmp_path: Path) -> None:
    command, env, calls = _development_script(tmp_path)
    for _ in range(2):
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=60)
    both = "compose -f compose.yml -f compose.dev.yml"
    assert calls.read_text().splitlines() == [f"{both} build", f"{both} run --rm init"] * 2

    filled = dict(re.findall(r"(?m)^(\w+)=(.*)$", (tmp_path / ".env").read_text()))
    user, group = map(int, filled["ARCHIVER_USER"].split(":"))
    assert user > 0
    for directory in ("ARCHIVER_DATA_DIR", "ARCHIVER_STAGING_DIR"):
        made = (tmp_path / filled[directory]).stat()
        assert (made.st_uid, made.st_gid) == (user, group)
    secrets = yaml.safe_load((ROOT / "compose.yml").read_text())["secrets"]
    assert all((tmp_path / secret["file"]).exists() for secret in secrets.values())


def test_every_variable_is_known(compose: Compose) -> None:
    prefect = _prefect_variables(PrefectSettings)
    for name, service in compose.services.items():
        for variable in service.get("environment", {}):
            assert variable in OURS.keys() | prefect | OTHERS, f"{name}: {variable}"
    for secret in compose.document["secrets"]:
        if secret not in ("redis_conf", "rabbitmq_conf", "pgpassword"):
            assert secret.upper() in OURS.keys() | prefect, secret
    for line in _lines("Dockerfile", r"\s+(ARCHIVER|PREFECT)_\w+="):
        assert line.strip().partition("=")[0] in OURS.keys() | prefect


def _prefect_variables(model: Any) -> set[str]:
    """Every environment variable of Prefect's settings, however deep."""
    names: set[str] = set()
    for name, field in model.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            names |= _prefect_variables(field.annotation)
        names.add(f"{model.model_config.get('env_prefix', '')}{name}".upper())
        names |= {str(alias).upper() for alias in getattr(field.validation_alias, "choices", [])}
    return names


# As it is written: a merged document no longer tells where a value is from.
WRITTEN = [
    pytest.param(service, name, id=f"{Path(file).stem}-{name}")
    for file in ("compose.yml", *sorted(map(str, ROOT.glob("deploy/hosts/*-host.yml"))))
    for name, service in yaml.safe_load((ROOT / file).read_text())["services"].items()
    if name in ("init", *ENTRYPOINTS)
]


@pytest.mark.parametrize(("service", "name"), WRITTEN)
def test_a_service_gets_the_settings_that_it_reads_and_no_others(service: dict[str, Any], name: str) -> None:
    by_secret = {secret.upper() for secret in service["secrets"]}
    given = {setting for setting in service["environment"] | dict.fromkeys(by_secret) if setting in OURS}
    assert given == read_by(name)
    for setting in given - by_secret - OF_THE_FILES:
        assert service["environment"][setting].startswith(f"${{{setting}:"), f"{setting} can't be set in .env"


@pytest.mark.parametrize(("service", "name"), WRITTEN)
def test_a_container_may_take_longer_to_stop_than_its_work_to_be_handed_back(
    service: dict[str, Any], name: str
) -> None:
    assert float(service["stop_grace_period"].removesuffix("s")) >= 2 * GRACE_SECONDS, name


@pytest.mark.parametrize(("service", "name"), WRITTEN)
def test_a_share_that_is_mounted_later_reaches_the_containers(service: dict[str, Any], name: str) -> None:
    # With a default in it, a variable has colons of its own.
    modes = [volume.rpartition(":")[2] for volume in service.get("volumes", []) if ":/data" in volume]
    assert all("rslave" in mode.split(",") for mode in modes), name
    assert bool(modes) == (name in ("init", "event-ingester", "upload-worker")), name


def test_a_redis_that_is_full_refuses_before_it_is_killed(production: Compose) -> None:
    redis = production.services["redis"]
    given = dict(zip(redis["command"], redis["command"][1:], strict=False))
    assert given["--maxmemory-policy"] == "noeviction"
    # What it writes to its append-only file, and a copy of what changes while it rewrites that, need room too.
    assert redis["mem_limit"] == "2g"
    assert int(given["--maxmemory"].removesuffix("mb")) <= 0.75 * 2048


def test_public_addresses_are_those_of_a_tls_proxy_in_front(tmp_path: Path) -> None:
    services = merged(
        tmp_path,
        *PRODUCTION,
        PUBLIC_SCHEME="https",
        API_HOSTNAME="archiver.example.org",
        PREFECT_HOSTNAME="prefect.example.org",
        ARCHIVER_API_ROOT_PATH="/mycelium",
    ).services
    for name in ("upload-worker", "api"):
        assert services[name]["environment"]["ARCHIVER_API_URL"] == "https://archiver.example.org/mycelium"
    assert services["api"]["environment"]["PREFECT_UI_URL"] == "https://prefect.example.org"
    prefect = services["prefect"]["environment"]
    assert prefect["PREFECT_SERVER_UI_API_URL"] == "https://prefect.example.org/api"
    assert prefect["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] == "https://prefect.example.org"


def test_what_must_be_set_is_asked_for(tmp_path: Path) -> None:
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "compose.yml").read_text()))
    assert {"ARCHIVER_BUCKET", "ARCHIVER_DATA_DIR", "AWS_ENDPOINT_URL", "ARCHIVER_CONSUMER"} <= asked
    with pytest.raises(pytest.fail.Exception, match="the address of the object storage"):
        merged(tmp_path, *PRODUCTION, AWS_ENDPOINT_URL="")


def test_the_example_names_every_variable() -> None:
    used = {
        name
        for file in (*DEVELOPMENT, *map(str, ROOT.glob("deploy/hosts/*.yml")))
        for name in re.findall(r"(?<!\$)\$\{(\w+)", re.sub(r"#.*", "", (ROOT / file).read_text()))
    }
    named = set(re.findall(r"^#? ?([A-Z_]+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    # Compose's own.
    assert named == used | {"COMPOSE_FILE"}


def test_traefik_routes_to_services_that_it_reaches(compose: Compose) -> None:
    static = yaml.safe_load((ROOT / "deploy/traefik/traefik.yml").read_text())
    assert static["providers"]["file"]["directory"] == "/etc/traefik/routes"
    assert static["entryPoints"]["web"]["address"] == ":80"
    hosts = compose.routes()
    # Where the API shares Traefik's loopback, it needs no network in common.
    shares = compose.services["api"].get("network_mode") == "service:traefik"
    assert hosts.pop("fastapi.localhost") == ("http://127.0.0.1:8000" if shares else "http://api:8000")
    assert hosts.pop("prefect.localhost") == "http://prefect:4200"
    assert hosts == ({"s3.localhost": "http://s3:5000"} if shares else {})
    reached = ["prefect", "s3"] if shares else ["prefect", "api"]
    for name in reached:
        assert set(compose.services[name]["networks"]) & set(compose.services["traefik"]["networks"]), name


def test_further_apis_are_ready_to_be_named() -> None:
    # The lines as they are without their mark.
    text = re.sub(r"# (?=- url|healthCheck)", "", (ROOT / "deploy/traefik/routes/archiver.yml").read_text())
    balancer = yaml.safe_load(text)["http"]["services"]["api"]["loadBalancer"]
    assert [server["url"] for server in balancer["servers"]] == ['{{ env "API_URL" }}', "http://10.0.0.3:8000"]
    assert balancer["healthCheck"]["path"] == "/health"


def _lines(file: str, pattern: str) -> list[str]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if re.match(pattern, line)]
    assert lines
    return lines


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.from_regex(r"[a-z][a-z_]{0,20}", fullmatch=True), st.text("ab'\"$ \\`#{}", min_size=1)))
def test_secrets_reach_the_command_as_they_are(secrets: dict[str, str]) -> None:
    # What a shell itself needs is not ours to change.
    secrets = {f"archiver_{name}": value for name, value in secrets.items()}
    text = (ROOT / "deploy/image/with-secrets").read_text()
    with tempfile.TemporaryDirectory() as directory:
        for name, value in secrets.items():
            Path(directory, name).write_text(f"{value}\n")
        script = text.replace("/run/secrets", directory)
        shown = subprocess.run(["sh", "-c", script, "with-secrets", "env", "-0"], capture_output=True, check=True)
    env = dict(pair.split("=", 1) for pair in shown.stdout.decode().split("\0") if pair)
    assert {name: value for name, value in env.items() if name.startswith("ARCHIVER_")} == {
        name.upper(): value for name, value in secrets.items()
    }


@pytest.mark.parametrize("what", ["closed", "a directory", "a link to nothing"])
def test_nothing_is_started_without_a_secret_that_can_not_be_read(what: str) -> None:
    text = (ROOT / "deploy/image/with-secrets").read_text()
    # Not below pytest's own directory, which is closed to others.
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        secret = Path(directory, "prefect_server_api_auth_string")
        if what == "closed":
            secret.write_text("admin:password")
            secret.chmod(0)
        elif what == "a directory":
            secret.mkdir()
        else:
            secret.symlink_to("nothing")
        command = ["sh", "-c", text.replace("/run/secrets", directory), "with-secrets", "echo", "started"]
        # Root may read everything.
        user = 65534 if os.geteuid() == 0 else None
        done = subprocess.run(command, user=user, capture_output=True, text=True)
    assert done.returncode != 0
    assert "started" not in done.stdout
    assert str(secret) in done.stderr


def test_what_is_no_secret_of_ours_keeps_nothing_from_starting(tmp_path: Path) -> None:
    text = (ROOT / "deploy/image/with-secrets").read_text().replace("/run/secrets", str(tmp_path))
    for _ in range(2):
        command = ["sh", "-c", text, "with-secrets", "echo", "started"]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "started\n"
        (tmp_path / "kubernetes.io").mkdir(exist_ok=True)


@pytest.mark.parametrize(("age", "status"), [(0, 0), (300, 1)])
def test_a_worker_is_healthy_while_it_goes_its_round(tmp_path: Path, age: int, status: int) -> None:
    beat = tmp_path / "heartbeat"
    beat.touch()
    os.utime(beat, (time.time() - age,) * 2)
    env = {"PATH": os.environ["PATH"], "ARCHIVER_HEARTBEAT_FILE": str(beat)}
    assert subprocess.run([ROOT / "deploy/image/healthy"], env=env, timeout=20).returncode == status
