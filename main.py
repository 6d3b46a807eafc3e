"""A users service in one file, on FastAPI and SQLModel: `uvicorn main:app`.

SPDX-License-Identifier: MIT
"""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from http import HTTPStatus
from secrets import compare_digest
from traceback import format_tb
from typing import Annotated, Any
from urllib.parse import urlencode

import asyncpg
import sqlalchemy as sa
from annotated_types import MaxLen, MinLen
from argon2 import PasswordHasher
from email_validator import validate_email
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError, ResponseValidationError
from pydantic import MISSING, AfterValidator, BaseModel, StringConstraints, ValidationError
from pydantic_settings import BaseSettings
from sqlalchemy import event, exc
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlmodel import Field, SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("uvicorn.error")  # the server's own

# --- Settings -------------------------------------------------------------------------


def check_database_url(text: str) -> str:
    with suppress(Exception):  # SQLAlchemy's text may quote the password
        url = sa.make_url(text)
        # `schema` is Prisma's, and unknown to asyncpg: without it other tables would be used.
        match url.get_backend_name():
            case "postgres" | "postgresql" if url.database and "schema" not in url.query:
                return text
            case "sqlite" if url.database not in (None, "", ":memory:") and not url.host:
                return text
    raise ValueError(
        "neither postgresql://login:password@host/name (without schema) nor sqlite:///file.db"
    )


class Settings(BaseSettings):
    """Each is an environment variable of the same name, in capitals."""

    model_config = {"str_strip_whitespace": True, "hide_input_in_errors": True}

    database_url: Annotated[str, AfterValidator(check_database_url)] = "sqlite:///users.db"
    database_pool_size: int = Field(default=10, ge=1, le=1000)  # a worker's, on PostgreSQL
    api_token: Annotated[str, StringConstraints(pattern="^[ -~]+$")] | None = None


try:
    settings = Settings()
except ValidationError as error:
    for e in error.errors():
        reason = e["msg"].removeprefix("Value error, ")
        logger.critical("%s: %s", str(e["loc"][0]).upper(), reason)
    sys.exit(3)  # uvicorn's own code for a start that failed: its --workers do not try again

# --- Models ---------------------------------------------------------------------------


def normalize(email: str) -> str:
    return validate_email(email.lower(), check_deliverability=False).normalized


NO_NUL = StringConstraints(pattern=r"^[^\x00]*$")  # PostgreSQL cannot store it
Name = Annotated[str, MinLen(1), MaxLen(100), NO_NUL]  # MaxLen is the column's length, too
Email = Annotated[str, MaxLen(254), AfterValidator(normalize)]
Password = Annotated[str, MinLen(8), MaxLen(128)]
ADA: Any = {"name": "Ada Lovelace", "email": "ada@example.com", "password": "correct horse"}


class UserBase(SQLModel):
    name: Name
    email: Email = Field(unique=True)


class User(UserBase, table=True):
    __tablename__ = "users"
    __table_args__ = {"sqlite_autoincrement": True}  # or SQLite gives a deleted user's id again

    id: int | None = Field(default=None, primary_key=True)
    password_hash: str


class UserPublic(BaseModel):
    id: int
    name: str
    email: str


class UserCreate(UserBase):
    model_config = {"extra": "forbid", "json_schema_extra": {"examples": [ADA]}}

    password: Password = Field(repr=False)


class UserUpdate(SQLModel):
    model_config = {"extra": "forbid"}

    name: Name | MISSING = MISSING
    email: Email | MISSING = MISSING
    password: Password | MISSING = Field(default=MISSING, repr=False)


hasher = PasswordHasher(parallelism=1)
hashing = ThreadPoolExecutor(max_workers=1)  # one at a time: each takes a core and 64 MiB


async def to_columns(user: UserCreate | UserUpdate) -> dict[str, Any]:
    """Give what to write, with a hash for the password."""
    columns = user.model_dump()
    if password := columns.pop("password", None):
        loop = asyncio.get_running_loop()
        columns["password_hash"] = await loop.run_in_executor(hashing, hasher.hash, password)
    return columns


# --- Database -------------------------------------------------------------------------


class Connection(asyncpg.Connection):  # type: ignore[misc]
    async def close(self, **_: object) -> None:
        """Abort after 0.5 s without a goodbye, not SQLAlchemy's 2 s: the server may be frozen."""
        with suppress(TimeoutError):
            await super().close(timeout=0.5)


# Two engines on one pool: `engine` is for transactions, `autocommit` for statements on their own.
url = sa.make_url(settings.database_url)
if url.get_backend_name() == "sqlite":
    autocommit = create_async_engine(
        url.set(drivername="sqlite+aiosqlite"),
        connect_args={"timeout": 2},  # seconds, for the lock of another process
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,  # from the log
        pool_size=1,  # as there is one writer at a time; what else comes in waits for it
        max_overflow=0,
    )
    # A copy, in AUTOCOMMIT as well, whose events do not reach `autocommit`: `begin` makes it safe.
    engine = autocommit.execution_options()

    @event.listens_for(autocommit.sync_engine, "connect")
    def set_pragmas(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")  # readers in other processes do not wait
        connection.execute("PRAGMA foreign_keys=ON")  # as on PostgreSQL

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: sa.Connection) -> None:
        # The driver sends COMMIT and ROLLBACK here, but no BEGIN. IMMEDIATE takes the lock of
        # writers at once: a transaction that has read before may be refused it.
        connection.exec_driver_sql("BEGIN IMMEDIATE")

else:
    # Prefixes of other drivers' options: asyncpg would send them to the server as settings.
    foreign = ("channel_binding", "connect", "gssencmode", "keepalives", "pool_timeout")
    if ignored := sorted(name for name in url.query if name.startswith(foreign)):
        logger.warning("DATABASE_URL: left out, of other drivers: %s", ", ".join(ignored))
    dsn = url.set(drivername="postgresql").difference_update_query([*ignored, "pgbouncer"])
    autocommit = create_async_engine(
        "postgresql+asyncpg://",
        connect_args={
            "dsn": dsn.render_as_string(hide_password=False),  # SQLAlchemy knows no sslmode
            "connection_class": Connection,
            "timeout": 2.5,  # seconds, to connect
            "command_timeout": 2.5,  # seconds, for a statement
            # 0: asyncpg's prepare, which SQLAlchemy calls, gives no name, and a statement is parsed
            # at each use: PgBouncer may switch connections between them.
            "statement_cache_size": 0 if url.query.get("pgbouncer") == "true" else 100,
        },
        isolation_level="AUTOCOMMIT",
        hide_parameters=True,  # from the log
        pool_size=settings.database_pool_size,
        max_overflow=0,
        pool_timeout=2,  # seconds, until one is free
        pool_recycle=240,  # seconds, before balancers cut what is idle
        pool_use_lifo=True,  # the others stay idle, until they are recycled
    )
    engine = autocommit.execution_options(isolation_level="READ COMMITTED")

    @event.listens_for(autocommit.pool, "checkout")
    def replace_closed(connection: Any, *_: object) -> None:
        if connection.driver_connection.is_closed():  # which takes no round trip to see
            raise exc.DisconnectionError

    @event.listens_for(autocommit.sync_engine, "handle_error")
    def replace_all(context: Any) -> None:
        """Give up all connections when one timed out, or its server is a standby by now."""
        # A server that is frozen cannot be told from one where a lock took long.
        cause = context.original_exception
        if isinstance(cause, TimeoutError) or getattr(cause, "sqlstate", None) == "25006":
            context.is_disconnect = context.invalidate_pool_on_disconnect = True


class Session(AsyncSession):
    """The way to the database, of every handler.

    A statement on its own is a transaction of its own, in one round trip. Several statements, or
    objects (`session.add`), are one transaction, all or nothing, in `async with session.begin():`.
    A second write outside of it is an InvalidRequestError; `sa.text` counts as a write. Results
    are rows, not objects.
    """

    def __init__(self, engine: AsyncEngine, autocommit: AsyncEngine) -> None:
        """Take an engine for transactions, and one (or the same) for statements on their own."""
        super().__init__(engine, autobegin=False, expire_on_commit=False)
        self.autocommit = autocommit.sync_engine
        self.has_written = False  # outside of a transaction, in this session (of one request)

    async def run(self, statement: sa.Executable, /, **parameters: Any) -> sa.CursorResult[Any]:
        """Run a statement and give its result, of which SQLAlchemy's drivers have fetched all."""
        if self.in_transaction():
            await self.flush()
            connection = await self.connection()
            return await connection.execute(statement, parameters)
        if self.has_written and not statement.is_select:
            raise exc.InvalidRequestError("A second write: use `async with session.begin():`")

        def run_alone(_: object) -> sa.CursorResult[Any]:
            with self.autocommit.begin() as connection:
                return connection.execute(statement, parameters)

        try:  # all of it in one step: to await each of them takes a fifth more
            result = await self.run_sync(run_alone)
        except exc.NotSupportedError:  # ALTER TABLE made asyncpg's plan stale: it has not run
            result = await self.run_sync(run_alone)
        self.has_written |= not statement.is_select
        return result


async def get_session() -> Session:
    return Session(engine, autocommit)  # which has nothing to close: it holds no connection


SessionDep = Annotated[Session, Depends(get_session)]

# --- Errors ---------------------------------------------------------------------------

UNIQUE = "23505", "SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY"
BUSY = "The service cannot answer at the moment."
FAILED = "The service failed."
RETRYABLE = (  # what a retry can cure: SQLSTATEs or their classes, and SQLite's names
    *("08", "3D000", "57"),  # not reachable; not there; starting or stopping
    "28",  # the password is being changed
    *("40", "55P03"),  # another transaction came first
    "53",  # out of connections, disk or memory
    *("SQLITE_BUSY", "SQLITE_CANTOPEN", "SQLITE_FULL", "SQLITE_LOCKED"),
)


class Invalid(BaseModel):
    loc: list[str | int] = Field(description="Where: body, path or query, and the field.")
    msg: str = Field(description="What is wrong, for people.")
    type: str = Field(description="What is wrong, for programs.")


class Problem(BaseModel):
    """An error (RFC 9457)."""

    type: str = Field(default="about:blank", description="The kind of problem, a URI.")
    title: str = Field(description="What the status means.")
    status: int = Field(description="The status of the answer.")
    detail: str = Field(description="What is wrong, for people.")
    errors: list[Invalid] | MISSING = Field(default=MISSING, description="The fields at fault.")


def problem(status: int, detail: str, headers: Any = None, errors: Any = MISSING) -> Response:
    title = HTTPStatus(status).phrase
    content = Problem(title=title, status=status, detail=detail, errors=errors).model_dump_json()
    headers = {"Cache-Control": "no-store", **(headers or {})}  # some pass the Gate by
    return Response(content, status, headers, "application/problem+json")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"content": content} for status in statuses}


def busy(cause: object) -> Response:
    logger.error("%s %s", BUSY, cause)
    return problem(503, BUSY, {"Retry-After": "5"})


def taken(cause: Any) -> list[str]:
    """Name the columns of the unique constraint that refused a row, as far as it is on columns."""
    if hasattr(cause, "sqlstate"):  # Key (a, b)=(1, 2) already exists.
        key = (cause.detail or "").partition("(")[2].partition(")=(")[0]
        names = key.replace('"', "").split(", ")
    else:  # UNIQUE constraint failed: table.a, table.b
        names = [name.partition(".")[2] for name in str(cause).partition(": ")[2].split(", ")]
    return [name for name in names if name.isidentifier()]


def failed(error: Exception, said: str) -> Response:
    """Log what is said, and where the service failed; not the error, which may quote a row."""
    logger.error("%s %s\nTraceback:\n%s", FAILED, said, "".join(format_tb(error.__traceback__)))
    return problem(500, FAILED)


def database_problem(error: exc.DBAPIError) -> Response:
    """Tell a value that is taken from what a retry can cure, and both from a fault of ours."""
    cause: Any = error.driver_exception
    code: str = getattr(cause, "sqlstate", None) or getattr(cause, "sqlite_errorname", None) or ""
    if code in UNIQUE and (columns := taken(cause)) != ["id"]:  # or its sequence lags: a fault
        errors = [{"loc": ["body", c], "msg": "Value is taken", "type": "taken"} for c in columns]
        detail = f"The {' with this '.join(columns) or 'value'} is taken."
        return problem(409, detail, errors=errors or MISSING)
    said = str(cause).partition("\n")[0]
    if error.connection_invalidated or code.startswith(RETRYABLE):
        return busy(f"{code} {said}")
    if not code.startswith(("42", "SQLITE_ERROR")):  # other texts may quote a row
        said = type(cause).__name__
    return failed(error, f"{code} {said}: {error.statement}")


async def to_problem(_: object, error: Exception) -> Response:
    """Turn an error that is known into a problem, and raise any other again."""
    match error:
        case HTTPException(status_code=204 | 304):  # which never have a body
            return Response(status_code=error.status_code, headers=error.headers)
        case HTTPException():
            return problem(error.status_code, str(error.detail), error.headers)
        case RequestValidationError():
            return problem(422, "The request is not valid.", errors=error.errors()[:100])
        case ResponseValidationError():
            place = error.errors()[0]["loc"]
            return failed(error, f"The answer of {error.endpoint_path} does not fit: {place}")
        case exc.NoResultFound():
            return problem(404, "There is nothing of this id.")
        case (
            exc.NotSupportedError()  # the plan was stale twice
            | exc.TimeoutError()  # no connection was free
            | OSError(filename=None)  # the deadline, or a socket: a file's error has its name
        ):
            return busy(repr(error))
        case exc.DBAPIError():
            return database_problem(error)
    raise error


async def to_failure(_: object, error: Exception) -> Response:
    """Answer what Starlette then raises again: the server logs it and closes the connection."""
    return problem(500, FAILED, {"Connection": "close"})


async def allow(request: Request, error: Any) -> Response:
    """Answer OPTIONS and 405 with all methods of a path; Starlette knows those of one route."""
    known = ["OPTIONS"]
    for method in "DELETE", "GET", "PATCH", "POST", "PUT":
        scope = {**request.scope, "method": method}
        # FastAPI keeps an included router as one route, without `methods`: so ask for matches.
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            known += ["GET", "HEAD"] if method == "GET" else [method]
    headers = {"Allow": ", ".join(known)}  # RFC 9110, 10.2.1
    if request.method == "OPTIONS":
        return Response(status_code=204, headers=headers)
    return problem(405, str(error.detail), headers)


# --- Application ----------------------------------------------------------------------

DEADLINE = 10  # seconds, until an answer begins
MAX_BODY = 65536  # bytes
OPEN = {"/livez", "/readyz", "/docs", "/redoc", "/openapi.json"}  # all else needs the token


def check(scope: Scope) -> None:
    """Refuse what is not to be read."""
    headers = Headers(scope=scope)
    path = scope["path"].removeprefix(scope.get("root_path", ""))  # a proxy's prefix
    if settings.api_token and path not in OPEN:
        scheme, _, token = headers.get("Authorization", "").partition(" ")
        is_known = compare_digest(token.strip().encode(), settings.api_token.encode())
        if scheme.lower() != "bearer" or not is_known:
            raise HTTPException(401, "The token is not valid.", {"WWW-Authenticate": "Bearer"})
    if int(headers.get("Content-Length", 0)) > MAX_BODY:
        # The middleware would say so in plain text; for a body without a length it raises a 413.
        raise HTTPException(413, "The body is too large.", {"Connection": "close"})


class Gate:
    """A middleware: what comes in is checked, what goes out is in time, and kept by no cache."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, and turn errors into problems."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        deadline = asyncio.timeout(DEADLINE)
        has_begun = False

        async def send_uncached(message: Message) -> None:
            nonlocal has_begun
            if not (has_begun or deadline.expired()):  # an expired one cannot be rescheduled
                deadline.reschedule(None)  # the rest may take longer
            has_begun = True
            if "headers" in message:
                MutableHeaders(scope=message)["Cache-Control"] = "no-store"
            await send(message)

        if scope.get("method") == "HEAD":
            scope = {**scope, "method": "GET"}  # the server keeps its own, and leaves the body out
        try:
            async with deadline:
                check(scope)
                await self.app(scope, receive, send_uncached)
        except Exception as error:
            if has_begun:
                raise
            cause = TimeoutError(f"{DEADLINE} s have passed") if deadline.expired() else error
            response = await to_problem(scope, cause)
            await response(scope, receive, send)


class Service(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """Describe the problems and the token, too."""
        document = super().openapi()
        schema = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= {**schema.pop("$defs"), "Problem": schema}
        if settings.api_token:
            schemes = document["components"].setdefault("securitySchemes", {})
            schemes["token"] = {"type": "http", "scheme": "bearer"}
            for path, operations in document["paths"].items():
                for operation in operations.values():
                    operation.setdefault("security", [] if path in OPEN else [{"token": []}])
        return document


async def create_tables() -> None:
    """Create the tables that are missing, one worker at a time."""
    async with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            key = sa.func.hashtext(User.__tablename__)  # one that old and new workers share
            await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(key)))
        await connection.run_sync(SQLModel.metadata.create_all)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Wait for the database, for 30 s."""
    if not settings.api_token:
        logger.warning("API_TOKEN is not set: the service is open to everyone")
    async with asyncio.timeout(30):
        while True:
            try:
                await create_tables()
                break
            except Exception as error:
                logger.warning("DATABASE_URL: waiting for the database: %r", error)
                await asyncio.sleep(2)
    yield
    await engine.dispose()


app = Service(
    title="Users",
    version="1.0.0",
    description="Creates, reads, updates and deletes users.",
    license_info={"name": "MIT", "identifier": "MIT"},
    openapi_tags=[
        {"name": "users", "description": "Users, one or page by page."},
        {"name": "probes", "description": "For what watches the service."},
    ],
    lifespan=lifespan,
    middleware=[Middleware(Gate), Middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY)],
    redirect_slashes=False,
    generate_unique_id_function=lambda route: route.name,
    exception_handlers={  # in place of FastAPI's; all other errors rise to the Gate
        405: allow,
        HTTPException: to_problem,
        RequestValidationError: to_problem,
        Exception: to_failure,
    },
)

# --- Users ----------------------------------------------------------------------------

# Built once: to build a statement takes longer than to run it.
users = SQLModel.metadata.tables["users"]
public = [users.c[name] for name in UserPublic.model_fields]  # each field is a column
# No column may be named `pk`: UPDATE keeps the names of columns for its SET. These are BigIntegers,
# so that an id which is too large for the column is a 404, and no error.
PK, AFTER, LIMIT = (sa.bindparam(name, type_=sa.BigInteger) for name in ("pk", "after", "limit"))
INSERT = sa.insert(users).returning(*public)
SELECT = sa.select(*public).where(users.c.id == PK)
UPDATE = sa.update(users).where(users.c.id == PK).returning(*public)
DELETE = sa.delete(users).where(users.c.id == PK).returning(users.c.id)
LIST = sa.select(*public).where(users.c.id > AFTER).order_by(users.c.id).limit(LIMIT)

UserId = Annotated[int, Path(ge=1, le=2**63 - 1)]
Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[int, Query(ge=0, le=2**63 - 1)]

router = APIRouter(prefix="/users", tags=["users"], responses=problems(401, 413, 422, 503))


@router.post("", status_code=201, response_model=UserPublic, responses=problems(400, 409))
async def create_user(
    user: UserCreate, session: SessionDep, request: Request, response: Response
) -> Any:
    """Create a user."""
    row = (await session.run(INSERT, **await to_columns(user))).one()
    response.headers["Location"] = request.url_for("read_user", user_id=row.id).path
    return row


@router.get("/{user_id}", response_model=UserPublic, responses=problems(404))
async def read_user(user_id: UserId, session: SessionDep) -> Any:
    """Read a user."""
    return (await session.run(SELECT, pk=user_id)).one()


@router.put("/{user_id}", response_model=UserPublic, responses=problems(400, 404, 409))
async def update_user(user_id: UserId, user: UserCreate, session: SessionDep) -> Any:
    """Replace a user."""
    return (await session.run(UPDATE, pk=user_id, **await to_columns(user))).one()


@router.delete("/{user_id}", status_code=204, response_class=Response, responses=problems(404))
async def delete_user(user_id: UserId, session: SessionDep) -> None:
    """Delete a user."""
    (await session.run(DELETE, pk=user_id)).one()


@router.patch("/{user_id}", response_model=UserPublic, responses=problems(400, 404, 409))
async def patch_user(user_id: UserId, user: UserUpdate, session: SessionDep) -> Any:
    """Change the fields of a user that are given."""
    columns = await to_columns(user)
    return (await session.run(UPDATE if columns else SELECT, pk=user_id, **columns)).one()


@router.get("", response_model=list[UserPublic])
async def list_users(
    session: SessionDep,
    request: Request,
    response: Response,
    limit: Limit = 50,
    after: After = 0,
    email: Email | None = None,
) -> Any:
    """List users by id, or find the one with an email. A Link is the next page (RFC 8288)."""
    query = LIST if email is None else LIST.where(users.c.email == email)
    rows = (await session.run(query, after=after, limit=limit + 1)).all()
    if len(rows) > limit:
        page = {**request.query_params, "after": rows[limit - 1].id}
        path = request.url_for("list_users").path
        response.headers["Link"] = f'<{path}?{urlencode(page)}>; rel="next"'
    # As dicts: pydantic reads them faster than rows, by a tenth of a long list.
    return [dict(zip(UserPublic.model_fields, row, strict=True)) for row in rows[:limit]]


app.include_router(router)

# --- Probes ---------------------------------------------------------------------------


@app.get("/livez", tags=["probes"], response_class=Response, responses=problems(413))
async def livez() -> None:
    """Report that the process answers."""


@app.get("/readyz", tags=["probes"], response_class=Response, responses=problems(413, 503))
async def readyz(session: SessionDep) -> Any:
    """Report that the database answers, and that the table can be read."""
    try:
        await session.run(LIST, after=0, limit=1)
    except exc.DBAPIError as error:  # a missing table, too, which elsewhere is a 500
        return busy(error.orig)
