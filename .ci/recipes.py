"""Follow README.md's "Make it yours" and .github/RECIPES.md in copies of the service.

python -m pytest .ci/recipes.py      # installs what the recipes install
"""

import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from readme import README, ROOT, blocks

from test_main import ADA, BOB, new_database, postgres, start

__all__ = ["new_database", "postgres"]  # fixtures
RECIPES = (ROOT / ".github" / "RECIPES.md").read_text()


class Copy:
    """A copy of the service, to which a recipe is applied block by block."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = os.environ.copy()
        directory.mkdir()
        for name in ("main.py", "test_main.py", "requirements.txt", "Dockerfile", ".dockerignore"):
            shutil.copy(ROOT / name, directory)
        (directory / ".venv").symlink_to(sys.prefix)

    @property
    def option(self) -> str:
        """Give the option that runs it."""
        return f"--app-dir={self.directory}"

    def run(self, *command: str, given: str = "") -> None:
        subprocess.run(command, cwd=self.directory, env=self.environment, input=given, text=True, check=True)

    def follow(self, steps: list[tuple[str, str]]) -> None:
        for language, content in steps:
            match language:
                case "sh":
                    self.run("bash", "-ec", f"{content}\nenv -0 > .environment")
                    pairs = (self.directory / ".environment").read_text().split("\0")[:-1]
                    self.environment = dict(pair.split("=", 1) for pair in pairs)
                case "diff":
                    self.run("git", "apply", "-", given=content)
                case "python":
                    with (self.directory / "test_main.py").open("a") as tests:
                        tests.write(f"\n\n{content}")
                case _:
                    pytest.fail(f"a block of {language}")

    def test(self, server: str, *options: str) -> None:
        """Type-check it, and run its tests."""
        temporary = self.directory / "tmp"
        temporary.mkdir()
        self.environment |= {"TEST_DATABASE_URL": server, "TMPDIR": str(temporary)}
        configuration = f"--config-file={ROOT / '.mypy.ini'}"
        self.run(sys.executable, "-m", "mypy", configuration, "--strict", "main.py", "test_main.py")
        self.run(sys.executable, "-m", "pytest", "-q", "-n2", *options)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "copy")


def test_make_it_yours(copy: Copy, postgres: str) -> None:
    copy.follow(blocks(README, "Make it yours"))
    copy.test(postgres)
    for name in ("main.py", "test_main.py", "requirements.txt"):
        assert not re.findall(r"(?i).*(?:user|email|argon2).*", (copy.directory / name).read_text())


def test_second_table(copy: Copy, postgres: str) -> None:
    copy.follow(blocks(RECIPES, "A second table"))
    copy.test(postgres, "-k", "posts")


def test_changing_the_schema(copy: Copy, new_database: Callable[[], str], tmp_path: Path) -> None:
    *setting_up, first_revision, change, upgrade = blocks(RECIPES, "Changing the schema")
    database = new_database()
    copy.environment["DATABASE_URL"] = database
    before = f"--app-dir={shutil.copytree(copy.directory, tmp_path / 'before', symlinks=True)}"
    with start(tmp_path, before, DATABASE_URL=database) as old, old.client() as client:
        ada = client.post("/users", json=ADA).json()
        copy.follow([*setting_up, first_revision, change, upgrade])
        assert client.get("/users").json() == [ada]
        bob = client.post("/users", json=BOB).json()
        with start(tmp_path, copy.option, DATABASE_URL=database) as new, new.client() as newer:
            assert newer.patch(f"/users/{bob['id']}", json={"motto": "after you"}).status_code == 200
            assert newer.get("/users").json() == [ada | {"motto": ""}, bob | {"motto": "after you"}]
            assert newer.get("/openapi.json").status_code == 200
        copy.run(".venv/bin/alembic", "check")
        copy.run(".venv/bin/alembic", "downgrade", "-1")
        assert client.get("/users").json() == [ada, bob]
    empty = new_database()
    copy.environment["DATABASE_URL"] = empty
    copy.run(".venv/bin/alembic", "upgrade", "head")
    with start(tmp_path, copy.option, DATABASE_URL=empty) as service, service.client() as client:
        assert client.post("/users", json=ADA | {"motto": "first"}).json()["motto"] == "first"


BATCH = """\ndef upgrade() -> None:
    with op.batch_alter_table("users", recreate="always", table_kwargs={"sqlite_autoincrement": True}) as users:
        users.add_column(sa.Column("motto", sa.String))
"""


def test_a_copied_table_keeps_what_refers_to_it(copy: Copy, tmp_path: Path) -> None:
    """SQLite drops a table that batch mode has copied: with the posts of its users, if foreign keys were on."""
    copy.follow(blocks(RECIPES, "A second table"))
    copy.follow(blocks(RECIPES, "Changing the schema")[:1])
    copy.environment["DATABASE_URL"] = f"sqlite:///{tmp_path}/users.db"
    copy.run(".venv/bin/alembic", "revision", "--autogenerate", "-m", "users")
    copy.run(".venv/bin/alembic", "upgrade", "head")
    with (
        start(tmp_path, copy.option, DATABASE_URL=copy.environment["DATABASE_URL"]) as service,
        service.client() as client,
    ):
        path = client.post("/users", json=ADA).headers["Location"]
        post = client.post(f"{path}/posts", json={"title": "title", "text": ""}).json()
        copy.run(".venv/bin/alembic", "revision", "-m", "batch")
        [revision] = (copy.directory / "migrations" / "versions").glob("*_batch.py")
        with revision.open("a") as script:
            script.write(BATCH)
        copy.run(".venv/bin/alembic", "upgrade", "head")
        assert client.get(f"{path}/posts").json() == [post]


def test_signing_in(copy: Copy, postgres: str) -> None:
    """After a second table and a new column, as one diff follows the other."""
    copy.follow(blocks(RECIPES, "A second table"))
    copy.follow([step for step in blocks(RECIPES, "Changing the schema") if step[0] == "diff"])
    copy.follow(blocks(RECIPES, "Signing in"))
    copy.test(postgres, "-k", "login or posts or openapi or any_request or takes or default")


class Receiver(ThreadingHTTPServer):
    """Keep what is sent by OTLP over HTTP, by path."""

    def __init__(self) -> None:
        self.received: list[tuple[str, bytes]] = []
        received = self.received

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        threading.Thread(target=receiver.serve_forever).start()
        yield receiver
        receiver.shutdown()


def test_seeing_inside(copy: Copy, new_database: Callable[[], str], tmp_path: Path, receiver: Receiver) -> None:
    copy.follow(blocks(RECIPES, "Seeing inside"))
    variables = {
        "DATABASE_URL": new_database(),
        "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{receiver.server_port}",
        "OTEL_EXPORTER_OTLP_COMPRESSION": "none",
    }
    with start(tmp_path, copy.option, **variables) as service, service.client() as client:
        assert client.post("/users", json=ADA).status_code == 201
        assert client.post("/users", json=BOB | {"password": "s3cret"}).status_code == 422
        assert client.post("/users", json=ADA).status_code == 409
    spans: list[Any] = []
    assert {path for path, _ in receiver.received} == {"/v1/traces", "/v1/metrics", "/v1/logs"}
    for path, body in receiver.received:
        for value in (*ADA.values(), "s3cret", "$argon2"):
            assert value.encode() not in body
        if path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans += [span for scope in resource.scope_spans for span in scope.spans]
    [request] = [span for span in spans if span.name == "POST /users" and "int_value: 201" in str(span.attributes)]
    trace = [span for span in spans if span.trace_id == request.trace_id]
    assert any("INSERT INTO users" in str(span.attributes) for span in trace), trace
