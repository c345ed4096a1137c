# SPDX-License-Identifier: Apache-2.0
"""Identity of configs: fingerprints that do not depend on names in code or on new fields.

A fingerprint is a hash of the identity form of a config: class keys, field keys and the values that
differ from the default with which their field was first released. Rules for a release:

    add a field            give it the default that keeps the old behaviour
    rename class or field  keep the key
    change a default       keep the old one in `first_defaults`
    change a meaning       raise `schema`: old artifacts then differ from every new config
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from sg4v_ray.core.config import to_plain
from sg4v_ray.core.errors import ConfigError

T = TypeVar("T")

_TYPE: Final = "type"
_SCHEMA: Final = "schema"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassIdentity:
    """Identity of one config class."""

    key: str
    schema: int
    keys: Mapping[str, str]
    """Key of each field, by name."""
    excluded: frozenset[str]
    """Keys of fields that are not part of the identity."""
    defaults: Mapping[str, Any]
    """Identity form of the first released default, by field key. A field without one is always
    written."""
    name_in_0_1: str
    """Class name in the configs that version 0.1.0 stored."""

    def name_of(self, key: str) -> str:
        """Return the field name of a key, or the key itself for an unknown one."""
        return next((name for name, one in self.keys.items() if one == key), key)

    def form(self, fields: Mapping[str, Any], schema: int) -> dict[str, Any]:
        """Return the identity form.

        Args:
            fields: identity form of each value by field key; unknown keys are kept.
            schema: of the values.
        """
        written = {
            key: value
            for key, value in fields.items()
            if key not in self.excluded
            and not (key in self.defaults and _is_equal(value, self.defaults[key]))
        }
        return {_TYPE: self.key, **({_SCHEMA: schema} if schema > 1 else {}), **written}


_CLASSES: Final[dict[type, ClassIdentity]] = {}
"""All decorated classes. Defaults of stored configs are looked up here: a config that is compared
with a stored one exists as an object, so its classes have been imported."""


def identity_keys(
    key: str,
    /,
    *,
    excluded: tuple[str, ...] = (),
    schema: int = 1,
    first_defaults: Mapping[str, Any] | None = None,
    name_in_0_1: str | None = None,
    **keys: str,
) -> Callable[[type[T]], type[T]]:
    """Give a dataclass its identity. Place above `@dataclass`.

    Args:
        key: key of the class; never changes once released.
        excluded: names of fields that are not part of the identity, such as a reject budget.
        schema: raised when equal field values no longer give equal results. Part of the identity
            above 1.
        first_defaults: first released default by field name, where the present one differs.
            `dataclasses.MISSING` for a field that was first released without a default.
        name_in_0_1: class name in version 0.1.0, where it differs from the key.
        keys: key of each field by its name; never changes once released.

    Raises:
        TypeError: keys and fields differ, or another class has the key.
    """

    def decorate(cls: type[T]) -> type[T]:
        _check_keys(cls, key, keys)
        _check_names(cls, keys, excluded, first_defaults or {}, schema)
        first = {**_defaults_of(cls), **(first_defaults or {})}
        _register(
            cls,
            ClassIdentity(
                key=key,
                schema=schema,
                keys=keys,
                excluded=frozenset(keys[name] for name in excluded),
                defaults={
                    keys[name]: identity_form(value)
                    for name, value in first.items()
                    if name not in excluded and value is not dataclasses.MISSING
                },
                name_in_0_1=name_in_0_1 or key,
            ),
        )
        return cls

    return decorate


def identity_form(value: Any) -> Any:
    """Return the JSON value that decides the fingerprint of a config.

    Mappings that `to_plain` made of a config in this process are accepted inside a config.

    Raises:
        ConfigError: a dataclass without `identity_keys`, or a value without a stable form.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = _CLASSES.get(type(value))
        if found is None:
            name = type(value).__name__
            raise ConfigError(
                f"{name} has no identity keys, so it cannot be part of an identity; put "
                f'@identity_keys("{name}", field="field", ...) of sg4v_ray.core.identity above its '
                "@dataclass"
            )
        included = {
            key: identity_form(getattr(value, name))
            for name, key in found.keys.items()
            if key not in found.excluded
        }
        return found.form(included, found.schema)
    if isinstance(value, Mapping):
        return _form_of_plain({key: identity_form(one) for key, one in _checked(value)})
    if isinstance(value, tuple | list):
        return [identity_form(one) for one in value]
    return to_plain(value)


def stored_identity_form(plain: Any) -> Any:
    """Return the identity form of a config that was read from storage.

    Args:
        plain: an identity form, which stays as it is, or a config as version 0.1.0 stored it: all
            fields by name, the class name as `type`. Classes that no longer exist stay as they are.
    """
    if isinstance(plain, list):
        return [stored_identity_form(one) for one in plain]
    if not isinstance(plain, Mapping):
        return plain
    fields = {key: stored_identity_form(one) for key, one in plain.items()}
    found = _stored_class(fields)
    if found is None:
        return fields
    schema = fields.pop(_SCHEMA, 1)
    del fields[_TYPE]
    return found.form(fields, schema)


def fingerprint_of(value: Any) -> str:
    """Return 16 hex digits that are equal exactly when two identity forms are equal."""
    return hashlib.sha256(_text(identity_form(value)).encode()).hexdigest()[:16]


def differences(stored: Any, config: Any) -> list[str]:
    """Return a line for each path at which a stored config differs from a present one.

    Args:
        stored: as `stored_identity_form` takes it.
        config: as `identity_form` takes it.
    """
    return list(_differences(stored_identity_form(stored), identity_form(config), ""))


def classes() -> dict[str, ClassIdentity]:
    """Return the identities of all imported classes of this package by class key."""
    return {one.key: one for cls, one in _CLASSES.items() if cls.__module__.startswith("sg4v_ray.")}


def _check_keys(cls: type, key: str, keys: Mapping[str, str]) -> None:
    if not dataclasses.is_dataclass(cls):
        raise TypeError(f"{cls.__name__} is no dataclass; put @identity_keys above @dataclass")
    names = {one.name for one in dataclasses.fields(cls) if one.init}
    if names != set(keys):
        missing, unknown = sorted(names - set(keys)), sorted(set(keys) - names)
        raise TypeError(
            f"identity keys of {cls.__name__} differ from its fields: no key for "
            f"{', '.join(missing) or 'none'}, no field for {', '.join(unknown) or 'none'}. A "
            "renamed field keeps its key (new_name='old_key')"
        )
    if len(set(keys.values())) < len(keys) or {_TYPE, _SCHEMA} & set(keys.values()):
        raise TypeError(
            f"field keys of {cls.__name__} must differ from each other and from {_TYPE!r} and "
            f"{_SCHEMA!r}, got {sorted(keys.values())}"
        )
    for other, identity in _CLASSES.items():
        if identity.key == key and not _is_reloaded(other, cls):
            raise TypeError(
                f"{cls.__module__}.{cls.__qualname__} takes the identity key {key!r} of "
                f"{other.__module__}.{other.__qualname__}; give another key"
            )


def _check_names(
    cls: type,
    keys: Mapping[str, str],
    excluded: tuple[str, ...],
    first_defaults: Mapping[str, Any],
    schema: int,
) -> None:
    if unknown := sorted({*excluded, *first_defaults} - set(keys)):
        raise TypeError(
            f"excluded and first_defaults of {cls.__name__} name no such field: "
            f"{', '.join(unknown)}"
        )
    if schema < 1:
        raise TypeError(f"schema of {cls.__name__} must be at least 1, got {schema}")


def _defaults_of(cls: Any) -> dict[str, Any]:
    found = {}
    for one in dataclasses.fields(cls):
        if one.init:
            make = one.default_factory
            found[one.name] = one.default if make is dataclasses.MISSING else make()
    return found


def _register(cls: type, identity: ClassIdentity) -> None:
    for other in [one for one in _CLASSES if _is_reloaded(one, cls)]:
        del _CLASSES[other]
    _CLASSES[cls] = identity


def _is_reloaded(old: type, new: type) -> bool:
    """Return True for two versions of one class, of a module that was imported again."""
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def _checked(value: Mapping[Any, Any]) -> Iterable[tuple[str, Any]]:
    if not all(isinstance(key, str) for key in value):
        raise ConfigError(f"config keys must be strings, got {list(value)!r}")
    return value.items()


def _form_of_plain(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the form of a mapping; one that `to_plain` made of a config has names, not keys."""
    name, given = fields.get(_TYPE), set(fields) - {_TYPE}
    for cls, found in _CLASSES.items():
        if cls.__name__ == name and given <= set(found.keys):
            return found.form({found.keys[one]: fields[one] for one in given}, found.schema)
    return fields


def _stored_class(fields: Mapping[str, Any]) -> ClassIdentity | None:
    """Return the class of a stored config. In 0.1.0 two classes were named `Share`, so the fields
    decide first."""
    kind, given = fields.get(_TYPE), set(fields) - {_TYPE, _SCHEMA}
    if not isinstance(kind, str):
        return None
    by_key = [one for one in _CLASSES.values() if one.key == kind]
    by_name = [one for one in _CLASSES.values() if one.name_in_0_1 == kind]
    fitting = [one for one in (*by_key, *by_name) if given <= set(one.keys.values())]
    return next(iter((*fitting, *by_key)), None)


@dataclass(frozen=True, slots=True)
class _Absent:
    """A value that a form does not have."""

    def __repr__(self) -> str:
        return "nothing"


_ABSENT: Final = _Absent()


def _differences(old: Any, new: Any, path: str) -> Iterable[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        is_one_class = old.get(_TYPE) == new.get(_TYPE)
        keys = sorted(set(old) | set(new)) if is_one_class else [_TYPE]
        found = _stored_class({**old, **new})
        for key in keys:
            name = found.name_of(key) if found else key
            inner = f"{path}.{name}" if path else name
            yield from _differences(_value(old, key, found), _value(new, key, found), inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{path}[{number}]")
    elif _ABSENT in (old, new) or not _is_equal(old, new):
        yield f"{path}: {old!r} there, {new!r} here"


def _value(form: Mapping[str, Any], key: str, found: ClassIdentity | None) -> Any:
    """Return a value of a form, or the default for which it was left out."""
    if key in form or found is None:
        return form.get(key, _ABSENT)
    return 1 if key == _SCHEMA else found.defaults.get(key, _ABSENT)


def _is_equal(form: Any, other: Any) -> bool:
    return _text(form) == _text(other)


def _text(form: Any) -> str:
    return json.dumps(form, sort_keys=True, ensure_ascii=True)
