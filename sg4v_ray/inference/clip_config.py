# SPDX-License-Identifier: Apache-2.0
"""Which CLIP model scores captions. Without torch, so that recipes can name it."""

import difflib
from dataclasses import dataclass
from pathlib import Path

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys


@identity_keys("ClipConfig", model="model", weights="weights")
@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Which CLIP model scores."""

    model: str = "ViT-L-14-336-quickgelu"
    """Architecture by open_clip's name. OpenAI's weights need the names with `-quickgelu`."""
    weights: str = ""
    """Absolute path of a safetensors file that every node sees; pickled ones are not opened."""

    def check(self) -> None:
        """Raise ConfigError if this machine has no such model or weights."""
        import open_clip

        if self.model not in open_clip.list_models():
            near = difflib.get_close_matches(self.model, open_clip.list_models(), n=3)
            raise ConfigError(
                f"open_clip has no model {self.model!r}; did you mean {' or '.join(near) or 'none'}"
            )
        if self._needs_quick_gelu():
            raise ConfigError(
                f"clip.model is {self.model!r}, for which all weights are of the activation "
                f"QuickGELU: their scores would be wrong. Give {self.model}-quickgelu"
            )
        if not self.weights.endswith(".safetensors"):
            raise ConfigError(
                f"clip.weights is {self.weights!r}, not a .safetensors file; pickled checkpoints "
                "are not opened. Convert them, and give --config.clip.weights"
            )
        if not Path(self.weights).is_file():
            raise ConfigError(f"there are no CLIP weights at {self.weights}; see --config.clip")

    def _needs_quick_gelu(self) -> bool:
        """Say whether open_clip knows weights of this model, and none with its own activation."""
        import open_clip
        from open_clip import pretrained

        tags = pretrained.list_pretrained_tags_by_model(self.model)
        known = [pretrained.get_pretrained_cfg(self.model, tag) for tag in tags]
        has_twin = f"{self.model}-quickgelu" in open_clip.list_models()
        return has_twin and bool(known) and all(one.get("quick_gelu") for one in known)

    @property
    def image_size(self) -> int:
        """Side in pixels of the square that the model sees."""
        import open_clip

        return int(open_clip.get_model_config(self.model)["vision_cfg"]["image_size"])
