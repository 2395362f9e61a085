"""Whatever the OpenAPI document allows, and what it forbids: no fault of the server, no undocumented answer."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import settings as hypothesis_settings
from pydantic import SecretStr
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import positive_data_acceptance
from sqlalchemy import Engine

from api.app import create_app
from blocks.bundle import Bundle
from blocks.event_log import EventLog
from blocks.object_store import ObjectStore
from blocks.settings import Settings
from tests.events import announced, archived, failed, ingested, rejected, uploaded
from tests.gateway import record
from tests.images import make_images
from tests.served_api import served

# The document can't say that a cursor must be one that was given, or how many bytes a name may have.
NOT_MEANT: list[Any] = [positive_data_acceptance]
# There is no Prefect here, and 503 is how that is told.
NOT_MEANT_BY_READY: list[Any] = [*NOT_MEANT, not_a_server_error]
TOKEN = "token-of-everybody-in-the-tests"

# The document does not depend on where the servers are.
_NOWHERE = Settings(
    database_url=SecretStr("postgresql://127.0.0.1:1/none"),
    redis_url=SecretStr("redis://127.0.0.1:1/0"),
    AWS_ENDPOINT_URL="http://127.0.0.1:1",
    AWS_ACCESS_KEY_ID="none",
    AWS_SECRET_ACCESS_KEY=SecretStr("none"),
)
_DOCUMENT = create_app(_NOWHERE).openapi()
schema = schemathesis.openapi.from_dict(_DOCUMENT)


@pytest.fixture
def api_url(
    settings: Settings, object_store: ObjectStore, event_log: EventLog, engine: Engine, tmp_path: Path
) -> Iterator[str]:
    """An API that knows something of everything, by the names that the document gives as examples."""
    event = announced(UUID("6a0ecf0c-4a5b-4a49-9cb3-0c7a86a4e2a1"), experiment_id="20261101_004", position=12)
    bundle = Bundle.of(make_images(tmp_path / "source", [1000, 2000]), b"{}")
    stored = object_store.upload(bundle, event.key, event.timestep_id)
    facts: dict[str, Any] = {"size": stored.size, "etag": stored.etag, "sha256": stored.sha256, "images": stored.images}
    record(
        engine,
        event_log,
        ingested(event),
        uploaded(event, bucket=object_store.bucket_name, **facts),
        archived(event.key, "images/20261101_004/20261123.tar"),
        failed(announced()),
        rejected(),
    )
    tokens = {"api_token": SecretStr(TOKEN), "webhook_token": SecretStr(TOKEN)}
    with served(settings.model_copy(update=tokens)) as url:
        yield url


def _test_of(method: str, path: str) -> Any:
    @schema.include(method=method, path=path).parametrize()
    @hypothesis_settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def test(case: schemathesis.Case[Any], api_url: str) -> None:
        case.call_and_validate(
            base_url=api_url,
            headers={"Authorization": f"Bearer {TOKEN}"},
            excluded_checks=NOT_MEANT_BY_READY if case.path == "/ready" else NOT_MEANT,
            timeout=30,
        )

    return test


# Schemathesis would give all operations one name, and of tests with one name pytest-xdist runs only one.
for _path, _methods in _DOCUMENT["paths"].items():
    for _method in map(str.upper, _methods):
        globals()[f"test_every_answer_is_documented[{_method} {_path}]"] = _test_of(_method, _path)
