# SPDX-License-Identifier: Apache-2.0
"""Read the encoded bytes of images wherever they lie, the size checked before the reading.

What cannot be read is a `Rejected`; what fails for all images alike (a bucket that is away)
raises, after the store's own retries, so that a job ends and can be run again.
"""

import asyncio
import errno
import functools
import io
import os
import stat
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

import obstore
import pyarrow as pa
import pyarrow.parquet as pq
from obstore.exceptions import NotFoundError, PermissionDeniedError
from obstore.store import from_url

from sg4v_ray.core.errors import ContractError, StorageError
from sg4v_ray.core.fetch import Fetcher
from sg4v_ray.core.images import ImageLimits, Rejected
from sg4v_ray.core.location import Cell, Span, Whole, parse
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.storage import is_local, local_path

_THIS_FILE: Final = {
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
    errno.EINVAL,
    errno.EISDIR,
    errno.ENXIO,
    errno.EIO,
}
"""What the system says when one file cannot be read and others can."""


def is_http(uri: str) -> bool:
    """Say whether a URI is fetched over HTTP."""
    return uri.startswith(("http://", "https://"))


def is_remote(text: str) -> bool:
    """Say whether reading a location waits for a network, so that many should be read at once."""
    try:
        return not is_local(parse(text).uri)
    except ContractError:
        return False


async def read_all(
    texts: Sequence[str], *, limits: ImageLimits, fetcher: Fetcher, concurrency: int
) -> list[bytes | Rejected]:
    """Read the images at some locations, at most `concurrency` at once; the order stays.

    Raises:
        OSError, obstore errors: the storage itself fails, after obstore's own retries.
    """
    slots = asyncio.Semaphore(concurrency)

    async def one(text: str) -> bytes | Rejected:
        async with slots:
            if is_http(text):
                return await fetcher.get(text, max_bytes=limits.max_bytes)
            return await asyncio.to_thread(read, text, limits=limits)

    return list(await asyncio.gather(*map(one, texts)))


def read(text: str, *, limits: ImageLimits) -> bytes | Rejected:
    """Read one image that is not on the web.

    Raises:
        OSError, obstore errors: the storage itself fails, after obstore's own retries.
    """
    if not text:
        return Rejected(Reject.MISSING, "the index has no URI for this image")
    try:
        place = parse(text)
    except ContractError as error:
        return Rejected(Reject.NOT_READABLE, str(error))
    if is_http(place.uri):
        return Rejected(Reject.HOST_NOT_ALLOWED, f"HTTP is not read here: {text}")
    try:
        match place:
            case Whole():
                return _whole(place.uri, limits)
            case Span():
                return _span(place, limits)
            case Cell():
                return _cell(place, limits)
    except (NotFoundError, FileNotFoundError):
        return Rejected(Reject.MISSING, f"there is no {place.uri}")
    except (PermissionDeniedError, PermissionError):
        return Rejected(Reject.NOT_READABLE, f"no permission to read {place.uri}")
    except ValueError as error:  # of the store: no name of a bucket or object
        return Rejected(Reject.NOT_READABLE, f"{place.uri}: {error}")
    except OSError as error:
        if error.errno not in _THIS_FILE:
            raise
        return Rejected(Reject.NOT_READABLE, f"{place.uri}: {error.strerror}")


def _too_big(size: int, limits: ImageLimits) -> Rejected | None:
    if size <= limits.max_bytes:
        return None
    return Rejected(Reject.TOO_MANY_BYTES, f"{size} bytes, limit {limits.max_bytes}")


def _whole(uri: str, limits: ImageLimits) -> bytes | Rejected:
    if is_local(uri):
        path = uri.removeprefix("file://")  # no Path: a tenth of the time of a small image
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):
            return Rejected(Reject.MISSING, f"{uri} is no file")
        if (refused := _too_big(found.st_size, limits)) is not None:
            return refused
        with open(path, "rb") as file:
            # Not up to the limit at once: a read first allocates all bytes that it may return.
            data = file.read(found.st_size + 1)
            if len(data) != found.st_size:  # it grows, or is of /proc, where files have no size
                data += file.read(limits.max_bytes + 1 - len(data))
        return _too_big(len(data), limits) or data
    remote = obstore.get(*_object(uri))
    return _too_big(remote.meta["size"], limits) or bytes(remote.bytes())


def _span(place: Span, limits: ImageLimits) -> bytes | Rejected:
    if (refused := _too_big(place.length, limits)) is not None:
        return refused
    if is_local(place.uri):
        with open_file(place.uri) as file:
            file.seek(place.offset)
            data = file.read(place.length)
    else:
        store, name = _object(place.uri)
        data = bytes(obstore.get_range(store, name, start=place.offset, length=place.length))
    if len(data) < place.length:
        detail = f"the archive ends {place.length - len(data)} bytes inside this image"
        return Rejected(Reject.TRUNCATED, detail)
    return data


def _cell(place: Cell, limits: ImageLimits) -> bytes | Rejected:
    try:
        value = _column(place.kind, place.uri, place.group, place.column)[place.row]
    except (pa.ArrowException, IndexError, KeyError, EOFError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the system's; Arrow's own have no number
        return Rejected(Reject.CORRUPT, f"{place.uri} is not as it was indexed: {error}")
    if not value.is_valid:
        return Rejected(Reject.EMPTY_FILE, f"row {place.row} of {place.column!r} is null")
    return _too_big(value.as_buffer().size, limits) or value.as_py()


def _object(uri: str) -> tuple[Any, str]:
    """Return the bucket of a remote URI and the name inside it, letter by letter as written."""
    scheme, _, rest = uri.partition("://")
    bucket, _, name = rest.partition("/")
    if not name:
        raise FileNotFoundError(errno.ENOENT, "no object's name", uri)
    return _bucket(f"{scheme}://{bucket}"), name


@functools.lru_cache(maxsize=64)
def _bucket(uri: str) -> Any:
    """Keep the clients of the buckets in use: making one costs a TLS session."""
    return from_url(uri)


class _Remote(io.RawIOBase):
    """An object of a bucket as a Python file."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._reader: Any = obstore.open_reader(*_object(uri))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._reader.seek(offset, whence))

    def readinto(self, buffer: Any) -> int:
        try:
            data = memoryview(self._reader.read(len(buffer)))
        except OSError as error:
            # Else Arrow, and who calls it, would take this for damage inside of the file.
            raise StorageError(
                f"{self._uri} could not be read ({error}); nothing is lost, run again"
            ) from error
        buffer[: len(data)] = data
        return len(data)


def open_file(uri: str) -> BinaryIO:
    """Open a local or remote file for reading at any place.

    Raises:
        FileNotFoundError: there is no such file; a folder, a pipe or a device is none.
    """
    if is_local(uri):
        path = local_path(uri)
        if not path.is_file():
            raise FileNotFoundError(errno.ENOENT, "no file", str(path))
        return path.open("rb")
    return io.BufferedReader(_Remote(uri), buffer_size=2**20)


@functools.lru_cache(maxsize=2)
def _column(kind: str, uri: str, group: int, column: str) -> pa.ChunkedArray:
    """Read a column of a row group. Rows of an index follow each other, so two are enough.

    The index refuses row groups that are too large to be held (`sources.tables`).
    """
    outer, _, inner = column.partition(".")
    with open_file(uri) as file:
        if kind == "parquet":
            table = pq.ParquetFile(file).read_row_group(group, columns=[column], use_threads=False)
            found = table[outer]
        else:
            found = pa.chunked_array([_arrow_batch(pa.PythonFile(file), group)[outer]])
    if inner:
        found = pa.chunked_array([chunk.field(inner) for chunk in found.chunks])
    return found


def _arrow_batch(file: pa.NativeFile, offset: int) -> pa.RecordBatch:
    """Read the record batch whose message begins at byte `offset` of an Arrow stream."""
    schema = pa.ipc.read_schema(file)
    file.seek(offset)
    return pa.ipc.read_record_batch(pa.ipc.read_message(file), schema)
