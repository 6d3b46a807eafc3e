"""Every error that main.py tells from others, on both databases, each from a fault that is real.

python -m pytest .ci/errors.py
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest
from harness import (
    CHEAP,
    Server,
    Wire,
    change_main,
    is_busy,
    locked,
    running,
    server,
    terminate,
    turn,
    wait_until,
    waiting,
    wire,
)
from httpx2 import Client, Response
from sqlalchemy import make_url

from test_main import (
    BUSY,
    FAILED,
    Service,
    app_on,
    execute,
    is_problem,
    postgres,
    start,
    temporary_database,
)

__all__ = ["postgres", "running", "server", "turn", "wire"]  # fixtures

# What is sent, and must not be found in a log.
ROW = {"name": "Zarathustra", "email": "zarathustra@example.com", "password": "correct horse"}
OTHER = {"name": "Zoroaster", "email": "zoroaster@example.com", "password": "battery staple"}
SECRETS = r"(?i)zarathustra|zoroaster|\$argon2"

POST = "POST", "/users", OTHER
GET = "GET", "/users/{id}", None
LIST = "GET", "/users", None
PUT = "PUT", "/users/{id}", OTHER
PATCH = "PATCH", "/users/{id}", {"name": OTHER["name"]}
DELETE = "DELETE", "/users/{id}", None
READY = "GET", "/readyz", None
Call = tuple[str, str, object]

# A handler that fails on its own, and one with a transaction.
MORE = """

@app.get("/file")
def file() -> None:
    open("/no such file")


@app.get("/teapot")
def teapot() -> None:
    raise HTTPException(418, {"is": "short"}, {"X-Spout": "1"})


@app.get("/without-a-body")
def without_a_body(status: int) -> None:
    raise HTTPException(status, headers={"ETag": '"1"'})


@app.get("/transaction")
async def transaction(session: SessionDep) -> Any:
    async with session.begin():
        await session.run(LIST, after=0, limit=1)
        return (await session.run(LIST, after=0, limit=1)).scalars().all()


@app.get("/unfit")
async def unfit(session: SessionDep) -> Any:
    return (await session.run(SELECT, pk={"s3cret": 1})).scalars().all()
"""


@dataclass
class Answer:
    """What a client was told, and what the log was."""

    response: Response
    log: str

    def is_busy(self, cause: str) -> bool:
        """Whether it is a 503 that asks to come again, with one line in the log."""
        assert is_busy(self.response), self.log
        [line] = self.log.splitlines()
        assert re.match(f"ERROR:    {BUSY} (?:{cause})", line), line
        return not re.search(SECRETS, line)

    def is_fault(self, cause: str) -> bool:
        """Whether it is a 500, with a traceback in the log and no data of a row."""
        assert is_problem(self.response, 500, FAILED), self.log
        assert "Retry-After" not in self.response.headers
        assert re.match(f"ERROR: +{FAILED} (?:{cause})", self.log), self.log
        assert self.log.count("Traceback") == self.log.count("Traceback:\n  File") == 1
        lines = self.log.partition("Traceback:\n")[2].splitlines()
        assert all(line.startswith("  ") for line in lines if line), self.log
        assert "main.py" in self.log
        return not re.search(SECRETS, self.log)

    def is_taken(self, *columns: str) -> bool:
        """Whether it is a 409 that names these columns, and nothing in the log."""
        errors = [
            {"loc": ["body", column], "msg": "Value is taken", "type": "taken"}
            for column in columns
        ]
        detail = f"The {' with this '.join(columns)} is taken."
        return is_problem(self.response, 409, detail, errors=errors) and not self.log


class Subject:
    """A service with one user, and its database, reached past the service."""

    def __init__(self, service: Service, client: Client, url: str, administrator: str) -> None:
        self.service, self.client = service, client
        self.url, self.administrator = url, administrator
        self.id = 0

    def run(self, *statements: str) -> None:
        """Run statements as the owner of the table."""
        for statement in statements:
            execute(self.url, statement)

    def ask(self, call: Call) -> Answer:
        method, path, body = call
        before = self.service.log.stat().st_size
        response = self.client.request(method, path.format(id=self.id), json=body)
        return Answer(response, self.service.log.read_bytes()[before:].decode())

    @contextmanager
    def broken(self, breaks: list[str], mends: list[str]) -> Iterator[None]:
        """Break the table, and mend it again."""
        self.run(*breaks)
        try:
            yield
        finally:
            self.run(*mends)

    def alter_role(self, change: str) -> None:
        """Change what the service's next connection to PostgreSQL meets."""
        execute(self.administrator, f"ALTER ROLE {make_url(self.url).username} {change}")

    @contextmanager
    def configured(self, setting: str) -> Iterator[None]:
        """Run the service with another default of PostgreSQL."""
        self.alter_role(f"SET {setting}")
        try:
            self.reconnect()
            yield
        finally:
            self.alter_role("RESET ALL")
            self.reconnect()

    def reconnect(self) -> None:
        terminate(self.administrator)
        wait_until(lambda: self.ask(READY).response.status_code == 200)


def with_one_user(subject: Subject) -> Subject:
    subject.run("DELETE FROM users")
    subject.id = subject.client.post("/users", json=ROW).json()["id"]
    return subject


@contextmanager
def run_service(directory: Path, url: str, administrator: str) -> Iterator[Subject]:
    """Run a service that has one connection to its database."""
    copy = change_main(directory, CHEAP, more=MORE)
    settings = {"DATABASE_URL": url, "DATABASE_POOL_SIZE": "1"}
    with (
        start(directory, copy, "--no-access-log", **settings) as service,
        service.client() as client,
    ):
        yield Subject(service, client, url, administrator)


@contextmanager
def ordinary_role(server: str) -> Iterator[tuple[str, str]]:
    """Make a database that belongs to a role without privileges; give its URL, and a superuser's.

    Of the connections that a server keeps for superusers the role has none.
    """
    role = f"role_{uuid4().hex}"
    execute(server, f"CREATE ROLE {role} LOGIN PASSWORD '{role}'")
    with temporary_database(server) as administrator:
        url = make_url(administrator).set(username=role, password=role)
        execute(server, f"ALTER DATABASE {url.database} OWNER TO {role}")
        yield url.render_as_string(hide_password=False), administrator
    execute(server, f"DROP ROLE {role}")


@pytest.fixture(scope="session")
def service_on_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    directory = tmp_path_factory.mktemp("sqlite")
    url = f"sqlite:///{directory}/users.db"
    with run_service(directory, url, url) as subject:
        yield subject


@pytest.fixture(scope="session")
def service_on_postgres(
    postgres: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Subject]:
    with (
        ordinary_role(postgres) as urls,
        run_service(tmp_path_factory.mktemp("postgres"), *urls) as subject,
    ):
        yield subject


@pytest.fixture
def on_sqlite(service_on_sqlite: Subject) -> Subject:
    return with_one_user(service_on_sqlite)


@pytest.fixture
def on_postgres(service_on_postgres: Subject) -> Subject:
    return with_one_user(service_on_postgres)


@pytest.fixture(params=["on_sqlite", "on_postgres"])
def subject(request: pytest.FixtureRequest) -> Subject:
    subject: Subject = request.getfixturevalue(request.param)
    return subject


@pytest.fixture
def on_server(server: Server, tmp_path: Path) -> Iterator[Subject]:
    """Give a service on a PostgreSQL of its own, which a test may harm."""
    with temporary_database(server.url) as url, run_service(tmp_path, url, url) as subject:
        yield with_one_user(subject)
        server.start()


@pytest.fixture
def on_wire(wire: Wire, tmp_path: Path) -> Iterator[Subject]:
    with run_service(tmp_path, wire.url, wire.database) as subject:
        yield with_one_user(subject)


# --- 409: a value is taken ------------------------------------------------------------

# As main.py makes it, but for what is unique.
TABLE = """CREATE TABLE users (id {primary_key}, name varchar NOT NULL, email varchar NOT NULL,
    password_hash varchar NOT NULL, {unique})"""
PRIMARY_KEY = {"sqlite": "integer PRIMARY KEY AUTOINCREMENT", "postgres": "serial PRIMARY KEY"}
ASIDE, BACK = "ALTER TABLE users RENAME TO elsewhere", "ALTER TABLE elsewhere RENAME TO users"


@pytest.mark.parametrize("call", [POST, PUT, PATCH], ids=["POST", "PUT", "PATCH"])
@pytest.mark.parametrize("column", ["email", "name"])
def test_value_is_taken(subject: Subject, column: str, call: Call) -> None:
    """Be it of the unique column that main.py has, or of a second one."""
    method, path, _ = call
    subject.client.post("/users", json=OTHER)
    body = {column: OTHER[column]} if method == "PATCH" else ROW | {column: OTHER[column]}
    if method == "POST":
        body |= {"name": "n", "email": "n@example.com"} | {column: OTHER[column]}
    with subject.broken(["CREATE UNIQUE INDEX second ON users (name)"], ["DROP INDEX second"]):
        assert subject.ask((method, path, body)).is_taken(column)


def test_pair_is_taken(subject: Subject) -> None:
    key = PRIMARY_KEY["sqlite" if subject.url.startswith("sqlite") else "postgres"]
    table = TABLE.format(primary_key=key, unique="UNIQUE (name, email)")
    with subject.broken([ASIDE, table], ["DROP TABLE users", BACK]):
        assert subject.client.post("/users", json=OTHER).status_code == 201
        same_email = OTHER | {"name": "n"}
        assert subject.client.post("/users", json=same_email).status_code == 201
        assert subject.ask(POST).is_taken("name", "email")


def test_key_is_taken(subject: Subject) -> None:
    """One that the client gives."""
    table = TABLE.format(primary_key="integer", unique="PRIMARY KEY (name, email)")
    with subject.broken([ASIDE, table], ["DROP TABLE users", BACK]):
        subject.run(f"INSERT INTO users VALUES (1, '{OTHER['name']}', '{OTHER['email']}', '')")
        assert subject.ask(POST).is_taken("name", "email")


def test_value_is_taken_that_looks_like_a_key(subject: Subject) -> None:
    """What the row holds decides nothing, though the database quotes it."""
    body = OTHER | {"email": "users_pkey@example.com", "name": "n)=(users_pkey"}
    assert subject.client.post("/users", json=body).status_code == 201
    assert subject.ask(("POST", "/users", body)).is_taken("email")


def test_value_is_taken_in_an_expression(subject: Subject) -> None:
    """A unique index on lower(name) has no column to name."""
    index = "CREATE UNIQUE INDEX second ON users (lower(name))"
    with subject.broken([index], ["DROP INDEX second"]):
        body = OTHER | {"name": ROW["name"].upper()}
        answer = subject.ask(("POST", "/users", body))
        assert answer.response.status_code == 409
        assert re.fullmatch(r"The \w.* is taken\.", answer.response.json()["detail"])


def test_value_is_taken_that_a_trigger_refuses(on_postgres: Subject) -> None:
    """Nobody knows a column then."""
    with on_postgres.broken(raising("unique_violation"), DROP_FUNCTION):
        answer = on_postgres.ask(POST)
        assert is_problem(answer.response, 409, "The value is taken.")
        assert not answer.log


# --- 500: what no retry can cure ------------------------------------------------------


@dataclass
class Fault:
    """What breaks the table, what mends it, a request that meets it, and what the log says."""

    breaks: list[str]
    mends: list[str]
    call: Call
    cause: str


DROP_AGE = ["ALTER TABLE users DROP age"]
FAULTS = {
    "table": Fault([ASIDE], [BACK], LIST, "42P01|SQLITE_ERROR no such table"),
    "column": Fault(
        ["ALTER TABLE users RENAME name TO label"],
        ["ALTER TABLE users RENAME label TO name"],
        GET,
        "42703|SQLITE_ERROR no such column",
    ),
    "not null": Fault(
        ["DELETE FROM users", "ALTER TABLE users ADD age integer NOT NULL"],
        DROP_AGE,
        POST,
        "23502|SQLITE_CONSTRAINT_NOTNULL",
    ),
    "check": Fault(
        [
            "ALTER TABLE users ADD age integer DEFAULT 2"
            f" CHECK (age = 1 OR length(name) <> {len(OTHER['name'])})",
        ],
        DROP_AGE,
        PATCH,
        "23514|SQLITE_CONSTRAINT_CHECK",
    ),
    "foreign key": Fault(
        [
            "CREATE TABLE orders (user_id integer NOT NULL REFERENCES users (id))",
            "INSERT INTO orders SELECT id FROM users",
        ],
        ["DROP TABLE orders"],
        DELETE,
        "23503|SQLITE_CONSTRAINT_FOREIGNKEY",
    ),
}
TRIGGER = "CREATE TRIGGER refuses BEFORE INSERT ON users "
DROP_FUNCTION = ["DROP FUNCTION refuse CASCADE"]


def raising(code: str) -> list[str]:
    """Have PostgreSQL raise an error that quotes the whole row."""
    body = f"BEGIN RAISE EXCEPTION 'no %', NEW USING ERRCODE = '{code}'; END"
    return [
        f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $${body}$$",
        f"{TRIGGER} FOR EACH ROW EXECUTE FUNCTION refuse()",
    ]


FAULTS_OF_POSTGRES = {
    "primary key": Fault(
        ["SELECT setval(pg_get_serial_sequence('users', 'id'), id, false) FROM users"],
        [],
        POST,
        "23505",
    ),
    "primary key of another name": Fault(
        [
            "ALTER TABLE users RENAME CONSTRAINT users_pkey TO pk_users",
            "SELECT setval(pg_get_serial_sequence('users', 'id'), id, false) FROM users",
        ],
        ["ALTER TABLE users RENAME CONSTRAINT pk_users TO users_pkey"],
        POST,
        "23505",
    ),
    "permission": Fault(
        ["REVOKE ALL ON users FROM CURRENT_USER"],
        ["GRANT ALL ON users TO CURRENT_USER"],
        POST,
        "42501 permission denied for table users",
    ),
    "length": Fault(
        ["UPDATE users SET name = 'n'", "ALTER TABLE users ALTER name TYPE varchar(3)"],
        ["ALTER TABLE users ALTER name TYPE varchar(100)"],
        PUT,
        "22001",
    ),
    "type": Fault(
        ["ALTER TABLE users ALTER name TYPE integer USING 1"],
        ["ALTER TABLE users ALTER name TYPE varchar(100)"],
        PATCH,
        "42804",
    ),
    "trigger": Fault(raising("P0001"), DROP_FUNCTION, POST, "P0001"),
    "trigger with a code of its own": Fault(raising("USER1"), DROP_FUNCTION, POST, "USER1"),
}
FAULTS_OF_SQLITE = {
    "primary key": Fault(
        [
            "CREATE TRIGGER twice AFTER INSERT ON users BEGIN INSERT INTO users"
            " (id, name, email, password_hash) VALUES (NEW.id, 'n', 'e', 'h'); END"
        ],
        ["DROP TRIGGER twice"],
        POST,
        "SQLITE_CONSTRAINT_PRIMARYKEY",
    ),
    "type": Fault(
        [
            ASIDE,
            "CREATE TABLE users (id integer PRIMARY KEY, name integer, email text,"
            " password_hash text) STRICT",
        ],
        ["DROP TABLE users", BACK],
        POST,
        "unknown IntegrityError: INSERT INTO users",
    ),
    "trigger": Fault(
        [f"{TRIGGER} BEGIN SELECT RAISE(ABORT, 'no {OTHER['name']}'); END"],
        ["DROP TRIGGER refuses"],
        POST,
        "SQLITE_CONSTRAINT_TRIGGER",
    ),
}


def is_fault(subject: Subject, fault: Fault) -> bool:
    healthy = with_one_user(subject).ask(GET)
    with subject.broken(fault.breaks, fault.mends):
        is_fault = subject.ask(fault.call).is_fault(fault.cause)
    assert with_one_user(subject).ask(POST).response.status_code == 201
    return healthy.response.status_code == 200 and is_fault


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_fault(subject: Subject, fault: Fault) -> None:
    assert is_fault(subject, fault)


@pytest.mark.parametrize("fault", FAULTS_OF_POSTGRES.values(), ids=FAULTS_OF_POSTGRES)
def test_fault_on_postgres(on_postgres: Subject, fault: Fault) -> None:
    assert is_fault(on_postgres, fault)


@pytest.mark.parametrize("fault", FAULTS_OF_SQLITE.values(), ids=FAULTS_OF_SQLITE)
def test_fault_on_sqlite(on_sqlite: Subject, fault: Fault) -> None:
    assert is_fault(on_sqlite, fault)


def test_fault_of_an_answer(on_postgres: Subject) -> None:
    """A row that another program has made what no answer can be."""
    breaks = "ALTER TABLE users ALTER name TYPE varchar[] USING ARRAY[name]"
    mends = "ALTER TABLE users ALTER name TYPE varchar USING name[1]"
    with_one_user(on_postgres)
    with on_postgres.broken([breaks], [mends]):
        answer = on_postgres.ask(GET)
    assert is_problem(answer.response, 500, FAILED)
    line = f"ERROR: +{FAILED} The answer of GET /users/.* does not fit: .*name"
    assert re.match(line, answer.log), answer.log
    assert answer.log.count("Traceback") == 1
    on_postgres.ask(GET)  # after which the log holds all of the first
    assert not on_postgres.service.logged(f"{SECRETS}|Exception in ASGI")


def test_fault_of_a_parameter(subject: Subject) -> None:
    """The driver refuses it, and SQLite has no name for that."""
    cause = "(22000 DataError| ProgrammingError): SELECT"
    assert subject.ask(("GET", "/unfit", None)).is_fault(cause)


def test_fault_of_a_handler(subject: Subject) -> None:
    """A file that is not there has nothing to do with the database."""
    answer = subject.ask(("GET", "/file", None))
    assert is_problem(answer.response, 500, FAILED), answer.log
    assert "Retry-After" not in answer.response.headers
    subject.ask(GET)  # after which the log holds all of the first
    assert subject.service.logged("main.py.*\n.*\nFileNotFoundError: .*: '/no such file'")
    assert not subject.service.logged(SECRETS)


def test_error_of_a_handler(subject: Subject) -> None:
    """Whatever its detail is, it is told as a text."""
    response = subject.ask(("GET", "/teapot", None)).response
    assert is_problem(response, 418, "{'is': 'short'}")
    assert response.headers["X-Spout"] == "1"


@pytest.mark.parametrize("status", [204, 304])
def test_error_without_a_body(subject: Subject, status: int) -> None:
    """RFC 9110, 15.3.5 and 15.4.5."""
    response = subject.ask(("GET", f"/without-a-body?status={status}", None)).response
    assert (response.status_code, response.content) == (status, b"")
    assert "Content-Type" not in response.headers
    assert response.headers["ETag"] == '"1"'


# --- 503: what a retry can cure -------------------------------------------------------


@contextmanager
def asking(subject: Subject, *calls: Call) -> Iterator[list[Future[Answer]]]:
    """Send requests beside the test."""
    with ThreadPoolExecutor(len(calls)) as pool:
        yield [pool.submit(subject.ask, call) for call in calls]


def test_refused(on_wire: Subject, wire: Wire) -> None:
    wire.cut()
    wait_until(lambda: not any(end.fileno() >= 0 for end in wire.ends))
    on_wire.client.get("/livez")  # so that the service has its turn to notice
    assert on_wire.ask(GET).is_busy("ConnectionRefusedError")
    wire.mend()
    assert on_wire.ask(GET).response.status_code == 200


@pytest.mark.parametrize("end", [Wire.cut, Wire.reset], ids=["closed", "reset"])
def test_reset(on_wire: Subject, wire: Wire, end: Callable[[Wire], None]) -> None:
    """The connection ends while the service waits for an answer."""
    with locked(wire.database), asking(on_wire, PATCH) as [answer]:
        wait_until(lambda: waiting(wire.database))
        end(wire)
        assert answer.result().is_busy("08003")


def test_timed_out(on_wire: Subject, wire: Wire) -> None:
    wire.flows.clear()
    assert on_wire.ask(GET).is_busy("TimeoutError")
    wire.flows.set()
    assert on_wire.ask(GET).response.status_code == 200


def test_stopped(on_server: Subject, server: Server) -> None:
    """There is no socket any more, and then a server that still starts."""
    execute(
        server.url,
        "ALTER SYSTEM SET restore_command = 'until [ -e go ]; do sleep 0.05; done; false'",
    )
    server.stop()
    on_server.client.get("/livez")  # so that the service has its turn to notice
    assert on_server.ask(GET).is_busy("FileNotFoundError|ConnectionRefusedError")
    folder = server.server.pgdata
    (folder / "recovery.signal").touch()
    with ThreadPoolExecutor(1) as pool:
        started = pool.submit(server.start)
        try:
            wait_until(lambda: "57P03" in on_server.ask(GET).log)
            assert on_server.ask(GET).is_busy("57P03")
        finally:
            (folder / "go").touch()
        started.result()
    wait_until(lambda: not execute(server.url, "SELECT pg_is_in_recovery()")[0][0])
    execute(server.url, "ALTER SYSTEM RESET restore_command")
    (folder / "go").unlink()
    assert on_server.ask(GET).response.status_code == 200


def test_ended_by_an_administrator(on_postgres: Subject) -> None:
    with locked(on_postgres.administrator), asking(on_postgres, PATCH) as [answer]:
        wait_until(lambda: waiting(on_postgres.administrator))
        pids = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        here = "wait_event_type = 'Lock' AND datname = current_database()"
        execute(on_postgres.administrator, f"{pids} WHERE {here}")
        assert answer.result().is_busy(
            "08003 .*: terminating connection due to administrator command"
        )
    assert on_postgres.ask(GET).response.status_code == 200


@pytest.mark.parametrize(
    ("refusing", "taking", "cause"),
    [("CONNECTION LIMIT 0", "CONNECTION LIMIT -1", "53300"), ("NOLOGIN", "LOGIN", "28000")],
    ids=["too many connections", "not let in"],
)
def test_role_is_refused(on_postgres: Subject, refusing: str, taking: str, cause: str) -> None:
    """For a while, as also with a password that is being changed."""
    on_postgres.alter_role(refusing)
    try:
        terminate(on_postgres.administrator)
        wait_until(lambda: cause in on_postgres.ask(GET).log)
        assert on_postgres.ask(GET).is_busy(cause)
    finally:
        on_postgres.alter_role(taking)
    assert on_postgres.ask(GET).response.status_code == 200


def test_renamed(on_postgres: Subject) -> None:
    """A database that is not there may come back: one is being restored."""
    url = make_url(on_postgres.administrator)
    server = url.set(database="postgres").render_as_string(hide_password=False)
    renames = "ALTER DATABASE {} RENAME TO {}"
    terminate(on_postgres.administrator)
    execute(server, renames.format(url.database, "elsewhere"))
    try:
        assert on_postgres.ask(GET).is_busy("3D000")
    finally:
        execute(server, renames.format("elsewhere", url.database))
    assert on_postgres.ask(GET).response.status_code == 200


def test_no_file_of_sqlite(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder may come back, as that of a volume."""
    client = app_on(monkeypatch, "sqlite+aiosqlite:////no such folder/users.db")
    assert is_busy(client.get("/users"))


def test_pool_exhausted(subject: Subject) -> None:
    """The one connection waits for a lock, and others wait for the connection."""
    before = subject.service.logged("ERROR.*")
    with locked(subject.administrator), asking(subject, PATCH, PUT, PATCH) as answers:
        assert all(is_busy(answer.result().response) for answer in answers)
    causes = subject.service.logged("ERROR.*")[len(before) :]
    assert len(causes) == 3
    expected = f"ERROR: +{BUSY} (TimeoutError|SQLITE_BUSY)"
    assert all(re.match(expected, cause) for cause in causes), causes
    assert "QueuePool limit" in "".join(causes) or "SQLITE_BUSY" in "".join(causes), causes
    assert subject.ask(GET).response.status_code == 200


def test_read_only(on_postgres: Subject) -> None:
    """A connection that says so, as after a failover, is not used again."""
    on_postgres.alter_role("SET default_transaction_read_only = on")
    try:
        on_postgres.reconnect()
        assert on_postgres.ask(GET).response.status_code == 200
        for _ in range(2):
            assert on_postgres.ask(POST).is_busy("25006")
    finally:
        on_postgres.alter_role("RESET ALL")
    assert on_postgres.ask(POST).response.status_code == 201


def test_serialization_failure(on_postgres: Subject) -> None:
    update = "UPDATE users SET name = 'n'"
    with (
        on_postgres.configured("default_transaction_isolation = 'repeatable read'"),
        locked(on_postgres.administrator, update) as run,
        asking(on_postgres, PATCH) as [answer],
    ):
        wait_until(lambda: waiting(on_postgres.administrator))
        run("COMMIT")
        assert answer.result().is_busy("40001")


def test_deadlock(on_postgres: Subject) -> None:
    """The service holds one row and waits for another, which somebody holds who waits for it."""
    other = on_postgres.client.post("/users", json=OTHER).json()["id"]
    update = "UPDATE users SET name = name WHERE id = {}"
    body = f"BEGIN {update.format(other)}; RETURN NULL; END"
    breaks = [
        f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $${body}$$",
        "CREATE TRIGGER touches AFTER UPDATE ON users FOR EACH ROW"
        " WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION refuse()",
    ]
    patient = "SET deadlock_timeout = '1min'; SET session_replication_role = replica"
    first = f"{patient}; {update.format(other)}"
    with (
        on_postgres.broken(breaks, DROP_FUNCTION),
        locked(on_postgres.administrator, first) as run,
        asking(on_postgres, PATCH) as [answer],
    ):
        wait_until(lambda: waiting(on_postgres.administrator))
        run(update.format(on_postgres.id))
        assert answer.result().is_busy("40P01")


@pytest.mark.parametrize(
    ("limit", "cause"), [("lock_timeout", "55P03"), ("statement_timeout", "57014")]
)
def test_limit_of_the_server(on_postgres: Subject, limit: str, cause: str) -> None:
    """What the database cancels is the same as what the service gives up."""
    with on_postgres.configured(f"{limit} = '50ms'"), locked(on_postgres.administrator):
        assert on_postgres.ask(PATCH).is_busy(cause)


def test_out_of_memory(on_server: Subject) -> None:
    """A trigger takes more locks than the server has room for."""
    body = (
        "BEGIN PERFORM pg_advisory_xact_lock(n) FROM generate_series(1, 1000000) n; RETURN NEW; END"
    )
    breaks = [
        f"CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $${body}$$",
        f"{TRIGGER} FOR EACH ROW EXECUTE FUNCTION refuse()",
    ]
    with on_server.broken(breaks, DROP_FUNCTION):
        assert on_server.ask(POST).is_busy("53200")
    assert on_server.ask(POST).response.status_code == 201


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Give a file system of one megabyte."""
    sudo = ["sudo", "-n"] if os.geteuid() and shutil.which("sudo") else []
    disk = tmp_path / "small disk"
    disk.mkdir()
    tmp_path.chmod(0o755)  # PostgreSQL runs as another user than root
    options = ["-t", "tmpfs", "-o", "size=1m,mode=1777", "tmpfs", str(disk)]
    mount = [*sudo, "mount", *options]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted")
    yield disk
    subprocess.run([*sudo, "umount", "--lazy", disk], check=True)


def test_disk_full_of_postgres(on_server: Subject, server: Server, small_disk: Path) -> None:
    folder = small_disk / "space"
    folder.mkdir()
    shutil.chown(folder, server.server.pgdata.owner())
    fill = (
        "DO $$ BEGIN PERFORM set_config('synchronous_commit', 'off', false); LOOP"
        " INSERT INTO users (name, email, password_hash) SELECT 'n', gen_random_uuid(), 'h';"
        " COMMIT; END LOOP; END $$"
    )
    execute(server.url, f"CREATE TABLESPACE small LOCATION '{folder}'")
    try:
        on_server.run("ALTER TABLE users SET TABLESPACE small")
        with pytest.raises(asyncpg.DiskFullError):
            on_server.run(fill)
        assert on_server.ask(POST).is_busy("53100")
        assert on_server.ask(GET).response.status_code == 200
        on_server.run("ALTER TABLE users SET TABLESPACE pg_default")
        assert on_server.ask(POST).response.status_code == 201
    finally:
        on_server.run("DROP TABLE users")
        execute(server.url, "DROP TABLESPACE small")


def test_disk_full_of_sqlite(small_disk: Path, tmp_path: Path) -> None:
    url = f"sqlite:///{small_disk}/users.db"
    with run_service(tmp_path, url, url) as subject:
        with_one_user(subject)
        with suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        wait_until(lambda: subject.ask(POST).response.status_code != 201)
        assert subject.ask(POST).is_busy("SQLITE_FULL")
        assert subject.ask(GET).response.status_code == 200
        (small_disk / "filler").unlink()
        assert subject.ask(POST).response.status_code == 201


def test_locked_in_the_process(tmp_path: Path) -> None:
    """By a second connection to a cache that both share, for which SQLite does not wait."""
    more = f"""
import sqlite3
shared = "file:{tmp_path}/users.db?cache=shared"
other = sqlite3.connect(shared, uri=True, isolation_level=None, check_same_thread=False)

@app.post("/lock")
async def lock() -> None:
    other.execute("BEGIN EXCLUSIVE")

@app.post("/unlock")
async def unlock() -> None:
    other.execute("ROLLBACK")
"""
    copy = change_main(tmp_path, CHEAP, more=more)
    url = f"sqlite:///file:{tmp_path}/users.db?cache=shared&uri=true"
    with start(tmp_path, copy, DATABASE_URL=url) as service, service.client() as client:
        assert client.post("/users", json=ROW).status_code == 201
        client.post("/lock")
        assert is_busy(client.get("/users"))
        assert service.logged(f"ERROR: +{BUSY} SQLITE_LOCKED")
        client.post("/unlock")
        assert client.get("/users").status_code == 200


def test_another_process_writes(on_sqlite: Subject) -> None:
    script = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]);"
        " c.execute('BEGIN IMMEDIATE'); print(flush=True); input()"
    )
    command = [sys.executable, "-c", script, str(make_url(on_sqlite.url).database)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        assert on_sqlite.ask(POST).is_busy("SQLITE_BUSY database is locked")
        assert on_sqlite.ask(GET).response.status_code == 200
        process.communicate(b"\n")
    assert on_sqlite.ask(POST).response.status_code == 201


def test_not_ready(subject: Subject) -> None:
    """A service that cannot read its table is not ready, and says why in one line."""
    with subject.broken([ASIDE], [BACK]):
        assert subject.ask(READY).is_busy('no such table: users|relation "users" does not exist')
    assert subject.ask(READY).response.status_code == 200


def test_not_ready_without_permission(on_postgres: Subject) -> None:
    fault = FAULTS_OF_POSTGRES["permission"]
    with on_postgres.broken(fault.breaks, fault.mends):
        assert on_postgres.ask(READY).is_busy("permission denied for table users")
    assert on_postgres.ask(READY).response.status_code == 200


# --- No error -------------------------------------------------------------------------


@pytest.mark.parametrize("call", [GET, PUT, PATCH, DELETE], ids=["GET", "PUT", "PATCH", "DELETE"])
def test_no_row(subject: Subject, call: Call) -> None:
    subject.run("DELETE FROM users")
    answer = subject.ask(call)
    assert is_problem(answer.response, 404, "There is nothing of this id.")
    assert not answer.log


def test_rows_of_another_program(subject: Subject) -> None:
    """They are shown as they are stored."""
    rows = [{"name": "", "email": "a" * 300}, {"name": "n" * 1000, "email": ""}]
    widens, narrows = [], ["DELETE FROM users"]
    if not subject.url.startswith("sqlite"):
        widens = [f"ALTER TABLE users ALTER {column} TYPE text" for column in ("name", "email")]
        narrows += ["ALTER TABLE users ALTER name TYPE varchar(100)"]
        narrows += ["ALTER TABLE users ALTER email TYPE varchar(254)"]
    inserts = [
        "INSERT INTO users (name, email, password_hash)"
        f" VALUES ('{row['name']}', '{row['email']}', '')"
        for row in rows
    ]
    with subject.broken(widens + inserts, narrows):
        listed = subject.client.get("/users").json()[1:]
        assert listed == [{"id": user["id"], **row} for user, row in zip(listed, rows, strict=True)]
        assert [subject.client.get(f"/users/{user['id']}").json() for user in listed] == listed


def test_table_is_altered(subject: Subject) -> None:
    """No request fails while a column is added, altered and dropped."""
    changes = ["ALTER TABLE users ADD age integer", "ALTER TABLE users DROP age"]
    if not subject.url.startswith("sqlite"):
        changes[1:1] = [
            "ALTER TABLE users ALTER name TYPE text",
            "ALTER TABLE users ALTER name TYPE varchar(100)",
        ]
    over = threading.Event()
    rounds = Counter(range(4))

    def use(number: int) -> set[int]:
        statuses = set()
        with subject.service.client() as client:
            body = OTHER | {"email": f"{number}@example.com"}
            path = client.post("/users", json=body).headers["Location"]
            while not over.is_set():
                rounds[number] += 1
                for method, url, content in [
                    ("GET", path, None),
                    ("GET", "/users", None),
                    ("PATCH", path, {"name": "n"}),
                    ("PUT", path, body),
                    ("GET", f"/users?email={body['email']}", None),
                ]:
                    statuses.add(client.request(method, url, json=content).status_code)
        return statuses

    def go_on() -> None:
        seen = dict(rounds)
        wait_until(lambda: all(rounds[number] > seen[number] + 1 for number in seen))

    with ThreadPoolExecutor(4) as pool:
        users = [pool.submit(use, number) for number in range(4)]
        try:
            for change in 5 * changes:
                subject.run(change)
                go_on()
        finally:
            over.set()
        statuses = set.union(*(user.result() for user in users))
    assert statuses == {200}, subject.service.logged("ERROR.*")


def test_table_is_altered_between_transactions(on_postgres: Subject) -> None:
    """What a transaction had prepared before cannot be run again in it: the client is to retry."""
    call = "GET", "/transaction", None
    assert on_postgres.ask(call).response.status_code == 200
    widens = "ALTER TABLE users ALTER name TYPE text"
    narrows = "ALTER TABLE users ALTER name TYPE varchar(100)"
    with on_postgres.broken([widens], [narrows]):
        answer = on_postgres.ask(call)
        assert answer.response.status_code == 200 or answer.is_busy("")
        assert on_postgres.ask(call).response.status_code == 200
