# SPDX-License-Identifier: Apache-2.0
"""Weights of others come in whole or not at all, and go out again to the bit."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
)

from jobs import import_weights
from sg4v_ray.core.artifact import Manifest
from sg4v_ray.core.config import load, to_plain
from sg4v_ray.core.errors import ConfigError, WeightsError
from sg4v_ray.model import convert, weights
from sg4v_ray.model import open_clip as vit
from sg4v_ray.model.config import ModelConfig, llava_7b, nano
from sg4v_ray.model.geometry import CLIP_MEAN, CLIP_STD
from sg4v_ray.model.published import read_llava_hf
from sg4v_ray.training.launch import model_config
from tests.unit.weight_sources import (
    PIXELS,
    TEXT,
    VISION,
    assert_same,
    in_shards,
    projector,
    randomised,
    run_export,
    run_import,
    write,
    write_clip,
    write_published,
    write_vicuna,
)

pytestmark = pytest.mark.training

# --- import, export, import ---


def test_published_goes_in_and_out_to_the_bit(tmp_path: Path) -> None:
    language, tower = write_published(tmp_path / "source")
    first = run_import("published", tmp_path / "source", tmp_path / "one")
    out = run_export("published", tmp_path / "one", tmp_path / "out")
    assert_same(load_file(out / "model.safetensors"), language)
    assert_same(load_file(out / "vision_tower/model.safetensors"), tower)
    again = run_import("published", out, tmp_path / "two")
    for file in sorted(first.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_exported_folder_loads_with_the_published_codes_own_classes(tmp_path: Path) -> None:
    language, _ = write_published(tmp_path / "source")
    run_import("published", tmp_path / "source", tmp_path / "one")
    out = run_export("published", tmp_path / "one", tmp_path / "out")
    fields = json.loads((out / "config.json").read_text())
    assert fields["vocab_size"] == len(language["lm_head.weight"])
    assert len(AutoTokenizer.from_pretrained(out)) == fields["vocab_size"]
    assert AutoImageProcessor.from_pretrained(out / "vision_tower").image_mean == (0.5, 0.4, 0.3)
    _, report = CLIPVisionModel.from_pretrained(out / "vision_tower", output_loading_info=True)
    assert not any(report[one] for one in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_llava_hf_goes_in_and_out_to_the_bit(tmp_path: Path) -> None:
    write_published(tmp_path / "source")
    first = run_import("published", tmp_path / "source", tmp_path / "one")
    out = run_export("llava-hf", tmp_path / "one", tmp_path / "out")
    again = run_import("llava-hf", out, tmp_path / "two")
    for file in sorted(first.iterdir()):
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_tower_without_its_infix_as_transformers_5_saves_it_is_the_same(tmp_path: Path) -> None:
    _, tower = write_published(tmp_path / "source")
    first = load_file(
        run_import("published", tmp_path / "source", tmp_path / "one") / "model.safetensors"
    )
    out = run_export("llava-hf", tmp_path / "one", tmp_path / "out")
    save_file(
        {name.replace(".vision_model.", "."): one for name, one in first.items()},
        out / "model.safetensors",
    )
    again = run_import("llava-hf", out, tmp_path / "two")
    assert_same(load_file(again / "model.safetensors"), first)
    bare = {name.removeprefix("vision_model."): one for name, one in tower.items()}
    save_file(bare, tmp_path / "source/vision_tower/model.safetensors")
    again = run_import("published", tmp_path / "source", tmp_path / "three")
    assert_same(load_file(again / "model.safetensors"), first)


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
def test_shards_of_either_kind_are_what_one_file_is(tmp_path: Path, kind: str) -> None:
    language, tower = write_published(tmp_path / "source")
    first = run_import("published", tmp_path / "source", tmp_path / "one")
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    in_shards(tmp_path / "source", language | buffer, kind=kind)
    buffer = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    in_shards(tmp_path / "source/vision_tower", tower | buffer, kind=kind)
    again = run_import("published", tmp_path / "source", tmp_path / "two")
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_a_tower_inside_the_checkpoint_is_used_if_no_other_is_there(tmp_path: Path) -> None:
    source = tmp_path / "source"
    language, tower = write_published(source)
    inside = {f"model.vision_tower.vision_tower.{name}": one for name, one in tower.items()}
    first = run_import("published", source, tmp_path / "one")
    save_file(language | inside, source / "model.safetensors")
    with pytest.raises(WeightsError, match=r"which is meant\? .* only config\.json"):
        run_import("published", source, tmp_path / "two")
    (source / "vision_tower/model.safetensors").unlink()
    again = run_import("published", source, tmp_path / "two")
    assert (again / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()


def test_of_a_whole_clip_model_only_the_vision_tower_is_taken(tmp_path: Path) -> None:
    write_published(tmp_path / "source")
    folder = tmp_path / "clip"
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 9}
    whole = CLIPModel(CLIPConfig(vision_config=VISION, text_config=text | {"num_heads": 2}))
    state = randomised(whole.state_dict())
    assert {"logit_scale", "visual_projection.weight", "text_projection.weight"} <= set(state)
    write(folder / "config.json", {"model_type": "clip", "vision_config": VISION})
    write(folder / "preprocessor_config.json", PIXELS)
    save_file(state, folder / "model.safetensors")
    model = run_import("published", tmp_path / "source", tmp_path / "runs", vision_tower=folder)
    made = load_file(model / "model.safetensors")
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(made[f"vision_tower.{name}"], state[name])


def test_vicuna_and_clip_get_a_new_projector_or_a_given_one(tmp_path: Path) -> None:
    write_vicuna(tmp_path / "vicuna")
    write_clip(tmp_path / "clip")
    paths = {"source": tmp_path / "vicuna", "vision_tower": tmp_path / "clip"}
    fresh = [
        load_file(run_import("vicuna-clip", root=tmp_path / root, **paths) / "model.safetensors")
        for root in ("one", "two")
    ]
    assert_same(*fresh)
    weight = fresh[0]["multi_modal_projector.linear_2.weight"]
    assert weight.std().item() == pytest.approx(TEXT["initializer_range"], rel=0.2)
    given = projector()
    torch.save(given, tmp_path / "mm_projector.bin")
    paths["projector"] = tmp_path / "mm_projector.bin"
    made = load_file(
        run_import("vicuna-clip", root=tmp_path / "three", **paths) / "model.safetensors"
    )
    expected = given["model.mm_projector.2.weight"]
    assert torch.equal(made["multi_modal_projector.linear_2.weight"], expected)


# --- the artifact ---


def test_the_job_makes_an_artifact_from_which_training_can_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    language, tower = write_published(tmp_path / "source")
    argv = ["import_weights", "--kind", "published", "--source", str(tmp_path / "source")]
    argv += ["--out.name", "tiny", "--where.root", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", argv)
    import_weights.run()
    assert capsys.readouterr().out.startswith("tiny@v1: ")
    manifest = load(Manifest, json.loads((tmp_path / "runs/tiny/v1/manifest.json").read_text()))
    assert manifest.metrics["vision_tower_sha256"] == convert.tower_sha256(tower)
    shape = model_config(manifest)
    rows = len(language["lm_head.weight"])
    assert (shape.image_token_id, shape.pad_token_id) == (rows, rows + 1)
    assert shape.image_mean == tuple(PIXELS["image_mean"])
    assert set(manifest.inputs) == {"source", "vision_tower"}

    model = weights.load(tmp_path / "runs/tiny/v1/model", dtype="float32")
    assert convert.tower_sha256(model.state_dict()) == manifest.metrics["vision_tower_sha256"]
    embedding = model.state_dict()["model.language_model.embed_tokens.weight"]
    assert len(embedding) == shape.vocab_size == convert.padded_rows(rows)
    old = language["model.embed_tokens.weight"]
    assert torch.equal(embedding[:rows], old)
    assert torch.equal(embedding[rows], embedding[-1])
    torch.testing.assert_close(embedding[rows], old.mean(0))

    before = (tmp_path / "runs/tiny/v1/manifest.json").read_bytes()
    import_weights.run()  # is finished: nothing is written again
    assert (tmp_path / "runs/tiny/v1/manifest.json").read_bytes() == before


def test_weights_keep_the_dtype_of_the_language_model(tmp_path: Path) -> None:
    language, _ = write_published(tmp_path / "source")
    half = {name: one.half() for name, one in language.items()}
    save_file(half, tmp_path / "source/model.safetensors")
    made = load_file(
        run_import("published", tmp_path / "source", tmp_path / "runs") / "model.safetensors"
    )
    assert {one.dtype for one in made.values()} == {torch.float16}


def test_an_old_manifest_without_the_towers_activation_still_loads() -> None:
    plain = to_plain(llava_7b())
    del plain["vision_act"]
    assert load(ModelConfig, plain) == llava_7b()


def test_the_towers_hash_is_of_its_bytes_and_not_of_its_names() -> None:
    state = weights.create(nano(), seed=1).state_dict()
    expected = convert.tower_sha256(state)
    assert convert.tower_sha256(convert.renamed(state, weights.LLAVA_HF)) == expected
    assert convert.tower_sha256(convert.renamed(state, convert.TOWER)) == expected
    assert convert.tower_sha256({key: one.bfloat16() for key, one in state.items()}) != expected
    state["lm_head.weight"] += 1
    assert convert.tower_sha256(state) == expected
    state["model.vision_tower.post_layernorm.bias"][3] += 1e-3
    assert convert.tower_sha256(state) != expected
    with pytest.raises(WeightsError, match="no vision tower"):
        convert.tower_sha256({"lm_head.weight": torch.ones(2)})


# --- the keys of the real 7B ---

LLM_7B = (
    r"model\.embed_tokens\.weight", r"model\.norm\.weight", r"lm_head\.weight",
    r"model\.layers\.\d+\.(input|post_attention)_layernorm\.weight",
    r"model\.layers\.\d+\.self_attn\.[qkvo]_proj\.weight",
    r"model\.layers\.\d+\.mlp\.(gate|up|down)_proj\.weight",
    r"model\.mm_projector\.[02]\.(weight|bias)",
)  # fmt: skip
TOWER_7B = (
    r"vision_model\.embeddings\.(class_embedding|(patch|position)_embedding\.weight)",
    r"vision_model\.(pre_layrnorm|post_layernorm)\.(weight|bias)",
    r"vision_model\.encoder\.layers\.\d+\.layer_norm[12]\.(weight|bias)",
    r"vision_model\.encoder\.layers\.\d+\.self_attn\.([qkv]|out)_proj\.(weight|bias)",
    r"vision_model\.encoder\.layers\.\d+\.mlp\.fc[12]\.(weight|bias)",
)


def test_the_keys_of_7b_become_the_published_ones_and_come_back() -> None:
    state = convert.cut_rows(convert.blank(llava_7b()).state_dict(), llava_7b())
    table = convert.PROJECTOR + convert.LANGUAGE
    language, tower = convert.renamed(state, table), convert.renamed(state, convert.TOWER)
    assert (len(state), len(language), len(tower)) == (686, 295, 391)
    for names, patterns in ((language, LLM_7B), (tower, TOWER_7B)):
        assert [one for one in names if not re.fullmatch("|".join(patterns), one)] == []
    assert language["lm_head.weight"].shape == (32_000, 4096)
    back = convert.renamed(language, convert.reverse(table))
    back |= convert.renamed(tower, convert.reverse(convert.TOWER))
    assert set(back) == set(state)
    assert {key: one.shape for key, one in back.items()} == {k: v.shape for k, v in state.items()}


def test_the_config_of_llava_hf_is_read_with_transformers_defaults(tmp_path: Path) -> None:
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "image_size": 336, "patch_size": 14,
    }  # fmt: skip
    fields = {
        "model_type": "llava", "image_token_index": 32_000, "pad_token_id": 32_001,
        "text_config": text | {"vocab_size": 32_064}, "vision_config": vision,
        "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    }  # fmt: skip
    write(tmp_path / "config.json", fields)
    clip = {"image_mean": list(CLIP_MEAN), "image_std": list(CLIP_STD)}
    write(tmp_path / "preprocessor_config.json", clip)
    assert read_llava_hf(tmp_path, name="llava-7b") == llava_7b()


def test_the_published_vocabulary_is_padded_as_llava_hf_pads_it() -> None:
    assert convert.padded_rows(32_000) == llava_7b().vocab_size


# --- open_clip ---


def _vit(folder: Path, *, quick_gelu: bool) -> open_clip.CLIP:
    """Write a small ViT as open_clip publishes one, text tower and all; return it."""
    vision = {"image_size": 28, "layers": 3, "width": 32, "patch_size": 14, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text, "quick_gelu": quick_gelu}
    model = open_clip.CLIP(**model_cfg).eval()
    with torch.no_grad():
        for one in model.visual.parameters():
            one.normal_(std=0.3)
    pixels = {"mean": PIXELS["image_mean"], "std": PIXELS["image_std"]}
    write(folder / vit.CONFIG, {"model_cfg": model_cfg, "preprocess_cfg": pixels})
    save_file(model.state_dict(), folder / vit.WEIGHTS[0])
    return model


@torch.no_grad()
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_an_open_clip_tower_has_open_clips_features(tmp_path: Path, quick_gelu: bool) -> None:
    model = _vit(tmp_path / "vit", quick_gelu=quick_gelu)
    write_vicuna(tmp_path / "vicuna")
    paths = {"source": tmp_path / "vicuna", "vision_tower": tmp_path / "vit"}
    loaded = weights.load(run_import("open-clip", root=tmp_path / "one", **paths), dtype="float32")
    tower = loaded.model.vision_tower
    assert tower.config.hidden_act == ("quick_gelu" if quick_gelu else "gelu")
    expected: list[Tensor] = []
    for block in model.visual.transformer.resblocks:
        block.register_forward_hook(lambda *args: expected.append(args[2]))
    image = torch.randn(2, 3, 28, 28)
    model.visual(image)
    states = tower(image, output_hidden_states=True).hidden_states
    assert len(states) == len(expected) + 1
    for ours, theirs in zip(states[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)

    visual = vit.drop_text(model.state_dict())
    assert set(model.state_dict()) - set(visual) >= {"visual.proj", "token_embedding.weight"}
    assert_same(vit.from_clip(vit.to_clip(visual)), visual)
    tensors = convert.renamed(loaded.state_dict(), convert.TOWER)
    assert_same(tensors, vit.to_clip(visual))
    assert_same(vit.from_clip(tensors), visual)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"timm_model_name": "vit_base"}, "vision_cfg.timm_model_name is 'vit_base'"),
        ({"layers": [3, 4, 6, 3]}, r"vision_cfg.layers is \[3, 4, 6, 3\]"),
        ({"ls_init_value": 0.1}, "vision_cfg.ls_init_value is 0.1"),
    ],
)
def test_open_clips_other_towers_are_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        vit.vision_config({"model_cfg": {"vision_cfg": change}}, where="x.json")


def test_a_folder_with_files_is_not_exported_to(tmp_path: Path) -> None:
    write_published(tmp_path / "source")
    run_import("published", tmp_path / "source", tmp_path / "runs")
    (tmp_path / "out").mkdir()
    run_export("published", tmp_path / "runs", tmp_path / "out")
    with pytest.raises(ConfigError, match="not an empty folder"):
        run_export("published", tmp_path / "runs", tmp_path / "out")


def test_a_model_whose_special_tokens_stand_first_has_no_published_layout() -> None:
    with pytest.raises(ConfigError, match="Use the layout llava-hf"):
        convert.cut_rows(convert.blank(nano()).state_dict(), nano())
