# SPDX-License-Identifier: Apache-2.0
"""A stage's settings as DeepSpeed spells them, and the parameter groups of its optimizer."""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import deepspeed
import torch
from torch import nn

from sg4v_ray.model.freeze import vision_depth
from sg4v_ray.model.weights import to_dtype
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
                # DeepSpeed's own fused one is compiled at the first start: it needs nvcc, and a
                # worker killed meanwhile leaves a lock on which every later one waits for ever.
                "torch_adam": True,
                **({"fused": True} if gpu else {}),
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


def initialise(model: nn.Module, stage: StageConfig, *, world_size: int, gpu: bool) -> Any:
    """Return DeepSpeed's engine around a model whose frozen parameters are set.

    Args:
        model: on the CPU, with weights of the stage's dtype; under ZeRO-3 of any.
        stage: what is trained and how.
        world_size: number of ranks.
        gpu: whether each rank has one.
    """
    # On CPUs DeepSpeed would compile a shared-memory all-reduce that training never calls: two
    # minutes at the first start, and a worker killed meanwhile leaves a lock on which every later
    # one waits for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    warnings.filterwarnings("ignore", _RENAMED, FutureWarning)
    config = settings(stage, world_size=world_size, gpu=gpu)
    trained = groups(  # before sharding, which leaves no shapes
        model.named_parameters(),
        weight_decay=stage.weight_decay,
        vision_layer_decay=stage.vision_layer_decay,
    )
    if stage.zero_stage == 3:
        _shard(model, config, to_dtype(stage.dtype))
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    if stage.zero_stage == 3:
        move_buffers(model, engine.device)
    return engine


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Bring what is no parameter (positions, frequencies) to the device.

    DeepSpeed does so for a model that it moves itself, not for one that is sharded already.
    """
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def _shard(model: nn.Module, config: dict[str, Any], dtype: torch.dtype) -> None:
    """Leave each rank its part of every parameter.

    DeepSpeed would do the same later, but first put the whole model on every GPU, and on CPUs
    write rank 0's weights into every other rank's: into a copy, where files are mapped.
    """
    first: Any = None
    for parameter in model.parameters():
        # The one whole parameter of this rank's own; DeepSpeed frees it when it has its part.
        parameter.data = parameter.data.to(dtype, copy=True)
        if first is None:
            first = parameter
            deepspeed.zero.Init(module=nn.ParameterList([first]), config_dict_or_path=config)
        else:
            first.convert_to_zero_parameters(param_list=[parameter])
