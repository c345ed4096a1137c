# SPDX-License-Identifier: Apache-2.0
"""What is learnt does not depend on how: by plain torch, by any number of workers, in any order
of stops. Processes are started by `tests.with_ray.ranks`.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from sg4v_ray.model.config import nano
from sg4v_ray.model.conversation import IGNORE, Conversation
from sg4v_ray.model.freeze import ALIGN, freeze
from sg4v_ray.model.pixels import PixelMaker
from sg4v_ray.model.processor import save_processor
from sg4v_ray.model.weights import create
from sg4v_ray.training.batch import RowRules, Rows, collate
from sg4v_ray.training.deepspeed import groups
from sg4v_ray.training.job import make_plan
from sg4v_ray.training.plan import unknown_lengths
from sg4v_ray.training.samples import open_samples
from sg4v_ray.training.schedule import Schedule
from tests.with_ray.ranks import Phase, run_phase
from tests.with_ray.training_site import STAGE, TINY, Site, make_site

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"
NANO = replace(nano(400), max_positions=256)
STAGE_20 = replace(STAGE, epochs=1.0, max_steps=20, learning_rate=1e-3)

pytestmark = [pytest.mark.training, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Site:
    made = make_site(tmp_path_factory.mktemp("numbers"), tiny_model / "tokenizer.json")
    return replace(made, model=NANO)


def plain_losses(site: Site, folder: Path) -> list[float]:
    """Train as a textbook does: one process, one batch, torch's AdamW; no line of the loop."""
    save_processor(
        folder,
        config=NANO,
        tokenizer_file=site.tokenizer,
        chat_template="",
        geometry=STAGE.geometry,
    )
    rules = RowRules(
        geometry=STAGE.geometry,
        image_size=NANO.image_size,
        num_image_tokens=NANO.num_image_tokens,
        max_length=STAGE.max_length,
        image_limits=STAGE.image_limits,
    )
    samples = open_samples(site.storage, site.dataset)
    rows = Rows(samples, Conversation.open(folder, STAGE.template), rules)
    plan = make_plan(STAGE_20, unknown_lengths(len(samples)), image_row=0)
    model = create(NANO, seed=3).train()
    freeze(model, STAGE.trainable)
    optimizer = torch.optim.AdamW(
        groups(model.named_parameters(), weight_decay=STAGE.weight_decay),
        betas=STAGE.betas,
        eps=STAGE.epsilon,
    )
    schedule = Schedule(
        peak=STAGE_20.learning_rate, warmup_ratio=STAGE.warmup_ratio, total_steps=plan.total_steps
    )
    losses = []
    for step in range(plan.total_steps):
        numbers = [one for rows_of in plan.micro_batches(step) for one in rows_of]
        batch = collate(
            [rows(one) for one in numbers],
            PixelMaker.open(folder),
            filler=rows.filler,
            pad=rows.pad_token_id,
        )
        logits = model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            pixel_values=batch.pixels_N3SS,
        ).logits
        loss = functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.labels_BT[:, 1:].flatten(), ignore_index=IGNORE
        )
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(
            [one for one in model.parameters() if one.requires_grad], STAGE.clip_norm
        )
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_plain_torch_learns_what_the_golden_file_says(site: Site, tmp_path: Path) -> None:
    golden = json.loads(GOLDEN.read_text())
    assert plain_losses(site, tmp_path) == pytest.approx(golden, rel=1e-4)
    assert golden[-1] < 0.5 * golden[0]


@pytest.mark.parametrize("zero_stage", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_two_sharded_workers_learn_the_same(site: Site, zero_stage: int) -> None:
    stage = replace(STAGE_20, zero_stage=zero_stage, micro_batch=2)
    made = run_phase(Phase(site, f"zero-{zero_stage}", stage, 2, None))
    assert made.losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-4)


@pytest.mark.soak
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_run_may_go_on_with_other_numbers_of_workers(site: Site, zero_stage: int) -> None:
    stage = replace(STAGE_20, zero_stage=zero_stage)
    name = f"changing-{zero_stage}"
    for world_size, stop_at in ((2, 7), (1, 13), (2, None)):
        made = run_phase(Phase(site, name, stage, world_size, stop_at))
    assert made.resumed_at == (7, 13)
    assert made.losses == pytest.approx(json.loads(GOLDEN.read_text()), rel=1e-3)


@pytest.mark.soak
def test_a_step_that_takes_too_long_ends_its_process_and_says_where_it_stood(site: Site) -> None:
    with pytest.raises(AssertionError, match=r"(?s)Timeout.*training/loop\.py"):
        run_phase(Phase(site, "slow", STAGE_20, 1, None, step_deadline_s=0.01))


@pytest.mark.soak
def test_a_projector_alone_is_saved_whole_though_each_worker_holds_whole_parameters(
    site: Site,
) -> None:
    stage = replace(STAGE_20, zero_stage=1, trainable=ALIGN, max_steps=6)
    tiny = replace(site, model=TINY)
    for world_size, stop_at in ((2, 3), (1, None)):
        made = run_phase(Phase(tiny, "projector", stage, world_size, stop_at))
    assert made.resumed_at == (3,)


@pytest.mark.soak
def test_text_and_images_in_every_arrangement_over_two_ranks_end_without_a_hang(
    tmp_path: Path, tiny_model: Path
) -> None:
    site = make_site(tmp_path, tiny_model / "tokenizer.json", text_every=2)
    stage = replace(
        STAGE, global_batch=2, micro_batch=1, zero_stage=3, max_steps=200, learning_rate=1e-3
    )
    alone = run_phase(Phase(site, "alone", stage, 1, None))
    both = run_phase(Phase(site, "both", stage, 2, None))
    assert len(both.losses) == 200
    said = "".join(one.read_text() for one in tmp_path.glob("*.stderr"))
    assert "FutureWarning" not in said, "two lines a step would fill the logs"
    assert both.losses == pytest.approx(alone.losses, rel=1e-3)
    samples = open_samples(site.storage, site.dataset)
    plan = make_plan(stage, unknown_lengths(len(samples)), image_row=0)
    kinds = {
        tuple(
            samples[plan.share(step, rank=rank, world_size=2)[0][0]].uri is None for rank in (0, 1)
        )
        for step in range(200)
    }
    assert len(kinds) == 4, "every arrangement occurred"
