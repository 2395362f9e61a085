"""A Chromium of the tests' own, driven over its DevTools protocol: what a page shows, asks for and complains about."""

import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import httpx
from websockets.sync.client import connect
from websockets.sync.connection import Connection

SECONDS = 60.0
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
# Nothing of its own that would ask the internet for anything.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)


def chromium_program() -> str | None:
    """Where it is installed, if it is."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Chromium:
    """One page. `requested` are the addresses it asked for, `complaints` what it wrote into its console as errors."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)
        self.requested: list[str] = []
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    @classmethod
    @contextmanager
    def running(cls, home: Path) -> Iterator["Chromium"]:
        """A browser without history, below `home`."""
        program = chromium_program()
        assert program is not None
        command = [program, *_FLAGS, f"--user-data-dir={home}", "about:blank"]
        with (home / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            with connect(_page_of(home), max_size=None, open_timeout=SECONDS) as connection:
                yield cls(connection)
        finally:
            process.terminate()
            process.wait(20)

    def open(self, url: str) -> None:
        """Go there, and wait until it is loaded."""
        self._ask("Page.navigate", url=url)
        self._wait_for("Page.loadEventFired")

    def follow(self, script: str) -> None:
        """Run a script that leads to another page, and wait until that is loaded."""
        self._ask("Runtime.evaluate", expression=script)
        self._wait_for("Page.loadEventFired")

    def evaluate(self, script: str) -> Any:
        """What an expression comes to in the page."""
        return self._ask("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def look(self, width: int, *, dark: bool = False) -> None:
        """Be so many pixels wide."""
        self._ask(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self) -> bytes:
        """The whole page as PNG."""
        picture = self._ask("Page.captureScreenshot", captureBeyondViewport=True)
        return base64.b64decode(picture["data"])

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self._connection.send(json.dumps({"id": number, "method": method, "params": params}))
        answer = self._read_until(lambda message: message.get("id") == number)
        assert "error" not in answer, answer
        return cast(dict[str, Any], answer["result"])

    def _wait_for(self, event: str) -> None:
        self._read_until(lambda message: message.get("method") == event)

    def _read_until(self, is_it: Any) -> dict[str, Any]:
        deadline = time.monotonic() + SECONDS
        while True:
            message = json.loads(self._connection.recv(timeout=max(0.0, deadline - time.monotonic())))
            self._note(message.get("method"), message.get("params", {}))
            if is_it(message):
                return cast(dict[str, Any], message)

    def _note(self, method: str | None, params: dict[str, Any]) -> None:
        match method:
            case "Network.requestWillBeSent":
                self.requested.append(params["request"]["url"])
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Runtime.exceptionThrown":
                self.complaints.append(params["exceptionDetails"]["text"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "assert"):
                self.complaints.append(json.dumps(params["args"]))


def _page_of(home: Path) -> str:
    """The address at which the browser's page takes commands, once it does."""
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            port = (home / "DevToolsActivePort").read_text().split()[0]
            targets = httpx.get(f"http://127.0.0.1:{port}/json").json()
            return str(next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page"))
        except (OSError, IndexError, StopIteration, httpx.TransportError):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
