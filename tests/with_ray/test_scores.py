# SPDX-License-Identifier: Apache-2.0
"""Scoring runs the real CLIP code, on random weights of the smallest model that open_clip has."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from jobs import _steps
from sg4v_ray.captions.score import ScoreConfig
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.errors import ConfigError, WeightsError
from sg4v_ray.core.records import CaptionRow, ImageRow, ScoreRow
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.inference.clip import Clip
from sg4v_ray.inference.clip_config import ClipConfig
from sg4v_ray.recipes.line import ScoreStep
from sg4v_ray.sources import shapes
from tests.row_artifacts import finish_rows

SMALLEST = "ViT-S-32-alt"
CAPTIONS, TESTS, SCORES = Ref(name="captions"), Ref(name="tests"), Ref(name="caption-scores")
LONG = " ".join(["a red circle on a blue field beside a green tree and a house"] * 12) + "."


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clip") / "clip.safetensors"
    torch.manual_seed(0)
    save_file(open_clip.create_model(SMALLEST).state_dict(), file)
    return file


@pytest.fixture(scope="module")
def clip(weights: Path) -> Clip:
    return Clip(ClipConfig(model=SMALLEST, weights=str(weights)), threads=2)


def test_a_caption_is_scored_sentence_by_sentence_and_nothing_is_cut_off(clip: Clip) -> None:
    assert clip.pieces("A red circle. It is big!\nIs it?") == [
        "A red circle.",
        "It is big!",
        "Is it?",
    ]
    halves = clip.pieces(LONG)
    assert " ".join(halves) == LONG
    assert len(halves) > 1
    room = clip._tokenize.context_length - 2
    assert all(len(clip._tokenize.encode("A photo depicts " + one)) <= room for one in halves)


def test_the_score_is_the_published_formula(clip: Clip, weights: Path) -> None:
    image = Image.new("RGB", (224, 224), "red")
    model = open_clip.create_model(SMALLEST, pretrained=str(weights)).eval()
    preprocess = open_clip.image_transform(224, is_train=False)
    tokens = open_clip.get_tokenizer(SMALLEST)(["A photo depicts a red square."])
    with torch.inference_mode():
        left = torch.nn.functional.normalize(model.encode_image(preprocess(image)[None]), dim=-1)
        right = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
    ((found,),) = clip.score([np.asarray(image)], [["a red square."]])
    assert found == pytest.approx(2.5 * max(0.0, float(left @ right.T)), abs=1e-4)


def test_weights_of_another_model_are_an_error(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, other)
    with pytest.raises(WeightsError, match="are no weights of ViT-S-32-alt"):
        Clip(ClipConfig(model=SMALLEST, weights=str(other)), threads=1)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (ClipConfig(model="ViT-L-14-336"), "wrong. Give ViT-L-14-336-quickgelu"),
        (ClipConfig(model="ViT-S-33"), "open_clip has no model 'ViT-S-33'; did you mean ViT-"),
        (ClipConfig(), "clip.weights is '', not a .safetensors file"),
        (ClipConfig(weights="/x.safetensors"), "there are no CLIP weights at /x.safetensors"),
    ],
)
def test_a_model_that_is_not_there_is_told_before_any_work(
    config: ClipConfig, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        config.check()


def caption(key: str, uri: Path, text: str | None) -> CaptionRow:
    return CaptionRow(
        id=key,
        source="s",
        uri=str(uri),
        text=text,
        num_tokens=3,
        finish_reason="stop",
        reject=None if text else "empty_text",
        reject_detail=None,
    )


@pytest.mark.usefixtures("ray_cluster")
def test_scores_of_captions_and_hashes_of_evaluation_images(tmp_path: Path, weights: Path) -> None:
    storage = Storage(str(tmp_path / "runs"))
    pictures = []
    for number in range(4):
        pictures.append(tmp_path / f"{number}.png")
        shapes.draw(number).save(pictures[-1])
    rows = [
        caption("a", pictures[0], "A circle. It is red."),
        caption("b", pictures[1], LONG),
        caption("c", tmp_path / "gone.png", "A square."),
        caption("d", pictures[2], None),
    ]
    finish_rows(storage, CAPTIONS, CaptionRow, rows)
    tests = [ImageRow(id="t", source="s", uri=str(pictures[3]), size_bytes=1)]
    finish_rows(storage, TESTS, ImageRow, tests)
    config = ScoreConfig(
        clip=ClipConfig(model=SMALLEST, weights=str(weights)), evaluation_images=(TESTS,)
    )
    config = replace(config, budget=replace(config.budget, max_reject_rate=0.5))
    step = ScoreStep(config=config, captions=CAPTIONS, out=SCORES)
    where = Where(root=storage.root, progress=False)
    _steps.score_captions(step, where)
    scores = {row.id: row for row in read_rows(storage, SCORES, ScoreRow)}
    assert set(scores) == {"a", "b", "c", f"{TESTS}/t"}
    assert scores["a"].clip_score >= scores["a"].worst_clip_score >= 0
    assert scores["b"].clip_score is not None
    assert scores["c"].reject == "missing"
    assert scores["c"].clip_score is None
    assert scores[f"{TESTS}/t"].clip_score is None
    assert len(scores[f"{TESTS}/t"].phash) == 16
    assert not scores[f"{TESTS}/t"].is_caption
    assert find(storage, SCORES).counts["rows"] == 4
