"""What takes longer than a few seconds: servers that are stopped and killed, storms, first starts.

python -m pytest .ci/faults.py      # with PgBouncer installed
"""

import http.client
import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from harness import (
    CHEAP,
    REQUESTS,
    Server,
    Wire,
    alone,
    change_main,
    connections,
    is_busy,
    kill,
    locked,
    peak_memory,
    running,
    server,
    turn,
)
from httpx2 import Client, HTTPError, Response
from sqlalchemy import make_url

from test_main import ADA, BUSY, Service, at_once, execute, start, temporary_database

__all__ = ["alone", "running", "server", "turn"]  # fixtures
# What PROMISES.md says: of a database that is frozen, and of a pool that is exhausted on SQLite
FROZEN, EXHAUSTED = timedelta(seconds=5), timedelta(seconds=12)


@pytest.fixture
def postgres(server: Server) -> Iterator[str]:
    with temporary_database(server.url) as url:
        yield url
        server.start()  # or nothing can be dropped


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        f"sqlite:///{tmp_path}/users.db"
        if request.param == "sqlite"
        else str(request.getfixturevalue("postgres"))
    )


# --- The database goes away -----------------------------------------------------------


def test_start_in_any_order(server: Server, postgres: str, tmp_path: Path) -> None:
    server.stop()
    with start(tmp_path, DATABASE_URL=postgres) as service:
        service.wait_for("WARNING: +DATABASE_URL: waiting for the database: ", 3)
        server.start()
        with service.client() as client:
            assert client.post("/users", json=ADA).status_code == 201
        assert not service.logged("Traceback")


def test_start_gives_up(server: Server, postgres: str, tmp_path: Path) -> None:
    """After 30 s, be the database down, frozen, not to be found, or not there."""
    wire = Wire(postgres)
    wire.flows.clear()
    down = "postgresql://postgres@127.0.0.1:1/postgres"
    urls = {
        "ConnectionRefusedError": down,
        "TimeoutError": wire.url,
        "UnicodeError": "postgresql://user:s3cret@a..b/name",
        "does not exist": server.url.replace("/postgres?", "/no_such_database?"),
    }
    with ExitStack() as stack:
        stack.callback(wire.cut)
        begun = time.monotonic()
        services = {
            cause: stack.enter_context(start(tmp_path, DATABASE_URL=url))
            for cause, url in urls.items()
        }
        supervised = stack.enter_context(start(tmp_path, "--workers=2", DATABASE_URL=down))
        for cause, service in services.items():
            assert service.process.wait(60) == 3
            assert time.monotonic() - begun > 29
            waits = service.logged("WARNING: +DATABASE_URL: waiting for the database: .*")
            assert len(waits) > 5
            assert all(cause in wait for wait in waits)
            assert service.logged("Application startup failed. Exiting.")
            assert not service.logged("s3cret")
        assert supervised.process.wait(60) == 0


def test_database_down(server: Server, postgres: str, tmp_path: Path) -> None:
    """Every route says so at once, on the connection that there was, with one line in the log."""
    with start(tmp_path, DATABASE_URL=postgres) as service:
        connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=30)
        connection.connect()
        connection.auto_open = 0  # a connection that was closed is an error

        def call(method: str, path: str, body: object = None) -> tuple[int, float]:
            before = time.monotonic()
            headers = {"Content-Type": "application/json"} if body else {}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            content = response.read()
            if response.status == 503:
                assert response.headers["Retry-After"] == "5"
                assert response.headers["Content-Type"] == "application/problem+json"
                assert json.loads(content)["detail"] == BUSY
            return response.status, time.monotonic() - before

        status, healthy = call("POST", "/users", ADA)
        assert status == 201
        server.stop()
        for method, path, body in REQUESTS:
            status, seconds = call(method, path, body)
            assert status == 503
            assert seconds < 1 + healthy
        assert call("GET", "/livez")[0] == 200
        assert len(service.logged("ERROR")) == len(service.logged(f"{BUSY} .+Error")) == 7
        assert not service.logged("Traceback")
        server.start()
        assert call("GET", "/users/1")[0] == 200
        connection.close()


def test_database_frozen(postgres: str, tmp_path: Path) -> None:
    """Every route gives up."""
    wire = Wire(postgres)
    with start(tmp_path, DATABASE_URL=wire.url) as service, service.client() as client:
        slowest = client.post("/users", json=ADA).elapsed
        wire.flows.clear()
        with ThreadPoolExecutor(len(REQUESTS)) as pool:
            responses = list(pool.map(lambda r: client.request(r[0], r[1], json=r[2]), REQUESTS))
        for response in responses:
            assert is_busy(response)
            assert response.elapsed < FROZEN + 2 * slowest
        assert len(service.logged("ERROR")) == 7
        assert not service.logged("Traceback")
        wire.flows.set()
        assert client.get("/users/1").status_code == 200
    wire.cut()


def test_database_restarted_while_idle(server: Server, postgres: str, tmp_path: Path) -> None:
    with start(tmp_path, DATABASE_URL=postgres) as service, service.client() as client:
        for _ in range(3):
            assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]
            server.stop()
            server.start()
            assert at_once(lambda _: client.get("/users"), 20) == 20 * [200]
        assert not service.logged("ERROR")


def test_pool_exhausted(server: Server, database: str, tmp_path: Path) -> None:
    with (
        start(tmp_path, DATABASE_URL=database, DATABASE_POOL_SIZE="2") as service,
        service.client() as client,
    ):
        user = client.post("/users", json=ADA)

        def patch(number: int) -> Response:
            time.sleep(
                number / 20
            )  # one after the other: some of them get a connection when others give up
            return client.patch(user.headers["Location"], json={"name": f"name {number}"})

        with ThreadPoolExecutor(40) as pool:
            with locked(database):
                patches = [pool.submit(patch, number) for number in range(40)]
                while not all(patched.done() for patched in patches):
                    if not database.startswith("sqlite"):
                        assert connections(database) <= 1 + 2  # the lock's own
                for patched in patches:
                    response = patched.result()
                    assert is_busy(response)
                    limit = EXHAUSTED if database.startswith("sqlite") else FROZEN
                    assert response.elapsed < limit + 2 * user.elapsed
            assert client.get("/users").json() == [user.json()]
            assert at_once(patch, 40) == 40 * [200]
        if database.startswith("sqlite"):
            assert service.logged("database is locked")
        else:
            assert connections(database) <= 2
        assert not service.logged("Traceback")


def test_pool_size(server: Server, postgres: str, tmp_path: Path) -> None:
    """Ten connections if not told, and no more of them under load."""
    with start(tmp_path, DATABASE_URL=postgres) as service, service.client() as client:
        path = client.post("/users", json=ADA).headers["Location"]
        with ThreadPoolExecutor(40) as pool:
            with locked(postgres):
                waiting = [
                    pool.submit(client.patch, path, json={"name": f"name {i}"}) for i in range(40)
                ]
                counts: list[int] = []
                begun = time.monotonic()
                while time.monotonic() < begun + (1 if 1 + 10 in counts else 3):
                    counts.append(connections(postgres))
            assert [future.result().status_code for future in waiting] == 40 * [200]
        assert max(counts) == 1 + 10  # the lock's own


# --- Something is killed --------------------------------------------------------------


class Storm:
    """Eight writers, each of which writes down what the service has acknowledged."""

    def __init__(self) -> None:
        self.url = ""
        self.acknowledged = 0
        self.over = False
        self.users: dict[
            str, set[str | None]
        ] = {}  # by email: what the name may be; None is no such user
        self.statuses: Counter[int] = Counter()

    def call(self, client: Client, method: str, path: str, email: str, name: str | None) -> Any:
        """Write, and learn what the database must hold: what was acknowledged or is in doubt."""
        body = {
            "POST": {"name": name, "email": email, "password": "correct horse"},
            "PATCH": {"name": name},
        }
        known = self.users[email]
        known.add(name)
        try:
            response = client.request(method, self.url + path, json=body.get(method))
        except HTTPError:
            time.sleep(0.05)
            return None
        self.statuses[response.status_code] += 1
        if not response.is_success:
            return None
        self.users[email] = {name}
        self.acknowledged += 1
        return response

    def write(self, writer: int) -> None:
        with Client(timeout=30) as client:
            for number in range(10_000):
                email = f"{writer}-{number}@example.com"
                self.users[email] = {None}
                created = self.call(client, "POST", "/users", email, "0")
                for change in range(1, 5):
                    if self.over:
                        return
                    if created:
                        self.call(client, "PATCH", created.headers["Location"], email, str(change))
                if created and number % 3 == 2:
                    self.call(client, "DELETE", created.headers["Location"], email, None)

    def blow(self, times: int, strike: Callable[[], None]) -> None:
        """Write until 400 writes were acknowledged after each strike."""
        with ThreadPoolExecutor(8) as pool:
            writers = [pool.submit(self.write, writer) for writer in range(8)]
            try:
                for strikes in range(1, times + 2):
                    while self.acknowledged < 400 * strikes:
                        assert not any(writer.done() for writer in writers)
                        time.sleep(0.01)
                    if strikes <= times:
                        strike()
            finally:
                self.over = True
            for writer in writers:
                writer.result()

    def check(self, database: str) -> None:
        """See that the database holds what was acknowledged, once."""
        found = dict(execute(database, "SELECT email, name FROM users"))
        assert set(found) <= set(self.users)
        lost = {
            email: (found.get(email), known)
            for email, known in self.users.items()
            if found.get(email) not in known
        }
        assert not lost
        assert self.acknowledged >= 1000


def test_service_killed(database: str, tmp_path: Path) -> None:
    storm = Storm()
    copy = change_main(tmp_path, CHEAP)
    services: list[Service] = []
    contexts = []

    def restart() -> None:
        if services:
            kill(services[-1].process.pid)
        contexts.append(start(tmp_path, copy, "--workers=2", DATABASE_URL=database))
        services.append(contexts[-1].__enter__())
        storm.url = services[-1].url

    try:
        restart()
        storm.blow(3, restart)
        storm.check(database)
        assert set(storm.statuses) <= {200, 201, 204, 404, 409}
    finally:
        for context in contexts:
            context.__exit__(None, None, None)


def test_database_killed(server: Server, postgres: str, tmp_path: Path) -> None:
    storm = Storm()

    def restart() -> None:
        server.kill()
        server.start()

    with start(
        tmp_path, change_main(tmp_path, CHEAP), "--workers=2", DATABASE_URL=postgres
    ) as service:
        storm.url = service.url
        storm.blow(3, restart)
        storm.check(postgres)
        assert storm.statuses[503]
        assert set(storm.statuses) <= {200, 201, 204, 503}
        assert not service.logged("Traceback")


# --- Load -----------------------------------------------------------------------------


@pytest.mark.usefixtures("alone")
def test_many_writers(tmp_path: Path) -> None:
    """SQLite takes 1,500 users, and a change to each, from 120 clients and three processes."""
    copy = change_main(tmp_path, CHEAP)
    with start(
        tmp_path, copy, "--workers=3", DATABASE_URL=f"sqlite:///{tmp_path}/users.db"
    ) as service:
        url = service.url

        def write(writer: int) -> Counter[int]:
            statuses: Counter[int] = Counter()
            with Client(base_url=url, timeout=120) as client:
                for number in range(1500 // 120 + 1):
                    response = client.post(
                        "/users", json=ADA | {"email": f"{writer}-{number}@example.com"}
                    )
                    assert response.status_code == 201, response.text
                    statuses[201] += 1
                    response = client.patch(response.headers["Location"], json={"name": "n"})
                    statuses[response.status_code] += 1
            return statuses

        with ThreadPoolExecutor(120) as pool:
            assert sum(pool.map(write, range(120)), Counter()) == {201: 1560, 200: 1560}
        assert not service.logged("locked|Traceback|ERROR")


def test_first_start_of_eight_workers(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        with temporary_database(server.url) as postgres:
            for url in f"sqlite:///{tmp_path}/{uuid4().hex}.db", postgres:
                with start(tmp_path, "--workers=8", DATABASE_URL=url) as service:
                    service.wait_for("Application startup complete", 8)
                    assert not service.logged("Traceback|died|CRITICAL")


@pytest.mark.usefixtures("alone")
def test_hashing_under_attack(database: str, tmp_path: Path) -> None:
    """Ten clients create users as fast as they can: others are served, the memory is limited."""
    with start(tmp_path, DATABASE_URL=database) as service, service.client() as client:
        host = service.url.removeprefix("http://")
        path = client.post("/users", json=ADA).headers["Location"]

        def slow_read() -> float:
            """Give the 99th percentile of 1,000 reads, in seconds."""
            seconds = []
            with closing(http.client.HTTPConnection(host, timeout=30)) as connection:
                for _ in range(1000):
                    before = time.perf_counter()
                    connection.request("GET", path)
                    response = connection.getresponse()
                    response.read()
                    seconds.append(time.perf_counter() - before)
                    assert response.status == 200
            return sorted(seconds)[990]

        slow_read()
        idle, memory = slow_read(), peak_memory(service.process.pid)
        over = threading.Event()

        def attack(attacker: int) -> set[int]:
            statuses = set()
            with service.client(timeout=120) as attacking:
                for number in range(10_000):
                    email = f"{attacker}-{number}@example.com"
                    statuses.add(attacking.post("/users", json=ADA | {"email": email}).status_code)
                    if over.is_set():
                        break
            return statuses

        with ThreadPoolExecutor(10) as pool:
            attackers = [pool.submit(attack, attacker) for attacker in range(10)]
            try:
                time.sleep(1)
                attacked = slow_read()
            finally:
                over.set()
        assert set.union(*(attacker.result() for attacker in attackers)) == {201}
        assert attacked < max(10 * idle, 0.05)  # a hiccup of the machine is no attack
        assert (
            peak_memory(service.process.pid) - memory < 32 * 1024
        )  # KiB: no second hash beside the first


# --- PgBouncer ------------------------------------------------------------------------


@pytest.fixture
def pgbouncer(postgres: str, tmp_path: Path) -> Iterator[str]:
    """Run Debian's PgBouncer in transaction mode, with three connections to the server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = make_url(postgres)
    configuration = tmp_path / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n* = host={url.query['host']} port={url.port or 5432} user=postgres\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        "auth_type = any\npool_mode = transaction\ndefault_pool_size = 3\nmax_client_conn = 20\n"
    )
    tmp_path.chmod(0o755)
    user = (
        [f"--user={Path(str(url.query['host'])).owner()}"] if os.geteuid() == 0 else []
    )  # it refuses root
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    assert program, "PgBouncer is not installed"
    with subprocess.Popen([program, "--quiet", *user, configuration]) as process:
        yield f"postgresql://postgres@127.0.0.1:{port}/{url.database}?pgbouncer=true"
        process.terminate()


def test_pgbouncer_is_full(server: Server, postgres: str, pgbouncer: str, tmp_path: Path) -> None:
    """It takes 20 connections, and refuses one more."""
    settings = {"DATABASE_URL": pgbouncer, "DATABASE_POOL_SIZE": "21"}
    with start(tmp_path, **settings) as service, service.client() as client:
        with locked(postgres):
            assert at_once(lambda _: client.get("/users"), 21) == 21 * [503]
        assert service.logged(f"ERROR: +{BUSY} 08P01 no more connections allowed")
        assert not service.logged("Traceback")


def test_pgbouncer_with_mixed_traffic(
    server: Server, postgres: str, pgbouncer: str, tmp_path: Path
) -> None:
    """Sixteen clients mix requests without an error, and everyone reads what he wrote."""
    with start(
        tmp_path, change_main(tmp_path, CHEAP), "--workers=2", DATABASE_URL=pgbouncer
    ) as service:
        url = service.url

        def use(number: int) -> None:
            with Client(base_url=url, timeout=60) as client:
                for turn in range(5):
                    email = f"{number}-{turn}@example.com"
                    response = client.post("/users", json=ADA | {"email": email})
                    assert response.status_code == 201
                    path, user = response.headers["Location"], response.json()
                    for name in map(str, range(10)):
                        changed = user | {"name": name}
                        assert client.patch(path, json={"name": name}).json() == changed
                        assert client.get(path).json() == changed
                        assert client.get("/users", params={"email": email}).json() == [changed]
                        assert client.get("/users", params={"limit": 3}).status_code == 200
                        assert (
                            client.post("/users", json=user | {"password": "p" * 9}).status_code
                            == 422
                        )
                    assert client.put(path, json=ADA | {"email": email}).json() == user
                    assert client.patch(
                        path, json={"email": f"{number}@example.com"}
                    ).status_code in (200, 409)
                    assert client.delete(path).status_code == 204
                    assert client.get(path).status_code == 404
                    assert client.get("/readyz").status_code == 200

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(use, range(16)))
        assert connections(postgres) <= 3
        assert not service.logged("ERROR|Traceback|waiting")
