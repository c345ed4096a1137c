# SPDX-License-Identifier: Apache-2.0
"""The fetch and decode step: URIs in, what the model (or the teacher) sees out, or a reason.

Runs on CPU workers, after the checkpoint filter, so finished rows are never fetched again.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import obstore
import pyarrow as pa
from obstore.exceptions import NotFoundError, PermissionDeniedError
from PIL import Image

from sg4v_ray.core.images import ImageLimits, Rejected, open_image
from sg4v_ray.core.rejects import Reject
from sg4v_ray.core.storage import Storage, is_local, local_path
from sg4v_ray.model.geometry import Geometry, as_model_sees

COLUMNS = pa.schema(
    [
        pa.field("image", pa.large_binary()),
        pa.field("reject", pa.string()),
        pa.field("reject_detail", pa.string()),
    ]
)
"""What this step adds to a table; exactly one of `image` and `reject` is set."""


def read_bytes(uri: str, *, limits: ImageLimits) -> bytes | Rejected:
    """Read an encoded image, its size checked before it is read.

    Raises:
        OSError, obstore errors: the storage itself fails, after obstore's own retries. The job
            ends and may be run again.
    """
    if is_local(uri):
        path = local_path(uri)
        if not path.is_file():
            return Rejected(Reject.MISSING, f"no such file: {uri}")
        if (size := path.stat().st_size) > limits.max_bytes:
            return Rejected(Reject.TOO_MANY_BYTES, f"{size} bytes, limit {limits.max_bytes}")
        try:
            return path.read_bytes()
        except PermissionError:
            return Rejected(Reject.NOT_READABLE, f"no permission to read {uri}")
    folder, _, name = uri.rpartition("/")
    store = Storage(folder).open()
    try:
        found = obstore.get(store, name)
    except (NotFoundError, FileNotFoundError):
        return Rejected(Reject.MISSING, f"no such object: {uri}")
    except PermissionDeniedError:
        return Rejected(Reject.NOT_READABLE, f"no permission to read {uri}")
    if (size := found.meta["size"]) > limits.max_bytes:
        return Rejected(Reject.TOO_MANY_BYTES, f"{size} bytes, limit {limits.max_bytes}")
    return bytes(found.bytes())


def load_image(uri: str, *, limits: ImageLimits) -> Image.Image | Rejected:
    """Read and decode one untrusted image."""
    data = read_bytes(uri, limits=limits)
    return data if isinstance(data, Rejected) else open_image(data, limits)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPixels:
    """Encode an image as the raw RGB bytes of the exact square that a model sees."""

    size: int
    """Side of the square in pixels."""
    geometry: Geometry

    def __call__(self, image: Image.Image) -> bytes:
        """Return size * size * 3 bytes, row by row."""
        return as_model_sees(image, self.size, self.geometry).tobytes()


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherPng:
    """Encode an image as a PNG for a teacher, scaled down to a longest side."""

    max_side: int

    def __call__(self, image: Image.Image) -> bytes:
        """Return the bytes of a PNG file."""
        small = image.copy()
        small.thumbnail((self.max_side, self.max_side), Image.Resampling.BICUBIC)
        out = BytesIO()
        small.save(out, "PNG")
        return out.getvalue()


def add_images(
    table: pa.Table, *, limits: ImageLimits, encode: Callable[[Image.Image], bytes]
) -> pa.Table:
    """Add `image`, `reject` and `reject_detail` to a table with a `uri` column."""
    rows: list[dict[str, Any]] = []
    for uri in table["uri"].to_pylist():
        image = load_image(uri, limits=limits)
        rows.append(
            {
                "image": None if isinstance(image, Rejected) else encode(image),
                "reject": image.reason.value if isinstance(image, Rejected) else None,
                "reject_detail": image.detail if isinstance(image, Rejected) else None,
            }
        )
    added = pa.Table.from_pylist(rows, schema=COLUMNS)
    for name in COLUMNS.names:
        table = table.append_column(COLUMNS.field(name), added[name])
    return table
