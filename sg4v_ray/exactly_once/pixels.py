# SPDX-License-Identifier: Apache-2.0
"""The fetch and decode step: URIs in, what the model (or the teacher) sees out, or a reason.

Runs in CPU tasks; rows of committed parts are never fetched again.
"""

import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
from PIL import Image
from ray.util.metrics import Counter

from sg4v_ray.core import observe
from sg4v_ray.core.fetch import FetchConfig, Fetcher
from sg4v_ray.core.image_bytes import is_remote, read, read_all
from sg4v_ray.core.images import ImageLimits, Rejected, open_image
from sg4v_ray.exactly_once.loop_thread import LoopThread
from sg4v_ray.model.geometry import Geometry, squared

COLUMNS = pa.schema(
    [
        pa.field("image", pa.large_binary()),
        pa.field("reject", pa.string()),
        pa.field("reject_detail", pa.string()),
    ]
)
"""What this step adds to a table; exactly one of `image` and `reject` is set."""


def load_image(uri: str, *, limits: ImageLimits) -> Image.Image | Rejected:
    """Read and decode one untrusted image that is not on the web."""
    data = read(uri, limits=limits)
    return data if isinstance(data, Rejected) else open_image(data, limits)


def read_images(
    uris: Sequence[str], *, limits: ImageLimits, fetch: FetchConfig
) -> Iterator[bytes | Rejected]:
    """Yield the encoded bytes of images: many at once where a network is waited for."""
    if not any(map(is_remote, uris)):
        yield from (read(uri, limits=limits) for uri in uris)
        return
    loop, fetcher = _network(fetch)
    yield from loop.run(
        read_all(uris, limits=limits, fetcher=fetcher, concurrency=fetch.concurrency)
    )


@functools.cache
def _network(fetch: FetchConfig) -> tuple[LoopThread, Fetcher]:
    """Keep one loop and its connections in each worker process."""
    return LoopThread("fetch"), Fetcher(fetch)


@functools.cache
def _decode_seconds() -> Counter:
    """Make the metric once in each worker process."""
    return Counter(observe.DECODE_S.name, observe.DECODE_S.description)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPixels:
    """Encode an image as the raw RGB bytes of the exact square that a model sees."""

    size: int
    """Side of the square in pixels."""
    geometry: Geometry

    def __call__(self, image: Image.Image) -> bytes:
        """Return size * size * 3 bytes, row by row."""
        return squared(image, self.size, self.geometry).tobytes()


def add_images(
    table: pa.Table,
    *,
    limits: ImageLimits,
    encode: Callable[[Image.Image], bytes],
    fetch: FetchConfig,
    hash_column: str | None = None,
) -> pa.Table:
    """Add `image`, `reject` and `reject_detail` to a table with a `uri` column.

    Args:
        hash_column: name of one more column, with the sha256 of the bytes that were read.
    """
    started_s = time.monotonic()
    encoded: list[bytes | None] = []
    rejects: list[Rejected | None] = []
    hashes: list[str | None] = []
    for data in read_images(table["uri"].to_pylist(), limits=limits, fetch=fetch):
        image = data if isinstance(data, Rejected) else open_image(data, limits)
        encoded.append(None if isinstance(image, Rejected) else encode(image))
        rejects.append(image if isinstance(image, Rejected) else None)
        if hash_column is not None:
            hashes.append(None if isinstance(data, Rejected) else hashlib.sha256(data).hexdigest())
    if hash_column is not None:
        table = table.append_column(hash_column, pa.array(hashes, pa.string()))
    _decode_seconds().inc(time.monotonic() - started_s)
    columns = (
        encoded,
        [None if one is None else one.reason.value for one in rejects],
        [None if one is None else one.detail for one in rejects],
    )
    for field, values in zip(COLUMNS, columns, strict=True):
        table = table.append_column(field, pa.array(values, field.type))
    return table
