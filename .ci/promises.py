"""What the service promises, proved by processes: two at once, cut wires, locks, kills and stops.

python -m pytest .ci/promises.py
"""

import http.client
import json
import os
import re
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from harness import (
    CHEAP,
    REQUESTS,
    ROOT,
    Wire,
    change_main,
    email,
    insert,
    is_busy,
    locked,
    peak_memory,
    terminate,
    turn,
    wait_until,
    waiting,
    wire,
)
from httpx2 import Client, ConnectError, RemoteProtocolError, get
from sqlalchemy import make_url

from test_main import (
    ADA,
    BOB,
    BUSY,
    FAILED,
    Service,
    at_once,
    execute,
    is_problem,
    new_database,
    postgres,
    start,
)

__all__ = ["new_database", "postgres", "turn", "wire"]  # fixtures

# Handlers such as a copier writes.
MORE = """

@app.post("/together", status_code=201, response_model=list[UserPublic])
async def create_together(users: list[UserCreate], session: SessionDep) -> Any:
    async with session.begin():
        return [(await session.run(INSERT, **await to_columns(user))).one() for user in users]


@app.post("/objects", status_code=201)
async def create_objects(users: list[UserCreate], session: SessionDep) -> Any:
    rows = [User(**await to_columns(user)) for user in users]
    async with session.begin():
        session.add_all(rows)
    return [UserPublic.model_validate(row, from_attributes=True) for row in rows]


@app.post("/engine", status_code=201)
async def create_on_engine(users: list[UserCreate]) -> Any:
    async with engine.begin() as connection:
        for user in users:
            await connection.execute(INSERT, await to_columns(user))


@app.post("/one-by-one", status_code=201, response_model=list[UserPublic])
async def create_one_by_one(users: list[UserCreate], session: SessionDep) -> Any:
    return [(await session.run(INSERT, **await to_columns(user))).one() for user in users]


@app.post("/forgetful", status_code=201)
async def create_without_a_transaction(users: list[UserCreate], session: SessionDep) -> Any:
    session.add_all([User(**await to_columns(user)) for user in users])
    await session.flush()


@app.delete("/everyone")
async def delete_everyone(session: SessionDep) -> Any:
    return (await session.run(sa.delete(users))).rowcount
"""


@pytest.fixture(scope="session")
def database(new_database: Callable[[], str]) -> str:
    return new_database()


@pytest.fixture(scope="session")
def services(
    database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Service, Service]]:
    """Run two processes on one database, with cheap hashes and one connection each."""
    directory = tmp_path_factory.mktemp("services")
    copy = change_main(directory, CHEAP, more=MORE)
    settings = {"DATABASE_URL": database, "DATABASE_POOL_SIZE": "1"}
    with start(directory, copy, **settings) as one, start(directory, copy, **settings) as another:
        yield one, another


@pytest.fixture
def service(services: tuple[Service, Service], database: str) -> Service:
    """Give a service without users."""
    assert services[0].url
    execute(database, "DELETE FROM users")
    return services[0]


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with service.client() as client:
        yield client


@pytest.fixture
def clients(client: Client, services: tuple[Service, Service]) -> Iterator[list[Client]]:
    """Give clients for two processes on one database."""
    with services[1].client() as another:
        yield [client, another]


@pytest.fixture
def ada(client: Client) -> dict[str, Any]:
    user: dict[str, Any] = client.post("/users", json=ADA).json()
    return user


@pytest.fixture
def five(client: Client) -> list[dict[str, Any]]:
    bodies = [ADA | {"email": email(number)} for number in range(5)]
    return [client.post("/users", json=body).json() for body in bodies]


# --- Of equal requests one wins -------------------------------------------------------


def test_create_user_twenty_at_once(clients: list[Client]) -> None:
    statuses = at_once(lambda i: clients[i % 2].post("/users", json=ADA), 20)
    assert statuses == [201] + 19 * [409]


def test_patch_user_fields_at_once(clients: list[Client], ada: dict[str, Any]) -> None:
    path = f"/users/{ada['id']}"
    for number in range(10):
        changes = [{"name": f"name {number}"}, {"email": email(number)}]
        with ThreadPoolExecutor(2) as pool:
            patched = pool.map(
                lambda client, change: client.patch(path, json=change), clients, changes
            )
        assert [response.status_code for response in patched] == [200, 200]
        assert clients[0].get("/users").json() == [ada | changes[0] | changes[1]]


def test_patch_user_to_one_email_at_once(clients: list[Client], five: list[dict[str, Any]]) -> None:
    paths = [f"/users/{user['id']}" for user in five]
    change = {"email": BOB["email"]}
    assert at_once(lambda i: clients[i % 2].patch(paths[i], json=change), 5) == [200] + 4 * [409]


def test_delete_user_ten_at_once(clients: list[Client], ada: dict[str, Any]) -> None:
    path = f"/users/{ada['id']}"
    assert at_once(lambda i: clients[i % 2].delete(path), 10) == [204] + 9 * [404]


def test_delete_user_while_it_is_updated(clients: list[Client], five: list[dict[str, Any]]) -> None:
    requests = [("PUT", BOB), ("DELETE", None), ("PATCH", {"name": "n"}), ("DELETE", None)]
    for user in five:
        path = f"/users/{user['id']}"
        with ThreadPoolExecutor(8) as pool:
            calls = [
                pool.submit(client.request, method, path, json=body)
                for client in clients
                for method, body in requests
            ]
        statuses = [call.result().status_code for call in calls]
        assert set(statuses) <= {200, 204, 404}
        assert statuses.count(204) == 1
    assert clients[0].get("/users").json() == []


# --- Statements and transactions ------------------------------------------------------


def test_statements(wire: Wire, tmp_path: Path) -> None:
    """Each request is one statement, which is a transaction of its own."""
    settings = {"DATABASE_URL": wire.url, "DATABASE_POOL_SIZE": "1"}
    with start(tmp_path, **settings) as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        for method, url, body, status in [
            ("GET", path, None, 200),
            ("GET", "/users", None, 200),
            ("GET", f"/users?email={BOB['email']}", None, 200),
            ("GET", "/readyz", None, 200),
            ("POST", "/users", BOB, 201),
            ("POST", "/users", BOB, 409),
            ("PUT", path, ADA, 200),
            ("PATCH", path, {"name": "Ada King"}, 200),
            ("PATCH", path, {}, 200),
            ("DELETE", path, None, 204),
            ("DELETE", path, None, 404),
        ]:
            wire.asked.clear()
            assert client.request(method, url, json=body).status_code == status
            assert wire.asked == ["execute"], (method, url)
        wire.asked.clear()
        assert client.get("/livez").status_code == 200
        assert client.post("/users", json={}).status_code == 422
        assert wire.asked == []


def test_statements_on_sqlite(tmp_path: Path) -> None:
    """SQLite itself tells what it runs: no BEGIN, and so no COMMIT, is among it."""
    traced = """

def trace(connection, _):
    tell = lambda statement: logger.info("ran %s;", statement.split()[0])
    connection.run_async(lambda driver: driver.set_trace_callback(tell))


event.listen(autocommit.sync_engine, "connect", trace)
"""
    copy = change_main(tmp_path, CHEAP, more=traced)
    with start(tmp_path, copy) as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        assert service.logged("ran (.*);")[-2:] == ["COMMIT", "INSERT"]  # of the tables, and of Ada
        for method, url, body, ran in [
            ("GET", path, None, "SELECT"),
            ("GET", "/users", None, "SELECT"),
            ("GET", "/readyz", None, "SELECT"),
            ("POST", "/users", BOB, "INSERT"),
            ("POST", "/users", BOB, "INSERT"),
            ("PUT", path, ADA, "UPDATE"),
            ("PATCH", path, {"name": "Ada King"}, "UPDATE"),
            ("DELETE", path, None, "DELETE"),
        ]:
            before = len(service.logged("ran (.*);"))
            client.request(method, url, json=body)
            assert service.logged("ran (.*);")[before:] == [ran]


def test_writes_are_committed_before_the_answer(tmp_path: Path) -> None:
    """Another connection sees them, and may write at once."""
    database = tmp_path / "users.db"
    settings = {"DATABASE_URL": f"sqlite:///{database}"}
    with start(tmp_path, **settings) as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        with closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as other:
            for method, body, name in [
                ("PUT", BOB, [(BOB["name"],)]),
                ("PATCH", {"name": "n"}, [("n",)]),
                ("DELETE", None, []),
            ]:
                assert client.request(method, path, json=body).is_success
                other.execute("BEGIN IMMEDIATE")
                assert other.execute("SELECT name FROM users").fetchall() == name
                other.execute("ROLLBACK")


@pytest.mark.parametrize("new_database", ["postgres"], indirect=True)
@pytest.mark.parametrize("path", ["/users", "/together"])
@pytest.mark.parametrize(("constraint", "status"), [("unique", 409), ("trigger", 500)])
def test_commit_that_fails_is_no_201(
    client: Client, database: str, path: str, constraint: str, status: int
) -> None:
    """SQLite checks nothing as late as that but foreign keys."""
    function = "'BEGIN RAISE check_violation; END'"
    execute(
        database,
        f"CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS {function}",
    )
    late, undo = {
        "unique": (
            "ALTER TABLE users ADD CONSTRAINT late UNIQUE (name) DEFERRABLE INITIALLY DEFERRED",
            "ALTER TABLE users DROP CONSTRAINT late",
        ),
        "trigger": (
            "CREATE CONSTRAINT TRIGGER late AFTER INSERT ON users DEFERRABLE INITIALLY DEFERRED"
            " FOR EACH ROW EXECUTE FUNCTION refuse()",
            "DROP TRIGGER late ON users",
        ),
    }[constraint]
    bob = client.post("/users", json=BOB).json()
    execute(database, late)
    try:
        body = ADA | {"name": BOB["name"]}
        response = client.post(path, json=body if path == "/users" else [body])
        assert response.status_code == status
        assert client.get("/users").json() == [bob]
    finally:
        execute(database, undo)


@pytest.mark.parametrize("path", ["/together", "/objects", "/engine"])
def test_transaction(client: Client, path: str) -> None:
    """All or nothing."""
    assert client.post(path, json=[BOB, ADA | {"email": BOB["email"]}]).status_code == 409
    assert client.get("/users").json() == []
    response = client.post(path, json=[ADA, BOB])
    assert response.status_code == 201
    users = client.get("/users").json()
    assert [user["email"] for user in users] == [ADA["email"], BOB["email"]]
    assert response.json() in (users, None)  # objects outlive the commit


def test_second_write_without_a_transaction(client: Client, service: Service) -> None:
    """It is refused, by an error that says what to do."""
    response = client.post("/one-by-one", json=[ADA, BOB])
    assert is_problem(response, 500, FAILED)
    service.wait_for("ERROR: +Exception in ASGI application\n")
    service.wait_for("InvalidRequestError: A second write: use `async with session.begin\\(\\):`")
    assert [user["email"] for user in client.get("/users").json()] == [ADA["email"]]


def test_write_without_returning(client: Client) -> None:
    """It has no rows, and is kept."""
    assert client.post("/users", json=ADA).status_code == 201
    assert client.delete("/everyone").json() == 1
    assert client.get("/users").json() == []


def test_objects_without_a_transaction(client: Client, service: Service) -> None:
    """A handler that forgets it is told so, and keeps no connection: there is one."""
    for times in range(1, 4):
        assert client.post("/forgetful", json=[ADA]).status_code == 500
        said = "InvalidRequestError: Autobegin is disabled on this Session"
        assert len(service.wait_for(said, times)) == times
        assert client.get("/users").json() == []


def test_overridden_session(tmp_path: Path) -> None:
    """Reads, writes and the probe follow it."""
    more = """
other = create_async_engine("sqlite+aiosqlite:///other.db")
SQLModel.metadata.create_all(sa.create_engine("sqlite:///other.db"))
app.dependency_overrides[get_session] = lambda: Session(other, other)
"""
    with (
        start(tmp_path, change_main(tmp_path, CHEAP, more=more)) as service,
        service.client() as client,
    ):
        created = client.post("/users", json=ADA)
        path = created.headers["Location"]
        assert client.get(path).json() == created.json()
        assert client.patch(path, json={"name": "n"}).json() in client.get("/users").json()
        [users] = tmp_path.rglob("users.db")
        assert execute(f"sqlite:///{users}", "SELECT count(*) FROM users") == [(0,)]
        execute(f"sqlite:///{users.parent}/other.db", "ALTER TABLE users RENAME TO elsewhere")
        assert client.get("/readyz").status_code == 503


def test_parameters_are_not_logged(new_database: Callable[[], str], tmp_path: Path) -> None:
    """What a statement was given is not in the log when it fails."""
    call = "session.run(SELECT, pk=user_id)"
    copy = change_main(tmp_path, (call, call.replace("pk=", "unknown=")))
    with start(tmp_path, "--no-access-log", copy, DATABASE_URL=new_database()) as service:
        with service.client() as client:
            response = client.get("/users/987654321")
            assert is_problem(response, 500, FAILED)
        service.wait_for("StatementError: .* A value is required for bind parameter 'pk'")
        assert not service.logged("987654321")


# --- Requests -------------------------------------------------------------------------


def test_token_comes_first(tmp_path: Path) -> None:
    """Who has none is told so before a body is read or looked at."""
    with start(tmp_path, API_TOKEN="token") as service, service.client() as client:
        assert client.post("/users", content=b"no JSON").status_code == 401
        schemes = client.get("/openapi.json").json()["components"]["securitySchemes"]
        assert schemes == {"token": {"type": "http", "scheme": "bearer"}}
        address = service.url.removeprefix("http://")
        with closing(http.client.HTTPConnection(address, timeout=30)) as connection:
            connection.putrequest("POST", "/users")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "1000")
            connection.endheaders()  # and no body follows
            assert connection.getresponse().status == 401


CORS = """
from fastapi.middleware.cors import CORSMiddleware

app.add_middleware(CORSMiddleware, allow_origins=["*"], allow_headers=["*"])


@app.middleware("http")
async def fail(request: Request, call_next: Any) -> Response:
    assert not request.url.path.endswith("/fail")
    return await call_next(request)
"""


def test_token_and_cors(tmp_path: Path) -> None:
    """A browser asks without the token whether it may send it, and may read that it is wrong."""
    prefix = "    redirect_slashes=False,\n", '    redirect_slashes=False,\n    root_path="/api",\n'
    copy = change_main(tmp_path, prefix, more=CORS)
    with start(tmp_path, copy, API_TOKEN="token") as service, service.client() as client:
        headers = {"Origin": "https://example.com", "Access-Control-Request-Method": "GET"}
        headers["Access-Control-Request-Headers"] = "authorization"
        assert client.options("/api/users", headers=headers).status_code == 200
        response = client.get("/api/users", headers=headers)
        assert is_problem(response, 401, "The token is not valid.")
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert client.get("/api/livez").status_code == client.get("/livez").status_code == 200
        assert is_problem(client.get("/api/fail"), 500, FAILED)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/users", "/users/{id}", "/openapi.json"])
def test_head(client: Client, ada: dict[str, Any], path: str) -> None:
    """HEAD is GET without a body."""
    path = path.format(id=ada["id"])
    head, whole = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (whole.status_code, b"") == (200, b"")
    assert head.headers["Content-Length"] == whole.headers["Content-Length"]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_redirect(client: Client, method: str) -> None:
    """A path with a slash too many sends no password to whatever Host says."""
    headers = {"Host": "example.com"}
    response = client.request(method, "/users/", json=ADA, headers=headers)
    assert response.status_code in (404, 405)
    assert "Location" not in response.headers


@pytest.mark.parametrize("new_database", ["sqlite"], indirect=True)
def test_ids_of_another_program(client: Client, database: str) -> None:
    """What can be created can be read; PostgreSQL's column ends before them."""
    columns = "(id, name, email, password_hash)"
    execute(database, f"INSERT INTO users {columns} VALUES ({2**40}, 'n', '{email(0)}', '')")
    response = client.post("/users", json=ADA)
    assert response.json()["id"] > 2**40
    assert client.get(response.headers["Location"]).json() == response.json()
    assert client.get(f"/users?after={2**40}").json() == [response.json()]


def test_fault_is_a_problem(tmp_path: Path) -> None:
    """Any fault of the service's own is one, with a traceback in the log."""
    change = '"""Read a user."""\n', '"""Read a user."""\n    assert user_id != 7\n'
    with start(tmp_path, change_main(tmp_path, change)) as service, service.client() as client:
        response = client.get("/users/7")
        assert is_problem(response, 500, FAILED)
        assert response.headers["Connection"] == "close"  # uvicorn does: nothing may follow on it
        service.wait_for("Traceback")
        service.wait_for("AssertionError")
        assert client.get("/users").status_code == 200


def test_large_body(client: Client) -> None:
    """64 KiB and no byte more, and who sends more is hung up on."""
    body = json.dumps(ADA).encode()
    body += b" " * (65536 - len(body))
    headers = {"Content-Type": "application/json"}
    assert client.post("/users", content=body, headers=headers).status_code == 201
    response = client.post("/users", content=body + b" ", headers=headers)
    assert is_problem(response, 413, "The body is too large.")
    assert response.headers["Connection"] == "close"


def test_many_faults(client: Client) -> None:
    """An answer does not name more of them than anybody reads."""
    response = client.post("/users", json=ADA | {str(number): 1 for number in range(6000)})
    assert response.status_code == 422
    assert len(response.json()["errors"]) == 100


# --- The database connection ----------------------------------------------------------


def test_outage(wire: Wire, tmp_path: Path) -> None:
    with start(tmp_path, DATABASE_URL=wire.url) as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        wire.cut()
        wait_until(lambda: not any(end.fileno() >= 0 for end in wire.ends))
        client.get("/livez")  # so that the service has had its turn to notice
        for method, url, body in REQUESTS:
            assert is_busy(client.request(method, url, json=body))
        assert client.get("/livez").status_code == 200
        assert len(service.logged(f"{BUSY} .*ConnectionRefusedError")) == len(REQUESTS)
        assert not service.logged("Traceback")
        wire.mend()
        assert client.get(path).status_code == 200


def test_closed_connections_are_replaced(wire: Wire, tmp_path: Path) -> None:
    settings = {"DATABASE_URL": wire.url, "DATABASE_POOL_SIZE": "3"}
    with start(tmp_path, **settings) as service, service.client() as client:
        assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]
        terminate(wire.database)
        assert wire.taken <= 3  # no more of them came and went
        wait_until(lambda: not any(end.fileno() >= 0 for end in wire.ends))
        client.get("/livez")  # so that the service has had its turn to notice
        assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]
        assert not service.logged("ERROR")


def test_lost_connections_are_replaced(wire: Wire, tmp_path: Path) -> None:
    """A balancer that forgets what was idle costs no request, if that is idle for long enough."""
    copy = change_main(tmp_path, ("pool_recycle=240", "pool_recycle=1"))
    with start(tmp_path, copy, DATABASE_URL=wire.url) as service, service.client() as client:
        assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]
        wire.lose()
        time.sleep(1.5)
        assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]
        assert client.get("/readyz").status_code == 200
        assert not service.logged("ERROR")


def test_lost_connections_are_replaced_by_one_that_fails(wire: Wire, tmp_path: Path) -> None:
    """If that is idle for less, one request pays for all."""
    with start(tmp_path, DATABASE_URL=wire.url) as service, service.client() as client:
        assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]
        wire.lose()
        assert is_busy(client.get("/users"))
        assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]


def test_few_connections_are_in_use(postgres: str) -> None:
    """The others stay idle, until they are replaced."""
    assert printed(TAKE, postgres) == "3 1\n"


TAKE = """
import asyncio, main

async def pid():
    session = await main.get_session()
    return (await session.run(main.sa.select(main.sa.func.pg_backend_pid()))).scalar()

async def take():
    at_once = await asyncio.gather(pid(), pid(), pid())
    print(len(set(at_once)), len({await pid() for _ in range(5)}))
    await main.engine.dispose()

asyncio.run(take())
"""


def test_one_connection_on_sqlite(tmp_path: Path) -> None:
    """Who needs another waits for it."""
    assert printed(WAIT, f"sqlite:///{tmp_path}/users.db") == "it waits\n"


WAIT = """
import asyncio, main

async def connect():
    async with main.engine.connect():
        try:
            await asyncio.wait_for(main.engine.connect().start(), 0.5)
        except TimeoutError:
            print("it waits")
    await main.engine.dispose()

asyncio.run(connect())
"""


def test_frozen_database(wire: Wire, tmp_path: Path) -> None:
    """It holds up neither a request nor the end of the service."""
    settings = {"DATABASE_URL": wire.url, "DATABASE_POOL_SIZE": "2"}
    with start(tmp_path, **settings) as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        wire.flows.clear()
        with ThreadPoolExecutor(1) as pool:
            ready = pool.submit(client.get, "/readyz")
            assert at_once(lambda _: client.get(path), 6) == 6 * [503]
            assert is_busy(ready.result())
        assert client.get("/livez").status_code == 200
        wire.flows.set()
        # So that one connection is idle in the end.
        assert at_once(lambda _: client.get(path), 6) == 6 * [200]
        wire.asked.clear()
        wire.flows.clear()
        with ThreadPoolExecutor(1) as pool:
            last = pool.submit(client.get, path)
            wait_until(lambda: wire.asked)
            service.process.terminate()
            assert last.result().status_code == 503
    assert service.logged("Application shutdown complete")


def test_abandoned_statements_end(wire: Wire, tmp_path: Path) -> None:
    """What nobody waits for gives its connection back, though the lock is still held."""
    with start(tmp_path, DATABASE_URL=wire.url) as service, service.client() as client:
        with locked(wire.database):
            assert at_once(lambda _: client.get("/users"), 5) == 5 * [503]
            wait_until(lambda: waiting(wire.database) == 0)
        assert client.get("/users").status_code == 200


def test_slow_and_vanishing_clients(new_database: Callable[[], str], tmp_path: Path) -> None:
    """Who stops amid a request, goes away, or does not read, holds no connection."""
    database = new_database()
    settings = {"DATABASE_URL": database, "DATABASE_POOL_SIZE": "1"}
    copy = change_main(tmp_path, CHEAP)
    with start(tmp_path, copy, **settings) as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        insert(database, *100 * ["n" * 100])
        address = make_url(service.url)
        body = json.dumps(BOB).encode()
        head = b"Host: users\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(
            body
        )
        stops = b"POST /users HTTP/1.1\r\n" + head + body[:20]
        vanishes = b"PATCH %s HTTP/1.1\r\n" % path.encode() + head + body
        waiting: list[socket.socket] = []
        does_not_read = 1000 * b"GET /users?limit=100 HTTP/1.1\r\nHost: users\r\n\r\n"
        with ExitStack() as slow:
            for request in [*10 * [stops, vanishes], does_not_read]:
                one = slow.enter_context(socket.socket())
                one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                one.connect((address.host, address.port))
                one.sendall(request)
                if request == stops:
                    waiting.append(one)
                if request == vanishes:  # with a reset
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    one.close()
            for number in range(200):
                assert client.get(path).status_code == 200
                assert client.patch(path, json={"name": f"name {number}"}).status_code == 200
            assert len(service.logged("GET /users.limit")) < 1000  # it does not read, really
            assert [one.recv(12) for one in waiting] == 10 * [b"HTTP/1.1 503"]
        assert len(service.logged(BUSY)) == 10


def printed(script: str, url: str) -> str:
    """Give what a script prints that imports main.py, with a database."""
    command, environment = [sys.executable, "-c", script], os.environ | {"DATABASE_URL": url}
    return subprocess.check_output(command, cwd=ROOT, env=environment, text=True)


CANCEL = """
import asyncio, main

async def transaction():
    session = await main.get_session()
    async with session.begin():
        await session.run(main.LIST, after=0, limit=1)

async def cancel_at_each_step():
    await main.create_tables()
    for steps in range(100):
        task = asyncio.create_task(transaction())
        for _ in range(steps):
            await asyncio.sleep(0 if steps % 3 else 0.0005)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.01)
    print(main.autocommit.pool.checkedout())
    await main.engine.dispose()

asyncio.run(cancel_at_each_step())
"""


STREAM = """
from fastapi.responses import StreamingResponse


@app.get("/stream")
async def stream() -> Response:
    async def parts():
        yield b"a"
        await asyncio.sleep(2)
        yield b"b"

    return StreamingResponse(parts())


@app.get("/late")
async def late() -> Response:
    try:
        await asyncio.sleep(5)
    except asyncio.CancelledError:
        pass
    return Response("late")


@app.get("/never")
async def never() -> None:
    await asyncio.sleep(5)


@app.get("/broken")
async def broken() -> Response:
    async def parts():
        yield b"a"
        raise ConnectionError("in the middle")

    return StreamingResponse(parts())
"""


def test_long_answer(tmp_path: Path) -> None:
    """The deadline is for its beginning."""
    copy = change_main(tmp_path, ("DEADLINE = 10", "DEADLINE = 1"), more=STREAM)
    with start(tmp_path, copy) as service, service.client() as client:
        assert client.get("/stream").text == "ab"
        assert client.get("/late").text == "late"  # as it does not heed it
        assert not service.logged("ERROR|Traceback")
        assert is_busy(client.get("/never"))
        service.wait_for(f"ERROR: +{BUSY} TimeoutError..1 s have passed")
        with pytest.raises(RemoteProtocolError):  # what has begun cannot become a problem
            client.get("/broken")
        service.wait_for("ConnectionError: in the middle")
        assert not service.logged("RuntimeError")


def test_cancelled_transactions(new_database: Callable[[], str]) -> None:
    """Wherever the deadline meets one, its connection goes back to the pool."""
    assert printed(CANCEL, new_database()) == "0\n"


# --- Settings -------------------------------------------------------------------------


PRAGMA = """

@app.get("/pragmas")
async def pragmas(session: SessionDep) -> Any:
    async with session.begin():
        names = "foreign_keys", "busy_timeout"
        return [(await session.run(sa.text(f"PRAGMA {name}"))).scalar() for name in names]
"""


def test_default_database(tmp_path: Path) -> None:
    copy = change_main(tmp_path, more=PRAGMA)
    with start(tmp_path, copy) as service, service.client() as client:
        assert client.post("/users", json=ADA).json()["id"] == 1
        [database] = tmp_path.rglob("users.db")
        assert execute(f"sqlite:///{database}", "PRAGMA journal_mode") == [("wal",)]
        assert client.get("/pragmas").json() == [1, 2000]
        assert len(service.logged("WARNING: +API_TOKEN is not set")) == 1
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
    url = change(wire.url)
    with start(tmp_path, DATABASE_URL=url) as service, service.client() as client:
        assert client.post("/users", json=ADA).json() in client.get("/users").json()


def test_database_url_of_other_drivers(postgres: str, tmp_path: Path) -> None:
    """What asyncpg does not know is left out, and named."""
    options = ["channel_binding", "connect_timeout", "connection_limit", "gssencmode", "keepalives"]
    options += ["keepalives_count", "keepalives_idle", "keepalives_interval", "pool_timeout"]
    url = make_url(postgres).update_query_dict(dict.fromkeys(options, "1"))
    with start(tmp_path, DATABASE_URL=url.render_as_string(False)) as service:
        with service.client() as client:
            assert client.get("/readyz").status_code == 200
        assert service.logged(f"WARNING: +DATABASE_URL: left out, .*: {', '.join(options)}\n")


TELL = """
import asyncio, main

@main.event.listens_for(main.engine.sync_engine, "do_connect")
def tell(dialect, record, args, options):
    print(options["dsn"])
    raise ValueError

try:
    asyncio.run(main.create_tables())
except ValueError:
    pass
"""


def test_database_url_keeps_the_password(tmp_path: Path) -> None:
    url = "postgresql://us%40er:p%2Fss%3Aw%25rd@host:5433/name?sslmode=require"
    assert printed(TELL, url).strip() == url


@pytest.mark.parametrize(
    ("option", "named"), [("", True), ("&pgbouncer=true", False), ("&pgbouncer=false", True)]
)
def test_pgbouncer(wire: Wire, tmp_path: Path, option: str, named: bool) -> None:
    """Behind it no statement has a name: the next may run on another connection."""
    url = wire.url + option
    with start(tmp_path, DATABASE_URL=url) as service, service.client() as client:
        assert client.get("/users").status_code == 200
        wire.prepared.clear()
        assert client.get("/users/1").status_code == 404
    assert wire.prepared
    assert any(wire.prepared) is named


SECRET = "s3cret"
WANTED = "neither postgresql://login:password@host/name (without schema) nor sqlite:///file.db"


@pytest.mark.parametrize(
    "settings",
    [
        {"DATABASE_URL": f"mysql://user:{SECRET}@host/name"},
        {"DATABASE_URL": SECRET},
        {"DATABASE_URL": f"postgres://user:{SECRET}@host"},
        {"DATABASE_URL": f"sqlite://users.db/{SECRET}"},
        {"DATABASE_URL": "sqlite:///"},
        {"DATABASE_POOL_SIZE": "many", "API_TOKEN": f"{SECRET}\u00e9"},
        {"DATABASE_URL": "", "DATABASE_POOL_SIZE": "0", "API_TOKEN": ""},
    ],
    ids=["another database", "no URL", "no name", "a host", "no file", "two", "three"],
)
def test_bad_settings(tmp_path: Path, settings: dict[str, str]) -> None:
    """One line for each, which names it and not its value; and code 3."""
    with start(tmp_path, **settings) as service:
        assert service.process.wait(20) == 3
        lines = service.log.read_text().splitlines()
        named = [re.findall(r"^CRITICAL: +(\w+): .", line) for line in lines]
        assert named == [[name] for name in settings]
        if "DATABASE_URL" in settings:
            assert lines[0].endswith(f" DATABASE_URL: {WANTED}")
        assert not service.logged(SECRET)


def test_bad_setting_with_workers(tmp_path: Path) -> None:
    """It is not tried again and again."""
    with start(tmp_path, "--workers=2", DATABASE_URL="") as service:
        service.process.wait(20)
        assert len(service.logged("CRITICAL")) <= 2  # one of each worker
        assert not service.logged("Traceback")


def test_settings_of_uvicorn(tmp_path: Path) -> None:
    settings = {"WEB_CONCURRENCY": "2", "FORWARDED_ALLOW_IPS": "*"}
    with start(tmp_path, **settings) as service, service.client() as client:
        headers = {"X-Forwarded-For": "203.0.113.7"}
        assert client.get("/livez", headers=headers).status_code == 200
        service.wait_for("Application startup complete", 2)
        service.wait_for('203.0.113.7:0 - "GET /livez')


# --- Start and stop -------------------------------------------------------------------


def test_start_of_many_workers(new_database: Callable[[], str], tmp_path: Path) -> None:
    with start(tmp_path, "--workers=4", DATABASE_URL=new_database()) as service:
        service.wait_for("Application startup complete", 4)
        assert not service.logged("waiting|died")


def test_start_takes_its_turn(wire: Wire, tmp_path: Path) -> None:
    """Who makes the tables holds a lock, for which others wait, but not who makes other tables."""
    queue = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
    names = [('__tablename__ = "users"', '__tablename__ = "people"'), ('s["users"]', 's["people"]')]
    with ExitStack() as turn:
        turn.enter_context(locked(wire.database, "SELECT pg_advisory_xact_lock(hashtext('users'))"))
        with (
            start(tmp_path, DATABASE_URL=wire.url) as service,
            start(tmp_path, change_main(tmp_path, *names), DATABASE_URL=wire.url) as people,
        ):
            people.wait_for("startup complete")
            wait_until(lambda: execute(wire.database, queue)[0][0])
            assert not service.logged("startup complete")
            turn.close()
            service.wait_for("startup complete")


def test_start_before_the_database(wire: Wire, tmp_path: Path) -> None:
    wire.cut()
    with start(tmp_path, DATABASE_URL=wire.url) as service:
        service.wait_for(
            "WARNING: +DATABASE_URL: waiting for the database: .*ConnectionRefusedError"
        )
        wire.mend()
        with service.client() as client:
            assert client.get("/readyz").status_code == 200


def test_start_with_a_frozen_database(wire: Wire, tmp_path: Path) -> None:
    wire.flows.clear()
    with start(tmp_path, DATABASE_URL=wire.url) as service:
        service.wait_for("WARNING: +DATABASE_URL: waiting for the database: TimeoutError")
        wire.flows.set()
        with service.client() as client:
            assert client.get("/readyz").status_code == 200


def test_start_before_the_folder_of_sqlite(tmp_path: Path) -> None:
    with start(tmp_path, DATABASE_URL=f"sqlite:///{tmp_path}/folder/users.db") as service:
        service.wait_for(
            "WARNING: +DATABASE_URL: waiting for the database: .*unable to open database file"
        )
        (tmp_path / "folder").mkdir()
        with service.client() as client:
            assert client.get("/readyz").status_code == 200


def has_stopped(service: Service) -> bool:
    """Whether it has come to its end, and nothing broke on the way."""
    assert service.process.wait(20) in (0, -15)
    assert service.logged("Application shutdown complete")
    return not service.logged("Traceback")


def test_stop_amid_requests(new_database: Callable[[], str], tmp_path: Path) -> None:
    """What has begun is answered, and nothing else."""
    database = new_database()
    with (
        start(tmp_path, "--log-level=trace", DATABASE_URL=database) as service,
        service.client() as client,
        ThreadPoolExecutor(5) as pool,
    ):
        path = client.post("/users", json=ADA).headers["Location"]
        url = service.url
        with locked(database):
            changes = [{"name": f"name {number}"} for number in range(5)]
            patches = [pool.submit(client.patch, path, json=change) for change in changes]
            service.wait_for(r"ASGI \[\d+] Started scope={'type': 'http'", 1 + 5)
            service.process.terminate()
            service.wait_for("Shutting down")
            with pytest.raises(ConnectError):
                get(f"{url}/livez")
        assert [patch.result().status_code for patch in patches] == 5 * [200]
        assert has_stopped(service)


def test_stop_amid_a_body(tmp_path: Path) -> None:
    """Who has sent half of one is told so in time."""
    with start(tmp_path) as service, socket.socket() as one:
        address = make_url(service.url)
        one.connect((address.host, address.port))
        one.sendall(b"POST /users HTTP/1.1\r\nHost: users\r\nContent-Length: 100\r\n\r\n{")
        service.process.terminate()
        assert one.recv(12) == b"HTTP/1.1 503"
        assert has_stopped(service)


def test_stop_with_a_frozen_database(wire: Wire, tmp_path: Path) -> None:
    """It is not asked for a goodbye for long, by each of the connections."""
    settings = {"DATABASE_URL": wire.url, "DATABASE_POOL_SIZE": "20"}
    with start(tmp_path, **settings) as service, service.client() as client:
        with locked(wire.database) as run, ThreadPoolExecutor(20) as pool:
            gets = [pool.submit(client.get, "/users") for _ in range(20)]
            wait_until(lambda: waiting(wire.database) == 20)
            run("COMMIT")
        assert [get.result().status_code for get in gets] == 20 * [200]
        wire.flows.clear()
        service.process.terminate()
        assert has_stopped(service)


def test_stop(wire: Wire, tmp_path: Path) -> None:
    """The connections are closed at the end."""
    with start(tmp_path, DATABASE_URL=wire.url) as service, service.client() as client:
        client.get("/users")
    assert wire.asked[-1] == "close"
    assert has_stopped(service)


# --- Hashes ---------------------------------------------------------------------------


def test_hashes_beside_the_event_loop(new_database: Callable[[], str], tmp_path: Path) -> None:
    """While passwords are hashed, the only thread and the only connection serve others."""
    settings = {"DATABASE_URL": new_database(), "DATABASE_POOL_SIZE": "1\n"}
    with (
        start(tmp_path, **settings) as service,
        service.client() as client,
        ThreadPoolExecutor(8) as pool,
    ):
        path = client.post("/users", json=BOB).headers["Location"]
        memory = peak_memory(service.process.pid)
        bodies = [ADA | {"email": email(number)} for number in range(8)]
        posts = [pool.submit(client.post, "/users", json=body) for body in bodies]
        reads = 0
        while not all(post.done() for post in posts):
            assert client.get(path).status_code == 200
            reads += 1
        assert [post.result().status_code for post in posts] == 8 * [201]
        assert reads > 2 * len(posts)
        # In KiB; a second hash beside the first would take 64 MiB.
        assert peak_memory(service.process.pid) - memory < 32 * 1024


def test_create_user_waits_for_its_hash_no_longer_than_the_limit(
    new_database: Callable[[], str], tmp_path: Path
) -> None:
    """Who has gone away from a queue of passwords, or came late to it, holds nobody up."""
    copy = change_main(tmp_path, ("DEADLINE = 10", "DEADLINE = 2"))
    with start(tmp_path, copy, DATABASE_URL=new_database()) as service, service.client() as client:
        client.post("/users", json=ADA)
        memory = peak_memory(service.process.pid)
        bodies = [ADA | {"email": email(number)} for number in range(100)]
        statuses = at_once(lambda number: client.post("/users", json=bodies[number]), 100)
        assert set(statuses) == {201, 503}
        assert client.post("/users", json=BOB).status_code == 201
        # In KiB; a second hash beside the first would take 64 MiB.
        assert peak_memory(service.process.pid) - memory < 32 * 1024
