# SPDX-License-Identifier: Apache-2.0
"""The one seam to models: token ids and images in, tokens out, as they are made.

Batch captioning, evaluation and serving all drive this protocol. An engine keeps its accelerator
full by itself; callers only keep enough requests in flight (`Engine.capacity`).
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from sg4v_ray.core.errors import ConfigError, EngineError, ImageTokenMismatch
from sg4v_ray.core.identity import identity_keys

FinishReason = Literal["stop", "length"]
Pixels = npt.NDArray[np.uint8]
"""(S, S, 3) uint8 RGB: the exact square that the model sees, from `model.geometry`."""


@identity_keys(
    "Generation",
    max_tokens="max_tokens",
    temperature="temperature",
    top_p="top_p",
    repetition_penalty="repetition_penalty",
    num_beams="num_beams",
    seed="seed",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """How to decode. Part of an artifact's identity."""

    max_tokens: int
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    num_beams: int = 1
    """Beams above 1 exist on HFEngine only, and are not streamed."""
    seed: int = 0
    """Seeds the sampling of one request, whatever else runs in its batch."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {self.max_tokens}")
        if not 0 <= self.temperature <= 2:
            raise ConfigError(f"temperature must be between 0 and 2, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ConfigError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.num_beams < 1:
            raise ConfigError(f"num_beams must be at least 1, got {self.num_beams}")
        if not 0 <= self.seed < 2**63:  # vLLM reads -1 as no seed at all
            raise ConfigError(f"seed must be at least 0 and below 2**63, got {self.seed}")


PUBLISHED_DECODING: Final = Generation(
    max_tokens=500, temperature=1.0, repetition_penalty=1.5, num_beams=3
)
"""How the published Share-Captioner captions.

Source: ShareGPT4Omni/ShareGPT4V@b6f70e9, tools/share-cap_batch_infer.py: num_beams=3,
do_sample=True, temperature=1.0, repetition_penalty=1.5, max_length=500.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt. `token_ids` holds one image placeholder for each image, in order."""

    token_ids: tuple[int, ...]
    images: tuple[Pixels, ...]
    generation: Generation


@dataclass(frozen=True, slots=True)
class Delta:
    """The tokens made since the last delta; the last delta carries `finish_reason`."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """All tokens of a request. An end token, if the model made one, is the last."""

    token_ids: tuple[int, ...]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class EngineStats:
    """What an engine does now, and has done since it was started."""

    running: int
    """Requests that hold a row of the decoding batch."""
    waiting: int
    """Requests that wait for a row."""
    decode_steps: int
    """Forward passes of the language model that made a token, since the start."""


class Engine(Protocol):
    """Token ids and images -> tokens. All methods but `stats` are for one event loop."""

    capacity: int
    """Rows of the decoding batch; more requests than this wait inside the engine."""

    async def start(self) -> None:
        """Load the model. Returns when the first request can run.

        Raises:
            ConfigError: the model folder or an option does not fit this engine.
        """

    def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield deltas as tokens are made; closing the iterator aborts the request.

        An abort frees the request's row within two decode steps.

        Raises:
            ImageTokenMismatch: placeholders and images differ in number.
            ConfigError: an option of `Generation` that this engine does not have.
            EngineError: the engine is not running, or the prompt is longer than its context.
        """

    def stats(self) -> EngineStats:
        """Return what the engine does now."""

    async def close(self) -> None:
        """Abort what runs and free the model."""


async def complete(engine: Engine, request: Request) -> Completion:
    """Run one request to its end and return all its tokens."""
    tokens: list[int] = []
    async with aclosing(engine.generate(request)) as deltas:
        async for delta in deltas:
            tokens.extend(delta.token_ids)
            if delta.finish_reason is not None:
                return Completion(tuple(tokens), delta.finish_reason)
    raise EngineError("the engine ended a request without a finish reason; restart the engine")


def check_request(request: Request, *, image_token: int) -> None:
    """Raise ImageTokenMismatch unless the prompt has one placeholder an image."""
    slots = request.token_ids.count(image_token)
    if slots != len(request.images):
        raise ImageTokenMismatch(
            f"the prompt has {slots} image placeholders for {len(request.images)} images"
        )
