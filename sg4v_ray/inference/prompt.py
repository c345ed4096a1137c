# SPDX-License-Identifier: Apache-2.0
"""What every engine checks alike before it takes a request, read from the model folder."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sg4v_ray.core.errors import ConfigError, EngineError
from sg4v_ray.inference.engine import Generation, Request, check_request


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRules:
    """What a model takes as a prompt."""

    image_token: int
    image_size: int
    num_image_tokens: int
    eos_token: int
    pad_token: int
    vocab_size: int
    max_len: int
    """Prompt with expanded image tokens plus new tokens."""

    @classmethod
    def read(cls, model: Path, *, max_model_len: int) -> "PromptRules":
        """Read config.json of a folder in the llava-hf layout.

        Raises:
            ConfigError: it is not there, not of LLaVA, or shorter than `max_model_len`.
        """
        file = model / "config.json"
        if not file.is_file():
            raise ConfigError(f"{model} is no model folder: it has no config.json")
        config = json.loads(file.read_text())
        if config.get("model_type") != "llava":
            raise ConfigError(f"{file} is of type {config.get('model_type')!r}, expected 'llava'")
        vision, text = config.get("vision_config", {}), config.get("text_config", {})
        # transformers leaves out what equals its own defaults; these are those of 5.19.
        positions = text.get("max_position_embeddings", 2048)
        if max_model_len > positions:
            raise ConfigError(
                f"max_model_len is {max_model_len} but {model.name} has {positions} positions; "
                f"set EngineConfig.max_model_len to at most {positions}"
            )
        side = vision.get("image_size", 336)
        return cls(
            image_token=config.get("image_token_index", 32_000),
            image_size=side,
            num_image_tokens=(side // vision.get("patch_size", 14)) ** 2,
            eos_token=_one_id(text.get("eos_token_id", 2)),
            pad_token=_one_id(text.get("pad_token_id", config.get("pad_token_id", 0))),
            vocab_size=text.get("vocab_size", 32_000),
            max_len=max_model_len,
        )

    def check(self, request: Request) -> int:
        """Return how many tokens a request may make: its own limit, or what the context leaves.

        Raises:
            ImageTokenMismatch: placeholders and images differ in number.
            EngineError: the prompt fills the context, or holds what would break its whole batch:
                no token, a token outside the vocabulary, an image of another size.
        """
        check_request(request, image_token=self.image_token)
        for image in request.images:
            if image.shape != (self.image_size, self.image_size, 3):
                raise EngineError(
                    f"an image has the shape {image.shape}, the model sees {self.image_size} x "
                    f"{self.image_size} x 3; make it with model.geometry.as_model_sees"
                )
        if not request.token_ids:
            raise EngineError("the prompt is empty; it needs at least a begin token")
        if not 0 <= min(request.token_ids) <= max(request.token_ids) < self.vocab_size:
            raise EngineError(
                f"the prompt has token ids from {min(request.token_ids)} to "
                f"{max(request.token_ids)}, the vocabulary {self.vocab_size}; tokenise with the "
                "model's own tokenizer.json"
            )
        length = len(request.token_ids) + len(request.images) * (self.num_image_tokens - 1)
        if length >= self.max_len:
            raise EngineError(
                f"the prompt has {length} tokens with its images, the context {self.max_len}; "
                "shorten it or raise EngineConfig.max_model_len"
            )
        return min(request.generation.max_tokens, self.max_len - length)

    def expand(self, token_ids: tuple[int, ...]) -> list[int]:
        """Repeat every placeholder once for each feature of its image."""
        expanded: list[int] = []
        for token in token_ids:
            expanded.extend([token] * (self.num_image_tokens if token == self.image_token else 1))
        return expanded


def refuse_beams(generation: Generation, *, kind: str) -> None:
    """Raise ConfigError when beams are asked of an engine that has none."""
    if generation.num_beams > 1 and kind != "hf":
        raise ConfigError(
            f"num_beams is {generation.num_beams}, but the engine {kind!r} has no beam search; "
            "set num_beams to 1 or use the engine 'hf'"
        )


def _one_id(value: Any) -> int:
    """Return a token id of config.json, where some are null and some are lists."""
    first = value[0] if isinstance(value, list) else value
    return int(first or 0)
