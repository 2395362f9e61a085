"""The description of the API: complete, for those who may read, and without the internet."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import SecretStr

from api.app import create_app
from blocks.settings import Settings
from tests.gateway import problem

TOKEN = "read-only-token-of-the-tests"


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/docs")
    assert page.status_code == 200
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)|url: '([^']+)""", page.text)
    local = ["".join(address) for address in addresses]
    assert len(local) == 4
    for address in local:
        assert address.startswith("/"), address
        answer = client.get(address)
        assert answer.status_code == 200, address
        assert len(answer.content) > 1000
    assert "'self'" in page.headers["content-security-policy"]
    assert "cdn" not in page.text


def test_a_token_guards_the_description_too(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"api_token": SecretStr(TOKEN)}))) as client:
        problem(client.get("/openapi.json"), 401)
        form = client.get("/docs")
        assert form.status_code == 401
        assert 'action="/sign-in"' in form.text
        bearer = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/openapi.json", headers=bearer).status_code == 200
        assert client.get("/docs", headers=bearer).status_code == 200
        client.post("/sign-in", data={"token": TOKEN})
        assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 200


def schemas(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of every answer, and every parameter."""
    for name, schema in document["components"]["schemas"].items():
        for field, described in schema.get("properties", {}).items():
            yield f"{name}.{field}", described
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                described = parameter.get("schema", {}) | parameter
                yield f"{path} {parameter['name']}", described


def holds_objects(field: dict[str, Any]) -> bool:
    """Whether it is an object, objects, or nothing: what has examples of its own."""
    either = field.get("anyOf", [field])
    kinds = [kind.get("items", kind) for kind in either if kind.get("type") != "null"]
    return all("$ref" in kind for kind in kinds)


def test_what_keeps_strangers_out_is_described_where_it_does(settings: Settings) -> None:
    for token, kept_out in ((None, True), (SecretStr(TOKEN), False)):
        document = create_app(settings.model_copy(update={"api_token": token})).openapi()
        for path, operations in document["paths"].items():
            for operation in operations.values():
                assert ({"403", "421"} <= operation["responses"].keys()) is kept_out, path


def test_every_field_and_parameter_is_described_by_an_example(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    found = dict(schemas(document))
    assert len(found) > 100
    plain = {name: field for name, field in found.items() if "default" not in field and not holds_objects(field)}
    assert [name for name, field in plain.items() if not field.get("examples")] == []
    assert [name for name, field in found.items() if "$ref" not in field and not field.get("description")] == []


@pytest.mark.parametrize("path", ["/openapi.json", "/docs", "/"])
def test_a_reverse_proxy_may_put_it_elsewhere(settings: Settings, path: str) -> None:
    with TestClient(create_app(settings.model_copy(update={"api_root_path": "/archiver"}))) as client:
        answer = client.get(path)
        assert answer.status_code == 200
        if path == "/openapi.json":
            assert answer.json()["servers"] == [{"url": "/archiver"}]
        else:
            addresses = re.findall(r"""(?:src|href|action)=["'](/[^"']*)|url: '([^']+)""", answer.text)
            assert addresses
            assert all("".join(address).startswith("/archiver/") for address in addresses)
        redirect = client.get("/?state=nonsense", follow_redirects=False)
        assert redirect.headers["location"] == "/archiver/"
