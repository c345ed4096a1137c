# SPDX-License-Identifier: Apache-2.0
"""The application as OpenAPI 3.1, from the models that bodies are parsed with."""

from collections.abc import Mapping
from typing import Any, Final

from pydantic.json_schema import models_json_schema

from serve.admin import Shift
from serve.captions import CaptionRequest
from serve.protocol import ChatRequest, neutral_fields

_REFS: Final = "#/components/schemas/{model}"
_MODELS: Final = (ChatRequest, CaptionRequest, Shift)
_TEXT: Final = {"type": "string"}
_FILE: Final = {"type": "string", "format": "binary"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_REASONS: Final[Mapping[str, str]] = {
    "400": "The request does not fit; the error names the field.",
    "401": "No valid API key.",
    "403": "The key has not the scope.",
    "404": "No such path or model.",
    "408": "The body took too long.",
    "413": "The body is too large.",
    "415": "The body is of another content type.",
    "429": "The key's quota is used; Retry-After says for how long.",
    "503": "No capacity now; Retry-After says when to try again.",
    "504": "The answer took longer than this server allows.",
}
_WAITS: Final = ("429", "503")


def document(version: str) -> dict[str, Any]:
    """Return the document; `version` is that of the package."""
    _, schemas = models_json_schema([(one, "validation") for one in _MODELS], ref_template=_REFS)
    components = {**schemas["$defs"], **_answers()}
    chat = components["ChatRequest"]
    chat["properties"] |= neutral_fields()
    chat["additionalProperties"] = False
    components["Message"]["additionalProperties"] = {"enum": [None, [], {}]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sg4v-ray", "version": version},
        "security": [{"key": []}],
        "paths": _paths(components["CaptionRequest"]),
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _paths(captions: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paths; `captions` is the schema of what /v1/captions takes as JSON."""
    model_id = {"name": "model_id", "in": "path", "required": True, "schema": {"type": "string"}}
    fields = {name: one for name, one in captions["properties"].items() if name != "images"}
    upload = {
        "type": "object",
        "required": ["image"],
        "properties": {"image": {"type": "array", "minItems": 1, "items": _FILE}, **fields},
    }
    return {
        "/v1/models": {"get": _operation("models", "ModelList", ("401", "403", "429", "503"))},
        "/v1/models/{model_id}": {
            "parameters": [model_id],
            "get": _operation("model", "Model", ("401", "403", "404", "429", "503")),
        },
        "/v1/chat/completions": {
            "post": _operation(
                "chat", "Completion", tuple(_REASONS),
                body={"application/json": _ref("ChatRequest")}, streams=True,
            )
        },
        "/v1/captions": {
            "post": _operation(
                "captions", "Captions", tuple(_REASONS),
                body={"application/json": _ref("CaptionRequest"), "multipart/form-data": upload},
            )
        },
        **{
            f"/health/{kind}": {"get": _health(kind)}
            for kind in ("live", "ready", "deep")
        },
        "/admin/traffic": {
            "get": _operation("traffic", "Traffic", ("401", "403", "429", "503")),
            "post": _operation(
                "shift", "Traffic", ("400", "401", "403", "404", "408", "413", "415", "429", "503"),
                body={"application/json": _ref("Shift")},
            ),
        },
        "/openapi.json": {"get": _operation("openapi", None, ("401", "403", "429", "503"))},
    }  # fmt: skip


def _health(kind: str) -> dict[str, Any]:
    made = _operation(kind, "Health", ("401", "403", "429", "503"))
    either = {"anyOf": [_ref("Health"), _ref("Error")]}  # of a model, or of the books of quotas
    made["responses"]["503"]["content"]["application/json"]["schema"] = either
    return made


def _operation(
    name: str,
    answer: str | None,
    errors: tuple[str, ...],
    *,
    body: Mapping[str, Any] | None = None,
    streams: bool = False,
) -> dict[str, Any]:
    schema = {"type": "object"} if answer is None else _ref(answer)
    content: dict[str, Any] = {"application/json": {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    made: dict[str, Any] = {
        "operationId": name,
        "responses": {
            "200": {"description": "The answer.", "content": content, "headers": _headers()},
            **{status: _error(status) for status in errors},
        },
    }
    if body is not None:
        made["requestBody"] = {
            "required": True,
            "content": {kind: {"schema": schema} for kind, schema in body.items()},
        }
    return made


def _error(status: str) -> dict[str, Any]:
    headers = _headers()
    if status in _WAITS:
        headers["retry-after"] = {"schema": {"type": "integer", "minimum": 1}, "required": True}
    if status == "401":
        headers["www-authenticate"] = {"schema": _TEXT, "required": True}
    return {
        "description": _REASONS[status],
        "headers": headers,
        "content": {"application/json": {"schema": _ref("Error")}},
    }


def _headers() -> dict[str, Any]:
    return {"x-request-id": {"schema": _TEXT, "required": True}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REFS.format(model=name)}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _list(of: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": of}


def _answers() -> dict[str, Any]:
    finish = {"enum": ["stop", "length", None]}
    usage = _object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT)
    head = {"id": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}
    message = _object(
        role={"const": "assistant"},
        content=_TEXT,
        refusal={"type": "null"},
        annotations={"type": "array", "maxItems": 0},
    )
    caption = _object(
        index=_COUNT, caption=_TEXT, finish_reason=finish, flags=_list(_TEXT), tokens=_COUNT
    )
    or_null = {"type": ["string", "null"]}
    model = _object(
        id=_TEXT, object={"const": "model"}, created=_COUNT, owned_by=_TEXT, max_model_len=_COUNT
    )
    choice = _object(index=_COUNT, message=message, logprobs={"type": "null"}, finish_reason=finish)
    return {
        "Model": model,
        "ModelList": _object(object={"const": "list"}, data=_list(model)),
        "Completion": _object(
            **head, object={"const": "chat.completion"}, choices=_list(choice), usage=usage
        ),
        "Captions": _object(**head, object={"const": "list"}, data=_list(caption), usage=usage),
        "Traffic": _object(
            object={"const": "list"},
            data=_list(_object(model=_TEXT, stable=_TEXT, canary=_TEXT, weight={"type": "number"})),
        ),
        "Health": {
            "type": "object",
            "required": ["status"],
            "properties": {
                "status": {"enum": ["ok", "unavailable"]},
                "models": {"type": "object", "additionalProperties": {"type": "boolean"}},
            },
        },
        "Error": _object(error=_object(message=_TEXT, type=_TEXT, param=or_null, code=or_null)),
    }
