# SPDX-License-Identifier: Apache-2.0
"""A stage's settings as DeepSpeed spells them, and the parameter groups of its optimizer."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
from torch import nn

from sg4v_ray.model.freeze import vision_depth
from sg4v_ray.training.config import StageConfig
from sg4v_ray.training.schedule import SCALE

# DeepSpeed calls torch's collectives by their former names: under ZeRO-3 two lines a step, a rank.
_RENAMED = r"`torch\.distributed\.\w+` is deprecated"
# Values of the published scripts/zero2.json and zero3.json (ShareGPT4Omni/ShareGPT4V@b6f70e9).
_SUB_GROUP_SIZE = 1_000_000_000
_ZERO: Mapping[int, Mapping[str, Any]] = {
    0: {},
    1: {},
    2: {"overlap_comm": True, "contiguous_gradients": True},
    3: {
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": _SUB_GROUP_SIZE,
        "stage3_max_live_parameters": _SUB_GROUP_SIZE,
        "stage3_max_reuse_distance": _SUB_GROUP_SIZE,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def settings(config: StageConfig, *, world_size: int, gpu: bool) -> dict[str, Any]:
    """Return the dict that `deepspeed.initialize` takes.

    The loop sets the learning rate of each step itself, so no scheduler is named, and says which
    micro-batch is a step's last one.
    """
    micro_batches = config.global_batch // config.micro_batch
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch,
        "gradient_accumulation_steps": math.ceil(micro_batches / world_size),
        "zero_optimization": {"stage": config.zero_stage, **_ZERO[config.zero_stage]},
        "bf16": {"enabled": config.dtype == "bfloat16"},
        "gradient_clipping": config.clip_norm or 0.0,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.learning_rate,
                "betas": list(config.betas),
                "eps": config.epsilon,
                "torch_adam": not gpu,  # the fused one needs CUDA
            },
        },
    }


def groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    vision_layer_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Split the trained parameters: matrices decay, biases and norms do not, as in transformers.

    Source:
        Layer-wise decay: BEiT (Bao et al. 2021), appendix; here over the vision tower alone.
    """
    trained = [(name, one) for name, one in named if one.requires_grad]
    depth = 1 + max((vision_depth(name) or 0 for name, _ in trained), default=0)
    made: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, one in trained:
        place = vision_depth(name)
        scale = 1.0 if place is None else (vision_layer_decay or 1.0) ** (depth - place)
        made.setdefault((scale, weight_decay if one.ndim > 1 else 0.0), []).append(one)
    return [
        {"params": params, "weight_decay": decay, SCALE: scale}
        for (scale, decay), params in made.items()
    ]


def initialise(model: nn.Module, config: StageConfig, *, world_size: int, gpu: bool) -> Any:
    """Return DeepSpeed's engine around a model whose frozen parameters are set."""
    # On CPUs DeepSpeed would compile a shared-memory all-reduce that training never calls: two
    # minutes at the first start, and a worker killed meanwhile leaves a lock on which every later
    # one waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", _RENAMED, FutureWarning)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=groups(
            model.named_parameters(),
            weight_decay=config.weight_decay,
            vision_layer_decay=config.vision_layer_decay,
        ),
        config=settings(config, world_size=world_size, gpu=gpu),
    )
    return engine
