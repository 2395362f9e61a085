"""Publishes a port of loopback at another address."""

import asyncio
from contextlib import suppress
from typing import Self


class Relay:
    """Passes on whatever comes to `address:port` to the same port of loopback, and back."""

    def __init__(self, address: str, port: int) -> None:
        self._address = address
        self._port = port

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._address, self._port)
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            there, back = await asyncio.open_connection("127.0.0.1", self._port)
            await asyncio.gather(pipe(reader, back), pipe(there, writer))
        writer.close()


async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass on what comes until it ends, and then the end."""
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()
