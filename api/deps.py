"""What the routes depend on, as types."""

import hashlib
import hmac
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Annotated, Self, cast

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import SecretStr
from sqlalchemy import Engine
from sqlmodel import Session

from api.problems import Problem
from api.warnings import Warnings
from blocks.database import create_engine
from blocks.event_log import EventLog
from blocks.expiry import ExpiryRules
from blocks.object_store import ObjectStore
from blocks.settings import Settings

COOKIE = "archiver"
MAX_PARAMETERS = 50
# A request to the storage is given up after so long.
STORE_SECONDS = 5.0
# So long a request waits for a connection to the database while others have them all.
DATABASE_SECONDS = 10.0
# Who reads does not wait for a stream that is away.
STREAM_SECONDS = 1.0


@dataclass(frozen=True)
class Services:
    """What the API talks to. Nothing of it connects before the first use."""

    settings: Settings
    engine: Engine
    log: EventLog
    """For reading: it is told soon that Redis is away."""
    patient_log: EventLog
    """For notices, which must not get lost: it waits for a Redis that restarts."""
    store: ObjectStore
    expiry_rules: ExpiryRules
    warnings: Warnings
    # Of /ready: the checks under way by their names, and what runs them.
    checking: dict[str, Future[None]] = field(default_factory=dict)
    checkers: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, "ready"))

    @classmethod
    def from_settings(cls, settings: Settings) -> Self:
        """All of it.

        Raises:
            MissingSetting: with the environment variables to set.
        """
        settings.require("database_url", "redis_url", "aws_access_key_id", "aws_secret_access_key")
        store = ObjectStore.from_settings(settings).within(STORE_SECONDS)
        patient_log = EventLog.from_settings(settings)
        log = patient_log.within(STREAM_SECONDS)
        rules = ExpiryRules(store)
        return cls(
            settings=settings,
            # Only the state-manager writes; PostgreSQL makes sure that we don't.
            engine=create_engine(settings, wait_seconds=DATABASE_SECONDS).execution_options(postgresql_readonly=True),
            log=log,
            patient_log=patient_log,
            store=store,
            expiry_rules=rules,
            warnings=Warnings(log, rules),
        )

    @property
    def prefect_ui_url(self) -> str | None:
        """Where people find flow runs; None where that is not known."""
        api_url = self.settings.prefect_api_url
        return self.settings.prefect_ui_url or (api_url and api_url.removesuffix("/api"))

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()
        self.log.close()
        self.patient_log.close()
        self.checkers.shutdown(wait=False, cancel_futures=True)


def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


ServicesDep = Annotated[Services, Depends(_services)]


def _session(services: ServicesDep) -> Iterator[Session]:
    with Session(services.engine) as session:
        yield session


def _store(services: ServicesDep) -> ObjectStore:
    return services.store


SessionDep = Annotated[Session, Depends(_session)]
StoreDep = Annotated[ObjectStore, Depends(_store)]

_reader_token = HTTPBearer(auto_error=False, scheme_name="reader", description="ARCHIVER_API_TOKEN, where it is set.")
_webhook_token = HTTPBearer(auto_error=False, scheme_name="surf-archiver", description="ARCHIVER_WEBHOOK_TOKEN.")
ReaderToken = Annotated[HTTPAuthorizationCredentials | None, Depends(_reader_token)]
WebhookToken = Annotated[HTTPAuthorizationCredentials | None, Depends(_webhook_token)]


def is_token(value: str, token: SecretStr) -> bool:
    """Compare in constant time."""
    return hmac.compare_digest(value.encode(errors="replace"), token.get_secret_value().encode())


def cookie_value(token: SecretStr) -> str:
    """What a signed-in browser keeps: proves the token without being it."""
    return hmac.digest(token.get_secret_value().encode(), b"signed in to the archiver", hashlib.sha256).hex()


def is_signed_in(request: Request, settings: Settings) -> bool:
    """Whether the page may be shown to this browser."""
    token = settings.api_token
    return token is None or is_token(request.cookies.get(COOKIE, ""), SecretStr(cookie_value(token)))


def has_read_access(request: Request, settings: Settings) -> bool:
    """Whether the request carries the token, or comes from a browser that signed in."""
    token = settings.api_token
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    return token is None or (scheme.lower() == "bearer" and is_token(sent, token)) or is_signed_in(request, settings)


def require_reader(request: Request, services: ServicesDep, sent: ReaderToken) -> None:
    """Let those read who send the token, or signed in on the page. `sent` is for the OpenAPI document."""
    if has_read_access(request, services.settings):
        return
    raise Problem(
        HTTPStatus.UNAUTHORIZED, "Send the API's token: Authorization: Bearer <token>.", {"WWW-Authenticate": "Bearer"}
    )


def require_few_parameters(request: Request) -> None:
    """Refuse a query that only takes time to read: FastAPI compares each of its parameters with each other one."""
    if request.url.query.count("&") > MAX_PARAMETERS:
        raise Problem(HTTPStatus.UNPROCESSABLE_ENTITY, f"query: at most {MAX_PARAMETERS} parameters.")


def require_surf_archiver(services: ServicesDep, sent: WebhookToken) -> None:
    """Let in who sends the webhook's token."""
    token = services.settings.webhook_token
    if token is None:
        raise Problem(HTTPStatus.SERVICE_UNAVAILABLE, "The webhook is closed until ARCHIVER_WEBHOOK_TOKEN is set.")
    if not (sent and is_token(sent.credentials, token)):
        raise Problem(
            HTTPStatus.UNAUTHORIZED,
            "Send the webhook's token: Authorization: Bearer <token>.",
            {"WWW-Authenticate": "Bearer"},
        )
