"""FastAPI with a pool of asyncpg and hand-written SQL: what this framework can do."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel


class UserCreate(BaseModel):
    name: str
    email: str
    password: str


class UserUpdate(BaseModel):
    name: str


class UserPublic(BaseModel):
    id: int
    name: str
    email: str


async def keep(connection: asyncpg.Connection) -> None:
    """Send nothing when a connection is given back: asyncpg's own reset is a query."""


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    url, size = os.environ["DATABASE_URL"], int(os.environ["POOL"])
    async with asyncpg.create_pool(url, min_size=size, max_size=size, reset=keep) as app.state.pool:
        yield


app = FastAPI(lifespan=lifespan)


async def one(query: str, *values: object) -> dict[str, Any]:
    row = await app.state.pool.fetchrow(query, *values)
    if row is None:
        raise HTTPException(404)
    return dict(row)


@app.post("/users", response_model=UserPublic)
async def create_user(user: UserCreate) -> Any:
    query = (
        "INSERT INTO users (name, email, password_hash) VALUES ($1, $2, $3)"
        " RETURNING id, name, email"
    )
    return await one(query, user.name, user.email, "a constant")


@app.get("/users", response_model=list[UserPublic])
async def list_users(limit: int = 50, after: int = 0) -> Any:
    query = "SELECT id, name, email FROM users WHERE id > $1 ORDER BY id LIMIT $2"
    return [dict(row) for row in await app.state.pool.fetch(query, after, limit)]


@app.get("/users/{user_id}", response_model=UserPublic)
async def read_user(user_id: int) -> Any:
    return await one("SELECT id, name, email FROM users WHERE id = $1", user_id)


@app.patch("/users/{user_id}", response_model=UserPublic)
async def update_user(user_id: int, user: UserUpdate) -> Any:
    return await one(
        "UPDATE users SET name = $2 WHERE id = $1 RETURNING id, name, email", user_id, user.name
    )
