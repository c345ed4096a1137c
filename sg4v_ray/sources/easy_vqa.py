# SPDX-License-Identifier: Apache-2.0
"""easy-VQA 1.0 (Victor Zhou, MIT): real public images and questions that come as a package.

4,000 train and 1,000 test images of 64 x 64 pixels, 38,575 and 9,673 questions, 13 answers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import easy_vqa

from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.records import ImageRow, Question
from sg4v_ray.core.storage import Storage

Split = Literal["train", "test"]


def _image_id(split: Split, number: int) -> str:
    return f"{split}-{number:05d}"


@identity_keys("EasyVqaImages", split="split", name="name")
@dataclass(frozen=True, kw_only=True, slots=True)
class EasyVqaImages:
    """The images of one split, copied below the artifact so that every node can read them."""

    split: Split
    name: str

    def rows(self, files: Storage) -> Iterator[ImageRow]:
        """Yield a row an image, in the package's numbering."""
        by_split = {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}
        paths: dict[int, str] = by_split[self.split]()
        for number in sorted(paths):
            data = Path(paths[number]).read_bytes()
            files.put(f"{number}.png", data)
            yield ImageRow(
                id=_image_id(self.split, number),
                source=self.name,
                uri=files.uri(f"{number}.png"),
                size_bytes=len(data),
            )


@identity_keys("EasyVqaQuestions", split="split", name="name")
@dataclass(frozen=True, kw_only=True, slots=True)
class EasyVqaQuestions:
    """The questions of one split."""

    split: Split
    name: str = "easy-vqa"

    def rows(self, uris: Mapping[str, str]) -> Iterator[Question]:
        """Yield the questions in the package's order.

        Args:
            uris: where each image of the index lies, by image id.

        Raises:
            ContractError: the index lacks an image that a question is about.
        """
        by_split = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}
        texts, answers, numbers = by_split[self.split]()
        for place, (text, answer, number) in enumerate(zip(texts, answers, numbers, strict=True)):
            image_id = _image_id(self.split, number)
            if image_id not in uris:
                raise ContractError(
                    f"question {place} is about {image_id}, which the index does not have; "
                    f"index the {self.split} images too"
                )
            yield Question(
                id=f"{self.split}-q{place:06d}",
                image_id=image_id,
                uri=uris[image_id],
                text=text,
                answers=(answer,),
            )
