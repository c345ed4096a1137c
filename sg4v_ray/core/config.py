# SPDX-License-Identifier: Apache-2.0
"""Configs as data: a stable fingerprint, and strict loading that names the nearest known key."""

import dataclasses
import difflib
import enum
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, cast

import yaml

from sg4v_ray.core.errors import ConfigError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Turn a config into JSON values; dataclasses carry their class name under `type`.

    Raises:
        ConfigError: a value has no stable text form (a float that is not finite, a set, an
            object). Hashing its `repr` would give each process another fingerprint.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, enum.Enum):
        return to_plain(value.value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, tuple | list):
        return [to_plain(one) for one in value]
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ConfigError(f"config keys must be strings, got {list(value)!r}")
        return {key: to_plain(value[key]) for key in sorted(value)}
    raise ConfigError(
        f"{value!r} ({type(value).__name__}) has no stable form; use str, int, finite float, "
        "bool, None, tuple, dict or a dataclass of these"
    )


_PATIENCE = ("budget", "fetch")


def content_of(config: Any) -> dict[str, Any]:
    """Return the plain form of what decides content: all fields but `budget` and `fetch`.

    Those say how much a job puts up with before it gives up. Whoever looks at the rejects and
    accepts them, or allows another host, runs again on the same rows.
    """
    return {key: value for key, value in to_plain(config).items() if key not in _PATIENCE}


def fingerprint(config: Any) -> str:
    """Return 16 hex digits that are equal exactly when two configs are equal."""
    text = json.dumps(to_plain(config), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(cls: type[T], data: Any, *, path: str = "", finite: bool = True) -> T:
    """Build the dataclass `cls` from plain JSON or YAML values, strictly.

    Args:
        cls: what to build.
        data: mappings, lists, text and numbers.
        path: name of `data` in messages, instead of the name of `cls`.
        finite: refuse NaN and infinity. Records of what was measured have them, settings not.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a missing key, or a value of
            the wrong type, each with its full path such as `models[0].engine`.
    """
    if finite:
        _require_finite(data, path or cls.__name__)
    return cast(T, _load(cls, data, path or cls.__name__))


def read_yaml(text: str, *, where: str) -> Any:
    """Return what a YAML text says; a key that stands twice is an error, as its first is lost.

    Raises:
        ConfigError: it is no such text.
    """
    try:
        return yaml.load(text, _OnceEach)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error


class _OnceEach(yaml.SafeLoader):
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Look at the keys as they are written, before merges (`<<`) add others."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            name = key.tag, str(key.value)
            if name in seen:
                raise yaml.composer.ComposerError(
                    None, None, f"{key.value!r} is there twice", key.start_mark
                )
            seen.add(name)
        return node


def _require_finite(data: Any, path: str) -> None:
    if isinstance(data, Mapping):
        for key, value in data.items():
            _require_finite(value, f"{path}.{key}")
    elif isinstance(data, list | tuple):
        for i, one in enumerate(data):
            _require_finite(one, f"{path}[{i}]")
    elif isinstance(data, float) and not math.isfinite(data):
        raise ConfigError(f"{path} must be a number that is finite, got {data}")


def _load(annotation: Any, data: Any, path: str) -> Any:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return data
    if dataclasses.is_dataclass(annotation):
        return _load_dataclass(cast(type, annotation), data, path)
    if origin in (types.UnionType, typing.Union):
        return _load_optional(args, data, path)
    if origin is Literal:
        if data not in args:
            raise ConfigError(f"{path} must be one of {', '.join(map(repr, args))}, got {data!r}")
        return data
    if origin is tuple:
        if not isinstance(data, list | tuple):
            raise ConfigError(f"{path} must be a list, got {data!r}")
        return tuple(_load(args[0], one, f"{path}[{i}]") for i, one in enumerate(data))
    if origin is dict:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{path} must be a mapping, got {data!r}")
        return {key: _load(args[1], value, f"{path}.{key}") for key, value in data.items()}
    return _load_scalar(annotation, data, path)


def _load_optional(args: tuple[Any, ...], data: Any, path: str) -> Any:
    inner = [one for one in args if one is not types.NoneType]
    if data is None and len(inner) < len(args):
        return None
    if len(inner) != 1:
        raise TypeError(f"{path}: a union of several types cannot be loaded")
    return _load(inner[0], data, path)


def _load_scalar(annotation: Any, data: Any, path: str) -> Any:
    if annotation is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, annotation) or (annotation is int and isinstance(data, bool)):
        raise ConfigError(f"{path} must be of type {annotation.__name__}, got {data!r}")
    return data


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _load_dataclass(cls: type, data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{path} must be a mapping of {cls.__name__}'s fields, got {data!r}")
    hints = _type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    given = {key: value for key, value in data.items() if key != "type"}
    for key in given:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{path} has no field {key!r}{hint} (known: {', '.join(fields)})")
    for name, field in fields.items():
        no_default = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if name not in given and no_default:
            raise ConfigError(f"{path} needs the field {name!r}")
    values = {key: _load(hints[key], value, f"{path}.{key}") for key, value in given.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
