# SPDX-License-Identifier: Apache-2.0
"""What those who run the server may see and change: /admin, for keys with the scope `admin`."""

from typing import Any

from fastapi import FastAPI, Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from serve.body import read_body
from serve.config import Limits
from serve.protocol import describe
from serve.versions import Versions


class Shift(BaseModel):
    """The body of POST /admin/traffic."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(max_length=256)
    weight: float = Field(ge=0, le=1)
    """Share of the model's requests that its canary gets."""


class Admin:
    """The handlers."""

    def __init__(self, versions: Versions, limits: Limits) -> None:
        self._versions, self._limits = versions, limits

    def add_to(self, app: FastAPI) -> None:
        """Put them behind their paths."""
        app.add_api_route("/admin/traffic", self.traffic, methods=["GET"])
        app.add_api_route("/admin/traffic", self.shift, methods=["POST"])

    async def traffic(self) -> dict[str, Any]:
        """GET /admin/traffic: what each canary gets."""
        return await self._versions.table()

    async def shift(self, http: Request) -> dict[str, Any]:
        """POST /admin/traffic: give a canary another weight."""
        data = await read_body(http, self._limits)
        try:
            body = Shift.model_validate_json(data)
        except ValidationError as error:
            raise describe(error) from None
        await self._versions.shift(body.model, body.weight)
        return await self._versions.table()
