# SPDX-License-Identifier: Apache-2.0
"""Write the ids of all conversations in token_ids.json anew, and where their answers stand.

    python -m tests.golden.make_token_ids

Only when ids must change, for another template or tokenizer: models that were trained before read
other ids afterwards. Read the difference before it is committed. To add a conversation, write it
into the file without ids and run this.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from sg4v_ray.core.records import Turn
from sg4v_ray.model.conversation import IGNORE, Conversation
from sg4v_ray.recipes import embedded

FILE = Path(__file__).with_name("token_ids.json")


def folder() -> Path:
    """Return the model whose tokenizer and config.json the ids belong to."""
    return embedded.folder() / "model"


def turns_of(golden: dict[str, Any]) -> tuple[Turn, ...]:
    """Return the turns of a conversation of the file."""
    roles = ("user", "assistant")
    return tuple(Turn(role=roles[i % 2], text=text) for i, text in enumerate(golden["texts"]))


def answers_of(labels: list[int]) -> list[list[int]]:
    """Return where each answer starts and ends, its end token included."""
    spans, place = [], 0
    for is_answer, group in groupby(labels, key=lambda label: label != IGNORE):
        size = len(list(group))
        if is_answer:
            spans.append([place, place + size])
        place += size
    return spans


def with_ids(golden: dict[str, Any]) -> dict[str, Any]:
    """Return a conversation with its ids, an image being one token."""
    chat = Conversation.open(folder(), golden["template"])
    made = chat.sample(turns_of(golden), num_images=int(golden["image"] is not None))
    answers = answers_of(list(made.labels))
    return {**golden, "answers": answers, "token_ids": list(made.token_ids)}


def read() -> list[dict[str, Any]]:
    """Return the conversations of the file."""
    found: list[dict[str, Any]] = json.loads(FILE.read_text())
    return found


if __name__ == "__main__":
    lines = [json.dumps(with_ids(one)) for one in read()]
    FILE.write_text("[\n" + ",\n".join(lines) + "\n]\n")
