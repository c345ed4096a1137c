# SPDX-License-Identifier: Apache-2.0
"""Run one training stage: dataset@v + a model -> a model, on Ray Train and DeepSpeed.

A killed worker is replaced, a killed driver is followed by the next call of `run`; both go on
from the last checkpoint and end with the weights of a run that was never stopped.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find, is_finished
from sg4v_ray.core.config import content_of, load, to_plain
from sg4v_ray.core.errors import ConfigError, ContractError, Sg4vError, WorkersLost
from sg4v_ray.core.lease import hold
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where, seconds_of
from sg4v_ray.exactly_once.capacity import max_cluster_resources, wait_for_nodes
from sg4v_ray.exactly_once.config import MODEL_FOLDER, ModelSource
from sg4v_ray.model.config import ModelConfig
from sg4v_ray.training import checkpoint, signals, tracker
from sg4v_ray.training.config import PLACED, Fresh, StageConfig
from sg4v_ray.training.estimate import busy_micro_batch, busy_share
from sg4v_ray.training.groups import Groups
from sg4v_ray.training.job import BY_NAME, OUTCOME, Job, Outcome
from sg4v_ray.training.lengths import TOKENIZER, Ruler, measure
from sg4v_ray.training.progress import Progress
from sg4v_ray.training.samples import open_samples
from sg4v_ray.training.signals import Receiver

_log = logging.getLogger(__name__)
_RESIZE_EVERY_S: Final = 60.0
"""How often Ray Train looks whether there is room for more workers; its own value."""
_RAY: Final = "ray"
_MODEL_FACT: Final = "model"


def run(
    config: StageConfig,
    *,
    start: Ref | Fresh,
    dataset: Ref,
    out: Ref,
    where: Where,
    held_out: Ref | None = None,
) -> Manifest:
    """Train the model `out`; open it if it is finished, go on with it if it was begun.

    Args:
        held_out: a dataset that is not trained on, whose loss is looked at now and then.

    Raises:
        ArtifactMissing: the dataset or the model to start from is not finished.
        ArtifactDrift: `out` exists and was made from something else.
        ConfigError: the settings fit neither each other nor the cluster.
        LeaseHeld: another driver is training it.
        TrainingDiverged, TooManyRejects: training cannot go on.
        WorkersLost: workers failed more than `where.max_restarts` times.
        Stopped: a signal said so (training/signals.py).
    """
    storage = where.storage
    inputs = _inputs(storage, start, dataset)
    if held_out is not None:
        inputs |= {str(held_out): find(storage, held_out).fingerprint}
    identity = {key: one for key, one in content_of(config).items() if key not in PLACED}
    if isinstance(start, Fresh):
        identity = {"stage": identity, "model": start.model, "seed": start.seed}
    if is_finished(storage, out, config=identity, inputs=inputs):
        return find(storage, out)
    job = replace(_job(config, start, dataset, out, where), held_out=held_out)
    _check(job, where)
    home = begin(storage, out, identity, inputs=inputs)
    with Receiver().receiving() as receiver, hold(home) as lease:
        if is_finished(storage, out, config=identity, inputs=inputs):  # since the first check
            return find(storage, out)
        home.put(TOKENIZER, _tokenizer(storage, start))
        if config.length_window:
            _measure(job, home)
        began = time.monotonic()
        for old in (OUTCOME, signals.FOLDER):
            home.delete(old)
        with receiver.passing_on(signals.wishes(home, lease.number)):
            _fit(replace(job, attempt=lease.number), home, where)
        outcome = read_outcome(home)
        facts = _facts(job, outcome, seconds=time.monotonic() - began)
        manifest = commit(
            storage,
            out,
            config=identity,
            inputs=inputs,
            counts=_counts(outcome),
            digests=outcome.digests,
            metrics=facts,
            lease=lease,
        )
    for spent in (checkpoint.FOLDER, signals.FOLDER, _RAY):
        home.delete(spent)
    receiver.refuse_to_go_on(str(out))
    return manifest


def _inputs(storage: Storage, start: Ref | Fresh, dataset: Ref) -> dict[str, str]:
    inputs = {str(dataset): find(storage, dataset).fingerprint}
    if isinstance(start, Ref):
        return inputs | {str(start): find(storage, start).fingerprint}
    file = Path(start.tokenizer_file)
    if not file.is_file():
        raise ConfigError(f"no tokenizer at {file}; train or export one first")
    return inputs | {"tokenizer.json": hashlib.sha256(file.read_bytes()).hexdigest()[:16]}


def _tokenizer(storage: Storage, start: Ref | Fresh) -> bytes:
    if isinstance(start, Fresh):
        return Path(start.tokenizer_file).read_bytes()
    return storage.get(f"{start.path}/{MODEL_FOLDER}/tokenizer.json")


def _measure(job: Job, home: Storage) -> None:
    ruler = Ruler(
        root=job.root,
        dataset=job.dataset,
        home=home.root,
        template=job.stage.template,
        num_image_tokens=job.model.num_image_tokens,
        max_length=job.stage.max_length,
    )
    measure(ruler, len(open_samples(Storage(job.root), job.dataset)), show=job.progress)


def _job(config: StageConfig, start: Ref | Fresh, dataset: Ref, out: Ref, where: Where) -> Job:
    source: ModelSource | int
    if isinstance(start, Fresh):
        model, source = start.model, start.seed
    else:
        model = model_config(find(where.storage, start))
        source = ModelSource(root=where.root, ref=start)
    return Job(
        stage=config,
        model=model,
        start=source,
        dataset=dataset,
        root=where.root,
        out=out,
        threads=max(1, int(where.worker_cpus)),
        loader_processes=where.loader_processes,
        step_deadline_s=seconds_of(where.step_deadline),
        gpu=where.train_gpu,
        progress=where.progress,
        tracker=where.tracker,
    )


def model_config(manifest: Manifest) -> ModelConfig:
    """Return the shape of the model of an artifact.

    Raises:
        ContractError: the job that made it did not write it down.
    """
    found = manifest.metrics.get(_MODEL_FACT)
    if not isinstance(found, Mapping):
        raise ContractError(
            f"{manifest.name}@{manifest.version} does not say what shape its model has; commit "
            f"it with metrics={{'{_MODEL_FACT}': to_plain(model_config)}}"
        )
    return load(ModelConfig, found)


def _check(job: Job, where: Where) -> None:
    """Refuse what cannot work before anything is written."""
    stage, model = job.stage, job.model
    if stage.max_length > model.max_positions:
        raise ConfigError(
            f"max_length {stage.max_length} is more than the {model.max_positions} positions of "
            f"{model.name}; lower max_length"
        )
    if stage.max_length < model.num_image_tokens + 2:
        raise ConfigError(
            f"max_length {stage.max_length} leaves no room for text beside the "
            f"{model.num_image_tokens} tokens of an image; raise it"
        )
    storage = Storage(job.root)
    for one in (job.dataset, *([job.held_out] if job.held_out else [])):
        if not len(open_samples(storage, one)):
            raise ConfigError(f"{one} has no samples; build it again")
    if (job.held_out is None) != (stage.held_out_every_steps is None):
        raise ConfigError("held_out and held_out_every_steps belong together; give both or neither")
    if job.held_out == job.dataset:
        raise ConfigError(f"held_out is {job.held_out}, which is trained on; give another dataset")
    tracker.check(where.tracker)
    _check_cluster(where)
    _warn_of_idle_workers(stage, where.train_workers)


def _check_cluster(where: Where) -> None:
    """Raise ConfigError if the workers do not fit; Ray would wait indefinitely."""
    wait_for_nodes(lambda: _shortage(where))


def _shortage(where: Where) -> str | None:
    have, now = max_cluster_resources(), ray.cluster_resources()
    workers = where.min_train_workers or where.train_workers
    need = {"CPU": where.worker_cpus, "GPU": 1.0 if where.train_gpu else 0.0}
    # Nodes that do not exist yet are not looked at one by one; those that do hold whole workers.
    grows = any(have.get(name, 0) > now.get(name, 0) for name in need)
    nodes = [have] if grows else [one["Resources"] for one in ray.nodes() if one["Alive"]]
    room = sum(_workers_of(node, need) for node in nodes)
    if room >= workers:
        return None
    return (
        f"the cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs on "
        f"{len(nodes)} nodes, room for {room} of {workers} training workers, which need "
        f"{need['CPU']:g} CPUs and {need['GPU']:g} GPUs each. Lower --where.train-workers, "
        "--where.min-train-workers or --where.worker-cpus, or add nodes."
    )


def _workers_of(node: Mapping[str, float], need: Mapping[str, float]) -> int:
    return int(min(node.get(name, 0) // each for name, each in need.items() if each))


def _warn_of_idle_workers(stage: StageConfig, workers: int) -> None:
    busy = busy_share(stage, workers)
    if busy == 1:
        return
    better = busy_micro_batch(stage, workers)
    remedy = "fewer workers keep all busy"
    if better is not None:
        remedy = f"--config.micro-batch {better} keeps all busy"
    _log.warning(
        "%.0f%% of the work of %d workers is rows that weigh nothing: a step has %d micro-batches; "
        "%s",
        100 * (1 - busy),
        workers,
        math.ceil(stage.global_batch / stage.micro_batch),
        remedy,
    )


def _work(config: dict[str, Any]) -> None:
    """Run in every training process; only there are transformers and DeepSpeed imported."""
    from sg4v_ray.training.worker import work

    work(config["job"])


def _fit(job: Job, home: Storage, where: Where) -> None:
    """Let Ray Train run the workers to their end.

    Raises:
        WorkersLost: they failed too often.
        Sg4vError: they did, for a reason of our own.
    """
    try:
        _trainer(job, home, where).fit()
    except (TrainingFailedError, RayError) as error:  # a worker's end; that of Ray's controller
        raise _why(error, home, where) from error


def _trainer(job: Job, home: Storage, where: Where) -> Any:
    filesystem, path = home.arrow(_RAY)
    resources = {"CPU": where.worker_cpus, **({"GPU": 1.0} if where.train_gpu else {})}
    most, least = where.train_workers, where.min_train_workers
    return TorchTrainer(
        _work,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=most if least in (None, most) else (least, most),
            elastic_resize_monitor_interval_s=_RESIZE_EVERY_S,
            use_gpu=where.train_gpu,
            resources_per_worker=resources,
        ),
        torch_config=TorchConfig(backend="nccl" if where.train_gpu else "gloo"),
        run_config=RunConfig(
            name=f"attempt-{job.attempt}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=where.max_restarts),
            callbacks=[Groups(home, job.attempt)],
        ),
    )


def _why(error: TrainingFailedError | RayError, home: Storage, where: Where) -> Sg4vError:
    """Return what ended a run after its last restart, as an error that says what to do."""
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for one in failures.values():
        if isinstance(one, Sg4vError):
            return one
    what = f"Ray Train gave up: {error}"
    if failures:
        rank, cause = next(iter(failures.items()))
        what = (
            f"training workers failed more than --where.max-restarts ({where.max_restarts}) times, "
            f"the last time rank {rank} with {type(cause).__name__}: {cause}"
        )
    found = checkpoint.newest(home)
    kept = f"the checkpoint of step {found.progress.step} is kept" if found else "nothing was saved"
    return WorkersLost(
        f"{what}\n{kept}; mend the cause and run the same command to go on. Where machines come "
        "and go, raise --where.max-restarts."
    )


def read_outcome(home: Storage) -> Outcome:
    """Return what rank 0 wrote at the end of a run, or raise the error that ended it."""
    outcome = load(Outcome, json.loads(home.get(OUTCOME)), finite=False)
    if outcome.error:
        raise BY_NAME[outcome.error](outcome.message)
    return outcome


def _counts(outcome: Outcome) -> dict[str, int]:
    progress = outcome.progress or Progress()
    return {"steps": progress.step, **dict(sorted(progress.counts.items()))}


def _facts(job: Job, outcome: Outcome, *, seconds: float) -> dict[str, object]:
    progress = outcome.progress or Progress()
    return {
        _MODEL_FACT: to_plain(job.model),
        "placed": {name: getattr(job.stage, name) for name in PLACED},
        "losses": [_or_none(one) for one in progress.losses],
        "grad_norms": [_or_none(one) for one in progress.grad_norms],
        "skipped": list(progress.skipped),
        "rollbacks": [to_plain(one) for one in progress.rollbacks],
        "step_seconds": [round(one, 4) for one in progress.seconds],
        "data_wait_share": sum(progress.waits_s) / max(1e-9, sum(progress.seconds)),
        "resumed_at": list(progress.resumed_at),
        "exported_step": outcome.exported_step,
        "held_out": [{"step": one.step, "loss": _or_none(one.loss)} for one in progress.held_out],
        "last_attempt_s": round(seconds, 1),
    }


def _or_none(number: float) -> float | None:
    """Return it, or None for NaN and infinity, which JSON does not know."""
    return number if math.isfinite(number) else None
