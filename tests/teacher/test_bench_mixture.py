# SPDX-License-Identifier: Apache-2.0
"""The mixing bench at a hundredth: its files have the published shape, its mix the right counts."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from jobs import _mix_files as files
from jobs.bench_mixture import Bench
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.llava_file import records_at
from sg4v_ray.dataset.details import NUM_DETAILS, asks_for_detail

pytestmark = pytest.mark.teacher

REPOSITORY = Path(__file__).parents[2]


def test_at_full_size_the_files_have_the_published_numbers_of_records() -> None:
    assert sum(one.records for one in files.MIX) == 665_298
    assert sum(one.records for one in files.CAPTIONS) == 102_025
    assert sum(one.records for one in files.MIX[:3]) == 157_712
    assert sum(files.expected(1).values()) == 665_058
    assert files.expected(1)["coco"] == 364_100 - 23_240 + 9_000


def test_the_files_are_read_as_the_published_ones_are(tmp_path: Path) -> None:
    mix, captions = tmp_path / "mix.json", tmp_path / "captions.json"
    records = files.write_mix(mix, 0.01)
    found = [one.value for one in records_at(str(mix))]
    assert found == json.loads(mix.read_text())
    assert len(found) == records
    assert sum(map(asks_for_detail, found)) == files.count(NUM_DETAILS, 0.01)
    assert max(Counter(one["id"] for one in found).values()) > 1, "ids repeat"
    assert any(type(one["id"]) is int for one in found)
    assert 1_400 < mix.stat().st_size / records < 1_900, "1.03 GB of 665,298"
    files.write_captions(captions, 0.01)
    texts = [one.value["conversations"][1]["value"] for one in records_at(str(captions))]
    assert 850 < sum(map(len, texts)) / len(texts) < 1_030, "942 in the paper"


def test_the_mix_of_a_hundredth_has_the_right_records(tmp_path: Path) -> None:
    # As its users start it: a child of this large process would be born with its peak memory.
    argv = [sys.executable, "-m", "jobs.bench_mixture", "--scale=0.01", f"--root={tmp_path}"]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["sources"] == files.expected(0.01)
    assert found["peak_rss_mb"] < 500


def test_a_scale_at_which_sources_have_no_record_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"0\.01 to 1"):
        Bench(scale=0.001)
