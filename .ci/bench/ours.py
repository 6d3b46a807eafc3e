"""main.py with a constant in place of the hash."""

from typing import Any

import main


async def to_columns(self: main.UserCreate) -> dict[str, Any]:
    columns = self.model_dump(exclude_unset=isinstance(self, main.UserUpdate))
    if "password" in columns:
        columns["password_hash"] = "a constant"
        del columns["password"]
    return columns


setattr(main.UserCreate, "to_columns", to_columns)  # noqa: B010
app = main.app
