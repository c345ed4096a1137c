# SPDX-License-Identifier: Apache-2.0
"""Write finished captions as the JSON that LLaVA and ShareGPT4V publish and their tools read.

captions@v -> one JSON array, rejected rows left out
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sg4v_ray.core.artifact import Ref, find
from sg4v_ray.core.llava_json import record_of, write_records
from sg4v_ray.core.records import Turn
from sg4v_ray.core.rows import all_rows, rows_by_file
from sg4v_ray.core.sampling import HoldOut
from sg4v_ray.core.where import Where
from sg4v_ray.model.instructions import training_question


def export(*, captions: Ref, to: str, seed: int, hold_out: HoldOut, where: Where) -> int:
    """Write the captions as `to`, a path below their artifact; return how many.

    Args:
        hold_out: what people read, which is left out.
        seed: chooses the question of each caption, as in a dataset.

    Raises:
        ArtifactMissing: the captions are not finished.
    """
    storage = where.storage
    artifact_dir, manifest = storage.sub(captions.path), find(storage, captions)
    held: set[str] = set()
    if hold_out.per_source:
        rows = all_rows(artifact_dir, manifest, ["source"])
        held = hold_out.of(zip(rows["id"].to_pylist(), rows["source"].to_pylist(), strict=True))

    def records() -> Iterator[dict[str, Any]]:
        for table in rows_by_file(artifact_dir, manifest, ["uri", "text"]):
            for row in table.to_pylist():
                if row["text"] is not None and row["id"] not in held:
                    question = Turn(role="user", text=training_question(row["id"], seed))
                    answer = Turn(role="assistant", text=row["text"])
                    yield record_of(row["id"], image_of(row["id"], row["uri"]), (question, answer))

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, Path(to).name)
        with path.open("wb") as file:
            count = write_records(file, records())
        artifact_dir.upload(Path(folder), str(Path(to).parent) if "/" in to else "")
    return count


def image_of(key: str, uri: str) -> str:
    """Return what a record names as its image: the path below the data folder, else the place."""
    return key if uri.endswith(f"/{key}") else uri
