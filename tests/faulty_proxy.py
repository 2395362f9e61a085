"""A proxy between an S3 client and its server that goes wrong in the ways networks and servers do."""

import contextlib
import http.client
import re
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Protocol, Self
from urllib.parse import urlsplit

_RECEIVE_BYTES = 64 << 10


@dataclass
class Request:
    """A request whose body the client is about to send."""

    client: socket.socket
    head: bytes
    body_start: bytes
    answered: int | None = None
    """The status that the client was given; None if it got no answer."""

    @property
    def line(self) -> str:
        """Method and target, e.g. `PUT /bucket/key?partNumber=1`."""
        return self.head.partition(b"\r\n")[0].decode().removesuffix(" HTTP/1.1")

    @property
    def method(self) -> str:
        return self.line.partition(" ")[0]

    @property
    def body_size(self) -> int:
        for header in self.head.lower().split(b"\r\n"):
            if header.startswith(b"content-length:"):
                return int(header.partition(b":")[2])
        return 0

    def receive(self, size: int) -> bytes:
        """The first `size` bytes of the body."""
        body = bytearray(self.body_start)
        while len(body) < size and (received := self.client.recv(_RECEIVE_BYTES)):
            body += received
        return bytes(body)


@dataclass
class Answer:
    """The server's answer, as it goes to the client."""

    status: int
    head: bytes
    body: bytes

    @property
    def wire(self) -> bytes:
        return self.head + self.body


class Fault(Protocol):
    """What to do with one request in place of passing it on."""

    def apply(self, request: Request, proxy: "FaultyProxy") -> None: ...


@dataclass
class Reset:
    """Break the connection in the middle of the request's body."""

    def apply(self, request: Request, proxy: "FaultyProxy") -> None:
        request.receive(request.body_size // 2)
        _reset(request.client)


@dataclass
class Refuse:
    """Answer with an error; the server never sees the request."""

    status: int
    code: str
    retry_after: int | None = None

    def apply(self, request: Request, proxy: "FaultyProxy") -> None:
        request.receive(request.body_size)
        body = f"<Error><Code>{self.code}</Code></Error>".encode()
        pause = f"Retry-After: {self.retry_after}\r\n" if self.retry_after is not None else ""
        head = f"HTTP/1.1 {self.status} Fault\r\nContent-Length: {len(body)}\r\n{pause}Connection: close\r\n\r\n"
        request.client.sendall(head.encode() + (b"" if request.method == "HEAD" else body))
        request.answered = self.status


@dataclass
class Truncate:
    """Pass the request on, and only the first part of its answer back."""

    share: float = 0.5

    def apply(self, request: Request, proxy: "FaultyProxy") -> None:
        answer = proxy.forward(request, request.receive(request.body_size))
        request.client.sendall(answer.wire[: int(len(answer.wire) * self.share)])


@dataclass
class LoseAnswer:
    """Pass the request on; its answer never arrives."""

    def apply(self, request: Request, proxy: "FaultyProxy") -> None:
        proxy.forward(request, request.receive(request.body_size))
        _reset(request.client)


@dataclass
class Stall:
    """Take half of the body, then do nothing for a while."""

    seconds: float

    def apply(self, request: Request, proxy: "FaultyProxy") -> None:
        request.receive(request.body_size // 2)
        proxy.stopped.wait(self.seconds)


@dataclass
class FlipByte:
    """Change one byte of the body on its way."""

    def apply(self, request: Request, proxy: "FaultyProxy") -> None:
        body = bytearray(request.receive(request.body_size))
        body[len(body) // 2] ^= 1
        answer = proxy.forward(request, bytes(body))
        request.client.sendall(answer.wire)
        request.answered = answer.status


@dataclass
class Backdate:
    """Pass everything on, with a clock in the answer that is behind."""

    seconds: float

    def apply(self, request: Request, proxy: "FaultyProxy") -> None:
        answer = proxy.forward(request, request.receive(request.body_size))
        date = format_datetime(datetime.now(UTC) - timedelta(seconds=self.seconds), usegmt=True).encode()
        request.client.sendall(re.sub(rb"(?im)^date:[^\r]*", b"Date: " + date, answer.wire))


@dataclass
class _Plan:
    fault: Fault
    containing: str
    times: int


@dataclass
class FaultyProxy:
    """Listens on loopback, passes everything on to `server_url` and notes it, except where a fault is planned."""

    server_url: str
    requests: list[Request] = field(default_factory=list)
    stopped: threading.Event = field(default_factory=threading.Event)
    _plans: list[_Plan] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @classmethod
    @contextlib.contextmanager
    def before(cls, server_url: str) -> Iterator[Self]:
        """A proxy that passes on to a server, until the block ends."""
        proxy = cls(server_url)
        threading.Thread(target=proxy._accept, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.stopped.set()
            proxy._listener.close()

    def plan(self, fault: Fault, containing: str, times: int = 1) -> None:
        """Apply a fault to the next requests whose method and target contain a text."""
        with self._lock:
            self._plans.append(_Plan(fault, containing, times))

    def seen(self, containing: str) -> list[Request]:
        """The requests so far whose method and target contain a text."""
        return [request for request in self.requests if containing in request.line]

    def forward(self, request: Request, body: bytes) -> Answer:
        """Send a request to the server and wait for its whole answer."""
        address = urlsplit(self.server_url)
        with socket.create_connection((address.hostname or "", address.port or 80), timeout=60) as server:
            with contextlib.suppress(ConnectionError):  # It may answer before it has read everything.
                server.sendall(request.head + body)
            response = http.client.HTTPResponse(server, method=request.method)
            response.begin()
            content = response.read()
        lines = [f"HTTP/1.1 {response.status} {response.reason}"]
        lines += [f"{name}: {value}" for name, value in response.getheaders() if name.lower() not in _PER_HOP]
        if request.method != "HEAD":
            lines.append(f"Content-Length: {len(content)}")
        elif length := response.getheader("content-length"):
            lines.append(f"Content-Length: {length}")
        return Answer(response.status, "\r\n".join([*lines, "Connection: close", "", ""]).encode("latin-1"), content)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed in the end
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError, http.client.HTTPException):
            received = b""
            while b"\r\n\r\n" not in received:
                if not (chunk := client.recv(_RECEIVE_BYTES)):
                    return
                received += chunk
            head, _, body_start = received.partition(b"\r\n\r\n")
            request = Request(client, head + b"\r\n\r\n", body_start)
            self.requests.append(request)
            if fault := self._planned(request):
                fault.apply(request, self)
                return
            answer = self.forward(request, request.receive(request.body_size))
            client.sendall(answer.wire)
            request.answered = answer.status

    def _planned(self, request: Request) -> Fault | None:
        with self._lock:
            for plan in self._plans:
                if plan.times and plan.containing in request.line:
                    plan.times -= 1
                    return plan.fault
        return None


_PER_HOP = {"connection", "content-length", "keep-alive", "transfer-encoding"}


def _reset(client: socket.socket) -> None:
    # With lingering for 0 s, closing sends a reset and throws away what was not sent.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
