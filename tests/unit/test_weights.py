# SPDX-License-Identifier: Apache-2.0
"""A folder is in the published layout, loads everywhere, and loads wholly or not at all."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from sg4v_ray.core.errors import ConfigError, ContractError, WeightsError
from sg4v_ray.model import weights
from sg4v_ray.model.config import ModelConfig, nano
from sg4v_ray.model.pixels import PixelMaker
from sg4v_ray.model.processor import save_processor

CONFIG = replace(nano(), vocab_size=320)
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    weights.save(weights.create(CONFIG, seed=1), folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


def _tokenizer(file: Path, *, specials: str = "<unk> <s> </s> <pad> <image>") -> Path:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials.split(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a red circle on a pale background"], trainer)
    tokenizer.save(str(file))
    return file


def _changed(saved: Path, folder: Path, change: Callable[[State], object]) -> Path:
    state = load_file(saved / "model.safetensors")
    change(state)
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((saved / "config.json").read_bytes())
    return folder


def test_equal_seeds_give_equal_weights() -> None:
    one, same, other = (weights.create(CONFIG, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_creating_a_model_leaves_the_callers_random_numbers_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    weights.create(CONFIG, seed=1)
    assert torch.equal(torch.rand(1), expected)


def test_the_keys_are_those_of_the_published_models(saved: Path) -> None:
    names = set(load_file(saved / "model.safetensors"))
    assert {
        "vision_tower.vision_model.embeddings.class_embedding",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.0.mlp.gate_proj.weight",
        "language_model.lm_head.weight",
    } <= names
    prefixes = (
        "vision_tower.vision_model.", "multi_modal_projector.", "language_model.model.",
        "language_model.lm_head.",
    )  # fmt: skip
    assert all(name.startswith(prefixes) for name in names)


def test_config_json_says_what_other_tools_ask_for(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["LlavaForConditionalGeneration"]
    assert config["model_type"] == "llava"
    assert config["image_token_index"] == CONFIG.image_token_id
    assert config["vision_feature_layer"] == -2
    assert config["vision_feature_select_strategy"] == "default"
    assert config["dtype"] == "float32"
    generation = json.loads((saved / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)


def test_what_was_saved_comes_back_equal_and_in_eval_mode(saved: Path) -> None:
    model = weights.load(saved, dtype="float32")
    assert not model.training
    expected = weights.create(CONFIG, seed=1).state_dict()
    state = model.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_transformers_loads_the_folder_by_itself(saved: Path) -> None:
    model, report = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert not any(report[one] for one in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_weights_are_kept_in_the_dtype_asked_for(tmp_path: Path) -> None:
    weights.save(weights.create(CONFIG, seed=1), tmp_path, dtype="bfloat16")
    state = load_file(tmp_path / "model.safetensors")
    assert {one.dtype for one in state.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert weights.load(tmp_path, dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_a_dtype_weights_keep_that_of_the_files(tmp_path: Path, dtype: str) -> None:
    weights.save(weights.create(CONFIG, seed=1), tmp_path, dtype=dtype)
    kept, asked = (weights.load(tmp_path, dtype=one) for one in (None, dtype))
    assert {one.dtype for one in kept.parameters()} == {weights.to_dtype(dtype)}
    expected = dict(asked.named_buffers()) | asked.state_dict()
    found = dict(kept.named_buffers()) | kept.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_weights_may_be_written_into_and_their_files_deleted(saved: Path, tmp_path: Path) -> None:
    folder = _changed(saved, tmp_path, lambda state: None)
    written, read = (weights.load(folder, dtype=None) for _ in range(2))
    with torch.no_grad():
        for parameter in written.parameters():
            parameter.zero_()
    again = weights.load(folder, dtype=None)
    (folder / "model.safetensors").unlink()
    expected = weights.create(CONFIG, seed=1).state_dict()
    for model in (read, again):
        assert all(torch.equal(one, expected[name]) for name, one in model.state_dict().items())
    assert not any(one.any() for one in written.parameters())


def test_a_big_model_is_written_in_shards_with_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_SHARD_SIZE", "3MB")
    model = weights.create(CONFIG, seed=1)
    weights.save(model, tmp_path, dtype="float32")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    assert (tmp_path / "model.safetensors.index.json").is_file()
    state = weights.load(tmp_path, dtype="float32").state_dict()
    assert all(torch.equal(state[name], one) for name, one in model.state_dict().items())


def test_a_state_gathered_elsewhere_is_saved_instead_of_the_models_own(tmp_path: Path) -> None:
    gathered = weights.create(CONFIG, seed=2).state_dict()
    weights.save(weights.create(CONFIG, seed=1), tmp_path, dtype="float32", state=gathered)
    state = weights.load(tmp_path, dtype="float32").state_dict()
    assert torch.equal(state["lm_head.weight"], gathered["lm_head.weight"])


NORM = "language_model.model.norm.weight"
BIAS = "multi_modal_projector.linear_1.bias"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(lambda state: state.pop(NORM), "missing .*norm.weight", id="missing"),
        pytest.param(
            lambda state: state.update({"surprise.weight": torch.zeros(2)}),
            "extra surprise.weight",
            id="extra",
        ),
        pytest.param(
            lambda state: state.update({BIAS: torch.zeros(7)}),
            r"misshapen .*linear_1.bias .*\[7\].*\[128\]",
            id="misshapen",
        ),
        pytest.param(
            lambda state: [state.pop(name) for name in list(state) if "mlp" in name],
            "missing .* and .* more",
            id="many",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_key(
    saved: Path, tmp_path: Path, change: Callable[[State], object], says: str
) -> None:
    with pytest.raises(WeightsError, match=says):
        weights.load(_changed(saved, tmp_path, change), dtype="float32")


def test_a_pickled_checkpoint_is_never_opened(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(WeightsError, match="pickled checkpoints are not opened"):
        weights.load(tmp_path, dtype="float32")
    assert not Path("pwned").exists()


def test_an_unknown_dtype_names_the_known_ones(saved: Path) -> None:
    with pytest.raises(ConfigError, match="float32, bfloat16, float16, got 'int8'"):
        weights.load(saved, dtype="int8")


def test_saving_a_wrapped_model_is_refused(tmp_path: Path) -> None:
    model = weights.create(CONFIG, seed=1)
    wrapped = {f"module.{name}": one for name, one in model.state_dict().items()}
    with pytest.raises(WeightsError, match=r"module\..* save the bare model"):
        weights.save(model, tmp_path, dtype="float32", state=wrapped)


def _processor(folder: Path, tokenizer_file: Path, *, config: ModelConfig = CONFIG) -> Path:
    save_processor(
        folder,
        config=config,
        tokenizer_file=tokenizer_file,
        chat_template="{{ messages[0]['content'] }}",
        geometry="pad",
    )
    return folder


def _squares(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    size = CONFIG.image_size
    return [rng.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


def test_our_pixels_are_those_of_the_saved_processor_to_the_bit(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    _processor(tmp_path, tokenizer_file)
    squares = _squares(4)
    images = [Image.fromarray(one) for one in squares]
    theirs = AutoProcessor.from_pretrained(tmp_path).image_processor(images, return_tensors="pt")
    ours = PixelMaker.open(tmp_path)(squares)
    assert ours.dtype == torch.float32
    assert torch.equal(ours, theirs["pixel_values"])


def test_every_level_of_every_channel_is_normalised_as_the_processor_does(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    _processor(tmp_path, tokenizer_file)
    levels = np.arange(CONFIG.image_size**2, dtype=np.uint16) % 256
    square = np.repeat(levels.astype(np.uint8), 3).reshape(CONFIG.image_size, -1, 3)
    theirs = AutoProcessor.from_pretrained(tmp_path).image_processor(
        Image.fromarray(square), return_tensors="pt"
    )
    assert torch.equal(PixelMaker.open(tmp_path)([square]), theirs["pixel_values"])


def test_no_images_make_an_empty_tensor_of_the_right_shape(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    maker = PixelMaker.open(_processor(tmp_path, tokenizer_file))
    assert maker([]).shape == (0, 3, CONFIG.image_size, CONFIG.image_size)


def test_an_image_that_is_not_the_models_square_is_refused(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    maker = PixelMaker.open(_processor(tmp_path, tokenizer_file))
    with pytest.raises(ContractError, match="as_model_sees"):
        maker([np.zeros((65, 64, 3), np.uint8)])


def test_the_saved_tokenizer_makes_the_ids_of_the_given_one(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    _processor(tmp_path, tokenizer_file)
    text = "<s>a red circle\n<image></s>"
    before = Tokenizer.from_file(str(tokenizer_file)).encode(text, add_special_tokens=False).ids
    after = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert after.encode(text, add_special_tokens=False).ids == before
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved.encode(text, add_special_tokens=False) == before
    assert saved.padding_side == "left"


def test_the_processor_expands_a_placeholder_to_the_models_number_of_tokens(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    _processor(tmp_path, tokenizer_file)
    processor = AutoProcessor.from_pretrained(tmp_path)
    image = Image.new("RGB", (300, 200))
    ids = processor(images=image, text="<image>a", return_tensors="pt")["input_ids"][0].tolist()
    assert ids.count(CONFIG.image_token_id) == CONFIG.num_image_tokens


def test_a_tokenizer_with_other_special_ids_is_refused(tmp_path: Path) -> None:
    file = _tokenizer(tmp_path / "other.json", specials="<unk> <s> </s> <image> <pad>")
    with pytest.raises(ConfigError, match="<pad> at 4, the model nano at 3"):
        _processor(tmp_path, file)


def test_a_tokenizer_larger_than_the_embedding_is_refused(
    tmp_path: Path, tokenizer_file: Path
) -> None:
    with pytest.raises(ConfigError, match="raise vocab_size"):
        _processor(tmp_path, tokenizer_file, config=replace(CONFIG, vocab_size=200))
