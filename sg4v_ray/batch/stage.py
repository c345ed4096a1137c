# SPDX-License-Identifier: Apache-2.0
"""A stage that writes one row for every row of an index: lease, plan, budget, count, manifest."""

import dataclasses
import json
from collections import Counter
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sg4v_ray.batch import plan
from sg4v_ray.batch.generate import MODEL_FOLDER
from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find, is_finished
from sg4v_ray.core.errors import ContractError
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import check_columns
from sg4v_ray.core.rejects import RejectBudget
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where


def write_rows(
    out: Ref,
    *,
    identity: dict[str, Any],
    inputs: dict[str, str],
    index: Storage,
    work: plan.Work,
    budget: RejectBudget,
    flow: plan.Flow,
    where: Where,
) -> Manifest:
    """Write the artifact `out` through the exactly-once plan; open it if it is finished.

    Args:
        identity: everything that decides the content of a row.
        inputs: fingerprints of the input artifacts.
        index: folder of the Parquet files that hold the rows to work on.

    Raises:
        ArtifactDrift: it was begun from another identity or other inputs.
        LeaseHeld: another driver is writing it.
        TooManyRejects: the budget is spent; the rows are kept, nothing is committed.
    """
    storage = where.storage
    if is_finished(storage, out, config=identity, inputs=inputs):
        return find(storage, out)
    home = begin(storage, out, identity, inputs=inputs)
    with hold(home) as lease:
        outcome, speed = plan.run(index=index, home=home, work=work, flow=flow, where=where)
        reasons = Counter(one for one in outcome["reject"].to_pylist() if one is not None)
        budget.check(rejected=reasons.total(), total=len(outcome))
        attempt = plan.FIRST_ATTEMPT
        check_columns(_schema(home.sub(attempt)), work.record, where=home.uri(attempt))
        manifest = commit(
            storage,
            out,
            config=identity,
            inputs=inputs,
            counts={
                "rows": len(outcome),
                "rejected": reasons.total(),
                "tokens": sum(outcome["num_tokens"].to_pylist()),
                **{f"rejected_{reason}": count for reason, count in sorted(reasons.items())},
            },
            attempts=(attempt,),
            facts=dataclasses.asdict(speed),
            lease=lease,
        )
    plan.drop_checkpoint(home)
    return manifest


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
