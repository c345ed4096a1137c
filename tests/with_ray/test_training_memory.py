# SPDX-License-Identifier: Apache-2.0
"""The memory of a node with several ranks: none holds a whole model of its own."""

from dataclasses import replace
from pathlib import Path

import pytest

from sg4v_ray.model.freeze import FreezePlan
from tests.with_ray.ranks import Phase, run_start
from tests.with_ray.training_site import STAGE, TINY, make_site

pytestmark = pytest.mark.training

WIDE = replace(TINY, text_width=1024, text_mlp=4096, text_layers=8, text_heads=8, text_kv_heads=8)
PARAMETERS = 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
"""Of the matrices of WIDE's language model, nearly all that it has."""
BESIDE_BYTES = 150_000_000
"""Libraries that are imported meanwhile (100 MB seen), one whole parameter, the rest of the model.
A whole model in bfloat16 is 268 MB."""


@pytest.mark.parametrize(
    ("on_disk", "dtype", "size_bytes"),
    [
        ("float32", "float32", 4),
        pytest.param("float32", "bfloat16", 2, marks=pytest.mark.soak),
    ],
)
def test_under_zero_3_a_rank_takes_its_part_of_the_model_and_never_the_whole(
    tmp_path: Path, tiny_model: Path, on_disk: str, dtype: str, size_bytes: int
) -> None:
    site = replace(make_site(tmp_path, tiny_model / "tokenizer.json"), model=WIDE)
    stage = replace(
        STAGE,
        dtype=dtype,
        zero_stage=3,
        # So that no optimizer's state hides what the weights take.
        trainable=FreezePlan(projector=True, language_model=False, vision_from_block=None),
    )
    start = site.commit_model("wide", dtype=on_disk)
    part = PARAMETERS * size_bytes // 2
    taken = run_start(Phase(site, "memory", stage, 2, None, start=start))
    assert all(part < one < part + BESIDE_BYTES for one in taken), taken
