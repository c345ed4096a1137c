# SPDX-License-Identifier: Apache-2.0
"""Normalisation for training and HFEngine, equal to the bit to what the saved image processor
makes inside vLLM.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sg4v_ray.core.errors import ContractError


class PixelMaker:
    """uint8 squares -> what the vision tower takes; made by `open`."""

    def __init__(self, *, size: int, mean: Tensor, std: Tensor) -> None:
        self.size = size
        self._mean = mean
        self._std = std

    @classmethod
    def open(cls, folder: Path) -> "PixelMaker":
        """Read the image processor of a model folder."""
        # Not above: a process that only decodes images would import transformers, for 5 s.
        from transformers import AutoImageProcessor

        saved = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        scale = 1.0 / saved.rescale_factor
        return cls(
            size=saved.crop_size["height"],
            mean=(torch.tensor(saved.image_mean) * scale).view(3, 1, 1),
            std=(torch.tensor(saved.image_std) * scale).view(3, 1, 1),
        )

    def __call__(self, images: Sequence[npt.NDArray[np.uint8]]) -> Tensor:
        """Return (N, 3, S, S) float32.

        Args:
            images: N times (S, S, 3), from `model.geometry.as_model_sees`.

        Raises:
            ContractError: an image has another shape.
        """
        shape = (self.size, self.size, 3)
        for image in images:
            if image.shape != shape:
                raise ContractError(
                    f"an image has the shape {image.shape}, expected {shape}; make it with "
                    "model.geometry.as_model_sees"
                )
        if not images:
            return torch.empty((0, 3, self.size, self.size))
        levels_NHWC = torch.from_numpy(np.stack(images))
        return levels_NHWC.permute(0, 3, 1, 2).to(torch.float32).sub_(self._mean).div_(self._std)
