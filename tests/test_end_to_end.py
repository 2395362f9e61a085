"""The whole system, as an operator installs and starts it: files in, objects and HTTP answers out."""

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from flows.stack.mock_microscope import Dropped
from tests.running_stack import RunningStack, announce, assert_same_images, drop, eventually

pytest_plugins = ["tests.installed"]

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stack") / "home"


@pytest.fixture(scope="module")
def before_start(home: Path) -> Dropped:
    """A timestep that was there before the stack."""
    return drop(home / "data", "aretha")


@pytest.fixture(scope="module")
def stack(installed: Path, home: Path, before_start: Dropped, s3_endpoint: str) -> Iterator[RunningStack]:
    running = RunningStack(installed / "archiver", home, s3_endpoint)
    try:
        yield running
    finally:
        running.stop()


def test_a_timestep_dropped_before_the_start_arrives(stack: RunningStack, before_start: Dropped) -> None:
    assert_same_images(stack.export(before_start)["url"], before_start)


def test_a_timestep_arrives_as_a_tar_a_row_and_an_answer(stack: RunningStack) -> None:
    dropped = drop(stack.data_dir)
    export = stack.export(dropped)
    assert export["key"] == f"images/20261101_004/20261123/104207_{dropped.timestep_id.hex[:8]}.tar"
    assert_same_images(export["url"], dropped)
    timestep = stack.get(f"/api/1/timesteps/{dropped.timestep_id}")
    assert timestep["state"] == "uploaded"
    assert [event["type"] for event in timestep["history"]] == ["timestep.ingested", "timestep.uploaded"]


def test_a_timestep_dropped_while_the_ingester_is_down_arrives(stack: RunningStack) -> None:
    pid = stack.pid_of("event-ingester")
    os.kill(pid, signal.SIGSTOP)
    dropped = drop(stack.data_dir)
    os.kill(pid, signal.SIGKILL)
    assert_same_images(stack.export(dropped)["url"], dropped)
    assert stack.pid_of("event-ingester") != pid


def test_a_timestep_survives_the_end_of_an_upload_worker(stack: RunningStack) -> None:
    pid = stack.pid_of("upload-worker")
    os.kill(pid, signal.SIGSTOP)
    dropped = drop(stack.data_dir)
    eventually(lambda: _known(stack, dropped), f"timestep {dropped.timestep_id}")
    os.kill(pid, signal.SIGKILL)
    assert_same_images(stack.export(dropped)["url"], dropped)


def test_timesteps_survive_the_end_of_the_prefect_server(stack: RunningStack) -> None:
    pid = stack.pid_of("server")  # prefect server start
    before = [drop(stack.data_dir) for _ in range(3)]
    os.kill(pid, signal.SIGKILL)
    after = drop(stack.data_dir)
    for dropped in (*before, after):
        assert_same_images(stack.export(dropped)["url"], dropped)
        history = stack.get(f"/api/1/timesteps/{dropped.timestep_id}")["history"]
        assert [event["type"] for event in history] == ["timestep.ingested", "timestep.uploaded"]
    assert stack.pid_of("server") != pid


def _known(stack: RunningStack, dropped: Dropped) -> bool | None:
    timesteps = stack.get("/api/1/timesteps", limit=100)["data"]
    return True if str(dropped.timestep_id) in {timestep["timestep_id"] for timestep in timesteps} else None


def test_the_archiver_announces_and_the_state_follows(stack: RunningStack) -> None:
    dropped = drop(stack.data_dir)
    key = stack.export(dropped)["key"]
    archive = {
        "path": f"images/{uuid4().hex}.tar",
        "src_keys": [key, f"{stack.env['ARCHIVER_BUCKET']}/images/no/such.tar"],
    }
    answer = stack.post(
        "/api/1/webhooks/surf-archiver", {"job_id": str(uuid4()), "date": "2026-11-23", "archives": [archive]}
    )
    assert answer.status_code == 202

    def archived() -> bool | None:
        return True if stack.get(f"/api/1/timesteps/{dropped.timestep_id}")["state"] == "archived" else None

    eventually(archived, f"archived state of {dropped.timestep_id}")


def test_broken_event_files_are_rejected_with_their_cause_and_stay(stack: RunningStack) -> None:
    root = stack.data_dir
    (root / "aretha" / "outside").mkdir(parents=True, exist_ok=True)
    (root / "prince").mkdir(exist_ok=True)
    (root / "prince" / "link").symlink_to(root / "aretha" / "outside")
    broken = announce(root)
    broken.write_text('{"timestep_id": ')
    causes = {
        broken: "not valid JSON",
        announce(root, plate=None): "plate: Field required",
        announce(root, img_dir="../aretha/outside"): "without '..'",
        announce(root, img_dir="/etc"): "relative path",
        announce(root, img_dir="link"): "symbolic link",
    }
    readable = announce(root, img_dir="nowhere", position=31, experiment_id="20261101_031")
    causes[readable] = "nowhere can't be read: No such file or directory"
    good = drop(root)
    for event_file, cause in causes.items():
        reason = stack.rejected(event_file)["reason"]
        assert event_file.name in reason
        assert cause in reason
        assert event_file.exists()
    assert_same_images(stack.export(good)["url"], good)
    # What it announces is known, where it could be read.
    announced = json.loads(readable.read_text())
    for query in ({"experiment": "20261101_031"}, {"position": 31, "system": "prince", "type": "stitch"}):
        (found,) = stack.get("/api/1/rejected", **query)["data"]
        assert found["event_file"] == f"events/{readable.name}"
        assert (found["timestep_id"], found["state"]) == (announced["timestep_id"], None)
    assert stack.get("/api/1/rejected", position=31, type="video")["data"] == []


def test_a_rejected_event_file_is_taken_in_once_it_is_mended(stack: RunningStack) -> None:
    event_file = announce(stack.data_dir, position="left")
    content = event_file.read_text()
    stack.rejected(event_file)
    event_file.write_text(content.replace('"left"', "7"))
    timestep_id = json.loads(content)["timestep_id"]

    def exported() -> bool | None:
        exports = stack.get("/api/1/exports", limit=100)["data"]
        return True if timestep_id in {export["timestep_id"] for export in exports} else None

    eventually(exported, f"an export of {event_file}")
    still = [one["event_file"] for one in stack.get("/api/1/rejected", limit=100)["data"]]
    assert f"events/{event_file.name}" not in still


@pytest.mark.long
def test_an_announced_directory_that_comes_later_is_taken_in(stack: RunningStack) -> None:
    dropped = drop(stack.data_dir)
    stack.export(dropped)
    away = dropped.image_dir.with_name("comes-later")
    event_file = announce(stack.data_dir, img_dir="comes-later", img_count=5)
    stack.rejected(event_file)
    dropped.image_dir.rename(away)
    timestep_id = json.loads(event_file.read_text())["timestep_id"]

    def state() -> str | None:
        found = stack.get("/api/1/timesteps", limit=100)["data"]
        return next(
            (one["state"] for one in found if one["timestep_id"] == timestep_id and one["state"] == "uploaded"), None
        )

    eventually(state, f"an upload of {event_file}")


def test_the_same_event_twice_is_one_timestep_and_another_content_is_a_conflict(stack: RunningStack) -> None:
    dropped = drop(stack.data_dir)
    stack.export(dropped)
    event = json.loads(dropped.event_file.read_text())
    same = dropped.event_file.with_name(f"again-{uuid4().hex}.json")
    same.write_text(json.dumps(event, indent=8))
    other = dropped.event_file.with_name(f"other-{uuid4().hex}.json")
    other.write_text(json.dumps(event | {"position": 99}))
    assert "announced before with other content" in stack.rejected(other)["reason"]
    (conflict,) = stack.get("/api/1/rejected", position=99, state="uploaded")["data"]
    assert conflict["event_file"] == f"events/{other.name}"
    history = stack.get(f"/api/1/timesteps/{dropped.timestep_id}")["history"]
    assert sorted(event["type"] for event in history if event["type"] != "event-file.rejected") == [
        "timestep.ingested",
        "timestep.uploaded",
    ]
    assert f"events/{same.name}" not in [one["event_file"] for one in stack.get("/api/1/rejected", limit=100)["data"]]


def test_a_laptop_needs_nothing_but_the_wheel_and_the_address(
    stack: RunningStack, installed: Path, tmp_path: Path
) -> None:
    export = stack.export(drop(stack.data_dir))
    address = f"http://{stack.env['ARCHIVER_API_HOST']}:{stack.env['ARCHIVER_API_PORT']}"
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "COLUMNS": "300", "ARCHIVER_API_URL": address}

    def archiver(*arguments: str) -> str:
        command = [str(installed / "archiver"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True).stdout

    listed = [json.loads(line) for line in archiver("ls", export["experiment_id"], "--json").splitlines()]
    assert export["timestep_id"] in {timestep["timestep_id"] for timestep in listed}
    assert "upload-worker" in archiver("status")
    assert "proven" in archiver("fetch", export["experiment_id"], "--position", str(export["position"]))
    assert hashlib.sha256((tmp_path / export["key"]).read_bytes()).hexdigest() == export["sha256"]


def test_no_log_and_no_page_of_the_stack_holds_a_secret(stack: RunningStack) -> None:
    """After all that went wrong above."""
    secrets = {path.name: path.read_text().strip() for path in (stack.home / "secrets").iterdir()}
    secrets["storage"] = stack.env["AWS_SECRET_ACCESS_KEY"]
    assert stack.env["ARCHIVER_WEBHOOK_TOKEN"] in secrets.values()
    said = {path.name: path.read_text() for path in [*(stack.home / "logs").iterdir(), stack.home.with_suffix(".log")]}
    for path in ("/", "/docs", "/metrics", "/openapi.json", "/ready", "/api/1/status"):
        said[path] = httpx.get(
            f"http://{stack.env['ARCHIVER_API_HOST']}:{stack.env['ARCHIVER_API_PORT']}{path}", trust_env=False
        ).text
    assert said["state-manager.log"]
    found = {(place, name) for place, text in said.items() for name, secret in secrets.items() if secret in text}
    assert found == set()
