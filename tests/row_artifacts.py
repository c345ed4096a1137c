# SPDX-License-Identifier: Apache-2.0
"""Finished artifacts of rows for tests, with a manifest that lists their files."""

from collections.abc import Iterable, Mapping
from typing import Any

from sg4v_ray.core.artifact import Manifest, Ref, begin, commit
from sg4v_ray.core.lease import hold
from sg4v_ray.core.rows import ROWS, put_rows
from sg4v_ray.core.storage import Storage


def finish_rows(
    storage: Storage, ref: Ref, record: type, *attempts: Iterable[Any], **fields: Any
) -> Manifest:
    """Commit records as an artifact, one file for each attempt; later attempts replace rows."""
    inputs: Mapping[str, str] = fields.pop("inputs", {})
    artifact_dir = begin(storage, ref, {}, inputs=inputs)
    names = [ROWS] if len(attempts) == 1 else [f"{ROWS}/{n}" for n in range(1, len(attempts) + 1)]
    files = tuple(
        put_rows(artifact_dir, f"{name}/part-0.parquet", record, rows)
        for name, rows in zip(names, attempts, strict=True)
    )
    with hold(artifact_dir) as lease:
        return commit(
            storage,
            ref,
            config={},
            inputs=inputs,
            lease=lease,
            **{"counts": {"rows": files[0].rows}, "attempts": tuple(names), "files": files}
            | fields,
        )
