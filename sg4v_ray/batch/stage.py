# SPDX-License-Identifier: Apache-2.0
"""A stage that writes one row for every row of an index: lease, plan, budget, count, manifest."""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sg4v_ray.batch import plan
from sg4v_ray.batch.generate import MODEL_FOLDER
from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find, is_finished
from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.lease import Lease, hold
from sg4v_ray.core.records import check_columns, schema
from sg4v_ray.core.rejects import Reject, RejectBudget
from sg4v_ray.core.rows import newest, read_columns
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A step that sends every row of an index through an expensive actor."""

    out: Ref
    identity: dict[str, Any]
    """Everything that decides the content of a row."""
    inputs: dict[str, str]
    """Fingerprints of the input artifacts by `name@version`."""
    index: Storage
    """Folder of the Parquet files that hold the rows to work on."""
    work: Callable[[int], plan.Work]
    """The expensive step of an attempt (1 is the first)."""
    budget: RejectBudget
    facts: Callable[[], dict[str, Any]] = dict
    """Figures for the manifest beside the speed, asked for when all rows are written."""


def write_rows(stage: Stage, *, flow: plan.Flow, where: Where) -> Manifest:
    """Write the artifact of a stage through the exactly-once plan; open it if it is finished.

    Raises:
        ArtifactDrift: it was begun from another identity or other inputs.
        LeaseHeld: another driver is writing it.
        TooManyRejects: the budget is spent; the rows are kept, nothing is committed.
    """
    storage = where.storage
    if is_finished(storage, stage.out, config=stage.identity, inputs=stage.inputs):
        return find(storage, stage.out)
    home = begin(storage, stage.out, stage.identity, inputs=stage.inputs)
    with hold(home) as lease:
        return _attempt(1, stage, stage.index, home, lease, flow=flow, where=where)


def retry_rejects(
    stage: Stage, reasons: tuple[str, ...], *, flow: plan.Flow, where: Where
) -> Manifest:
    """Run the rejected rows of a finished artifact again, as a new attempt at them.

    The manifest is replaced; readers take each row from its newest attempt. What was built from
    the artifact before has another fingerprint as input and is refused until it is built anew.

    Args:
        reasons: `Reject` values; empty means every rejected row.

    Raises:
        ArtifactMissing: the first attempt is not finished.
        ArtifactDrift: it was made from another identity or other inputs.
        ConfigError: no row was rejected for these reasons, or a retry for others was begun.
    """
    storage = where.storage
    done = find(storage, stage.out, config=stage.identity, inputs=stage.inputs)
    home, number = storage.sub(stage.out.path), len(done.attempts) + 1
    with hold(home) as lease:
        index = _rejected_rows(stage, done, home, reasons)
        return _attempt(number, stage, index, home, lease, flow=flow, where=where, earlier=done)


def _attempt(
    number: int,
    stage: Stage,
    index: Storage,
    home: Storage,
    lease: Lease,
    *,
    flow: plan.Flow,
    where: Where,
    earlier: Manifest | None = None,
) -> Manifest:
    work = stage.work(number)
    speed = plan.run(
        index=index,
        home=home,
        attempt=number,
        work=work,
        flow=flow,
        where=where,
        lease=lease,
        # A retry's rows were all rejected before; its budget is counted over all rows at the end.
        budget=stage.budget if earlier is None else None,
    )
    attempts = (*(earlier.attempts if earlier else ()), plan.rows_of(number))
    check_columns(_schema(home.sub(attempts[-1])), work.record, where=home.uri(attempts[-1]))
    counted = [name for name in ("num_tokens", "reject") if name in schema(work.record).names]
    outcome = newest(home, attempts, counted)
    reasons = Counter(one for one in outcome["reject"].to_pylist() if one is not None)
    stage.budget.check(rejected=reasons, total=len(outcome))
    tokens = {"tokens": pc.sum(outcome["num_tokens"]).as_py() or 0} if len(counted) > 1 else {}
    manifest = commit(
        where.storage,
        stage.out,
        config=stage.identity,
        inputs=stage.inputs,
        counts={
            "rows": len(outcome),
            "rejected": reasons.total(),
            **tokens,
            **{f"rejected_{reason}": count for reason, count in sorted(reasons.items())},
        },
        attempts=attempts,
        # Of a few hard rows, the speed of a retry says nothing about the job's.
        facts=(dataclasses.asdict(speed) if earlier is None else earlier.facts) | stage.facts(),
        lease=lease,
    )
    plan.drop_checkpoint(home, number)
    return manifest


def _rejected_rows(
    stage: Stage, done: Manifest, home: Storage, reasons: tuple[str, ...]
) -> Storage:
    """Write the index rows of the rejected rows as an index of their own, and return its folder."""
    unknown = set(reasons) - {one.value for one in Reject}
    if unknown:
        known = ", ".join(one.value for one in Reject)
        raise ConfigError(f"no such reject reason: {', '.join(sorted(unknown))}; there are {known}")
    outcome = newest(home, done.attempts, ["reject"])
    wanted = pc.is_valid(outcome["reject"])
    if reasons:
        wanted = pc.is_in(outcome["reject"], value_set=pa.array(reasons))
    ids = outcome["id"].filter(wanted)
    if not len(ids):
        raise ConfigError(
            f"{stage.out} has no row rejected for {' or '.join(reasons) or 'anything'}"
        )
    number = len(done.attempts) + 1
    folder = home.sub(f"retry/attempt-{number:04d}")
    chosen = json.dumps({"reasons": sorted(reasons)}).encode()
    if not folder.create("reasons.json", chosen) and folder.get("reasons.json") != chosen:
        raise ConfigError(
            f"a retry of {stage.out} for other reasons was begun: {folder.get('reasons.json')!r}. "
            f"Finish that one first, or delete {folder.root} and, where they exist, "
            f"{home.uri(plan.rows_of(number))} and {home.uri(plan.checkpoint_of(number))}"
        )
    rows = read_columns(stage.index, None)
    rows = rows.filter(pc.is_in(rows["id"], value_set=ids))
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink)
    folder.put("index/part-00000.parquet", sink.getvalue().to_pybytes())
    return folder.sub("index")


def input_fingerprints(storage: Storage, *refs: Ref) -> dict[str, str]:
    """Return the fingerprints of finished artifacts by `name@version`."""
    return {str(ref): find(storage, ref).fingerprint for ref in refs}


def image_size(storage: Storage, model: Ref) -> int:
    """Return the side in pixels of the square that a model artifact sees."""
    find(storage, model)
    config = json.loads(storage.get(f"{model.path}/{MODEL_FOLDER}/config.json"))
    size = config.get("vision_config", {}).get("image_size")
    if not isinstance(size, int):
        raise ContractError(f"{model} has no vision_config.image_size; export it again")
    return size


def _schema(folder: Storage) -> pa.Schema:
    filesystem, path = folder.arrow()
    first = next(name for name in folder.list() if name.endswith(".parquet"))
    return pq.read_schema(f"{path}/{first}", filesystem=filesystem)
