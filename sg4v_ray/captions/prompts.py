# SPDX-License-Identifier: Apache-2.0
"""What the teacher is asked. A prompt is a named, dated constant; its name is stored with rows."""

from dataclasses import dataclass

from sg4v_ray.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One wording. A change of wording is a new name."""

    name: str
    text: str


DETAILED_2026_11 = Prompt(
    name="detailed-2026-11",
    text=(
        "You write captions that let a reader picture an image without seeing it. Describe the "
        "objects, their colours, sizes, number, actions and where they stand to each other, then "
        "the background. Say only what you can see for certain. Write flowing prose, no lists, "
        "and leave judgements of beauty aside."
    ),
)
"""Base prompt, written 2026-11 to ask for what the paper's base prompt asks for (section 3.2:
no imaginary content, prose instead of items, little aesthetics), in our own words."""

PROMPTS = {one.name: one for one in (DETAILED_2026_11,)}


def prompt(name: str) -> Prompt:
    """Return a prompt by name.

    Raises:
        ConfigError: there is no such prompt.
    """
    if name not in PROMPTS:
        raise ConfigError(f"no teacher prompt {name!r}; there are {', '.join(PROMPTS)}")
    return PROMPTS[name]
