"""Follow README.md's "Make it yours" and .github/RECIPES.md in copies of the service.

python -m pytest -n 2 .ci/recipes.py      # installs what the recipes install
"""

import ast
import fcntl
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
from readme import OWN, README, RECIPES, ROOT, blocks

from test_main import ADA, BOB, execute, new_database, postgres, start

__all__ = ["new_database", "postgres"]  # fixtures

FILES = (
    *("main.py", "test_main.py", "requirements.txt", "Dockerfile", ".dockerignore"),
    *(".gitignore", ".logging.json", ".pytest.ini", ".ruff.toml", ".mypy.ini"),
)


def lines_of(source: str, name: str) -> tuple[int, int]:
    """Give where a function, a class or a name begins, and where it ends."""
    for node in ast.parse(source).body:
        names = {getattr(node, "name", "")}
        if isinstance(node, ast.Assign):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
        if name in names:
            decorators = getattr(node, "decorator_list", [])
            assert node.end_lineno
            return min(n.lineno for n in (node, *decorators)) - 1, node.end_lineno
    pytest.fail(f"there is no {name}")


def put(source: str, place: str, block: str) -> str:
    """Put a block where its first line says."""
    lines = source.splitlines()
    sections = [n for n, line in enumerate(lines) if line.startswith("# --- ")]

    def begin(title: str) -> int:
        return next(n for n in sections if lines[n].startswith(f"# --- {title}"))

    def end(title: str) -> int:
        return next((n for n in sections if n > begin(title)), len(lines))

    match place.split():
        case ["above", "the", "other", "imports"]:
            start = stop = next(n for n, line in enumerate(lines) if line.startswith("import "))
        case ["at", "the", "end"]:
            start = stop = len(lines)
        case ["the", "section", *words]:
            start, stop = begin(" ".join(words)) + 1, end(" ".join(words))
        case ["at", "the", "end", "of", "the", "section", *words]:
            start = stop = end(" ".join(words))
        case ["in", "front", "of", "the", "section", title]:
            start = stop = begin(title)
        case ["in", "front", "of", name]:
            start = stop = lines_of(source, name)[0]
        case ["in", "place", "of", name]:
            start, stop = lines_of(source, name)
        case _:
            pytest.fail(f"no place: {place}")
    return "\n".join([*lines[:start], "", block, "", *lines[stop:]]) + "\n"


class Copy:
    """A copy of the service, to which a text is applied block by block."""

    def __init__(self, directory: Path, files: tuple[str, ...] = FILES) -> None:
        self.directory = directory
        self.environment = os.environ.copy()
        directory.mkdir()
        for name in files:
            shutil.copy(ROOT / name, directory)
        (directory / ".venv").symlink_to(sys.prefix)

    @property
    def option(self) -> str:
        """Give the option that runs it."""
        return f"--app-dir={self.directory}"

    def run(self, *command: str) -> None:
        subprocess.run(command, cwd=self.directory, env=self.environment, check=True)

    def shell(self, script: str) -> None:
        """Run a script, and keep where it went and what it exported."""
        with (Path(sys.prefix) / ".lock").open("w") as lock:  # it may install
            fcntl.flock(lock, fcntl.LOCK_EX)
            environment = self.directory / ".environment"
            self.run("bash", "-ec", f"{script}\nenv -0 > {environment}")
        pairs = environment.read_text().split("\0")[:-1]
        self.environment = dict(pair.split("=", 1) for pair in pairs)
        self.directory = Path(self.environment["PWD"])

    def follow(self, steps: list[tuple[str, str]], *, tidy: bool = True) -> None:
        for language, content in steps:
            if language == "sh":
                self.shell(content)
                continue
            place, _, block = content.partition("\n")
            [(name, where)] = re.findall(r"^# (\w+\.py): ([\w ]+\w)", place)
            path = self.directory / name
            path.write_text(put(path.read_text(), where, block))
        if not tidy:
            return
        ruff = sys.executable, "-m", "ruff"
        self.run(*ruff, "check", "--quiet", "--fix", "--exit-zero", "main.py", "test_main.py")
        self.run(*ruff, "format", "--quiet", "main.py", "test_main.py")

    def check(self) -> None:
        """Check its style and its types."""
        files = "main.py", "test_main.py"
        length = "--ignore=E501"  # a word that is longer makes a comment longer
        self.run(sys.executable, "-m", "ruff", "check", "--quiet", length, *files)
        cache = f"--cache-dir={ROOT}/.mypy_cache/{os.environ.get('PYTEST_XDIST_WORKER', '')}"
        self.run(sys.executable, "-m", "mypy", "--strict", cache, *files)

    def test(self, server: str, *options: str) -> None:
        """Run its tests."""
        temporary = self.directory / "tmp"
        temporary.mkdir(exist_ok=True)
        self.environment |= {"TEST_DATABASE_URL": server, "TMPDIR": str(temporary)}
        self.run(sys.executable, "-m", "pytest", "-q", *options)


@pytest.fixture
def copy(tmp_path: Path) -> Copy:
    return Copy(tmp_path / "users")


# The recipes of code, and the tests that show each on its own.
ALONE = {
    "A parent": "posts",
    "Belonging to another": "test",
    "Two writes in one transaction": "event or breaks_between or delete",
    "Filters and sorting": "sorted or filtered or list_users",
    "Lost updates": "etag or if_match",
    "Signing in": "login or test_token",
    "Logs for machines": "test_log or head",
    "The documentation page without the internet": "docs or head",
    "UUID keys": "test_uuid or list_users or no_such or session",
}


@pytest.mark.parametrize("recipe", ALONE)
def test_recipe(copy: Copy, postgres: str, recipe: str) -> None:
    copy.follow(blocks(RECIPES, recipe))
    copy.test(postgres, "-k", ALONE[recipe])


def test_recipes_together(copy: Copy, postgres: str) -> None:
    recipes = list(ALONE)
    for recipe in (*recipes[:-1], "Seeing inside", recipes[-1]):
        copy.follow(blocks(RECIPES, recipe))
    copy.check()
    copy.test(postgres)


def test_make_it_yours(copy: Copy, postgres: str) -> None:
    rename, *steps = blocks(README, "Make it yours")
    copy.follow([rename])
    copy.check()
    copy.follow(steps)
    copy.check()
    copy.test(postgres)
    for name in ("main.py", "test_main.py", "requirements.txt", "Dockerfile", ".gitignore"):
        words = r"(?i).*(?:user|email|argon2).*"
        assert not re.findall(words, (copy.directory / name).read_text().replace("USER", ""))


def test_make_it_yours_with_recipes(copy: Copy, postgres: str) -> None:
    """The line that renames the copy renames the recipes."""
    rename, *steps = blocks(README, "Make it yours")
    copy.follow([rename, *steps])
    recipes = copy.directory / "RECIPES.md"
    recipes.write_text(RECIPES)
    renaming = rename[1][rename[1].index("perl") :].partition(" \\\n")[0]
    copy.shell(f"{renaming} RECIPES.md")
    for recipe in (*list(ALONE)[:3], "Lost updates"):
        copy.follow(blocks(recipes.read_text(), recipe))
    copy.check()
    shown = "posts or team or event or breaks_between or etag or if_match or read or update"
    copy.test(postgres, "-k", shown)


def columns() -> list[str]:
    """Give the lines of the table of types."""
    rows = re.findall(r"^\| [^|]+ \| `(.+?)`.* \| .+ \|$", RECIPES, re.MULTILINE)
    return [line.replace("\\|", "|") for line in rows]


# For a field: what is sent, and what is answered; and what is refused.
TAKEN: dict[str, list[tuple[object, object]]] = {
    "notes": [("text", "text"), (None, None)],
    "motto": [("text", "text")],
    "code": [("a-1", "A-1")],
    "price": [("19.9", "19.90"), (3, "3.00"), (99999999.99, "99999999.99")],
    "is_heavy": [(True, True), (False, False)],
    "quantity": [(0, 0), (2**31 - 1, 2**31 - 1)],
    "size": [(2**53 - 1, 2**53 - 1)],
    "status": [("on_sale", "on_sale")],
    "stage": [("on_sale", "on_sale")],
    "available_on": [("2026-05-01", "2026-05-01"), ("0001-01-01", "0001-01-01"), (None, None)],
    "ends_at": [("2026-05-01T12:00:00.5+02:00", "2026-05-01T10:00:00.500000Z"), (None, None)],
    "labels": [({"a": "b"}, {"a": "b"}), ({}, {})],
}
REFUSED: dict[str, list[object]] = {
    "notes": [1, "x" * 2001, "a\0b"],
    "motto": [None],
    "code": ["", "a b", "x" * 41, None],
    "price": [-1, "1.999", "NaN", 1e30, "x", None],
    "is_heavy": [1, "yes", None],
    "quantity": [-1, 2**31, "7", True, 1.5, None],
    "size": [2**53, None],
    "status": ["lost", None],
    "stage": ["lost", None],
    "available_on": [0, "0", "2026-02-30", "2026-05-01T00:00:00"],
    "ends_at": [0, "0", "2026-05-01T12:00:00", "0001-01-01T00:00:00+14:00", "x"],
    "labels": [[], {"a": 1}, {"a": "\0"}, {"": "b"}, None],
    "created_at": ["2026-05-01T12:00:00Z"],
    "updated_at": ["2026-05-01T12:00:00Z"],
}


def test_types_of_fields(copy: Copy, new_database: Callable[[], str], tmp_path: Path) -> None:
    copy.follow(blocks(RECIPES, "Types of fields"), tidy=False)
    base, table, public, update = "", "", "", ""
    names = {line.partition(": ")[0] for line in columns()}
    assert {name for name in names if name.isidentifier()} == TAKEN.keys() | REFUSED.keys()
    for line in columns():
        name, _, definition = line.partition(": ")
        if not name.isidentifier():
            table += f"    {line}\n"
            continue
        annotation = definition.partition(" = ")[0]
        shown = annotation.replace("Moment", "datetime").replace("Code", "str")
        public += f"    {name}: {shown}\n"
        if name in ("created_at", "updated_at"):
            table += f"    {line}\n"
            continue
        base += f"    {line}\n"
        missing = annotation.replace(" | None", " | MISSING | None")
        missing += "" if "MISSING" in missing else " | MISSING"
        update += f"    {name}: {missing} = MISSING\n"
    main = copy.directory / "main.py"
    text = main.read_text()
    text = re.sub(r"\n    __table_args__ = \{.*\n", "\n", text)
    for head, lines in [
        ("    name: Name\n", base),
        ("    password_hash: str\n", table),
        ("    name: str\n", public),
        ("    name: Name | MISSING = MISSING\n", update),
    ]:
        assert text.count(head) == 1
        text = text.replace(head, head + lines)
    main.write_text(text)
    copy.follow([])
    copy.run(sys.executable, "-m", "mypy", "--strict", "main.py")
    database = new_database()
    with (
        start(tmp_path, copy.option, DATABASE_URL=database) as service,
        service.client() as client,
    ):
        body = ADA | {"code": "a-1", "price": "1", "name": "n"}
        created = client.post("/users", json=body).json()
        assert created["labels"] == {}
        assert created["created_at"].endswith("Z")
        path = f"/users/{created['id']}"
        for name, values in TAKEN.items():
            for sent, answered in values:
                changed = client.patch(path, json={name: sent}).json()
                assert changed[name] == client.get(path).json()[name] == answered
                assert changed["created_at"] == created["created_at"] < changed["updated_at"]
        for name, refused in REFUSED.items():
            for value in refused:
                response = client.patch(path, json={name: value})
                assert response.status_code == 422, (name, value, response.text)
        replaced = client.put(path, json=body).json()
        assert {**created, "updated_at": replaced["updated_at"]} == replaced
        bob = BOB | {"code": "b-1", "price": 1}
        assert client.post("/users", json=bob | {"code": "A-1"}).json()["detail"].endswith("taken.")
        same = bob | {"name": "n"}
        assert client.post("/users", json=same).json()["detail"].count("name") == 1
        assert client.post("/users", json=bob).status_code == 201
        assert not service.logged("Traceback")
    main.write_text(
        main.read_text().replace(
            "    on_sale = auto()\n", "    on_sale = auto()\n    lost = auto()\n"
        )
    )
    [add_value] = re.findall(r"`(ALTER TYPE .+?)`", RECIPES)
    with (
        start(tmp_path, copy.option, DATABASE_URL=database) as service,
        service.client() as client,
    ):
        assert client.patch(path, json={"stage": "lost"}).json()["stage"] == "lost"
        if database.startswith("postgres"):
            assert client.patch(path, json={"status": "lost"}).status_code == 500
            execute(database, add_value)
        assert client.patch(path, json={"status": "lost"}).json()["status"] == "lost"


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
        with (
            start(tmp_path, copy.option, DATABASE_URL=database) as new,
            new.client() as newer,
        ):
            path = f"/users/{bob['id']}"
            assert newer.patch(path, json={"motto": "after you"}).status_code == 200
            assert newer.get("/users").json() == [ada | {"motto": ""}, bob | {"motto": "after you"}]
        copy.run(".venv/bin/alembic", "check")
        copy.run(".venv/bin/alembic", "downgrade", "-1")
        assert client.get("/users").json() == [ada, bob]
    empty = new_database()
    copy.environment["DATABASE_URL"] = empty
    copy.run(".venv/bin/alembic", "upgrade", "head")
    with (
        start(tmp_path, copy.option, DATABASE_URL=empty) as service,
        service.client() as client,
    ):
        assert client.post("/users", json=ADA | {"motto": "first"}).json()["motto"] == "first"


CASCADE = """\
        assert client.post("/users/1/posts", json={"title": "A title", "text": ""}).is_success
        assert client.delete("/users/1").status_code == 204
        assert execute(f"sqlite:///{tmp_path}/test.db", "SELECT * FROM posts") == []
"""


def test_tests_as_in_the_tutorial(copy: Copy, postgres: str) -> None:
    """In them, too, posts go with their user."""
    copy.follow(blocks(RECIPES, "A parent"))
    test = dict(blocks(RECIPES, OWN))["python"]
    end = "        client.portal.call(engine.dispose)\n"
    assert end in test
    test = "from test_main import execute\n" + test.replace(end, CASCADE + end)
    (copy.directory / "test_mine.py").write_text(test)
    copy.test(postgres, "test_mine.py")


BATCH = """\ndef upgrade() -> None:
    arguments = {"sqlite_autoincrement": True}
    with op.batch_alter_table("users", recreate="always", table_kwargs=arguments) as users:
        users.add_column(sa.Column("motto", sa.String))
"""


def test_a_copied_table_keeps_what_refers_to_it(copy: Copy, tmp_path: Path) -> None:
    """SQLite drops a table that batch mode has copied, and posts with it if keys are looked at."""
    copy.follow(blocks(RECIPES, "A parent"))
    copy.follow(blocks(RECIPES, "Changing the schema")[:1])
    database = f"sqlite:///{tmp_path}/users.db"
    copy.environment["DATABASE_URL"] = database
    copy.run(".venv/bin/alembic", "revision", "--autogenerate", "-m", "users")
    copy.run(".venv/bin/alembic", "upgrade", "head")
    with (
        start(tmp_path, copy.option, DATABASE_URL=database) as service,
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


def test_docs_in_a_browser(copy: Copy, tmp_path: Path) -> None:
    """With the network away; and no address outside is asked for."""
    if not (chromium := shutil.which("chromium")):
        pytest.skip("There is no chromium.")
    copy.follow(blocks(RECIPES, "The documentation page without the internet"))
    with start(tmp_path, copy.option, DATABASE_URL=f"sqlite:///{tmp_path}/users.db") as service:
        command = [
            *(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", f"{service.url}/docs"),
            *("--virtual-time-budget=10000", f"--user-data-dir={tmp_path}/profile"),
        ]
        for _ in range(5):  # it may take the page before it is ready
            page = subprocess.check_output(command, text=True, timeout=60)
            if "Delete User" in page:
                break
    assert "Create User" in page
    loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="([^"]*)"', page)
    assert {address.partition("/")[0] for address in loaded} == {"docs"}


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


def test_seeing_inside(
    copy: Copy, new_database: Callable[[], str], tmp_path: Path, receiver: Receiver
) -> None:
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
            assert str(value).encode() not in body
        if path == "/v1/traces":
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                spans += [span for scope in resource.scope_spans for span in scope.spans]
    [request] = [
        span
        for span in spans
        if span.name == "POST /users" and "int_value: 201" in str(span.attributes)
    ]
    trace = [span for span in spans if span.trace_id == request.trace_id]
    assert any("INSERT INTO users" in str(span.attributes) for span in trace), trace
