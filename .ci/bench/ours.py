"""main.py with a constant in place of the hash."""

from typing import Any

import main


async def to_columns(user: main.UserCreate | main.UserUpdate) -> dict[str, Any]:
    columns = user.model_dump()
    if columns.pop("password", None):
        columns["password_hash"] = "a constant"
    return columns


setattr(main, "to_columns", to_columns)  # noqa: B010
app = main.app
