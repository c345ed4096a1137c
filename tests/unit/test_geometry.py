# SPDX-License-Identifier: Apache-2.0
"""The square that the model sees is the published one, for every shape and at bounded cost."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from sg4v_ray.core.errors import ContractError
from sg4v_ray.model.geometry import CLIP_MEAN, PAD_COLOUR, Geometry, as_model_sees

SHAPES = [(640, 480), (480, 640), (500, 333), (301, 1200), (64, 64), (20, 31), (1500, 40), (7, 3)]


def _picture(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng(width * 10_000 + height)
    coarse = rng.integers(0, 256, (height // 5 + 2, width // 5 + 2, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def _published_pad(image: Image.Image, size: int) -> np.ndarray:
    side = max(image.size)
    square = Image.new("RGB", (side, side), PAD_COLOUR)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BICUBIC))


def _published_square(image: Image.Image, size: int) -> np.ndarray:
    width, height = image.size
    short = min(width, height)
    shape = (int(size * width / short), int(size * height / short))
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    # Rows first whatever the shape: the Pillow of the published code knew no other order.
    rows = image.resize((shape[0], height), Image.Resampling.BICUBIC)
    resized = rows.resize(shape, Image.Resampling.BICUBIC)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("size", [64, 336])
@pytest.mark.parametrize("shape", SHAPES)
def test_pad_is_equal_to_the_published_code(shape: tuple[int, int], size: int) -> None:
    image = _picture(*shape)
    assert np.array_equal(as_model_sees(image, size, "pad"), _published_pad(image, size))


@pytest.mark.parametrize("size", [64, 336])
@pytest.mark.parametrize("shape", SHAPES)
def test_square_is_within_two_levels_of_the_published_code(
    shape: tuple[int, int], size: int
) -> None:
    image = _picture(*shape)
    ours = as_model_sees(image, size, "square").astype(int)
    off = np.abs(ours - _published_square(image, size))
    assert off.max() <= 2
    assert (off > 0).mean() < 0.01


@pytest.mark.parametrize("geometry", ["square", "pad"])
def test_an_image_of_the_models_size_is_not_touched(geometry: Geometry) -> None:
    image = _picture(64, 64)
    assert np.array_equal(as_model_sees(image, 64, geometry), np.asarray(image))


def test_pad_shows_the_whole_image_between_two_bars() -> None:
    seen = as_model_sees(Image.new("RGB", (400, 100), "red"), 64, "pad")
    assert tuple(seen[0, 0]) == tuple(seen[-1, -1]) == PAD_COLOUR
    assert tuple(seen[32, 0]) == tuple(seen[32, -1]) == (255, 0, 0)


def test_square_shows_the_centre_only() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste((0, 0, 255), (100, 0, 200, 100))
    seen = as_model_sees(image, 64, "square")
    assert tuple(seen[32, 32]) == (0, 0, 255)
    assert (seen[:, 2:-2] == (0, 0, 255)).all()


def test_the_padding_is_clips_mean_truncated_as_published() -> None:
    assert PAD_COLOUR == (122, 116, 104)
    assert tuple(int(one * 255) for one in CLIP_MEAN) == PAD_COLOUR


@pytest.mark.parametrize("geometry", ["square", "pad"])
@pytest.mark.parametrize("shape", [(2_000_000, 1), (1, 2_000_000)])
def test_a_legal_but_absurd_strip_fits_in_memory(
    shape: tuple[int, int], geometry: Geometry
) -> None:
    # The padded square would have 4e12 pixels, the uncropped resize 2e11.
    assert as_model_sees(Image.new("RGB", shape), 336, geometry).shape == (336, 336, 3)


def test_a_panorama_that_is_halved_first_still_looks_the_same() -> None:
    image = _picture(9000, 700)
    off = np.abs(as_model_sees(image, 336, "pad").astype(int) - _published_pad(image, 336))
    assert off.mean() < 0.5


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_another_mode_is_an_error_not_a_wrong_array(mode: str) -> None:
    with pytest.raises(ContractError, match=f"got mode {mode}"):
        as_model_sees(Image.new(mode, (64, 64)), 64, "pad")


@pytest.mark.parametrize(
    "module",
    [
        "sg4v_ray.model.geometry",
        "sg4v_ray.model.config",
        "sg4v_ray.model.freeze",
        "sg4v_ray.model.size",
        "sg4v_ray.inference.open",
        "sg4v_ray.inference.fake",
    ],
)
def test_decode_workers_and_drivers_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
