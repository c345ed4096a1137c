# SPDX-License-Identifier: Apache-2.0
"""Training and serving make the same token ids: both are held against one golden file.

`python -m tests.golden.make_token_ids` writes it; its images are one token, before they are
expanded.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from serve.config import Limits
from serve.deployment import ModelDeployment
from serve.protocol import parse
from serve.request import ChatModel, to_request
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.records import Sample, schema, to_table
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.inference.prompt import PromptRules
from sg4v_ray.model.conversation import Conversation, TemplateName
from sg4v_ray.model.pixels import PixelMaker
from sg4v_ray.training.batch import RowRules, Rows, collate
from sg4v_ray.training.samples import Samples
from tests.golden.make_token_ids import answers_of, folder, read, turns_of
from tests.unit.test_serve_protocol import image, png, text, uri

pytestmark = pytest.mark.training

GOLDEN = {one["name"]: one for one in read()}
SERVED = [name for name, one in GOLDEN.items() if one["template"] != "plain"]
"""A `plain` model has no place for a question; the server refuses to start with it."""
LENGTH = 512
RULES = PromptRules.read(folder(), max_model_len=LENGTH)


@cache
def _chat(template: TemplateName) -> Conversation:
    return Conversation.open(folder(), template)


@cache
def _pixels() -> PixelMaker:
    return PixelMaker.open(folder())


@cache
def _served_model(template: TemplateName) -> ChatModel:
    deployment = ModelDeployment(
        id="chat",
        artifact=Ref(name="vlm"),
        root="/nowhere",
        template=template,
        geometry="pad",
        engine=EngineConfig(kind="fake", max_model_len=LENGTH),
        generation=Generation(max_tokens=8),
    )
    return ChatModel.open(deployment, folder())


def _trained(golden: dict[str, Any], scratch: Path) -> tuple[list[int], list[list[int]]]:
    """Return the ids and answers of the row that training makes of a dataset's sample."""
    picture, file = scratch / "picture.png", scratch / "samples.arrow"
    Image.new("RGB", (30, 20), "teal").save(picture)
    uri = str(picture) if golden["image"] else None
    sample = Sample(id="a", source="test", uri=uri, turns=turns_of(golden))
    with pa.ipc.new_file(str(file), schema(Sample)) as writer:
        writer.write_table(to_table(Sample, [sample]))
    rules = RowRules(
        geometry="pad",
        image_size=RULES.image_size,
        num_image_tokens=1,
        max_length=LENGTH,
        image_limits=ImageLimits(),
    )
    rows = Rows(Samples(file), _chat(golden["template"]), rules)
    made = collate([rows(0)], _pixels(), filler=rows.filler, pad=rows.pad_token_id)
    size = int(made.attention_mask_BT[0].sum())
    ids, labels = made.input_ids_BT[0, :size].tolist(), made.labels_BT[0, :size].tolist()
    assert all(label in (token, -100) for label, token in zip(labels, ids, strict=True))
    return ids, answers_of(labels)


def _served(golden: dict[str, Any], rounds: int) -> list[int]:
    """Return the ids that an engine gets when the same is asked over HTTP."""
    messages: list[dict[str, Any]] = []
    for turn in turns_of(golden)[: 2 * rounds - 1]:
        parts = [text(turn.text)]
        if golden["image"] and not messages:
            parts.insert(0 if golden["image"] == "first" else 1, image(uri(png())))
        messages.append({"role": turn.role, "content": parts})
    body = parse(json.dumps({"model": "chat", "messages": messages}).encode())
    job = to_request(body, model=_served_model(golden["template"]), limits=Limits())
    assert len(job.request.images) == job.request.token_ids.count(RULES.image_token)
    return list(job.request.token_ids)


@pytest.mark.parametrize("name", GOLDEN)
def test_training_reads_the_ids_and_answers_of_the_golden_file(name: str, tmp_path: Path) -> None:
    golden = GOLDEN[name]
    assert _trained(golden, tmp_path) == (golden["token_ids"], golden["answers"])


@pytest.mark.parametrize("name", SERVED)
def test_serving_asks_with_the_ids_that_stand_before_each_answer(name: str) -> None:
    golden = GOLDEN[name]
    assert len(golden["answers"]) == len(golden["texts"]) // 2
    for rounds, (start, _) in enumerate(golden["answers"], start=1):
        assert _served(golden, rounds) == golden["token_ids"][:start]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_golden_ids_are_the_texts_of_the_file(name: str) -> None:
    golden = GOLDEN[name]
    chat = _chat(golden["template"])
    ids = golden["token_ids"]
    for (start, end), answer in zip(golden["answers"], golden["texts"][1::2], strict=True):
        assert chat.decode(ids[start:end]) == answer.strip()
    specials = (chat.bos_token_id, chat.image_token_id, chat.eos_token_id)
    ends = 0 if golden["template"] == "plain" else len(golden["answers"])
    assert [ids.count(one) for one in specials] == [1, int(golden["image"] is not None), ends]
