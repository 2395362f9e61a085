"""A whole stack as it is installed and started by an operator, seen from outside."""

import hashlib
import io
import json
import os
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx

from flows.stack.mock_microscope import Dropped, drop_timestep
from tests.events import document
from tests.images import tiff

T = TypeVar("T")

START_SECONDS = 300.0
ARRIVAL_SECONDS = 90.0


class RunningStack:
    """An `archiver up` on a home of its own, seen from outside. Its object storage outlives it."""

    def __init__(self, archiver: Path, home: Path, s3_endpoint: str) -> None:
        self.home = home
        self.archiver = archiver
        # The settings it is started with; what is not in it is embedded.
        self.given = {
            "ARCHIVER_HOME": str(home),
            "AWS_ENDPOINT_URL": s3_endpoint,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test-secret",
        }
        self.http = httpx.Client(trust_env=False)
        self.start()

    def start(self) -> None:
        """Start it on what is in its home, and wait until it is ready."""
        inherited = {
            key: value for key, value in os.environ.items() if not key.startswith(("ARCHIVER_", "AWS_", "PREFECT_"))
        }
        command, env = [str(self.archiver), "up"], inherited | self.given
        with self.home.with_suffix(".log").open("ab") as log:
            # Away from the checkout, whose packages Python would find first.
            self.process = subprocess.Popen(
                command, env=env, cwd=self.home.parent, stdout=log, stderr=log, start_new_session=True
            )
        self.env = eventually(self._settings, f"settings in {self.home}/env", START_SECONDS)

    def stop(self) -> None:
        """Stop it as an operator does."""
        self.process.send_signal(signal.SIGTERM)
        stopping = time.monotonic()
        assert self.process.wait(timeout=30) == 0
        assert time.monotonic() - stopping < 15
        assert not (self.home / "env").exists()

    def _settings(self) -> dict[str, str] | None:
        assert self.process.poll() is None, self.home.with_suffix(".log").read_text()
        if not (self.home / "env").exists():
            return None
        shell = subprocess.run(["sh", "-c", f". {self.home}/env; env -0"], env={}, capture_output=True, check=True)
        return dict(pair.split("=", 1) for pair in shell.stdout.decode().split("\0") if pair)

    @property
    def data_dir(self) -> Path:
        return Path(self.env["ARCHIVER_DATA_DIR"])

    def get(self, path: str, **query: Any) -> Any:
        base = f"http://{self.env['ARCHIVER_API_HOST']}:{self.env['ARCHIVER_API_PORT']}"
        answer = self.http.get(f"{base}{path}", params=query)
        answer.raise_for_status()
        return answer.json()

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        base = f"http://{self.env['ARCHIVER_API_HOST']}:{self.env['ARCHIVER_API_PORT']}"
        headers = {"Authorization": f"Bearer {self.env['ARCHIVER_WEBHOOK_TOKEN']}"}
        return self.http.post(f"{base}{path}", json=body, headers=headers)

    def export(self, dropped: Dropped) -> dict[str, Any]:
        """The timestep's export, once there is one."""

        def find() -> dict[str, Any] | None:
            exports = self.get("/api/1/exports", limit=100)["data"]
            return next((export for export in exports if export["timestep_id"] == str(dropped.timestep_id)), None)

        return eventually(find, f"an export of {dropped.event_file}")

    def rejected(self, event_file: Path) -> dict[str, Any]:
        """The file's rejection, once there is one."""

        def find() -> dict[str, Any] | None:
            found = self.get("/api/1/rejected", limit=100)["data"]
            return next((one for one in found if one["event_file"] == f"events/{event_file.name}"), None)

        return eventually(find, f"a rejection of {event_file}")

    def pid_of(self, entrypoint: str) -> int:
        """The process of an entrypoint."""
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        for pid in " ".join(file.read_text() for file in children).split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            if entrypoint in command:
                return int(pid)
        raise LookupError(f"{entrypoint} is not running")


def eventually(ask: Callable[[], T | None], what: str, seconds: float = ARRIVAL_SECONDS) -> T:
    """The answer, as soon as there is one."""
    deadline = time.monotonic() + seconds
    while (answer := ask()) is None:
        assert time.monotonic() < deadline, f"no {what} within {seconds:.0f} s"
        time.sleep(0.3)
    return answer


def drop(root: Path, system: str = "prince", **changes: Any) -> Dropped:
    """A small timestep, with images of more than one tar block each."""
    timestamp = datetime(2026, 11, 23, 10, 42, 7, tzinfo=UTC)
    return drop_timestep(root, system, images=5, image_bytes=30_000, timestamp=changes.pop("timestamp", timestamp))


def announce(root: Path, **changes: Any) -> Path:
    """An event file of its own for an image directory that holds one file, changed as asked for."""
    directory = root / "prince"
    (directory / "events").mkdir(parents=True, exist_ok=True)
    name = f"case-{uuid4().hex[:8]}"
    (directory / name / "Img").mkdir(parents=True)
    (directory / name / "Img" / "one.tif").write_bytes(tiff(bytes(200)))
    event = document(position=1, img_count=1, img_dir=name)
    event_file = directory / "events" / f"{name}.json"
    event_file.write_text(json.dumps({key: value for key, value in (event | changes).items() if value is not None}))
    return event_file


def assert_same_images(url: str, dropped: Dropped) -> None:
    """Every byte of every image on disk is in the object, and the object proves it by itself."""
    content = httpx.get(url, trust_env=False).raise_for_status().content
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    images = {
        f"./{path.relative_to(dropped.image_dir)}": path.read_bytes() for path in dropped.image_dir.rglob("*.tif")
    }
    assert len(images) == dropped.images
    names = list(members)
    assert names == ["./metadata.json", *sorted(images), "./manifest-sha256.txt"]
    assert {name: members[name] for name in images} == images
    for line in members["./manifest-sha256.txt"].decode().splitlines():
        digest, name = line.split("  ", 1)
        assert hashlib.sha256(members[f"./{name.removeprefix('./')}"]).hexdigest() == digest
    assert json.loads(members["./metadata.json"])["timestep_id"] == str(dropped.timestep_id)
