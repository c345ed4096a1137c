# SPDX-License-Identifier: Apache-2.0
"""Label masks of a thousand odd conversations, against a slow reference that never masks.

The reference asks for each answer where the prompt before it ends and where the conversation up
to it ends; what lies between is the answer. The product masks by character offsets instead.
"""

import random
from pathlib import Path

import pytest

from sg4v_ray.core.records import Turn
from sg4v_ray.model.conversation import IGNORE, Conversation, TemplateName
from tests.unit.tokenizer_kinds import KINDS, make

pytestmark = pytest.mark.training

PIECES = (
    *("a red circle", "What is it?", "left", " ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u3000"),
    *("</s>", "<s>", "<image>", "<pad>", "<unk>", "USER:", "ASSISTANT:", " ASSISTANT: ", "###"),
    *("\U0001f600", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "e\u0301", "\u4e2d\u6587"),
    *("\u202e", "\x00", "7,000.5", ""),
)  # fmt: skip
NUM_CONVERSATIONS = 1000


def conversations() -> list[tuple[tuple[Turn, ...], int]]:
    """Return turns and numbers of images, always the same."""
    draw = random.Random(7)

    def text() -> str:
        return "".join(draw.choices(PIECES, k=draw.randrange(0, 7)))

    made = []
    for _ in range(NUM_CONVERSATIONS):
        rounds = draw.choice((1, 1, 2, 3, 5))
        roles = ("user", "assistant") * rounds
        made.append((tuple(Turn(role=role, text=text()) for role in roles), draw.randrange(3)))
    return made


def slow_labels(chat: Conversation, turns: tuple[Turn, ...], num_images: int) -> list[int]:
    """Return the labels by encoding the conversation anew up to and after each answer."""
    labels: list[int] = []
    for end in range(2, len(turns) + 1, 2):
        prompt = chat.prompt(turns[: end - 1], num_images=num_images).token_ids
        whole = chat.sample(turns[:end], num_images=num_images).token_ids
        assert whole[: len(prompt)] == prompt, "an answer changes no token before it"
        labels += [IGNORE] * (len(prompt) - len(labels)) + list(whole[len(prompt) :])
    return labels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["vicuna_v1", "llava_v1"])
def test_the_mask_is_that_of_the_slow_reference_and_no_sample_is_dropped(
    tmp_path: Path, kind: str, template: TemplateName
) -> None:
    make(kind).save(str(tmp_path / "tokenizer.json"))
    chat = Conversation.open(tmp_path, template)
    learnt = 0
    for turns, num_images in conversations():
        encoded = chat.sample(turns, num_images=num_images)
        assert list(encoded.labels) == slow_labels(chat, turns, num_images)
        assert encoded.labels.count(chat.eos_token_id) == len(turns) // 2
        assert encoded.token_ids.count(chat.image_token_id) == num_images, "typed ones are text"
        learnt += any(label != IGNORE for label in encoded.labels)
    assert learnt == NUM_CONVERSATIONS
