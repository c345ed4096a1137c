# SPDX-License-Identifier: Apache-2.0
"""What is counted from a config is what transformers allocates and torch computes and keeps."""

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

from jobs._bench_site import model_150m
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model.config import ModelConfig, llava_7b, nano, to_transformers
from sg4v_ray.model.freeze import ALIGN, FINETUNE, PRETRAIN, FreezePlan, freeze, trainable
from sg4v_ray.model.size import (
    Parameters,
    count_activations,
    count_flops,
    count_parameters,
    count_trainable,
    kv_cache_bytes,
)

pytestmark = pytest.mark.training

LATTER_HALF = FreezePlan(projector=True, language_model=True, vision_from_block=1)
TOWER_ONLY = FreezePlan(projector=False, language_model=False, vision_from_block=1)
WHOLE = FreezePlan(projector=True, language_model=True, vision_from_block=0, vision_embeddings=True)
PLANS = {
    "align": ALIGN,
    "finetune": FINETUNE,
    "latter half": LATTER_HALF,
    "tower only": TOWER_ONLY,
    "whole": WHOLE,
}
TINY = replace(
    nano(),
    text_width=96,
    text_heads=6,
    text_kv_heads=2,
    text_mlp=200,
    vision_width=64,
    vocab_size=900,
)
MIDDLE = model_150m()
TEXT_TOKENS = 36


def _model(
    config: ModelConfig,
    plan: FreezePlan,
    *,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> Any:
    model = LlavaForConditionalGeneration._from_config(
        to_transformers(config), attn_implementation=attention, dtype=dtype
    ).train()
    freeze(model, plan)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # Else the gradient passes a frozen tower too, which no plan needs.
        model.disable_input_require_grads()
    return model


def _loss(model: Any, config: ModelConfig, *, rows: int, padded: int = 0) -> torch.Tensor:
    """Return the loss of rows with an image each; `padded` tokens at the end of the first row."""
    ids = torch.full((rows, config.num_image_tokens + TEXT_TOKENS), 50)
    ids[:, 1 : 1 + config.num_image_tokens] = config.image_token_id
    mask = torch.ones_like(ids)
    if padded:
        mask[0, -padded:] = 0
    pixels = torch.randn(rows, 3, config.image_size, config.image_size).to(model.dtype)
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, use_cache=False).logits
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
    )


class _Kept:
    """Counts the storages that autograd keeps, each once, parameters left out."""

    def __init__(self, model: Any) -> None:
        self._parameters = {one.untyped_storage().data_ptr() for one in model.parameters()}
        self._uses: dict[int, list[int]] = {}

    @property
    def size_bytes(self) -> int:
        return sum(size for _, size in self._uses.values())

    def pack(self, tensor: torch.Tensor) -> Any:
        held, storage = _Held(tensor.detach()), tensor.untyped_storage()
        key = storage.data_ptr()
        if key not in self._parameters:
            self._uses.setdefault(key, [0, storage.nbytes()])[0] += 1
            weakref.finalize(held, self._free, key)
        return held

    def _free(self, key: int) -> None:
        self._uses[key][0] -= 1
        if not self._uses[key][0]:
            del self._uses[key]


class _Held:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _kept_bytes(model: Any, config: ModelConfig, *, rows: int, padded: int = 0) -> int:
    """Return the bytes that autograd keeps at the end of a forward pass."""
    kept = _Kept(model)
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda held: held.tensor):
        loss = _loss(model, config, rows=rows, padded=padded)
        gc.collect()
        size_bytes = kept.size_bytes
    del loss
    return size_bytes


class _Live(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, fake ones too."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.now = self.peak = 0

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
            self.peak = max(self.peak, self.now)

    def _free(self, size_bytes: int) -> None:
        self.now -= size_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, torch.Tensor):
                self.hold(one)
        return made


def _sum(tensors: Any) -> int:
    return sum(one.untyped_storage().nbytes() for one in tensors)


# Parameters


def test_7b_has_the_known_parameters_by_part() -> None:
    vicuna = replace(llava_7b(), vocab_size=32_000, image_token_id=31_998, pad_token_id=31_999)
    assert count_parameters(vicuna) == Parameters(
        vision_tower=303_507_456,
        projector=20_979_712,
        language_model=6_607_343_616,
        head=131_072_000,
    )


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("config", [nano(), TINY], ids=["nano", "tiny"])
def test_what_trains_is_counted_as_the_plan_names_it(config: ModelConfig, plan: FreezePlan) -> None:
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(to_transformers(config))
    assert count_trainable(config, plan) == _named(model, trainable(model, plan))


def test_of_7b_in_pretraining_11_vision_blocks_train() -> None:
    counted = count_trainable(llava_7b(), PRETRAIN)
    assert counted.vision_tower == 11 * 12_596_224
    assert replace(counted, vision_tower=303_507_456) == count_parameters(llava_7b())


def test_a_block_that_gets_no_gradient_is_refused_here_too() -> None:
    plan = replace(PRETRAIN, vision_from_block=3)
    with pytest.raises(ConfigError, match="only the blocks 0 to 2"):
        count_trainable(nano(), plan)


def _named(model: Any, names: tuple[str, ...]) -> Parameters:
    parts = {
        "vision_tower": "model.vision_tower.",
        "projector": "model.multi_modal_projector.",
        "language_model": "model.language_model.",
        "head": "lm_head.",
    }
    sizes = {name: one.numel() for name, one in model.named_parameters() if name in set(names)}
    return Parameters(
        **{
            part: sum(size for name, size in sizes.items() if name.startswith(prefix))
            for part, prefix in parts.items()
        }
    )


# FLOPs


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_flops_are_those_that_torch_counts(plan: FreezePlan, checkpointing: bool) -> None:
    # Eager: torch does not count the CPU's fused attention.
    model = _model(TINY, plan, checkpointing=checkpointing, attention="eager")
    with FlopCounterMode(display=False) as counter:
        loss = _loss(model, TINY, rows=1)
        forward = counter.get_total_flops()
        loss.backward()
    counted = count_flops(
        TINY, plan, text_tokens=TEXT_TOKENS, images=1, checkpointing=checkpointing
    )
    assert counted.forward == pytest.approx(forward, rel=0.01)
    assert counted.hardware == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert (counted.recompute > 0) == checkpointing


def test_a_trained_language_model_takes_six_flops_a_weight_and_token() -> None:
    counted = count_flops(llava_7b(), FINETUNE, text_tokens=1, images=0, checkpointing=False)
    parameters = count_parameters(llava_7b())
    matrices = parameters.language_model + parameters.head - 32_064 * 4096
    # A mean of 0 images is a row of text; the patches' norms and the attention are the rest.
    assert counted.model == pytest.approx(6 * matrices, rel=0.001)


def test_a_token_of_7b_takes_half_a_mebibyte_of_kv_cache() -> None:
    assert kv_cache_bytes(llava_7b()) == 2**19


# Memory


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.soak)], ids=str
)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_activations_are_those_that_autograd_keeps(
    plan: FreezePlan, checkpointing: bool, dtype: torch.dtype
) -> None:
    model = _model(nano(), plan, checkpointing=checkpointing, dtype=dtype)
    counted = _activations(nano(), plan, 4, checkpointing, dtype)
    # What lies before the blocks and trains in no published stage is left out.
    tolerance = 0.02 if plan in (ALIGN, FINETUNE, LATTER_HALF) else 0.15
    assert counted.kept == pytest.approx(_kept_bytes(model, nano(), rows=4), rel=tolerance)


@pytest.mark.soak
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_so_they_are_at_185m_parameters_with_grouped_keys_and_padding(checkpointing: bool) -> None:
    model = _model(MIDDLE, FINETUNE, checkpointing=checkpointing)
    counted = _activations(MIDDLE, FINETUNE, 2, checkpointing, torch.float32)
    assert counted.kept == pytest.approx(_kept_bytes(model, MIDDLE, rows=2, padded=5), rel=0.05)


@pytest.mark.parametrize(("plan", "checkpointing"), [(PRETRAIN, False), (ALIGN, True)])
def test_so_they_are_at_7b_on_fake_tensors(plan: FreezePlan, checkpointing: bool) -> None:
    config, rows = llava_7b(), 2
    with FakeTensorMode():
        model = _model(config, plan, checkpointing=checkpointing, dtype=torch.bfloat16)
        with _Live() as live:
            for one in model.parameters():
                live.hold(one)
            weights = live.now
            loss = _fake_loss(model, config, rows)
            gc.collect()
            kept = live.now - weights
            loss.backward()
            gradients = _sum(one.grad for one in model.parameters() if one.grad is not None)
    counted = _activations(config, plan, rows, checkpointing, torch.bfloat16)
    assert weights == 2 * count_parameters(config).total
    assert gradients == 2 * count_trainable(config, plan).total
    assert counted.kept == pytest.approx(kept, rel=0.05)
    if plan == ALIGN:  # else gradients come while activations go
        assert counted.peak + gradients == pytest.approx(live.peak - weights, rel=0.05)


def _fake_loss(model: Any, config: ModelConfig, rows: int) -> torch.Tensor:
    """Return the loss as LLaVA's forward makes it, but for its look at the tokens' values."""
    ids = torch.full((rows, config.num_image_tokens + TEXT_TOKENS), 50)
    pixels = torch.randn(rows, 3, config.image_size, config.image_size, dtype=model.dtype)
    text_BTD = model.get_input_embeddings()(ids)
    found = model.model.get_image_features(
        pixel_values=pixels,
        vision_feature_layer=config.feature_layer,
        vision_feature_select_strategy="default",
        return_dict=True,
    )
    slots_BT1 = torch.zeros((*ids.shape, 1), dtype=torch.bool)
    joined_BTD = text_BTD.masked_scatter(slots_BT1, torch.cat(list(found.pooler_output)))
    del found
    hidden = model.model.language_model(
        inputs_embeds=joined_BTD,
        attention_mask=None,
        position_ids=torch.arange(ids.shape[1])[None],
        use_cache=False,
    ).last_hidden_state
    logits = model.lm_head(hidden)
    return functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
    )


def _activations(
    config: ModelConfig, plan: FreezePlan, rows: int, checkpointing: bool, dtype: torch.dtype
) -> Any:
    return count_activations(
        config,
        plan,
        tokens=rows * (config.num_image_tokens + TEXT_TOKENS),
        images=rows,
        number_bytes=dtype.itemsize,
        checkpointing=checkpointing,
    )
