# SPDX-License-Identifier: Apache-2.0
"""A captioning config that cannot run is refused before anything is read or started."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sg4v_ray.captions import bulk
from sg4v_ray.captions.bulk import BulkConfig
from sg4v_ray.captions.quality import QualityConfig
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ArtifactMissing, ConfigError
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.stage import Stage
from sg4v_ray.inference.engine import PUBLISHED_DECODING
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.recipes.catalogue import RECIPES


def stage(config: BulkConfig, engine: EngineConfig, root: Path) -> Stage:
    return bulk.stage_of(
        config,
        engine=engine,
        images=Ref(name="images"),
        captioner=Ref(name="captioner"),
        out=Ref(name="captions"),
        where=Where(root=str(root)),
    )


def config() -> BulkConfig:
    step = RECIPES["demo"]().caption
    assert step is not None
    return step.config


def published() -> BulkConfig:
    return replace(config(), generate=replace(config().generate, generation=PUBLISHED_DECODING))


@pytest.mark.parametrize("kind", ["vllm", "fake"])
def test_the_published_beams_are_refused_where_there_are_none(kind: Any, tmp_path: Path) -> None:
    engine = EngineConfig(kind=kind)
    with pytest.raises(ConfigError, match=f"num_beams is 3, but the engine '{kind}' has no beam"):
        stage(published(), engine, tmp_path)


def test_the_published_beams_run_on_the_reference_engine(tmp_path: Path) -> None:
    with pytest.raises(ArtifactMissing, match="captioner@v1"):  # what is looked at next
        stage(published(), EngineConfig(kind="hf"), tmp_path)


def test_a_language_that_nobody_can_tell_is_refused(tmp_path: Path) -> None:
    unknown = replace(config(), quality=QualityConfig(language="xx"))
    with pytest.raises(ConfigError, match="language 'xx' is not one of"):
        stage(unknown, EngineConfig(kind="hf"), tmp_path)
