# SPDX-License-Identifier: Apache-2.0
"""How many parameters a model has, from its config alone."""

from dataclasses import dataclass

from sg4v_ray.model.config import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """Parameters of each part."""

    vision_tower: int
    projector: int
    language_model: int
    """With its embedding, without the head."""
    head: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.vision_tower + self.projector + self.language_model + self.head


def count_parameters(config: ModelConfig) -> Parameters:
    """Return what transformers will allocate."""
    return Parameters(
        vision_tower=_vision_tower(config),
        projector=_linear(config.vision_width, config.text_width)
        + _linear(config.text_width, config.text_width),
        language_model=_language_model(config),
        head=config.vocab_size * config.text_width,
    )


def _vision_tower(config: ModelConfig) -> int:
    width = config.vision_width
    norm = 2 * width
    patches = 3 * config.patch_size**2 * width
    positions = (config.num_image_tokens + 1) * width  # one for the class token
    attention = 4 * _linear(width, width)
    mlp = _linear(width, config.vision_mlp) + _linear(config.vision_mlp, width)
    blocks = config.vision_layers * (attention + mlp + 2 * norm)
    return width + patches + positions + blocks + 2 * norm


def _language_model(config: ModelConfig) -> int:
    width = config.text_width
    keys = width // config.text_heads * config.text_kv_heads
    attention = 2 * width * width + 2 * width * keys
    mlp = 3 * width * config.text_mlp
    blocks = config.text_layers * (attention + mlp + 2 * width)
    return config.vocab_size * width + blocks + width


def _linear(inputs: int, outputs: int) -> int:
    """Weights and biases."""
    return inputs * outputs + outputs
