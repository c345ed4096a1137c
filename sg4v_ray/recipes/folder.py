# SPDX-License-Identifier: Apache-2.0
"""Caption a folder of images with the embedded nano captioner: the smallest real job."""

from sg4v_ray.core.artifact import Ref
from sg4v_ray.recipes.easy_vqa import caption_step
from sg4v_ray.recipes.embedded import CAPTIONER
from sg4v_ray.recipes.line import IndexStep, Line
from sg4v_ray.sources.folder import Folder
from sg4v_ray.sources.index import IndexConfig


def folder() -> Line:
    """Caption any folder: --step.0.config.sources.0.path /absolute/path (index_images)."""
    images = Ref(name="images")
    return Line(
        images=(IndexStep(config=IndexConfig(sources=(Folder(path="/images"),)), out=images),),
        caption=caption_step(images, CAPTIONER, Ref(name="captions")),
    )
