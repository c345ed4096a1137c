# SPDX-License-Identifier: Apache-2.0
"""Configs of the work actors. This module imports neither ray nor torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.storage import Storage
from sg4v_ray.inference.engine import Generation
from sg4v_ray.model.conversation import TemplateName

MODEL_FOLDER: Final = "model"


@dataclass(frozen=True, kw_only=True, slots=True)
class Batching:
    """Sizes of the units of work. They change no row, so they are not identity."""

    rows_per_part: int = 512
    """Rows that are committed together. Fixed by the first run of an attempt; larger where an index
    would have more than 50,000 parts. A kill loses the parts in flight."""
    rows_per_task: int = 16
    """Rows of one decode task at most; half of the engine's capacity if that is less."""

    def __post_init__(self) -> None:
        for name in ("rows_per_part", "rows_per_task"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSource:
    """The location of a model artifact, and of copies of it on nodes."""

    root: str
    ref: Ref
    cache: str = "~/.cache/sg4v-models"
    """Folder on the local disk of a node; unused if the root is local."""

    def localise(self) -> Path:
        """Return the model folder on this node, its checksums verified."""
        storage = Storage(self.root)
        manifest = find(storage, self.ref)
        cache = Path(self.cache)
        path = f"{self.ref.path}/{MODEL_FOLDER}"
        return storage.localise(path, cache=cache, digests=manifest.digests)


@identity_keys(
    "GenerateConfig",
    template="template",
    generation="generation",
    instruction="instruction",
    cut_off="cut_off",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """The question about every image and the decoding of its answer. Part of identity."""

    template: TemplateName
    generation: Generation
    instruction: str | None
    """The same question for every row, or None for each row's own `text` column."""
    cut_off: Literal["reject", "keep"]
    """Treatment of an answer that hit `max_tokens` or is empty. Evaluation keeps it: a wrong
    answer is a result."""
