"""The API, as a client sees it."""

from collections.abc import Iterator, Mapping
from datetime import datetime
from http import HTTPStatus
from typing import Any, Self, cast
from uuid import UUID

import httpx
from pydantic import BaseModel

from blocks.errors import ArchiverError
from blocks.proven_object import Image
from blocks.settings import Settings

PAGE = 500
TIMEOUT = httpx.Timeout(30, connect=10)


class GatewayError(ArchiverError):
    """The API could not be asked, or refused; the message says why and what to do."""


class GatewayAway(GatewayError):
    """The API could not be asked for a reason that may pass by itself."""


class RemoteTimestep(BaseModel):
    """An uploaded timestep that can be fetched."""

    timestep_id: UUID
    key: str
    size: int
    sha256: str | None
    etag: str
    timestamp: datetime


class Gateway:
    """The API of an archiver. Threads may share it."""

    def __init__(self, url: str, token: str | None) -> None:
        self.url = url
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT)

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """The API that the settings name.

        Raises:
            MissingSetting: when ARCHIVER_API_URL is not set.
        """
        settings.require("api_url")
        token = settings.api_token.get_secret_value() if settings.api_token else None
        return cls(cast(str, settings.api_url), token)

    def close(self) -> None:
        """Give the connections back."""
        self._client.close()

    def ask(self, path: str, query: Mapping[str, Any] | None = None, *, accept: int = HTTPStatus.OK) -> httpx.Response:
        """Ask for something.

        Args:
            accept: a status that is an answer too.

        Raises:
            GatewayError: when there is no such answer.
        """
        try:
            answer = self._client.get(path, params={k: v for k, v in (query or {}).items() if v is not None})
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise GatewayAway(f"the API at {self.url} can't be reached: {error}") from error
        if answer.status_code in (HTTPStatus.OK, accept):
            return answer
        if answer.status_code == HTTPStatus.UNAUTHORIZED:
            raise GatewayError(f"the API at {self.url} wants its token: set ARCHIVER_API_TOKEN")
        kind = GatewayAway if answer.is_server_error else GatewayError
        raise kind(f"the API at {self.url} answers {answer.status_code}: {_detail(answer)}")

    def rows(self, path: str, query: Mapping[str, Any], *, limit: int | None = None) -> Iterator[dict[str, Any]]:
        """The rows of a list, page by page; all, or so many.

        Raises:
            GatewayError: when it can't be asked.
        """
        cursor = None
        while True:
            page = self.ask(path, {**query, "limit": min(limit or PAGE, PAGE), "cursor": cursor}).json()
            yield from page["data"][:limit]
            cursor = page["next"]
            if limit is not None:
                limit -= len(page["data"])
            if cursor is None or (limit is not None and limit <= 0):
                return

    def exports(self, query: Mapping[str, Any]) -> Iterator[RemoteTimestep]:
        """Uploaded timesteps, newest first.

        Raises:
            GatewayError: when it can't be asked.
        """
        return map(RemoteTimestep.model_validate, self.rows("/api/1/exports", query))

    def images(self, timestep: RemoteTimestep) -> Iterator[Image]:
        """What is in the object, as recorded.

        Raises:
            GatewayError: when it can't be asked.
        """
        return map(Image.model_validate, self.rows(f"/api/1/timesteps/{timestep.timestep_id}/images", {}))

    def url_of(self, timestep: RemoteTimestep) -> str:
        """A fresh URL that reads the object without credentials; the one in the list may be too old by now.

        Raises:
            GatewayError: when it can't be asked.
        """
        path = f"/api/1/timesteps/{timestep.timestep_id}/download"
        return self.ask(path, accept=HTTPStatus.TEMPORARY_REDIRECT).headers["location"]

    def archives_of(self, timestep: RemoteTimestep) -> list[str]:
        """The archives on tape that the object is in; none where they have another one with its key only.

        Raises:
            GatewayError: when it can't be asked.
        """
        known = self.ask(f"/api/1/timesteps/{timestep.timestep_id}").json()
        return [str(archive["path"]) for archive in known["archives"] if known["state"] == "archived"]


def _detail(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return "it does not look like an archiver's API; check ARCHIVER_API_URL"
