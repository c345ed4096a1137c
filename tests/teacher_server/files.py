# SPDX-License-Identifier: Apache-2.0
"""Files that clients upload and batches write; they live as long as the process."""

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import BodyPartReader, web

from tests.teacher_server.answers import ApiError

_CHUNK_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredFile:
    """One file."""

    id: str
    name: str
    purpose: str
    data: bytes
    created_at: int = field(default_factory=lambda: int(time.time()))

    def fields(self) -> dict[str, Any]:
        """Return the file object."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": len(self.data),
            "created_at": self.created_at,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class Files:
    """The file store and its routes."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._files: dict[str, StoredFile] = {}
        self._num_made = 0

    def add(self, name: str, purpose: str, data: bytes) -> StoredFile:
        """Store a file under a new id."""
        self._num_made += 1
        made = StoredFile(id=f"file-{self._num_made:06d}", name=name, purpose=purpose, data=data)
        self._files[made.id] = made
        return made

    def find(self, file_id: str) -> StoredFile:
        """Return a file.

        Raises:
            ApiError: there is none of that id.
        """
        if file_id not in self._files:
            raise ApiError(404, f"No such File object: {file_id}")
        return self._files[file_id]

    def routes(self) -> list[web.RouteDef]:
        """Return what the service answers about files."""
        return [
            web.post("/v1/files", self._create),
            web.get("/v1/files", self._list),
            web.get("/v1/files/{id}", self._retrieve),
            web.get("/v1/files/{id}/content", self._content),
            web.delete("/v1/files/{id}", self._delete),
        ]

    async def _create(self, request: web.Request) -> web.Response:
        name, purpose, data = "", "", None
        async for part in await request.multipart():
            if not isinstance(part, BodyPartReader):
                continue
            if part.name == "purpose":
                purpose = await part.text()
            elif part.name == "file":
                name, data = part.filename or "upload", await self._read(part)
        if purpose != "batch" or data is None:
            raise ApiError(400, f"expected a file with purpose batch, not {purpose!r}")
        return web.json_response(self.add(name, purpose, data).fields())

    async def _read(self, part: BodyPartReader) -> bytes:
        """Read to the end whatever the size, so that the client hears why and not a closed line."""
        data, size_bytes = bytearray(), 0
        while chunk := await part.read_chunk(_CHUNK_BYTES):
            size_bytes += len(chunk)
            if size_bytes <= self._max_bytes:
                data += chunk
        if size_bytes > self._max_bytes:
            raise ApiError(413, f"The file has {size_bytes} bytes, more than {self._max_bytes}")
        return bytes(data)

    async def _list(self, request: web.Request) -> web.Response:
        purpose = request.query.get("purpose")
        shown = [f.fields() for f in self._files.values() if purpose in (None, f.purpose)]
        return web.json_response(page(shown[::-1], request))

    async def _retrieve(self, request: web.Request) -> web.Response:
        return web.json_response(self.find(request.match_info["id"]).fields())

    async def _content(self, request: web.Request) -> web.Response:
        data = self.find(request.match_info["id"]).data
        return web.Response(body=data, content_type="application/octet-stream")

    async def _delete(self, request: web.Request) -> web.Response:
        gone = self.find(request.match_info["id"])
        del self._files[gone.id]
        return web.json_response({"id": gone.id, "object": "file", "deleted": True})


def page(newest_first: Iterable[dict[str, Any]], request: web.Request) -> dict[str, Any]:
    """Cut one page out of a list, as `after` and `limit` ask."""
    shown, after = list(newest_first), request.query.get("after")
    limit = int(request.query.get("limit", 20))
    if not 1 <= limit <= 100:
        raise ApiError(400, f"limit must be 1 to 100, got {limit}")
    ids = [one["id"] for one in shown]
    if after is not None and after not in ids:
        raise ApiError(400, f"after names no object: {after!r}")
    rest = shown[ids.index(after) + 1 :] if after is not None else shown
    part = rest[:limit]
    return {
        "object": "list",
        "data": part,
        "first_id": part[0]["id"] if part else None,
        "last_id": part[-1]["id"] if part else None,
        "has_more": len(rest) > limit,
    }
