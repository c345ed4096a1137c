# SPDX-License-Identifier: Apache-2.0
"""From an image of any size to the exact uint8 square that the model sees.

Captioning, training, evaluation and serving all call `as_model_sees`. The resize and the crop of
the saved processor are then no-ops, so the model sees equal pixels everywhere.
"""

import math
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from sg4v_ray.core.errors import ContractError

Geometry = Literal["square", "pad"]
"""`square`: shortest side to size, centre crop (stage 1). `pad`: whole image, centred on a square
of `PAD_COLOUR` (stage 2 and inference). Names as in LLaVA's `image_aspect_ratio`."""

CLIP_MEAN: Final = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD: Final = (0.26862954, 0.26130258, 0.27577711)
PAD_COLOUR: Final = (122, 116, 104)
"""`int(mean * 255)` of each channel, truncated as LLaVA does."""

_LONGEST: Final = 8_192
"""Longest side that `pad` takes as it is. Beyond it (a strip of 50 million x 1 is a legal PNG) the
work would grow with its square."""
_BAND_ROWS: Final = 256


def as_model_sees(image: Image.Image, size: int, geometry: Geometry) -> npt.NDArray[np.uint8]:
    """Return the (size, size, 3) pixels that the vision tower gets; see `squared`."""
    return np.asarray(squared(image, size, geometry))


def squared(image: Image.Image, size: int, geometry: Geometry) -> Image.Image:
    """Return the square of `size` pixels that the vision tower gets, before normalisation.

    Raises:
        ContractError: the image is not RGB.

    Source:
        haotian-liu/LLaVA, llava/mm_utils.py, expand2square, and CLIPImageProcessor with Pillow.
        `pad` is equal to it. `square` differs by a level or two in a few pixels of a thousand:
        we never make the uncropped resize, which for a long strip takes gigabytes.
    """
    if image.mode != "RGB":
        raise ContractError(
            f"expected an RGB image, got mode {image.mode}; open it with core.images.open_image"
        )
    if image.size == (size, size):
        return image
    return _padded(image, size) if geometry == "pad" else _cropped(image, size)


def _cropped(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short = min(width, height)
    # The resized sides and the crop's corner are whole numbers in the published code.
    wide, high = size * width // short, size * height // short
    left, top = (wide - size) // 2, (high - size) // 2
    # Two passes by hand, rows first, as in the published code: since version 13 Pillow takes the
    # cheaper order, which the crop can turn round, and the rounding between them is not the same.
    scale = height / high
    first, last = top * scale, (top + size) * scale
    reach = math.ceil(2 * max(scale, 1.0)) + 1  # what the bicubic filter sees beyond the crop
    above, below = max(0, math.floor(first) - reach), min(height, math.ceil(last) + reach)
    rows = image.crop((0, above, width, below)).resize(
        (size, below - above),
        Image.Resampling.BICUBIC,
        box=(left * width / wide, 0, (left + size) * width / wide, below - above),
    )
    box = (0, first - above, size, last - above)
    return rows.resize((size, size), Image.Resampling.BICUBIC, box=box)


def _padded(image: Image.Image, size: int) -> Image.Image:
    if max(image.size) > _LONGEST:
        image = image.reduce(math.ceil(max(image.size) / _LONGEST))
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    # A resize goes along the rows first, then along the columns, so rows may be done in bands:
    # the result is equal to the bit and the padded square is never in memory.
    narrow = Image.new("RGB", (size, side), PAD_COLOUR)
    if width == side:  # nothing beside the rows: they need no copy
        narrow.paste(image.resize((size, height), Image.Resampling.BICUBIC), (0, top))
        return narrow.resize((size, size), Image.Resampling.BICUBIC)
    for row in range(0, height, _BAND_ROWS):
        rows = min(_BAND_ROWS, height - row)
        band = Image.new("RGB", (side, rows), PAD_COLOUR)
        band.paste(image.crop((0, row, width, row + rows)), (left, 0))
        narrow.paste(band.resize((size, rows), Image.Resampling.BICUBIC), (0, top + row))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)
