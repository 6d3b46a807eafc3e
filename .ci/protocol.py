"""What HTTP asks for beside the interface: methods, media types, paths and bodies (RFC 9110).

python -m pytest .ci/protocol.py
"""

import json
from typing import Any

import pytest
from httpx2 import Client

from test_main import (
    ADA,
    BOB,
    FILTER,
    PATH,
    ada,
    client,
    database,
    done,
    five,
    is_problem,
    new_database,
    path,
    postgres,
    service,
    shown,
)

__all__ = ["ada", "client", "database", "five", "new_database", "postgres", "service"]  # fixtures


@pytest.mark.parametrize("query", [f"{FILTER}=%ff%fe", "limit=%00", "%", "&&=", "after=1&after=x"])
def test_list_users_with_any_query(client: Client, query: str) -> None:
    assert client.get(f"{PATH}?{query}").status_code in (200, 422)


@pytest.mark.parametrize("url", [PATH, f"{PATH}/{{id}}", "/livez", "/readyz", "/openapi.json"])
def test_head(client: Client, ada: dict[str, Any], url: str) -> None:
    url = url.format(id=ada["id"])
    response, got = client.head(url), client.get(url)
    assert (response.status_code, response.content) == (200, b"")
    assert dict(response.headers) | {"date": ""} == dict(got.headers) | {"date": ""}


@pytest.mark.parametrize(
    ("method", "url", "allowed"),
    [
        ("PUT", PATH, {"GET", "HEAD", "OPTIONS", "POST"}),
        ("POST", f"{PATH}/1", {"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "PUT"}),
        ("DELETE", "/livez", {"GET", "HEAD", "OPTIONS"}),
    ],
)
def test_unknown_method(client: Client, method: str, url: str, allowed: set[str]) -> None:
    response = client.request(method, url)
    assert is_problem(response, 405, "Method Not Allowed")
    assert set(response.headers["Allow"].split(", ")) == allowed
    response = client.options(url)
    assert done(response, 204) is None
    assert set(response.headers["Allow"].split(", ")) == allowed


@pytest.mark.parametrize("url", ["/nobody", f"{PATH}/", f"{PATH}/1/", "//users"])
def test_unknown_path(client: Client, url: str) -> None:
    assert is_problem(client.get(url), 404, "Not Found")
    assert is_problem(client.options(url), 404, "Not Found")


def test_any_accept_and_host(client: Client, five: list[Any]) -> None:
    """There is JSON only, also for who asks for something else (RFC 9110, 12.5.1)."""
    for headers in {"Accept": "text/html"}, {"Accept": "x/y;q=0"}, {"Host": "["}:
        response = client.get(f"{PATH}?limit=1", headers=headers)
        assert done(response) == five[:1]
        assert response.headers["Content-Type"] == "application/json"
        assert response.headers["Link"].startswith(f"<{PATH}?")


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_body_where_none_belongs(client: Client, ada: dict[str, Any], method: str) -> None:
    assert client.request(method, path(ada), content=b"{").status_code in (200, 204)
    assert done(client.get("/livez")) is None  # on the same connection


@pytest.mark.parametrize(
    "media_type", ["application/json; charset=utf-8", "application/merge-patch+json"]
)
def test_media_types(client: Client, ada: dict[str, Any], media_type: str) -> None:
    headers = {"Content-Type": media_type}
    assert done(client.patch(path(ada), content=b"{}", headers=headers)) == ada


def test_byte_order_mark_and_duplicate_keys(client: Client, ada: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    response = client.patch(path(ada), content=b"\xef\xbb\xbf{}", headers=headers)
    assert response.status_code in (200, 422)
    [field, *_] = shown(BOB)
    first, last = json.dumps(ADA[field]), json.dumps(BOB[field])
    body = f'{{"{field}": {first}, "{field}": {last}}}'
    response = client.patch(path(ada), content=body, headers=headers)
    assert done(response)[field] == BOB[field]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_encodings(client: Client, encoding: str) -> None:
    """JSON is UTF-8 (RFC 8259); what Python's decoder takes besides is not stored wrongly."""
    headers = {"Content-Type": "application/json"}
    response = client.post(PATH, content=json.dumps(ADA).encode(encoding), headers=headers)
    assert response.status_code == 422 or shown(ADA).items() <= done(response, 201).items()
