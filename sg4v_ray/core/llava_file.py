# SPDX-License-Identifier: Apache-2.0
"""A LLaVA JSON by its path or URI: opened, read with a progress bar, and fingerprinted."""

import hashlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from obstore.exceptions import NotFoundError, PermissionDeniedError
from tqdm import tqdm

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.image_bytes import open_file
from sg4v_ray.core.json_array import Element
from sg4v_ray.core.llava_json import read_elements
from sg4v_ray.core.storage import check_root


def check_place(uri: str) -> None:
    """Raise ConfigError unless a file is given by an absolute path or a bucket's URI."""
    if "://" not in uri and not uri.startswith("/"):
        raise ConfigError(f"{uri!r} is relative; write {Path(uri).absolute()} or a URI")
    check_root(os.path.dirname(uri) or "/")


def records_at(uri: str, *, bar: str | None = None) -> Iterator[Element]:
    """Yield the checked records of a file.

    Args:
        bar: names a progress bar over the file's bytes; None shows none.

    Raises:
        ConfigError: there is no such file, or it may not be read.
        ContractError: it is no LLaVA JSON.
    """
    with _opened(uri, bar) as file:
        yield from read_elements(file, where=uri)


def digest_at(uri: str, *, bar: str | None = None) -> str:
    """Return the sha256 of a file as 64 hex digits.

    Raises:
        ConfigError: there is no such file, or it may not be read.
    """
    digest = hashlib.sha256()
    with _opened(uri, bar) as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def _opened(uri: str, bar: str | None) -> Iterator[BinaryIO]:
    try:
        file = open_file(uri)
    except (NotFoundError, FileNotFoundError) as error:
        raise ConfigError(f"there is no file {uri} (a folder is none); check the path") from error
    except (PermissionDeniedError, PermissionError) as error:
        raise ConfigError(f"no permission to read {uri}; make it readable") from error
    with file, _watched(file, bar) as watched:
        yield watched


@contextmanager
def _watched(file: BinaryIO, bar: str | None) -> Iterator[BinaryIO]:
    if bar is None:
        yield file
        return
    total = file.seek(0, io.SEEK_END)
    file.seek(0)
    settings: dict[str, Any] = {"file": sys.stderr, "mininterval": 0.5, "dynamic_ncols": True}
    with tqdm.wrapattr(file, "read", total=total, desc=bar, **settings) as wrapped:
        yield cast(BinaryIO, wrapped)
