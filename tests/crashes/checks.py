# SPDX-License-Identifier: Apache-2.0
"""The state of a root after a kill and one resume, compared with an undisturbed run."""

import json
from collections import Counter
from typing import Any

from sg4v_ray.analysis.captioning import write_report
from sg4v_ray.captions import score
from sg4v_ray.captions.export import export
from sg4v_ray.core.artifact import Manifest, Ref, find
from sg4v_ray.core.records import CaptionRow
from sg4v_ray.core.rows import all_rows, read_rows
from sg4v_ray.core.sampling import HoldOut
from sg4v_ray.core.verify import verify
from sg4v_ray.core.where import Where
from sg4v_ray.dataset import build
from tests.crashes import job
from tests.crashes.workbench import EMPTY, NUM_IMAGES, Place

DATASET = Ref(name="dataset")
IDS = [f"i{number:02d}.png" for number in range(NUM_IMAGES)]


def outcome(place: Place) -> dict[str, Any]:
    """Return the outcome of each row: what does not depend on the place and the time of a run."""
    rows: list[CaptionRow] = read_rows(place.storage, job.CAPTIONS, CaptionRow)
    return {
        one.id: [
            one.text,
            one.num_tokens,
            one.finish_reason,
            one.reject,
            one.uri.rpartition("/")[2],
        ]
        for one in rows
    }


def check(place: Place, expected: dict[str, Any]) -> None:
    """Assert that every id is there once, and that all readers agree with the manifest."""
    storage, where = place.storage, Where(root=place.root, progress=False)
    manifest = find(storage, job.CAPTIONS)
    artifact_dir = storage.sub(job.CAPTIONS.path)
    ids = all_rows(artifact_dir, manifest, ["id"])["id"].to_pylist()
    assert Counter(ids) == Counter(IDS), "an id is missing or there twice"
    rows = outcome(place)
    assert rows == expected, "a row differs from that of an undisturbed run"
    rejects = Counter(row[3] for row in rows.values() if row[3] is not None)
    captioned = sorted(key for key, row in rows.items() if row[3] is None)
    assert captioned == [one for one in IDS if one != EMPTY]
    _check_counts(manifest, rows, rejects)
    _check_files(place, manifest)

    report = write_report(captions=job.CAPTIONS, where=where)
    assert report["rows"] == manifest.counts["rows"]
    assert report["rejected"] == manifest.counts["rejected"]
    assert report["rejected_by_reason"] == dict(rejects)
    assert report["tokens"] == manifest.counts["tokens"]

    exported = export(
        captions=job.CAPTIONS, to="export.json", seed=1, hold_out=HoldOut(), where=where
    )
    records = json.loads(artifact_dir.get("export.json"))
    assert exported == len(records) == len(captioned)
    assert sorted(one["id"] for one in records) == captioned

    part = build.CaptionsPart(captions=job.CAPTIONS)
    built = build.run(build.BuildConfig(parts=(part,), seed=1), out=DATASET, where=where)
    assert built.counts["samples"] == len(captioned)
    assert {key: n for key, n in built.counts.items() if key.startswith("left_out_")} == {
        f"left_out_{reason}": count for reason, count in rejects.items()
    }

    # The rows that `score_captions` would process; the scores themselves need CLIP weights.
    index = score._write_index(storage, storage.sub("score-index"), job.CAPTIONS, ())
    assert index.rows == len(captioned)

    for ref in (job.IMAGES, job.CAPTIONS, DATASET):
        verify(storage, ref)


def _check_counts(manifest: Manifest, rows: dict[str, Any], rejects: Counter[str]) -> None:
    assert manifest.attempts == ("rows/attempt-0001", "rows/attempt-0002")
    assert manifest.counts == {
        "rows": NUM_IMAGES,
        "rejected": rejects.total(),
        "tokens": sum(row[1] for row in rows.values()),
        **{f"rejected_{reason}": count for reason, count in rejects.items()},
    }


def _check_files(place: Place, manifest: Manifest) -> None:
    """Assert that there is one object for each part, and that the manifest lists exactly these."""
    artifact_dir = place.storage.sub(job.CAPTIONS.path)
    found = [one for one in artifact_dir.list("rows") if one.endswith(".parquet")]
    assert sorted(one.path for one in manifest.files) == sorted(found)
    assert not [one for one in found if ".r" in one], "a part was made twice"
    names = [one for one in artifact_dir.list_folder() if one.startswith("manifest")]
    assert names == ["manifest-0002.json", "manifest.json"]
