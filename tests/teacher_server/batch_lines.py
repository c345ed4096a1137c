# SPDX-License-Identifier: Apache-2.0
"""Lines of a batch: what is checked before any is run, and the lines that come back.

Source:
    OpenAI's Batch guide and the codes that its clients report: `invalid_json_line`,
    `duplicate_custom_id`, `url_mismatch`, `mismatched_model`, `empty_file`, `too_many_tasks`,
    `token_limit_exceeded`; lines that were not run have `batch_expired` or `batch_cancelled`.
    `missing_required_parameter`, `invalid_method` and `invalid_request` are guesses.
"""

import asyncio
import json
from dataclasses import dataclass
from typing import Any, Final

from tests.teacher_server.wire import CHAT, Ask, BadRequest, parse_fields

_LINES_AT_ONCE: Final = 50
"""Lines after which other requests get their turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One request of a batch."""

    custom_id: str
    ask: Ask | None
    bad: str = ""
    """Why there is no `ask`; the line gets a 400, the batch goes on."""


class BadLine(ValueError):
    """The whole batch fails for it."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param

    def fields(self, number: int | None) -> dict[str, Any]:
        """Return an entry of the batch's errors."""
        return {"code": self.code, "message": str(self), "param": self.param, "line": number}


async def check(data: bytes, max_lines: int) -> tuple[list[Line], list[dict[str, Any]]]:
    """Read an input file; return its lines, and what is wrong with them if anything is."""
    lines: list[Line] = []
    errors: list[dict[str, Any]] = []
    seen: set[str] = set()
    models: set[str] = set()
    raw_lines = data.splitlines()
    if not raw_lines:
        return [], [BadLine("empty_file", "The file has no lines.").fields(None)]
    if len(raw_lines) > max_lines:
        message = f"The file has {len(raw_lines)} requests; the limit is {max_lines}."
        return [], [BadLine("too_many_tasks", message).fields(None)]
    for number, raw in enumerate(raw_lines, start=1):
        try:
            lines.append(_read(raw, seen, models))
        except BadLine as error:
            errors.append(error.fields(number))
        if number % _LINES_AT_ONCE == 0:
            await asyncio.sleep(0)
    return lines, errors


def _read(raw: bytes, seen: set[str], models: set[str]) -> Line:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        message = "This line is not parseable as valid JSON."
        raise BadLine("invalid_json_line", message) from error
    for name in ("custom_id", "method", "url", "body"):
        if not isinstance(fields, dict) or not fields.get(name):
            raise BadLine("missing_required_parameter", f"Missing {name}.", name)
    custom_id, body = str(fields["custom_id"]), fields["body"]
    if not isinstance(body, dict):
        raise BadLine("invalid_request", "The body must be an object.", "body")
    if custom_id in seen:
        raise BadLine("duplicate_custom_id", f"{custom_id!r} is a duplicate.", "custom_id")
    seen.add(custom_id)
    if fields["method"] != "POST":
        raise BadLine("invalid_method", "The method must be POST.", "method")
    if fields["url"] != CHAT:
        raise BadLine("url_mismatch", "The URL is not the batch's endpoint.", "url")
    models.add(str(body.get("model")))
    if len(models) > 1:
        raise BadLine("mismatched_model", "All requests must be of one model.", "body.model")
    try:
        return Line(custom_id=custom_id, ask=parse_fields(body))
    except BadRequest as error:
        return Line(custom_id=custom_id, ask=None, bad=str(error))


def answered(line: Line, request_id: str, status: int, body: dict[str, Any]) -> bytes:
    """Return the line of a request that was run, well or not."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return _line(line, request_id, response, None)


def not_run(line: Line, request_id: str, code: str) -> bytes:
    """Return the line of a request that the end of its batch came before."""
    messages = {
        "batch_expired": "This request could not be executed before the completion window expired.",
        "batch_cancelled": "This request was not executed because the batch was cancelled.",
    }
    return _line(line, request_id, None, {"code": code, "message": messages[code]})


def _line(
    line: Line, request_id: str, response: dict[str, Any] | None, error: dict[str, str] | None
) -> bytes:
    fields = {
        "id": f"batch_{request_id}",
        "custom_id": line.custom_id,
        "response": response,
        "error": error,
    }
    return json.dumps(fields).encode() + b"\n"
