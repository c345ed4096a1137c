# SPDX-License-Identifier: Apache-2.0
"""From an engine's config to an engine; each engine is imported only when it is asked for."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.inference.engine import Engine


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Which engine runs a model, and how."""

    kind: Literal["hf", "vllm", "fake"]
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    capacity: int = 64
    """Rows of the decoding batch."""
    max_model_len: int = 2048
    """Prompt with expanded image tokens plus new tokens; vLLM sizes its cache by it."""
    tensor_parallel: int = 1
    """GPUs of one node that share the model; vLLM only."""
    compile: bool = True
    """Let vLLM compile and capture graphs: slower to start, faster to run."""
    kv_cache_gb: float = 1.0
    """Memory for keys and values of vLLM's CPU build; GPUs size it by themselves."""
    latency_s: float = 0.0
    """FakeEngine only: seconds a decode step takes."""
    tokens_per_step: int = 1
    """FakeEngine only: tokens of a row that a decode step makes."""
    poison: int | None = None
    """FakeEngine only: an image whose first pixel value (0 to 255) is this ends the process, as
    an image does that makes a real engine crash."""

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ConfigError(f"capacity must be at least 1, got {self.capacity}")
        if self.kind != "vllm" and self.tensor_parallel != 1:
            raise ConfigError(
                f"tensor_parallel is {self.tensor_parallel} but the engine is {self.kind!r}; "
                "only 'vllm' splits a model over GPUs"
            )

    @property
    def identity(self) -> dict[str, str | int]:
        """The part that may change a caption; the rest is speed and may change on a resume."""
        # A shorter context ends answers earlier.
        return {"kind": self.kind, "dtype": self.dtype, "max_model_len": self.max_model_len}


def open_engine(config: EngineConfig, model: Path, *, threads: int) -> Engine:
    """Return an engine for a model folder in the llava-hf layout; call `start` before use.

    Args:
        config: which engine, and how.
        model: folder with config.json, safetensors, tokenizer and processor.
        threads: CPU threads that the engine may use.
    """
    if config.kind == "vllm":
        from sg4v_ray.inference.vllm import VLLMEngine

        return VLLMEngine(config, model, threads=threads)
    if config.kind == "hf":
        from sg4v_ray.inference.hf import HFEngine

        return HFEngine(config, model, threads=threads)
    from sg4v_ray.inference.fake import FakeEngine

    return FakeEngine(config, model)
