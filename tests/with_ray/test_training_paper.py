# SPDX-License-Identifier: Apache-2.0
"""The paper's four trainings in their order, from imported weights; only sizes are not the paper's.

Vicuna and CLIP are small and random, in their published layouts.
"""

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from jobs import _steps
from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.where import Where
from sg4v_ray.recipes import paper
from sg4v_ray.recipes.line import TrainStep
from tests.unit.weight_sources import run_import, write_clip, write_vicuna
from tests.with_ray.training_site import DATASET, make_site

pytestmark = [
    pytest.mark.training,
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.usefixtures("ray_cluster"),
]
TOWER, PROJECTOR, LANGUAGE = "vision_tower.", "multi_modal_projector.", "language_model."


def small(step: TrainStep) -> TrainStep:
    """Return a step of a size that fits here: batches, lengths, blocks and numbers."""
    trainable = step.config.trainable
    if trainable.vision_from_block is not None:  # of 24 blocks the latter half; here of 3
        trainable = replace(trainable, vision_from_block=1)
    config = replace(
        step.config,
        trainable=trainable,
        global_batch=8,
        micro_batch=2,
        max_length=200,
        max_steps=6,
        dtype="float32",
        export_dtype="float32",
        budget=replace(step.config.budget, max_reject_rate=0.1),
    )
    start = Ref(name="tiny") if step.start == paper.BASE else step.start
    return replace(step, config=config, start=start, dataset=DATASET)


def weights(root: Path, ref: Ref) -> dict[str, Tensor]:
    folder = root / ref.path / "model"
    return {
        name: one for file in folder.glob("*.safetensors") for name, one in load_file(file).items()
    }


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not before[name].equal(after[name])}


def test_the_papers_trainings_follow_one_another_and_each_changes_what_it_should(
    tmp_path: Path, tiny_model: Path
) -> None:
    site = make_site(tmp_path, tiny_model / "tokenizer.json")
    write_vicuna(tmp_path / "vicuna")
    write_clip(tmp_path / "clip")
    run_import("vicuna-clip", tmp_path / "vicuna", site.root, vision_tower=tmp_path / "clip")
    line, where = paper.sharegpt4v_line(), Where(root=str(site.root), progress=False)
    moved = {}
    for step in (line.align, line.captioner, line.pretrain, line.finetune):
        assert step is not None
        made = small(step)
        _steps.train(made, where)
        assert isinstance(made.start, Ref)
        moved[step.config.kind] = changed(
            weights(site.root, made.start), weights(site.root, made.out)
        )
    assert all(name.startswith(PROJECTOR) for name in moved["align"]) and moved["align"]
    for kind in ("captioner", "pretrain"):
        blocks = {
            name.split(".")[4] for name in moved[kind] if ".layers." in name and TOWER in name
        }
        assert blocks == {"1"}, "from the block that is asked for to the one that features are of"
        assert any(name.startswith(LANGUAGE) for name in moved[kind])
    assert not any(name.startswith(TOWER) for name in moved["finetune"])
    facts = find(site.storage, paper.VLM).metrics
    assert len(facts["losses"]) == 6
    assert (site.root / paper.VLM.path / "tensorboard").is_dir()
