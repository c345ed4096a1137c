# SPDX-License-Identifier: Apache-2.0
"""Open an untrusted image: limits before work, upright RGB out, or the reason why not.

The order matters: byte limit, magic bytes, header, pixel limit, and only then the decoder.
"""

import re
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.rejects import Reject

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What we decode. Of a GIF the first frame. Anything else is `format_not_allowed`."""

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"%PDF", "PDF"),
    (b"%!PS", "EPS"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
    (b"\xff\x0a", "JPEG XL"),
)
_ORIENTATION = 0x0112
# Source: EXIF 2.3, tag 274, and the names that Pillow has for what undoes each value.
_MEMORY_OBJECT = re.compile(r" <_io\.BytesIO object at 0x[0-9a-f]+>")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STRIP_PIXELS = 1_000_000
_BOMB_PIXELS = 178_956_970
"""Where Pillow raises: twice its `Image.MAX_IMAGE_PIXELS`."""
_MAX_SCANS = 100
"""A progressive JPEG has about ten. Each is a pass over all pixels and may be of a few bytes."""
_END: dict[str, bytes] = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
# What Pillow's decoders raise on hostile or damaged input (its plugins, 9.0 to 13.0).
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@identity_keys("ImageLimits", max_bytes="max_bytes", max_pixels="max_pixels")
@dataclass(frozen=True, kw_only=True, slots=True)
class ImageLimits:
    """What is refused before any decoding."""

    max_bytes: int = 32 * 2**20
    """Encoded size. The largest SA-1B JPEG is below 2 MB."""
    max_pixels: int = 50_000_000
    """Width times height; 200 MB once decoded, for Pillow takes four bytes a pixel."""

    def __post_init__(self) -> None:
        if self.max_bytes < 1:
            raise ConfigError(f"max_bytes must be at least 1, got {self.max_bytes}")
        if not 1 <= self.max_pixels <= _BOMB_PIXELS:
            raise ConfigError(
                f"max_pixels must be 1 to {_BOMB_PIXELS}, got {self.max_pixels}: beyond it Pillow "
                "takes an image for an attack"
            )


@dataclass(frozen=True, slots=True)
class Rejected:
    """Why there is no image."""

    reason: Reject
    detail: str


def sniff(data: bytes) -> str | None:
    """Name the format of encoded bytes by their first bytes, or None if they are no image."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1"):
        return "AVIF" if data[8:11] == b"avi" else "HEIF"
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    return None


def open_image(data: bytes, limits: ImageLimits) -> Image.Image | Rejected:
    """Decode untrusted bytes to an upright RGB image.

    EXIF orientation is applied, CMYK and palettes are converted, 16-bit grey is scaled to 8 bits
    (not clipped), transparency is laid over white.
    """
    if not data:
        return Rejected(Reject.EMPTY_FILE, "0 bytes")
    if len(data) > limits.max_bytes:
        return Rejected(Reject.TOO_MANY_BYTES, f"{len(data)} bytes, limit {limits.max_bytes}")
    name = sniff(data)
    if name is None:
        return Rejected(Reject.NOT_AN_IMAGE, f"starts with the bytes {data[:8].hex(' ')}")
    if name not in FORMATS:
        return Rejected(Reject.FORMAT_NOT_ALLOWED, f"{name}; allowed: {', '.join(FORMATS)}")
    return _decode(data, name, limits)


def _decode(data: bytes, name: str, limits: ImageLimits) -> Image.Image | Rejected:
    if name == "PNG" and len(data) >= 24:  # Pillow wants pixel data before it tells the size
        width, height = struct.unpack(">II", data[16:24])
        if (refused := _too_large(width, height, limits)) is not None:
            return refused
    if name == "JPEG" and (scans := data.count(b"\xff\xda")) > _MAX_SCANS:
        return Rejected(Reject.CORRUPT, f"JPEG of {scans} scans, limit {_MAX_SCANS}")
    try:
        with Image.open(BytesIO(data), formats=[name]) as image:
            if (refused := _too_large(*image.size, limits)) is not None:
                return refused
            image.load()
            return _to_rgb(_upright(image))
    except Image.DecompressionBombError as error:
        return Rejected(Reject.TOO_MANY_PIXELS, str(error))
    except _DECODE_ERRORS as error:
        reason = Reject.TRUNCATED if _is_cut(data, name) else Reject.CORRUPT
        # Pillow names the object in memory: another text in each run.
        return Rejected(reason, f"{name}: {_MEMORY_OBJECT.sub('', str(error))}")


def _upright(image: Image.Image) -> Image.Image:
    """Turn an image as its EXIF orientation says.

    `ImageOps.exif_transpose` also writes the EXIF data anew, which strange data make fail.
    """
    turn = _TURNS.get(image.getexif().get(_ORIENTATION, 1))
    return image if turn is None else image.transpose(turn)


def _too_large(width: int, height: int, limits: ImageLimits) -> Rejected | None:
    if width * height <= limits.max_pixels:
        return None
    detail = f"{width} x {height} pixels, limit {limits.max_pixels}"
    return Rejected(Reject.TOO_MANY_PIXELS, detail)


def _is_cut(data: bytes, name: str) -> bool:
    """Say whether the end marker of a format is missing; some writers pad after it."""
    if name == "WEBP":
        return int.from_bytes(data[4:8], "little") + 8 > len(data)
    if name == "BMP":
        return int.from_bytes(data[2:6], "little") > len(data)
    return _END[name] not in data[-64:]


def _to_rgb(image: Image.Image) -> Image.Image:
    is_grey = image.mode.startswith("I")  # Pillow would clip it, transparent or not
    layers = not is_grey and (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info)
    if not layers and not is_grey:
        return image if image.mode == "RGB" else image.convert("RGB")
    # In strips: on the way each pixel takes several times what it takes in the end.
    found, rows = Image.new("RGB", image.size), max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(top + rows, image.height))
        found.paste(_over_white(image.crop(box)) if layers else _eight_bits(image.crop(box)), box)
    return found


def _over_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    grey = np.asarray(image, dtype=np.float64)
    return Image.fromarray((grey.clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
