# mypy: ignore-errors
# (Litestar and Advanced Alchemy are not in requirements.txt.)
"""Litestar with the session of Advanced Alchemy's plugin, as its documentation shows."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from advanced_alchemy.extensions.litestar import (
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
    SQLAlchemyDTO,
    SQLAlchemyDTOConfig,
    SQLAlchemyPlugin,
)
from litestar import Litestar, get, patch, post
from litestar.exceptions import NotFoundException
from sqlalchemy import String, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "users"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))
    email: Mapped[str] = mapped_column(String(254), unique=True)
    password_hash: Mapped[str]


@dataclass
class UserCreate:
    name: str
    email: str
    password: str


@dataclass
class UserUpdate:
    name: str


class UserPublic(SQLAlchemyDTO[User]):
    config = SQLAlchemyDTOConfig(exclude={"password_hash"})


@post("/users", return_dto=UserPublic)
async def create_user(data: UserCreate, db_session: AsyncSession) -> User:
    user = User(name=data.name, email=data.email, password_hash="a constant")
    db_session.add(user)
    await db_session.flush()
    return user


@get("/users", return_dto=UserPublic)
async def list_users(db_session: AsyncSession, limit: int = 50, after: int = 0) -> Sequence[User]:
    query = select(User).where(User.id > after).order_by(User.id).limit(limit)
    return (await db_session.scalars(query)).all()


async def get_user(user_id: int, session: AsyncSession) -> User:
    if user := await session.get(User, user_id):
        return user
    raise NotFoundException


@get("/users/{user_id:int}", return_dto=UserPublic)
async def read_user(user_id: int, db_session: AsyncSession) -> User:
    return await get_user(user_id, db_session)


@patch("/users/{user_id:int}", return_dto=UserPublic)
async def update_user(user_id: int, data: UserUpdate, db_session: AsyncSession) -> User:
    user = await get_user(user_id, db_session)
    user.name = data.name
    return user


config = SQLAlchemyAsyncConfig(
    connection_string=os.environ["DATABASE_URL"].replace("postgresql:", "postgresql+asyncpg:"),
    engine_config=EngineConfig(pool_size=int(os.environ["POOL"]), max_overflow=0),
    session_config=AsyncSessionConfig(expire_on_commit=False),
    before_send_handler="autocommit",
)
app = Litestar(
    [create_user, list_users, read_user, update_user], plugins=[SQLAlchemyPlugin(config)]
)
