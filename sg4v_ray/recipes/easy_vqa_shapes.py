# SPDX-License-Identifier: Apache-2.0
"""Drawn images of one shape each, made to look like the images of easy-VQA.

SYNTHETIC: every image here is drawn by this program from a seed. None is a photograph and none
is part of easy-VQA. The laptop recipe takes them as the unlabelled images that a captioner
captions, because easy-VQA itself has only 4,000 images to train on.

Colors, sizes, positions and anti-aliasing were matched to the 4,000 training images of easy-VQA
1.0; its test images were not used.
"""

import math
import random
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias, get_args

from PIL import Image, ImageDraw

Rgb: TypeAlias = tuple[int, int, int]
Shape = Literal["circle", "rectangle", "triangle"]
Color = Literal["red", "green", "blue", "black", "gray", "teal", "brown", "yellow"]

SHAPES: Final[tuple[Shape, ...]] = get_args(Shape)
COLORS: Final[dict[Color, Rgb]] = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "black": (0, 0, 0),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (165, 42, 42),
    "yellow": (255, 255, 0),
}
IMAGE_PIXELS: Final = 64
"""Width and height of an image."""

_SCALE: Final = 2  # easy-VQA draws at twice the size and shrinks; that makes its soft edges
_CANVAS: Final = IMAGE_PIXELS * _SCALE
_SIDES: Final = (_CANVAS // 8, _CANVAS // 2)
_PALE: Final = (230, 255)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One filled shape on a plain, pale background. Lengths are in canvas pixels (half pixels)."""

    shape: Shape
    color: Color
    background: Rgb
    left: int
    top: int
    width: int
    height: int
    """Equal to `width` unless the shape is a rectangle. A triangle, which is equilateral, fills
    the lower sqrt(3)/2 of it."""


def scene(seed: int) -> Scene:
    """Choose what to draw, equal for equal seeds on every platform."""
    rng = random.Random(seed)
    shape = rng.choice(SHAPES)
    width = rng.randint(*_SIDES)
    height = rng.randint(*_SIDES) if shape == "rectangle" else width
    return Scene(
        shape=shape,
        color=rng.choice(tuple(COLORS)),
        background=(rng.randint(*_PALE), rng.randint(*_PALE), rng.randint(*_PALE)),
        left=rng.randint(0, _CANVAS - width),
        top=rng.randint(0, _CANVAS - height),
        width=width,
        height=height,
    )


def render(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of 64 x 64 pixels."""
    canvas = Image.new("RGB", (_CANVAS, _CANVAS), scene.background)
    draw = ImageDraw.Draw(canvas)
    fill = COLORS[scene.color]
    right, bottom = scene.left + scene.width, scene.top + scene.height
    match scene.shape:
        case "circle":
            draw.ellipse((scene.left, scene.top, right, bottom), fill=fill)
        case "rectangle":
            draw.rectangle((scene.left, scene.top, right, bottom), fill=fill)
        case "triangle":
            tip = (scene.left + scene.width / 2, bottom - scene.width * math.sqrt(3) / 2)
            draw.polygon([(scene.left, bottom), (right, bottom), tip], fill=fill)
    return canvas.resize((IMAGE_PIXELS, IMAGE_PIXELS), Image.Resampling.BILINEAR)


def draw(seed: int) -> Image.Image:
    """Draw the image of a seed: RGB, 64 x 64 pixels."""
    return render(scene(seed))
