# SPDX-License-Identifier: Apache-2.0
"""CLIPScore with open_clip: how well a text fits an image.

Source:
    Hessel et al., "CLIPScore", EMNLP 2021: 2.5 * max(cos(image, text), 0), the text with the prefix
    "A photo depicts". Ours differs: a caption is scored sentence by sentence, because CLIP reads
    77 tokens and detailed captions have several times that many.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np
import open_clip
import torch

from sg4v_ray.core.errors import WeightsError
from sg4v_ray.inference.clip_config import ClipConfig
from sg4v_ray.inference.engine import Pixels

_WEIGHT: Final = 2.5
_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+|\n+")
_PREFIX: Final = "A photo depicts "


class Clip:
    """A CLIP model in this process."""

    def __init__(self, config: ClipConfig, *, threads: int) -> None:
        config.check()
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            model = open_clip.create_model(config.model, pretrained=config.weights)
        except RuntimeError as error:  # torch's load_state_dict
            raise WeightsError(
                f"{config.weights} are no weights of {config.model}: {error}"
            ) from error
        self._model = model.eval().to(self._device)
        self._tokenize = open_clip.get_tokenizer(config.model)
        self._mean = torch.tensor(self._model.visual.image_mean).view(3, 1, 1)
        self._std = torch.tensor(self._model.visual.image_std).view(3, 1, 1)

    def pieces(self, text: str) -> list[str]:
        """Split a text into its sentences, and those that CLIP would cut off into halves."""
        sentences = (one.strip() for one in _SENTENCE_END.split(text))
        return [part for one in sentences if one for part in self._halves(one)] or [text]

    def _halves(self, text: str) -> Iterator[str]:
        words = text.split()
        # The context also holds a begin and an end token.
        room = self._tokenize.context_length - 2
        if len(self._tokenize.encode(_PREFIX + text)) <= room or len(words) < 2:
            yield text
            return
        middle = len(words) // 2
        yield from self._halves(" ".join(words[:middle]))
        yield from self._halves(" ".join(words[middle:]))

    @torch.inference_mode()
    def score(self, images: Sequence[Pixels], texts: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the CLIPScore of each text with its image, 0 to 2.5.

        Args:
            images: (S, S, 3) uint8 squares.
            texts: the sentences about each image.
        """
        stacked = torch.stack([torch.from_numpy(np.array(one)).permute(2, 0, 1) for one in images])
        pixels_B3SS = ((stacked.float() / 255 - self._mean) / self._std).to(self._device)
        image_BD = self._model.encode_image(pixels_B3SS, normalize=True)
        flat = [_PREFIX + text for group in texts for text in group]
        text_ND = self._model.encode_text(self._tokenize(flat).to(self._device), normalize=True)
        owner_N = torch.tensor([n for n, group in enumerate(texts) for _ in group])
        cosine_N = (image_BD[owner_N] * text_ND).sum(dim=1)
        scores = (_WEIGHT * cosine_N.clamp(min=0)).tolist()
        out: list[list[float]] = [[] for _ in texts]
        for place, score in zip(owner_N.tolist(), scores, strict=True):
            out[place].append(score)
        return out
