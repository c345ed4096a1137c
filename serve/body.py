# SPDX-License-Identifier: Apache-2.0
"""Reading a request's body within limits."""

import asyncio
from typing import Final

from fastapi import Request

from serve.config import Limits
from serve.protocol import ApiError

JSON: Final = "application/json"


async def read_body(http: Request, limits: Limits, *, kinds: tuple[str, ...] = (JSON,)) -> bytes:
    """Read a body, counting the bytes that arrive and not those that were announced.

    Raises:
        ApiError: 408, it did not come in time; 413, it is too large; 415, it is declared to be of
            another kind. A web page of somebody else can send forms without asking, but no JSON,
            and no key.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in kinds:
        raise ApiError(415, f"the body must have the content type {' or '.join(kinds)}")
    max_bytes = limits.max_body_bytes
    too_large = ApiError(413, f"the body has more than {max_bytes} bytes", code="body_too_large")
    announced = http.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            async for data in http.stream():
                body += data
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError:
        raise ApiError(
            408, f"the body took longer than {limits.body_timeout_s:g} s", code="body_too_slow"
        ) from None
    return bytes(body)
