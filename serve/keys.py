# SPDX-License-Identifier: Apache-2.0
"""API keys: who may call, for what, and how much. Only hashes are stored.

    python -m serve.keys NAME      prints a new key, once, and the entry to store

The file (or the environment variable) is YAML:

    keys:
      - name: team-a
        sha256: "9f86d0..."
        scopes: [inference]
        quota: {requests_per_min: 600, tokens_per_min: 200000, concurrency: 16}
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from sg4v_ray.core.config import load, read_yaml
from sg4v_ray.core.errors import ConfigError, Sg4vError

_log = logging.getLogger(__name__)

Scope = Literal["inference", "metrics", "admin"]
"""`inference`: models, chat, captions. `metrics`: health. `admin`: the weights of canaries."""
_PREFIX: Final = "sg4v-"
_SECRET_BYTES: Final = 32
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LOOK_EVERY_S: Final = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """What one key may use; None sets no limit."""

    requests_per_min: float | None = None
    tokens_per_min: float | None = None
    """Of prompts and answers together, images included as the tokens they take."""
    concurrency: int | None = None
    """Requests that are open at once."""
    tokens_per_day: int | None = None
    """Counted from midnight UTC."""

    def __post_init__(self) -> None:
        for name in ("requests_per_min", "tokens_per_min", "concurrency", "tokens_per_day"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ConfigError(
                    f"quota.{name} must be above 0, got {value}; leave it out for no limit"
                )

    @property
    def has_limits(self) -> bool:
        """Something is limited."""
        return self != Quota()


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """One caller."""

    name: str
    """Stands in the log; the key itself never does."""
    sha256: str
    """Of the key, in hexadecimal. Keys are 256 random bits, so no slow hash is needed."""
    scopes: tuple[Scope, ...] = ("inference",)
    quota: Quota = field(default_factory=Quota)

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"key name {self.name!r} must be up to 64 letters, digits, '.', '_' and '-'"
            )
        if not _HASH.fullmatch(self.sha256):
            raise ConfigError(
                f"key {self.name!r}: sha256 must be 64 hexadecimal digits; make an entry with "
                f"`python -m serve.keys {self.name}`"
            )
        if not self.scopes:
            raise ConfigError(f"key {self.name!r} has no scopes; write scopes: [inference]")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Keys:
    keys: tuple[Key, ...]

    def __post_init__(self) -> None:
        for what in ("name", "sha256"):
            values = [getattr(one, what) for one in self.keys]
            if doubled := sorted({one for one in values if values.count(one) > 1}):
                raise ConfigError(f"keys must have each {what} once, {doubled[0]!r} is there twice")


class KeyRing:
    """The keys of a file or a variable; a file that changes is read again while we serve."""

    def __init__(self, *, file: str | None = None, variable: str | None = None) -> None:
        """Read the keys.

        Raises:
            ConfigError: there are none, or they cannot be read.
        """
        self._file = Path(file).expanduser() if file is not None else None
        self._looked_s, self._mark = time.monotonic(), self._mark_now()
        text = self._text() if variable is None else _of_variable(variable)
        self._keys = parse(text, where=file or f"${variable}")

    def find(self, presented: str) -> Key | None:
        """Return the key that this is, if it is one; all are compared, in constant time."""
        self._look_again()
        digest = hashlib.sha256(presented.encode()).hexdigest()
        found = None
        for one in self._keys:
            if hmac.compare_digest(one.sha256, digest):
                found = one
        return found

    def _look_again(self) -> None:
        now = time.monotonic()
        if self._file is None or now - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now
        try:
            if (mark := self._mark_now()) == self._mark:
                return
            self._keys = parse(self._text(), where=str(self._file))
        except Sg4vError as error:  # half written, or wrong: nobody is locked out by it
            _log.error("the keys of before stay in use, also those taken out: %s", error)
        else:
            self._mark = mark
            _log.info("the file of keys changed; these are in use: %s", _names(self._keys))

    def _mark_now(self) -> tuple[int, int, int] | None:
        """Return what changes when the file does; a secret that Kubernetes swaps is a new inode."""
        if self._file is None:
            return None
        try:
            found = self._file.stat()
        except OSError as error:
            raise _unreadable(self._file, error) from error
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _text(self) -> str:
        assert self._file is not None
        try:
            return self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _unreadable(self._file, error) from error


def _names(keys: tuple[Key, ...]) -> str:
    return ", ".join(one.name for one in keys)


def _unreadable(file: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"no keys can be read from {file} ({error}); give auth.keys_file a file as serve/keys.py "
        "describes it"
    )


def _of_variable(name: str) -> str:
    if name not in os.environ:
        raise ConfigError(
            f"the environment has no {name}, which auth.keys_env names; set it where Ray starts"
        )
    return os.environ[name]


def parse(text: str, *, where: str) -> tuple[Key, ...]:
    """Return the keys that a text holds.

    Raises:
        ConfigError: it is no YAML of keys, or there are none.
    """
    data = read_yaml(text, where=where)
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} has no keys; it must begin with `keys:`")
    keys = load(_Keys, data, path=where).keys
    if not keys:
        raise ConfigError(f"{where} has no keys; make one with `python -m serve.keys NAME`")
    return keys


def new_key(name: str) -> tuple[str, Key]:
    """Return a new key and its entry."""
    secret = _PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    return secret, Key(name=name, sha256=hashlib.sha256(secret.encode()).hexdigest())


def main(arguments: list[str]) -> None:
    """Print a new key to standard error, and its entry, which may be kept, to standard output."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("usage: python -m serve.keys NAME")
    try:
        secret, key = new_key(arguments[0])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    sys.stderr.write(f"the key of {key.name}, shown once: {secret}\n")
    sys.stdout.write(f"  - name: {key.name}\n    sha256: '{key.sha256}'\n    scopes: [inference]\n")


if __name__ == "__main__":
    main(sys.argv[1:])
