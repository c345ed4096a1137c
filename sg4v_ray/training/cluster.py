# SPDX-License-Identifier: Apache-2.0
"""The GPUs that a plan is made for, and what they and a teacher cost: arithmetic, no detection."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.price import PriceTable

GB: Final = 1e9
USABLE: Final = 0.9
"""Share of a GPU's memory that may be planned with. Ours: the CUDA context and NCCL take 1 to 2 GB,
and the allocator leaves gaps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU."""

    memory_gb: float
    tflops: float
    """Dense bfloat16, without sparsity."""


KNOWN_GPUS: Final[Mapping[str, Gpu]] = MappingProxyType(
    {
        # NVIDIA A100 Tensor Core GPU data sheet (2021): BFLOAT16 Tensor Core 312.
        "A100-40G": Gpu(memory_gb=40, tflops=312),
        "A100-80G": Gpu(memory_gb=80, tflops=312),
        # NVIDIA H100 Tensor Core GPU data sheet (2023), SXM: 1,979 with sparsity, which doubles it.
        "H100-80G": Gpu(memory_gb=80, tflops=989),
        # NVIDIA L40S data sheet (2023): BFLOAT16 Tensor Core 362.05 | 733 with sparsity.
        "L40S-48G": Gpu(memory_gb=48, tflops=362),
    }
)


def tflops_of(device: str) -> float | None:
    """Return the dense bfloat16 TFLOP/s of a device as CUDA names it, if its kind is known.

    H100 cards for PCIe are slower than those that are known here.
    """
    words = device.replace("-", " ").split()
    if "H100" in words and "HBM3" not in words:
        return None
    known = (one.tflops for name, one in KNOWN_GPUS.items() if name.split("-")[0] in words)
    return next(known, None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """The GPUs to plan with."""

    gpu: str = "A100-80G"
    """A known kind, or any name together with `memory_gb` and `tflops`."""
    gpus_per_node: int = 8
    nodes: int = 2
    memory_gb: float | None = None
    """Memory of a GPU, where it is not the data sheet's."""
    tflops: float | None = None
    """Dense bfloat16 TFLOP/s of a GPU, where it is not the data sheet's."""
    gpu_hour_usd: float | None = None
    """What one GPU costs an hour."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "nodes", "memory_gb", "tflops", "gpu_hour_usd"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0, got {value}")
        if self.gpu not in KNOWN_GPUS and (self.memory_gb is None or self.tflops is None):
            raise ConfigError(
                f"no figures for the GPU {self.gpu!r}; known are {', '.join(KNOWN_GPUS)}. For "
                "another, give memory_gb and tflops (dense bfloat16) from its data sheet"
            )

    @property
    def kind(self) -> Gpu:
        """The figures of one GPU."""
        known = KNOWN_GPUS.get(self.gpu)
        memory_gb, tflops = self.memory_gb, self.tflops
        if known is not None:
            memory_gb, tflops = memory_gb or known.memory_gb, tflops or known.tflops
        assert memory_gb is not None  # checked at construction
        assert tflops is not None
        return Gpu(memory_gb=memory_gb, tflops=tflops)

    @property
    def gpus(self) -> int:
        """All of them: one training process each."""
        return self.gpus_per_node * self.nodes

    @property
    def usable_bytes(self) -> float:
        """Bytes of one GPU that may be planned with."""
        return USABLE * self.kind.memory_gb * GB

    def usd(self, hours: float) -> float | None:
        """Return what the whole cluster costs; None without a price."""
        return None if self.gpu_hour_usd is None else hours * self.gpus * self.gpu_hour_usd


@dataclass(frozen=True, kw_only=True, slots=True)
class Captioning:
    """What captioning takes."""

    images: int
    images_per_gpu_s: float
    gpus: int
    hours: float
    usd: float | None


def captioning(images: int, *, images_per_gpu_s: float, cluster: Cluster) -> Captioning:
    """Return what captioning takes at a rate that was measured, or is assumed.

    Raises:
        ConfigError: the rate is not above 0.
    """
    if images_per_gpu_s <= 0:
        raise ConfigError(f"images_per_gpu_s must be above 0, got {images_per_gpu_s:g}")
    hours = images / (images_per_gpu_s * cluster.gpus) / 3600
    return Captioning(
        images=images,
        images_per_gpu_s=images_per_gpu_s,
        gpus=cluster.gpus,
        hours=hours,
        usd=cluster.usd(hours),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class TeacherCaptions:
    """What captions of a paid teacher take."""

    images: int
    prompt_tokens: int
    """Image tokens included."""
    completion_tokens: int
    usd: float | None


def teacher_captions(
    images: int, *, prompt_tokens: float, completion_tokens: float, prices: PriceTable | None
) -> TeacherCaptions:
    """Return what captions of a teacher take.

    Args:
        prompt_tokens: mean of a request, image tokens included.
        completion_tokens: mean of an answer.
        prices: None where nobody gave them; then there are no dollars.
    """
    asked, answered = round(images * prompt_tokens), round(images * completion_tokens)
    return TeacherCaptions(
        images=images,
        prompt_tokens=asked,
        completion_tokens=answered,
        usd=None if prices is None else prices.usd(asked, answered),
    )
