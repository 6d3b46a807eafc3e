"""A users service in one file, on FastAPI and SQLModel: `uvicorn main:app`."""  # SPDX-License-Identifier: MIT

import asyncio
import gc
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from secrets import compare_digest
from typing import Annotated, Any, NoReturn

from anyio import CapacityLimiter, fail_after, to_thread
from argon2 import PasswordHasher
from email_validator import validate_email
from fastapi import APIRouter, Depends, FastAPI, Path, Query, Request, Response, exceptions, responses, security
from pydantic import AfterValidator, BaseModel, StringConstraints, create_model
from sqlalchemy import bindparam, delete, event, exc, insert, make_url, select, update
from sqlalchemy.ext.asyncio import create_async_engine
from sqlmodel import Field, SQLModel
from sqlmodel.ext.asyncio.session import AsyncSession
from starlette.exceptions import HTTPException

logger = logging.getLogger("uvicorn.error")  # the server's own


def refuse(variable: str, reason: str) -> NoReturn:
    logger.critical("%s: %s", variable, reason)
    os._exit(3)  # SystemExit would end in a traceback; by this code uvicorn knows not to try again


API_TOKEN = os.environ.get("API_TOKEN", "").strip()
if "API_TOKEN" in os.environ and not (API_TOKEN and API_TOKEN.isascii() and API_TOKEN.isprintable()):
    refuse("API_TOKEN", "set, but not to one or more printable ASCII characters")
POOL_SIZE = os.environ.get("DATABASE_POOL_SIZE", "10").strip()
if POOL_SIZE not in map(str, range(1, 1001)):
    refuse("DATABASE_POOL_SIZE", f"{POOL_SIZE!r} is not a number of connections from 1 to 1000")
try:
    url = make_url(os.environ.get("DATABASE_URL", "sqlite:///users.db").strip())
    POSTGRES = {"postgres": True, "postgresql": True, "sqlite": False}[url.get_backend_name()]
    if url.database in (None, "", ":memory:") or (url.host and not POSTGRES):
        raise ValueError
except Exception:  # what it says may hold the password
    refuse("DATABASE_URL", "neither postgresql://login:password@host/name nor sqlite:///file.db")
DEADLINE = 4 if POSTGRES else 2.5  # seconds for the database; what SQLite has begun may take 2 more

# --- Models: make them yours here, README.md says how ---------------------------------
Text = Annotated[str, StringConstraints(pattern=r"^[^\x00]*$")]  # PostgreSQL stores no NUL
Email = Annotated[Text, AfterValidator(lambda e: validate_email(e.lower(), check_deliverability=False).normalized)]
hasher, queue = PasswordHasher(parallelism=1), CapacityLimiter(1)  # one at a time, on one core: each takes 64 MiB


class UserBase(SQLModel):
    name: Text = Field(min_length=1, max_length=100, schema_extra={"examples": ["Ada Lovelace", "Bob"]})
    email: Email = Field(max_length=254, unique=True, schema_extra={"examples": ["ada@example.com", "bob@example.com"]})


class User(UserBase, table=True):
    __tablename__ = "users"
    __table_args__ = {"sqlite_autoincrement": True}  # no id is used twice
    id: int | None = Field(default=None, primary_key=True)
    password_hash: str


class UserPublic(UserBase):
    id: int
    email: str  # as it was checked when it came in
    __new__, __init__ = BaseModel.__new__, BaseModel.__init__  # SQLModel's own run Python for each row


class UserCreate(UserBase):
    model_config = {"extra": "forbid"}
    password: Text = Field(min_length=8, max_length=128, repr=False, schema_extra={"examples": ["correct horse"]})

    async def to_columns(self) -> dict[str, Any]:
        """Give the columns to write."""
        columns = self.model_dump(exclude_unset=isinstance(self, UserUpdate))
        if "password" in columns:  # a hash takes its place
            with fail_after(10):  # in the queue; a hash that has begun is not given up
                columns["password_hash"] = await to_thread.run_sync(hasher.hash, columns.pop("password"), limiter=queue)
        return columns


class UserUpdate(UserCreate):
    """Any of the fields of UserCreate: what is not given stays as it is."""


for field in UserUpdate.model_fields.values():
    field.default = None  # not required, yet never null
UserUpdate.model_rebuild(force=True)

# --- Database -------------------------------------------------------------------------
options = {"isolation_level": "AUTOCOMMIT", "max_overflow": 0, "hide_parameters": True}  # a read is one round trip
if POSTGRES:
    dsn = url.set(drivername="postgresql").difference_update_query(["channel_binding", "pgbouncer"])
    cache = 0 if url.query.get("pgbouncer") == "true" else 100
    args = {"dsn": dsn.render_as_string(hide_password=False), "statement_cache_size": cache}
    engine = create_async_engine("postgresql+asyncpg://", connect_args=args, pool_size=int(POOL_SIZE), **options)

    @event.listens_for(engine.sync_engine, "checkout")
    def replace_closed(connection: Any, *_: object) -> None:
        if connection.driver_connection.is_closed():  # by the server; to know takes no round trip
            raise exc.DisconnectionError

    @event.listens_for(engine.sync_engine, "close")
    def limit_close(connection: Any, _: object) -> None:  # to cancel a statement takes a moment; it may be frozen
        asyncio.get_running_loop().call_later(0.5, connection.driver_connection.terminate)

else:
    options |= {"pool_size": 1, "connect_args": {"timeout": 2}}  # a worker's writers queue here, in turn
    engine = create_async_engine(url.set(drivername="sqlite+aiosqlite"), **options)
    event.listen(engine.sync_engine, "connect", lambda c, _: c.execute("PRAGMA journal_mode=WAL"))
writer = engine.execution_options(isolation_level="READ COMMITTED" if POSTGRES else "SERIALIZABLE")  # transactions


async def get_session() -> AsyncSession:
    """Give a session to write with: `async with session.begin()` is one transaction, and there is no other way."""
    return AsyncSession(writer, autobegin=False, expire_on_commit=False)


users = SQLModel.metadata.tables["users"]
public = [users.c[name] for name in UserPublic.model_fields]
INSERT = insert(users).returning(*public)  # built once: building costs more than running
READ = select(*public).where(users.c.id == bindparam("user_id"))
UPDATE = update(users).where(users.c.id == bindparam("user_id")).returning(*public)
LIST = select(*public).where(users.c.id > bindparam("after")).order_by(users.c.id).limit(bindparam("limit"))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Create the tables once the database answers, one worker at a time."""
    if not API_TOKEN:
        logger.warning("API_TOKEN is not set: the service is open to everyone")
    for pause in (asyncio.create_task(asyncio.sleep(2)) for _ in range(15)):  # 30 s, however each try fails
        try:
            async with asyncio.timeout(2), writer.begin() as connection:
                await connection.exec_driver_sql("SELECT pg_advisory_xact_lock(1)" if POSTGRES else "BEGIN IMMEDIATE")
                await connection.run_sync(SQLModel.metadata.create_all)
            break
        except (OSError, ValueError, exc.DBAPIError) as error:
            logger.warning("DATABASE_URL: waiting for the database: %r", error)
            await pause
    else:
        refuse("DATABASE_URL", "the database cannot be used")
    gc.freeze()  # what was loaded stays: the collector need not look at it again
    yield
    await engine.dispose()


async def answer(request: Request, error: Exception) -> Response:
    """Turn every error into a problem (RFC 9457)."""
    status, detail, headers, more = 500, "The service failed.", {"Connection": "close"}, {}  # as uvicorn will
    match error:
        case HTTPException():
            status, detail, headers = error.status_code, error.detail, dict(error.headers or {})
        case exceptions.RequestValidationError():
            status, detail, headers = 422, "The request is not valid.", {}
            more = {"errors": [{key: e[key] for key in ("loc", "msg", "type")} for e in error.errors()]}
        case exc.NoResultFound():
            status, detail, headers = 404, "There is no such user.", {}
        case exc.IntegrityError() if "unique" in repr(error.driver_exception).lower():
            status, detail, headers = 409, "The email is taken.", {}
        case OSError() | exc.DBAPIError():  # TimeoutError is an OSError
            status, detail, headers = 503, "The service is busy, or its database does not answer.", {"Retry-After": "5"}
            logger.error("%s %r", detail, error)
    content = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, **more}
    return responses.JSONResponse(content, status, headers, "application/problem+json")


async def authorize(token: Annotated[security.HTTPAuthorizationCredentials, Depends(security.HTTPBearer())]) -> None:
    """Require API_TOKEN as the bearer token (RFC 6750)."""
    if not compare_digest(token.credentials.encode(), API_TOKEN.encode()):
        raise HTTPException(401, "The token is not valid.", {"WWW-Authenticate": "Bearer"})


schema = create_model("Problem", type=str, title=str, status=int, detail=str, errors=(list, [])).model_json_schema()
PROBLEM = {"content": {"application/problem+json": {"schema": schema}}}  # RFC 9457
app = FastAPI(title="Users", lifespan=lifespan, max_body_size=65536, generate_unique_id_function=lambda r: r.name)
for kind in HTTPException, exceptions.RequestValidationError, exc.NoResultFound, exc.DBAPIError, OSError, Exception:
    app.add_exception_handler(kind, answer)
router = APIRouter(prefix="/users", dependencies=[Depends(authorize)] if API_TOKEN else [])

Session = Annotated[AsyncSession, Depends(get_session)]
Id = Annotated[int, Path(ge=1, le=2**31 - 1)]
Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[int, Query(ge=0, le=2**31 - 1)]


@router.post("", status_code=201, response_model=UserPublic, responses={400: PROBLEM, 409: PROBLEM})
async def create_user(user: UserCreate, session: Session, response: Response) -> Any:
    """Create a user."""
    columns = await user.to_columns()
    async with asyncio.timeout(DEADLINE), session.begin():
        row = (await session.exec(INSERT, params=columns)).one()
    response.headers["Location"] = f"/users/{row.id}"
    return row


@router.get("/{user_id}", response_model=UserPublic, responses={404: PROBLEM})
async def read_user(user_id: Id) -> Any:
    """Read a user."""
    async with asyncio.timeout(DEADLINE), engine.connect() as connection:
        return (await connection.execute(READ, {"user_id": user_id})).one()


@router.put("/{user_id}", response_model=UserPublic, responses={400: PROBLEM, 404: PROBLEM, 409: PROBLEM})
async def update_user(user_id: Id, user: UserCreate, session: Session) -> Any:
    """Replace a user."""
    columns = await user.to_columns()
    async with asyncio.timeout(DEADLINE), session.begin():
        return (await session.exec(UPDATE, params={"user_id": user_id, **columns})).one()


@router.delete("/{user_id}", status_code=204, response_class=Response, responses={404: PROBLEM})
async def delete_user(user_id: Id, session: Session) -> None:
    """Delete a user."""
    async with asyncio.timeout(DEADLINE), session.begin():
        (await session.exec(delete(users).where(users.c.id == user_id).returning(users.c.id))).one()


@router.patch("/{user_id}", response_model=UserPublic, responses={400: PROBLEM, 404: PROBLEM, 409: PROBLEM})
async def patch_user(user_id: Id, user: UserUpdate, session: Session) -> Any:
    """Change the fields of a user that are given."""
    return await (update_user(user_id, user, session) if user.model_fields_set else read_user(user_id))


@router.get("", response_model=list[UserPublic])
async def list_users(response: Response, limit: Limit = 50, after: After = 0, email: Email | None = None) -> Any:
    """List users by id, or find the one with an email. A Link leads to the next page (RFC 8288)."""
    query = LIST.where(users.c.email == email) if email else LIST
    async with asyncio.timeout(DEADLINE), engine.connect() as connection:
        rows = (await connection.execute(query, {"after": after, "limit": limit + 1})).all()
    if len(rows) > limit:
        response.headers["Link"] = f'</users?limit={limit}&after={rows[limit - 1].id}>; rel="next"'
    return [dict(zip(UserPublic.model_fields, row, strict=True)) for row in rows[:limit]]  # dicts are checked faster


app.include_router(router, responses=dict.fromkeys((401, 413, 422, 503), PROBLEM))


@app.get("/livez", response_class=Response)
async def livez() -> None:
    """Report that the process answers."""


@app.get("/readyz", response_class=Response, responses={503: PROBLEM})
async def readyz() -> None:
    """Report that the database answers, within two seconds."""
    async with asyncio.timeout(1.5), engine.connect() as connection:
        await connection.execute(select(1))
