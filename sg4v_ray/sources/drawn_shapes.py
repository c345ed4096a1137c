# SPDX-License-Identifier: Apache-2.0
"""A source of synthetic images: shapes drawn by `sources.shapes`, without questions."""

from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.records import ImageRow
from sg4v_ray.core.storage import Storage
from sg4v_ray.sources import shapes


@identity_keys("DrawnShapes", num_images="num_images", seed="seed", name="name")
@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnShapes:
    """`num_images` drawn images; equal seeds draw equal images on every machine."""

    num_images: int
    seed: int
    name: str = "drawn"

    def __post_init__(self) -> None:
        if self.num_images < 1:
            raise ConfigError(f"num_images must be at least 1, got {self.num_images}")

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Draw the images, write them as PNG below `files`, and yield a row each."""
        for number in range(self.num_images):
            out = BytesIO()
            scene = shapes.scene(self.seed * 1_000_003 + number)
            shapes.render(scene).save(out, "PNG")
            files.put(f"{number}.png", out.getvalue())
            yield ImageRow(
                id=f"{self.name}-{number:06d}",
                source=self.name,
                uri=files.uri(f"{number}.png"),
                size_bytes=out.tell(),
            )
