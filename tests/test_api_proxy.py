"""The API behind a reverse proxy, as people call it since long."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import Engine

from blocks.bundle import Bundle
from blocks.event_log import EventLog
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from tests.events import announced, ingested, uploaded
from tests.gateway import record
from tests.images import make_images
from tests.served_api import served

TOKEN = "read-only-token-of-the-tests"


class _Handler(BaseHTTPRequestHandler):
    """Takes a prefix off the path, and tells where the request came from."""

    def __init__(self, upstream: str, prefix: str, *args: Any) -> None:
        self._upstream = upstream
        self._prefix = prefix
        super().__init__(*args)

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = dict(self.headers.items()) | {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.7"}
        url = self._upstream + self.path.removeprefix(self._prefix)
        answer = httpx.request(self.command, url, headers=headers, content=body)
        self.send_response(answer.status_code)
        for name, value in answer.headers.multi_items():
            if name not in ("content-length", "connection"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.content)))
        self.end_headers()
        self.wfile.write(answer.content)

    do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def behind_a_proxy(settings: Settings) -> Iterator[str]:
    """The address of a proxy before an API with these settings."""
    with served(settings) as url:
        proxy = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, url, settings.api_root_path))
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{proxy.server_port}"
        finally:
            proxy.shutdown()
            proxy.server_close()


@pytest.fixture
def key(object_store: ObjectStore, engine: Engine, event_log: EventLog, tmp_path: Path) -> str:
    """The key of a timestep that is in the bucket."""
    event = announced()
    stored = object_store.upload(
        Bundle.of(make_images(tmp_path / "source", [1000]), b"{}"), event.key, event.timestep_id
    )
    facts: dict[str, Any] = {"size": stored.size, "etag": stored.etag, "sha256": stored.sha256}
    record(engine, event_log, ingested(event), uploaded(event, bucket=object_store.bucket_name, **facts))
    return event.key


@pytest.mark.parametrize("prefix", ["", "/archiver"])
def test_the_legacy_call_and_its_urls_work(
    settings: Settings, key: str, object_store: ObjectStore, prefix: str
) -> None:
    with behind_a_proxy(settings.model_copy(update={"api_root_path": prefix})) as url:
        answer = httpx.get(f"{url}{prefix}/api/1/exports", headers={"Host": "fastapi.localhost"})
        assert answer.status_code == 200
        (export,) = answer.json()["data"]
        redirect = httpx.get(f"{url}{prefix}/api/1/timesteps/{export['timestep_id']}/download")
    head = object_store.head(key)
    assert head is not None
    for presigned in (export["url"], redirect.headers["location"]):
        # Neither the proxy's address nor the caller's Host has a part in it, and it is good for an hour.
        assert presigned.startswith(f"{settings.aws_endpoint_url}/{settings.bucket}/{key}?")
        assert parse_qs(urlsplit(presigned).query)["X-Amz-Expires"] == ["3600"]
        assert len(httpx.get(presigned).content) == head.size


def test_a_browser_that_came_over_tls_gets_a_cookie_for_tls(
    settings: Settings, object_store: ObjectStore, event_log: EventLog
) -> None:
    guarded = {"api_token": SecretStr(TOKEN), "api_root_path": "/archiver"}
    with behind_a_proxy(settings.model_copy(update=guarded)) as url:
        answer = httpx.post(f"{url}/archiver/sign-in", data={"token": TOKEN})
        assert (answer.status_code, answer.headers["location"]) == (303, "/archiver/")
        assert "Secure" in answer.headers["set-cookie"]
        cookie = answer.headers["set-cookie"].partition(";")[0]
        assert httpx.get(f"{url}/archiver/", headers={"Cookie": cookie}).status_code == 200


@pytest.mark.parametrize(("public", "is_secure"), [("https://archiver.example.org", True), ("http://archiver", False)])
def test_a_cookie_is_for_tls_where_the_public_address_is(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, public: str, is_secure: bool
) -> None:
    """Whatever the proxies between a browser and the API say, or don't."""
    guarded = settings.model_copy(update={"api_token": SecretStr(TOKEN), "api_url": public})
    with served(guarded) as url:
        answer = httpx.post(f"{url}/sign-in", data={"token": TOKEN})
    assert ("Secure" in answer.headers["set-cookie"]) is is_secure
