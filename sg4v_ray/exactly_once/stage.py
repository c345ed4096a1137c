# SPDX-License-Identifier: Apache-2.0
"""A stage that writes one row for each row of an index: lease, plan, reject budget, manifest."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find, identity, is_finished
from sg4v_ray.core.config import fingerprint, to_plain
from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.lease import Lease, hold
from sg4v_ray.core.rejects import Reject, RejectBudget
from sg4v_ray.core.row_files import RowFile, RowIndex, read_tables, write_index
from sg4v_ray.core.rows import row_files, rows_by_file
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.config import MODEL_FOLDER, Batching
from sg4v_ray.exactly_once.monitor import put_final_status, stopped_on_error
from sg4v_ray.exactly_once.plan import ActorStep, Attempt, attempt_folder, run

_SELECTION: Final = "reasons.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A step that sends each row of an index through an expensive actor."""

    out: Ref
    identity: dict[str, Any]
    """Everything that decides the content of a row."""
    inputs: dict[str, str]
    """Fingerprints of the input artifacts by `name@version`."""
    index: RowIndex
    """The rows to process."""
    step: Callable[[int], ActorStep]
    """Returns the expensive step of an attempt (1 is the first)."""
    budget: RejectBudget
    metrics: Callable[[], dict[str, Any]] = dict
    """Returns figures for the manifest beside the throughput, when all rows are written."""
    retry_limits: tuple[str, ...] = ()
    """Paths in `identity` of limits that cause rejects, such as `captions.images.max_pixels`. A
    retry of rejects may raise them; its manifest records the values."""


def write_rows(stage: Stage, *, batching: Batching, where: Where) -> Manifest:
    """Write the artifact of a stage; open it if it is finished, resume it if it was started.

    Raises:
        ArtifactDrift: it was started from another identity or other inputs, or finished from an
            index that was made again with other rows since.
        LeaseHeld: another driver is writing it.
        ArtifactCorrupt: parts stay damaged after several rounds.
        ConfigError: the index has no rows, or the cluster is too small.
        LeaseLost: another driver took over.
        MoneySpent: the cost reaches `max_usd`.
        TooManyRejects: the budget is exceeded.
            Committed parts are kept in each case, and no manifest is written.
    """
    storage = where.storage
    if not stage.index.rows:
        raise ConfigError(
            f"{stage.out} would have no rows, because {', '.join(stage.inputs)} has none to "
            "process; check that its rows are not all rejected"
        )
    if _is_finished(storage, stage):
        return find(storage, stage.out)
    artifact_dir = begin(storage, stage.out, stage.identity, inputs=stage.inputs)
    with hold(artifact_dir) as lease:
        # Again under the lease: another driver may have committed since the first check.
        if _is_finished(storage, stage):
            return find(storage, stage.out)
        attempt = Attempt(
            artifact_dir=artifact_dir,
            number=1,
            index=stage.index,
            identity=identity(stage.identity, stage.inputs),
        )
        with stopped_on_error(artifact_dir, lease):
            manifest = _first_attempt(stage, attempt, lease, batching=batching, where=where)
        put_final_status(artifact_dir, manifest.counts)
        return manifest


def retry_rejects(
    stage: Stage, reasons: tuple[str, ...], *, batching: Batching, where: Where
) -> Manifest:
    """Run the rejected rows of a finished artifact again, as a new attempt.

    A new manifest is added; readers take each row from its newest attempt. Artifacts that were
    built from the old rows have another fingerprint as input and must be built again.

    Args:
        reasons: `Reject` values; empty means every rejected row.

    Raises:
        ArtifactMissing: the first attempt is not finished.
        ArtifactDrift: it was made from another identity, other inputs or other rows.
        ConfigError: no row was rejected for these reasons, a retry for others was started, or a
            limit is lower than in the first attempt.
        LeaseHeld: another driver is writing it.
    """
    storage = where.storage
    find(storage, stage.out)
    artifact_dir = storage.sub(stage.out.path)
    with hold(artifact_dir) as lease:
        earlier, raised = _finished_but_for_limits(storage, stage)
        if _is_done(artifact_dir, earlier, reasons):
            return earlier
        number = len(earlier.attempts) + 1
        index = _rejected_rows(stage, earlier, artifact_dir, reasons, number)
        attempt = Attempt(
            artifact_dir=artifact_dir,
            number=number,
            index=index,
            identity=fingerprint([earlier.fingerprint, number, raised]),
        )
        with stopped_on_error(artifact_dir, lease):
            manifest = _retry(
                stage, attempt, earlier, raised, lease, batching=batching, where=where
            )
        put_final_status(artifact_dir, manifest.counts)
        return manifest


def _is_finished(storage: Storage, stage: Stage) -> bool:
    return is_finished(
        storage,
        stage.out,
        config=stage.identity,
        inputs=stage.inputs,
        index=stage.index,
    )


def _first_attempt(
    stage: Stage, attempt: Attempt, lease: Lease, *, batching: Batching, where: Where
) -> Manifest:
    checked, speed = run(
        attempt,
        step=stage.step(attempt.number),
        batching=batching,
        where=where,
        lease=lease,
        budget=stage.budget,
    )
    rows = sum(one.rows for one in checked.figures)
    tokens = sum(one.tokens for one in checked.figures)
    stage.budget.check(rejected=checked.rejects, total=rows)
    return commit(
        where.storage,
        stage.out,
        config=stage.identity,
        inputs=stage.inputs,
        counts=_counts(rows, tokens if _has_tokens(stage) else None, checked.rejects),
        attempts=(attempt_folder(1),),
        files=_below(attempt_folder(1), checked.files),
        index_sha256=stage.index.sha256,
        metrics=dataclasses.asdict(speed) | stage.metrics(),
        lease=lease,
        software=checked.software,
    )


def _retry(
    stage: Stage,
    attempt: Attempt,
    earlier: Manifest,
    raised: dict[str, Any],
    lease: Lease,
    *,
    batching: Batching,
    where: Where,
) -> Manifest:
    checked, _ = run(
        attempt, step=stage.step(attempt.number), batching=batching, where=where, lease=lease
    )
    folder = attempt_folder(attempt.number)
    attempts = (*earlier.attempts, folder)
    files = (
        *row_files(attempt.artifact_dir, earlier),
        *_below(folder, checked.files),
    )
    merged = dataclasses.replace(earlier, format=2, attempts=attempts, files=files)
    rows, tokens, rejects = _outcome(attempt.artifact_dir, merged, _has_tokens(stage))
    # No reject budget: every row of a retry was rejected before, so no retry makes it worse.
    return commit(
        where.storage,
        stage.out,
        config=stage.identity,
        inputs=earlier.inputs,
        earlier=earlier,
        counts=_counts(rows, tokens, rejects),
        attempts=attempts,
        files=files,
        index_sha256=earlier.index_sha256,
        # The speed of a few difficult rows is not the speed of the job.
        metrics=earlier.metrics | stage.metrics(),
        raised_limits=earlier.raised_limits | ({folder: raised} if raised else {}),
        lease=lease,
        software=tuple(
            one
            for place, one in enumerate((*earlier.software, *checked.software))
            if one not in (*earlier.software, *checked.software)[:place]
        ),
    )


def _below(folder: str, files: tuple[RowFile, ...]) -> tuple[RowFile, ...]:
    return tuple(dataclasses.replace(one, path=f"{folder}/{one.path}") for one in files)


def _has_tokens(stage: Stage) -> bool:
    return any(one.name == "num_tokens" for one in dataclasses.fields(stage.step(1).record))


def _counts(rows: int, tokens: int | None, rejects: Counter[str]) -> dict[str, int]:
    return {
        "rows": rows,
        "rejected": rejects.total(),
        **({} if tokens is None else {"tokens": tokens}),
        **{f"rejected_{reason}": count for reason, count in sorted(rejects.items())},
    }


def _outcome(
    artifact_dir: Storage, manifest: Manifest, has_tokens: bool
) -> tuple[int, int | None, Counter[str]]:
    """Count rows, tokens (None for records without them) and rejects, each row from its newest
    attempt.
    """
    rows = tokens = 0
    rejects: Counter[str] = Counter()
    columns = ["reject", *(["num_tokens"] if has_tokens else [])]
    for table in rows_by_file(artifact_dir, manifest, columns):
        rows += len(table)
        rejects.update(one for one in table["reject"].to_pylist() if one is not None)
        if has_tokens:
            tokens += pc.sum(table["num_tokens"]).as_py() or 0
    return rows, tokens if has_tokens else None, rejects


def _finished_but_for_limits(storage: Storage, stage: Stage) -> tuple[Manifest, dict[str, Any]]:
    """Open a finished artifact; return the limits that differ from its config.

    Raises:
        ArtifactDrift: something else differs.
        ConfigError: a limit is lower.
    """
    earlier = find(storage, stage.out)
    config, raised = to_plain(stage.identity), {}
    for path in stage.retry_limits:
        *parents, name = path.split(".")
        new, old = config, earlier.config
        for key in parents:
            new, old = new[key], old[key]
        if name in old and new[name] < old[name]:
            raise ConfigError(
                f"{name} is {new[name]}, {stage.out} was made with {old[name]}; a retry may raise "
                "this limit and not lower it"
            )
        if name in old and new[name] > old[name]:
            raised[path] = new[name]
            new[name] = old[name]
    limits = ", ".join(one.rpartition(".")[2] for one in stage.retry_limits) or "none"
    same = find(
        storage,
        stage.out,
        config=config,
        inputs=stage.inputs,
        index=stage.index,
        advice=f"A retry takes the config of the first attempt; it may raise limits ({limits}).",
    )
    return same, raised


def _is_done(artifact_dir: Storage, earlier: Manifest, reasons: tuple[str, ...]) -> bool:
    """Return True if the last attempt retried these reasons and left no such reject.

    So the command of a driver that died right after its commit can be run again.
    """
    last = f"retry/attempt-{len(earlier.attempts):04d}/{_SELECTION}"
    left = reasons or tuple(one.value for one in Reject)
    return (
        len(earlier.attempts) > 1
        and not any(earlier.counts.get(f"rejected_{one}") for one in left)
        and artifact_dir.exists(last)
        and artifact_dir.get(last) == _selection(reasons)
    )


def _selection(reasons: tuple[str, ...]) -> bytes:
    return json.dumps({"reasons": sorted(reasons)}).encode()


def _rejected_rows(
    stage: Stage,
    earlier: Manifest,
    artifact_dir: Storage,
    reasons: tuple[str, ...],
    number: int,
) -> RowIndex:
    """Write the index rows of the rejected rows as an index of their own."""
    unknown = set(reasons) - {one.value for one in Reject}
    if unknown:
        known = ", ".join(one.value for one in Reject)
        raise ConfigError(f"no such reject reason: {', '.join(sorted(unknown))}; there are {known}")
    chosen = []
    for table in rows_by_file(artifact_dir, earlier, ["reject"]):
        wanted = pc.is_valid(table["reject"])
        if reasons:
            wanted = pc.is_in(table["reject"], value_set=pa.array(reasons))
        chosen.append(table["id"].filter(wanted).combine_chunks())
    ids = pa.concat_arrays([pa.array([], pa.string()), *chosen])
    if not len(ids):
        raise ConfigError(
            f"{stage.out} has no row rejected for {' or '.join(reasons) or 'any reason'}"
        )
    folder = artifact_dir.sub(f"retry/attempt-{number:04d}")
    selection = _selection(reasons)
    if not folder.create(_SELECTION, selection) and folder.get(_SELECTION) != selection:
        raise ConfigError(
            f"a retry of {stage.out} for other reasons was started: "
            f"{folder.get(_SELECTION).decode()}. Finish that retry first, or delete "
            f"{folder.root} and, if it exists, {artifact_dir.uri(attempt_folder(number))}"
        )
    tables = read_tables(stage.index.folder, stage.index.files, None)
    return write_index(
        folder.sub("index"),
        (table.filter(pc.is_in(table["id"], value_set=ids)) for table in tables),
    )


def input_fingerprints(storage: Storage, *refs: Ref) -> dict[str, str]:
    """Return the fingerprints of finished artifacts by `name@version`."""
    return {str(ref): find(storage, ref).fingerprint for ref in refs}


def image_size(storage: Storage, model: Ref) -> int:
    """Return the side in pixels of the square that a finished model artifact takes."""
    config = json.loads(storage.get(f"{model.path}/{MODEL_FOLDER}/config.json"))
    size = config.get("vision_config", {}).get("image_size")
    if not isinstance(size, int):
        raise ContractError(f"{model} has no vision_config.image_size; export it again")
    return size
