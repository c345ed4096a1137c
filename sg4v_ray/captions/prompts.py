# SPDX-License-Identifier: Apache-2.0
"""What the teacher is asked. A prompt is a named, dated constant; name and hash go with each row.

A prompt is the base, with a part for its kind of source in the middle. For a share of the images
the last sentence asks for an aesthetic judgement instead of none.

Source:
    What each part must ask for: the paper, section 3.2 and figure 8. The words are ours: the
    published ones were never released in full.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from sg4v_ray.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One wording. A change of wording is a new name."""

    name: str
    text: str

    @property
    def sha256(self) -> str:
        """Hash of the text, 16 hex digits: what was asked, whatever the name says later."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


DETAILED_2026_11: Final = Prompt(
    name="detailed-2026-11",
    text=(
        "You write captions that let a reader picture an image without seeing it. Describe the "
        "objects, their colours, sizes, number, actions and where they stand to each other, then "
        "the background. Say only what you can see for certain. Write flowing prose, no lists, "
        "and leave judgements of beauty aside."
    ),
)
"""Short base prompt, written 2026-11 to ask for what the paper's base prompt asks for (no
imaginary content, prose instead of items, little aesthetics). For small teachers."""

_ROLE: Final = (
    "You are an expert at captions that let a reader picture an image without seeing it. "
    "Write a detailed caption of this one."
)
_HONEST: Final = (
    "Mention nothing that you cannot tell from the image with confidence; leave out what is "
    "unclear rather than guess. Where you know for certain what a thing, a place or a work is "
    "called, call it by that name. Write connected prose, never a list."
)
_PLAIN: Final = "Keep remarks about beauty and mood to a minimum."
_AESTHETIC: Final = (
    "Then judge it as a picture: its composition, its colours and light, and the feeling that they "
    "give, each with what in the image causes it."
)


def _of(kind: str, part: str) -> Prompt:
    text = " ".join(piece for piece in (_ROLE, part, _HONEST, _PLAIN) if piece)
    return Prompt(name=f"{kind}-2026-11", text=text)


BASE_2026_11: Final = _of("base", "")
"""Written 2026-11. Must ask for: a detailed caption, nothing imagined, prose and no list, little
aesthetics (paper, section 3.2). What a refused image is asked a second time."""

OBJECTS_2026_11: Final = _of(
    "objects",
    "Name the kinds and colours of the objects, how many there are of each, what they are doing, "
    "and exactly where they are. Quote any text. Check twice where things stand relative to each "
    "other before you say it.",
)
"""Written 2026-11, for detection and segmentation images and the web (COCO, LCS, SAM). Must ask
for: types and colours, counts, actions, precise places, texts, relative positions checked."""

TEXT_2026_11: Final = _of(
    "text",
    "Give most attention to the text in the image: quote it as it is written, say where it stands "
    "and on what, and explain what it tells a reader.",
)
"""Written 2026-11, for text-rich images (TextCaps). Must ask for: the text and what it conveys."""

LANDMARK_2026_11: Final = _of(
    "landmark",
    "Say which landmark this is and where in the world it stands, describe what can be seen of it, "
    "and add what is known of it, such as its history, where that belongs to the picture.",
)
"""Written 2026-11, for landmarks. Must ask for: name, location, related knowledge."""

CELEBRITY_2026_11: Final = _of(
    "celebrity",
    "If the person is publicly known and you are sure who it is, give the name and, for a film "
    "or a stage, the role. Describe what the person does, wears and expresses, and the setting.",
)
"""Written 2026-11, for celebrities. Must ask for: name, role, action, expression."""

ARTWORK_2026_11: Final = _of(
    "artwork",
    "Give the title and the artist of the work if you know them, its style and genre and how it is "
    "made, then describe what it shows and what is known of its background.",
)
"""Written 2026-11, for artworks (WikiArt). Must ask for: name, style or genre, author."""

WEB_2026_11: Final = _of(
    "web",
    "Name the brands, products, people and places that are surely to be recognised, quote the "
    "text, and say what kind of picture it is: a photograph, a drawing, an advertisement, a "
    "screenshot.",
)
"""Written 2026-11, for images from the web at large. Must ask for: names, text, kind of image."""

_BY_KIND: Final = (
    BASE_2026_11,
    OBJECTS_2026_11,
    TEXT_2026_11,
    LANDMARK_2026_11,
    CELEBRITY_2026_11,
    ARTWORK_2026_11,
    WEB_2026_11,
)


def aesthetic(plain: Prompt) -> Prompt:
    """Return the variant of a prompt that asks for an aesthetic judgement.

    Raises:
        ConfigError: the prompt has none.
    """
    if not plain.text.endswith(_PLAIN):
        raise ConfigError(
            f"the prompt {plain.name!r} has no aesthetic variant; set aesthetic_rate to 0, or "
            f"choose one of {', '.join(one.name for one in _BY_KIND)}"
        )
    text = plain.text.removesuffix(_PLAIN) + _AESTHETIC
    return replace(plain, name=f"{plain.name}-aesthetic", text=text)


PROMPTS: Final[Mapping[str, Prompt]] = {
    one.name: one for one in (DETAILED_2026_11, *_BY_KIND, *map(aesthetic, _BY_KIND))
}


def prompt(name: str) -> Prompt:
    """Return a prompt by name.

    Raises:
        ConfigError: there is no such prompt.
    """
    if name not in PROMPTS:
        raise ConfigError(f"no teacher prompt {name!r}; there are {', '.join(PROMPTS)}")
    return PROMPTS[name]
