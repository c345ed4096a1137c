# SPDX-License-Identifier: Apache-2.0
"""Caption a folder of images with the embedded nano captioner: the smallest real job."""

from dataclasses import replace

from sg4v_ray.core.artifact import Ref
from sg4v_ray.recipes.easy_vqa import demo
from sg4v_ray.recipes.line import IndexStep, Line
from sg4v_ray.sources.folder import Folder
from sg4v_ray.sources.index import IndexConfig


def folder() -> Line:
    """Caption any folder: --step.0.config.sources.0.path /absolute/path (index_images)."""
    line = demo()
    images = Ref(name="images")
    if line.caption is None:
        raise AssertionError("the demo captions")
    return replace(
        line,
        images=(IndexStep(config=IndexConfig(sources=(Folder(path="/images"),)), out=images),),
        questions=(),
        caption=replace(line.caption, images=images),
    )
