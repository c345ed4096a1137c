# SPDX-License-Identifier: Apache-2.0
"""The training loop in this process, with DeepSpeed but without Ray: what a step is, what is saved.

`whole` is the run that nothing happened to.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sg4v_ray.core import errors
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import TooManyRejects
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.storage import Storage
from sg4v_ray.model.weights import create
from sg4v_ray.training import checkpoint, metrics
from sg4v_ray.training.checkpoint import CheckpointsDamaged
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.job import Job
from sg4v_ray.training.launch import read_outcome
from sg4v_ray.training.lengths import TOKENIZER
from sg4v_ray.training.loop import Loop, train
from sg4v_ray.training.metrics import Metrics
from sg4v_ray.training.progress import Progress
from sg4v_ray.training.signals import Word
from sg4v_ray.training.worker import make_loop, prepare, work
from tests.with_ray.training_site import DATASET, STAGE, TINY, Site, make_site

pytestmark = pytest.mark.training

SHORT = replace(STAGE, epochs=1.5)  # 12 steps
STEPS = 12


class Stopped(Exception):
    """A test ends a run."""


@dataclass
class Listener:
    """A monitor that hears every step, stops a run, or announces the end of a machine."""

    stop_at: int | None = None
    save_at: frozenset[int] | set[int] = frozenset()
    heard: list[Metrics] = field(default_factory=list)
    words: list[Word] = field(default_factory=list)
    """What is asked before each step."""

    def report(self, metrics: Metrics) -> None:
        self.heard.append(metrics)
        if metrics.step == self.stop_at:
            raise Stopped

    def should_save(self) -> bool:
        return self.heard[-1].step in self.save_at

    def asked(self) -> Word:
        return self.words.pop(0) if self.words else Word.NOTHING


@dataclass
class Run:
    """Runs of one artifact, one after the other, as restarts are."""

    site: Site
    name: str

    @property
    def home(self) -> Storage:
        return self.site.storage.sub(Ref(name=self.name).path)

    def job(self, stage: StageConfig) -> Job:
        self.home.put(TOKENIZER, self.site.tokenizer.read_bytes())
        return Job(
            stage=stage,
            model=TINY,
            start=3,
            dataset=DATASET,
            root=str(self.site.root),
            out=Ref(name=self.name),
            threads=1,
            step_deadline_s=300.0,
            gpu=False,
            progress=False,
            held_out=DATASET if stage.held_out_every_steps else None,
        )

    def loop(self, stage: StageConfig, listener: Listener) -> Loop:
        job = self.job(stage)
        folder = self.site.root.parent / "models" / self.name
        folder.mkdir(parents=True, exist_ok=True)
        self.model = prepare(job, self.home, folder)
        return make_loop(job, self.home, folder, self.model, listener)

    def train(self, stage: StageConfig = SHORT, listener: Listener | None = None) -> Progress:
        made = self.loop(stage, listener or Listener())
        try:
            return train(made)
        except Stopped:
            made.checkpoints.finish()  # what was begun would be complete a moment later
            raise

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints."""
        paths = [one for one in self.home.list(checkpoint.FOLDER) if one.endswith("complete.json")]
        return [int(path.split("/")[1].split("-")[0]) for path in paths]


@pytest.fixture(scope="module")
def site(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, process_group: None
) -> Iterator[Site]:
    """A root to train in, by this process alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        patch.setattr(metrics, "REPORT_EVERY_S", 0.0)
        # ZeRO-3 puts its own in this place for the rest of the process, which keeps more tensors.
        patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as one worker of one CPU
        yield make_site(tmp_path_factory.mktemp("loop"), tiny_model / "tokenizer.json")
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(site: Site) -> Run:
    run = Run(site, "whole")
    run.progress = run.train()
    return run


@pytest.fixture
def run(site: Site, request: pytest.FixtureRequest) -> Run:
    return Run(site, f"run{abs(hash(request.node.name))}")


# --- what a step is -----------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_accumulation_does_not_change_what_is_learnt(
    whole: Run, run: Run, micro_batch: int
) -> None:
    progress = run.train(replace(SHORT, micro_batch=micro_batch))
    assert progress.losses == pytest.approx(whole.progress.losses, rel=1e-5)
    assert progress.grad_norms == pytest.approx(whole.progress.grad_norms, rel=1e-4)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_sharding_does_not_change_what_is_learnt(whole: Run, run: Run, zero_stage: int) -> None:
    progress = run.train(replace(SHORT, zero_stage=zero_stage))
    assert progress.losses == pytest.approx(whole.progress.losses, rel=1e-5)
    assert progress.grad_norms == pytest.approx(whole.progress.grad_norms, rel=1e-4)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_bfloat16_learns_nearly_the_same(whole: Run, run: Run, zero_stage: int) -> None:
    half = replace(SHORT, dtype="bfloat16", zero_stage=zero_stage)
    progress = run.train(half)
    assert progress.losses == pytest.approx(whole.progress.losses, rel=0.03)


def test_gradient_checkpointing_does_not_change_what_is_learnt(whole: Run, run: Run) -> None:
    progress = run.train(replace(SHORT, gradient_checkpointing=True))
    assert progress.losses == pytest.approx(whole.progress.losses, rel=1e-5)


def test_a_loss_is_that_of_transformers_over_the_labelled_tokens_of_the_global_batch(
    whole: Run, run: Run
) -> None:
    batches = next(run.loop(replace(SHORT, micro_batch=2), Listener()).batches.steps(0))
    model, total, labels = create(TINY, seed=3), 0.0, 0
    for one in batches:
        if one.counts["labels"]:
            loss = model(
                input_ids=one.input_ids_BT,
                attention_mask=one.attention_mask_BT,
                pixel_values=one.pixels_N3SS,
                labels=one.labels_BT,
            ).loss
            total += float(loss.detach()) * one.counts["labels"]
            labels += one.counts["labels"]
    assert whole.progress.losses[0] == pytest.approx(total / labels, rel=1e-5)


def test_metrics_name_step_epoch_rate_and_time_left(run: Run) -> None:
    listener = Listener()
    run.train(SHORT, listener)
    assert [one.step for one in listener.heard] == list(range(1, STEPS + 1))
    last = listener.heard[-1]
    assert (last.total_steps, last.epoch, last.eta_s, last.rejected) == (STEPS, 1.5, 0.0, 2)
    assert last.samples_per_s > 0 and last.tokens_per_s > last.samples_per_s
    assert 0 < last.padding_share < 0.5 and 0 < last.memory_gb < 24
    assert 0 <= last.data_wait_share < 1
    assert last.mfu is None, "nobody knows what this CPU can do"
    assert listener.heard[0].learning_rate == 0.0 < listener.heard[1].learning_rate


@pytest.mark.parametrize("zero_stage", [2, 3])
def test_the_loss_of_samples_that_are_not_trained_on_is_looked_at_and_changes_nothing(
    whole: Run, run: Run, zero_stage: int
) -> None:
    listener = Listener()
    progress = run.train(replace(SHORT, held_out_every_steps=4, zero_stage=zero_stage), listener)
    assert progress.losses == pytest.approx(whole.progress.losses, rel=1e-5)
    assert [one.step for one in progress.held_out] == [4, 8, 12]
    seen = [one.loss for one in progress.held_out]
    assert seen == sorted(seen, reverse=True) and seen[-1] < progress.losses[0]
    assert listener.heard[-1].held_out_loss == seen[-1]


def test_the_checkpoint_with_the_least_held_out_loss_is_kept(run: Run) -> None:
    stage = replace(SHORT, held_out_every_steps=3, save_every_steps=3)
    begin = checkpoint.Checkpoints.begin

    def worse_later(self: checkpoint.Checkpoints, progress: Progress) -> None:
        *_, last = progress.held_out
        worse = replace(last, loss=float(last.step))
        begin(self, replace(progress, held_out=(*progress.held_out[:-1], worse)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "begin", worse_later)
        run.train(stage)
    assert run.steps() == [3, 9, 12], "the best, and the last two"


# --- what goes wrong ----------------------------------------------------------------------------


def test_more_rejected_samples_than_the_budget_allows_end_the_run_and_the_driver_hears_of_it(
    run: Run,
) -> None:
    strict = replace(SHORT, budget=RejectBudget(max_reject_rate=0.0))
    work(run.job(strict))  # no exception here: Ray would start the workers again
    with pytest.raises(TooManyRejects, match="1 of 92 rows"):
        read_outcome(run.home)
    assert not any(path.startswith("model/") for path in run.home.list())


# --- checkpoints --------------------------------------------------------------------------------


def test_a_stopped_run_ends_with_the_weights_of_one_that_was_not(whole: Run, run: Run) -> None:
    with pytest.raises(Stopped):
        run.train(SHORT, Listener(stop_at=7))
    assert run.steps() == [5]
    progress = run.train()
    assert progress.resumed_at == (5,)
    assert progress.losses == whole.progress.losses
    assert progress.counts == whole.progress.counts
    expected = whole.model.state_dict()
    for name, weight in run.model.state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-6)


def test_a_run_that_was_over_trains_no_further_step(whole: Run) -> None:
    again = Run(whole.site, whole.name)
    assert again.train().losses == whole.progress.losses


def test_the_last_two_checkpoints_are_kept(run: Run) -> None:
    run.train(replace(SHORT, save_every_steps=3))
    assert run.steps() == [9, 12]


def test_a_machine_that_will_be_taken_away_makes_the_run_save_at_once(run: Run) -> None:
    with pytest.raises(Stopped):
        run.train(SHORT, Listener(save_at={2}, stop_at=3))
    assert run.steps() == [2]


def test_a_run_that_is_asked_to_saves_before_the_next_step_and_goes_on(run: Run) -> None:
    with pytest.raises(Stopped):
        run.train(SHORT, Listener(words=_asked(Word.SAVE, after=2), stop_at=4))
    assert run.steps() == [2]


def test_a_run_that_is_asked_to_stop_saves_and_the_next_one_goes_on_there(
    whole: Run, run: Run
) -> None:
    with pytest.raises(errors.Stopped, match=f"stopped after step 7 of {STEPS}, saved; run the"):
        run.train(SHORT, Listener(words=_asked(Word.STOP, after=7)))
    assert run.steps() == [5, 7]
    progress = run.train()
    assert progress.resumed_at == (7,)
    assert progress.losses == whole.progress.losses
    assert progress.counts == whole.progress.counts


@pytest.mark.parametrize(("after", "steps"), [(0, []), (5, [5])])
def test_what_is_saved_already_is_not_saved_again_for_a_stop(
    run: Run, after: int, steps: list[int]
) -> None:
    with pytest.raises(errors.Stopped):
        run.train(SHORT, Listener(words=_asked(Word.STOP, after=after)))
    assert run.steps() == steps


def _asked(word: Word, *, after: int) -> list[Word]:
    return [Word.NOTHING] * after + [word]


def test_an_unfinished_checkpoint_is_not_used_and_then_removed(run: Run) -> None:
    run.home.put(f"{checkpoint.FOLDER}/00000099-dead/rank-00000.safetensors", b"half")
    assert run.train().resumed_at == ()
    assert run.steps() == [10, 12]
    assert not any("dead" in path for path in run.home.list(checkpoint.FOLDER))


@pytest.mark.parametrize("damage", ["cut", "changed", "missing", "record"])
def test_a_damaged_checkpoint_is_skipped_and_named_and_the_one_before_is_used(
    whole: Run, run: Run, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run.train()
    name = checkpoint.newest(run.home).name
    file = f"{checkpoint.FOLDER}/{name}/rank-00000.safetensors"
    data = run.home.get(file)
    match damage:
        case "cut":
            run.home.put(file, data[:-1000])
        case "changed":
            run.home.put(file, data[:-1] + b"!")
        case "missing":
            run.home.delete(file)
        case "record":
            run.home.put(f"{checkpoint.FOLDER}/{name}/complete.json", b"{}")
    progress = run.train()
    assert progress.resumed_at == (10,)
    assert progress.losses == whole.progress.losses
    assert f"checkpoint {name} is skipped, the one before is used" in caplog.text
    assert len(run.steps()) == 2, "it takes no place of a sound one"


def test_when_all_checkpoints_are_damaged_nothing_is_trained_anew_in_silence(run: Run) -> None:
    run.train()
    for path in list(run.home.list(checkpoint.FOLDER)):
        if path.endswith(".safetensors"):
            run.home.put(path, b"damaged")
    with pytest.raises(CheckpointsDamaged, match=r"all 2 checkpoints .* restore one"):
        run.train()
    assert run.steps() == [10, 12], "a person may still mend them"


@pytest.mark.parametrize(
    ("dtype", "other"), [("float32", 0), ("float32", 3), ("bfloat16", 1), ("bfloat16", 3)]
)
def test_a_run_may_go_on_under_another_zero_stage(
    whole: Run, run: Run, dtype: str, other: int
) -> None:
    before, after = replace(SHORT, dtype=dtype), replace(SHORT, dtype=dtype, zero_stage=other)
    with pytest.raises(Stopped):
        run.train(before, Listener(stop_at=7))
    progress = run.train(after)
    assert progress.resumed_at == (5,)
    rel = 1e-5 if dtype == "float32" else 0.03
    assert progress.losses == pytest.approx(whole.progress.losses, rel=rel)


@pytest.mark.parametrize(
    ("dtype", "zero_stage"),
    [
        ("float32", 0),
        ("float32", 2),
        pytest.param("float32", 3, marks=pytest.mark.soak),
        ("bfloat16", 2),
        ("bfloat16", 3),
    ],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped_to_the_bit(
    run: Run, site: Site, dtype: str, zero_stage: int
) -> None:
    stage = replace(SHORT, dtype=dtype, zero_stage=zero_stage)
    undisturbed = Run(site, f"{run.name}-undisturbed")
    expected = undisturbed.train(stage)
    with pytest.raises(Stopped):
        run.train(stage, Listener(stop_at=7))
    assert run.train(stage).losses == expected.losses
    found = [state_of(one) for one in (undisturbed, run)]
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def state_of(run: Run, name: str | None = None) -> dict[str, torch.Tensor]:
    """Return weights and moments of a checkpoint, of the newest by default."""
    folder = Path(run.home.root, checkpoint.FOLDER, name or checkpoint.newest(run.home).name)
    (file,) = folder.glob("*.safetensors")
    return load_file(file)
