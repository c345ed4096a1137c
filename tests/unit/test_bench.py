# SPDX-License-Identifier: Apache-2.0
"""A bench empties only folders of benches; parts are counted and generated as a job makes them."""

import os
import shutil
from pathlib import Path

import pyarrow.compute as pc
import pytest

from jobs import bench_plan
from jobs._bench_run import check_out, empty, part_objects, peak_rss_mb
from jobs.bench_plan import Bench, PlanRun
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.storage import Storage
from sg4v_ray.exactly_once.parts import check_parts, split_into_parts


def test_a_bench_empties_its_own_folder(tmp_path: Path) -> None:
    root = tmp_path / "new" / "bench"
    empty(root)
    (root / "photos").mkdir()
    empty(root)
    assert not (root / "photos").exists()


def test_a_bench_touches_no_file_of_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ConfigError, match="name a new folder"):
        empty(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "dear"


def test_only_committed_parts_are_counted(tmp_path: Path) -> None:
    assert part_objects(tmp_path / "absent") == 0
    names = ["part-000001.parquet", "part-000001.r1.parquet", "plan.json", "part-000002.parquet#77"]
    for name in names:
        (tmp_path / name).touch()
    assert part_objects(tmp_path) == 2


def test_the_peak_memory_of_a_process_is_read_while_it_lives() -> None:
    assert peak_rss_mb(os.getpid()) > 10
    assert peak_rss_mb(2**30) == 0.0


def test_a_clone_without_the_old_commit_ends_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^commit 0000000 is not in this clone.*--old-rows 0\)$"):
        check_out("0000000", tmp_path)


def test_index_rows_of_the_plan_bench_have_unique_ids_and_go_round_the_images() -> None:
    first = bench_plan.index_table(0, 7, ["/a", "/b"], [10, 20])
    second = bench_plan.index_table(7, 3, ["/a", "/b"], [10, 20])
    ids = first["id"].to_pylist() + second["id"].to_pylist()
    assert len(set(ids)) == 10
    assert ids == sorted(ids)
    assert second["uri"].to_pylist() == ["/b", "/a", "/b"]
    assert second["size_bytes"].to_pylist() == [20, 10, 20]


def test_generated_captions_are_accepted_rows() -> None:
    table = bench_plan.caption_table(bench_plan.index_table(0, 5, ["/a"], [1]), 0)
    assert table["reject"].null_count == 5
    assert table["text"].null_count == 0
    assert pc.min(table["num_tokens"]).as_py() > 0


def test_the_job_finds_every_generated_part(tmp_path: Path) -> None:
    flags = bench_plan.job_flags(tmp_path, 1000)
    bench_plan.write_index(Storage(str(tmp_path)), 5000, 1)
    attempt = bench_plan.write_parts(flags, 1000, 3000, 1)
    parts = split_into_parts(attempt.index, 1000)
    checked = check_parts(attempt.out, attempt.index, parts, identity=attempt.identity)
    assert [one.number for one in checked.missing] == [3, 4]
    assert not checked.problems


def test_the_ratios_compare_the_largest_peaks() -> None:
    figures = {"rows": 1, "done": 0, "commit_s": 2.0, "rows_per_s": 1.0, "manifest_mb": 1.0}
    times = {"first_part_s": (3.0, 9.0, 4.0), "write_s": 1.0}
    large = PlanRun(**figures, **times, peak_mb=(300.0, 330.0, 310.0))
    small = PlanRun(**figures, **times, peak_mb=(300.0, 290.0, 280.0))
    assert bench_plan.ratios_of(large, small) == {
        "driver_peak_mb": 330.0,
        "driver_peak_over_small": 1.1,
        "first_part_s": 9.0,
        "commit_s": 2.0,
    }


def test_a_disk_that_is_too_small_is_reported_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(bench_plan.shutil, "disk_usage", lambda root: usage)
    with pytest.raises(ConfigError, match=r"the bench needs .* GB below .*, which has 0.0 GB"):
        bench_plan.check_disk(Bench(), tmp_path)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        ({"rows_per_part": 3000}, "rows_per_part must divide 100,000"),
        ({"done": 19_000_001}, "done must be a multiple of rows_per_part"),
        ({"done": 19_990_000}, "too few to be killed twice"),
    ],
)
def test_sizes_that_cannot_be_measured_are_refused(flags: dict[str, int], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        Bench(**flags)
