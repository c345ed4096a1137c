# SPDX-License-Identifier: Apache-2.0
"""How one model is deployed, and its second version beside it."""

import re
from dataclasses import dataclass, replace
from typing import Final

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.storage import check_root
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.model.conversation import TemplateName
from sg4v_ray.model.geometry import Geometry

INGRESS: Final = "ingress"
"""Name of the deployment that answers HTTP; a model cannot have it."""
DESK: Final = "quotas"
"""Name of the deployment that keeps the books of all keys; a model cannot have it."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Canary:
    """Another version of a model, served beside it with a share of its requests."""

    artifact: Ref
    """Its version is not that of the model; clients may ask for either, as `chat@v2`."""
    weight: float
    """Share of the requests, 0 to 1, until `python -m serve.traffic` sets another."""
    min_replicas: int = 1
    max_replicas: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise ConfigError(f"canary.weight must be between 0 and 1, got {self.weight}")


def canary_id(model_id: str) -> str:
    """Return the name of the deployment of a model's second version."""
    return f"{model_id}.canary"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelDeployment:
    """One model: where it lies, how it is asked, and what it may use."""

    id: str
    """What clients write in `model`."""
    artifact: Ref
    root: str = ""
    """Absolute path or URI below which the artifact lies; `root=...` sets it for all models."""
    template: TemplateName
    geometry: Geometry
    engine: EngineConfig
    generation: Generation
    """How to decode where a request does not say. A seed applies to greedy decoding only:
    sampled requests without a seed get a random one."""
    instruction: str | None = None
    """What is asked when a request has an image and no text; None refuses such a request."""
    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing: float = 32.0
    """Requests a replica that autoscaling aims at; not used when min and max are equal."""
    upscale_delay_s: float = 30.0
    """How long load must last before replicas are added: loading weights takes a minute or more."""
    downscale_delay_s: float = 600.0
    """How long load must be less before replicas are stopped; they end what they have begun."""
    max_surge_percent: int = 0
    """Replicas that a rolling update starts before it stops old ones. 0 needs no more GPUs, but
    what comes meanwhile waits in the queue if there is one replica; 100 needs twice as many."""
    canary: Canary | None = None
    """A second version of this model; see `serve.traffic`."""
    max_ongoing: int = 80
    """Requests in one replica; those beyond the engine's capacity wait inside it."""
    max_queued: int = 64
    """Requests that wait for a replica in one ingress; beyond it clients get 503. Each is one of
    them at first, so no more answers of one call (`n`, images) are asked for at once."""
    num_cpus: float = 1.0
    """CPUs that a replica reserves."""
    num_gpus: float = 0.0
    """GPUs that a replica reserves: `engine.tensor_parallel` of them, or a share of one."""
    threads: int = 1
    """CPU threads of the engine."""

    def __post_init__(self) -> None:
        if not _ID.fullmatch(self.id) or self.id in (INGRESS, DESK):
            raise ConfigError(
                f"model id {self.id!r} must be letters, digits, '.', '_', '-' and not {INGRESS!r} "
                f"or {DESK!r}"
            )
        if not self.root:
            raise ConfigError(
                f"model {self.id!r} has no root; write it in the config or give root=/absolute/path"
            )
        check_root(self.root)
        if self.template == "plain":
            raise ConfigError(
                f"model {self.id!r} has the template 'plain', which has no place for a question; "
                "serve it with 'vicuna_v1' or 'llava_v1'"
            )
        self._check_generation()
        self._check_replicas()
        if self.canary is not None and self.canary.artifact.version == self.artifact.version:
            raise ConfigError(
                f"model {self.id!r}: canary.artifact has the model's own version "
                f"{self.artifact.version!r}; name another one"
            )

    def with_canary(self, canary: Canary) -> "ModelDeployment":
        """Return the deployment of a second version; all but its artifact is the same."""
        return replace(
            self,
            id=canary_id(self.id),
            artifact=canary.artifact,
            min_replicas=canary.min_replicas,
            max_replicas=canary.max_replicas,
            canary=None,
        )

    def _check_generation(self) -> None:
        if self.generation.num_beams > 1:
            raise ConfigError(f"model {self.id!r}: beams cannot be streamed; set num_beams to 1")
        if self.generation.max_tokens >= self.engine.max_model_len:
            raise ConfigError(
                f"model {self.id!r}: generation.max_tokens {self.generation.max_tokens} leaves no "
                f"room for a prompt in engine.max_model_len {self.engine.max_model_len}"
            )

    def _check_replicas(self) -> None:
        if not 1 <= self.min_replicas <= self.max_replicas:
            raise ConfigError(
                f"model {self.id!r}: replicas must satisfy 1 <= min_replicas <= max_replicas, got "
                f"{self.min_replicas} and {self.max_replicas}"
            )
        if self.max_ongoing < self.engine.capacity:
            raise ConfigError(
                f"model {self.id!r}: max_ongoing {self.max_ongoing} is below engine.capacity "
                f"{self.engine.capacity}, so rows of the batch would stay empty"
            )
        if self.upscale_delay_s <= 0 or self.downscale_delay_s <= 0:
            raise ConfigError(
                f"model {self.id!r}: upscale_delay_s and downscale_delay_s must be above 0"
            )
        if not 0 <= self.max_surge_percent <= 100:
            raise ConfigError(
                f"model {self.id!r}: max_surge_percent must be 0 to 100, got "
                f"{self.max_surge_percent}"
            )
        if self.target_ongoing <= 0:
            raise ConfigError(
                f"model {self.id!r}: target_ongoing must be above 0, got {self.target_ongoing:g}"
            )
        if self.num_gpus > 1 and not float(self.num_gpus).is_integer():
            raise ConfigError(
                f"model {self.id!r}: num_gpus must be whole or a share of one, got "
                f"{self.num_gpus:g}"
            )
        if self.max_queued < 1 or self.num_cpus < 0 or self.num_gpus < 0 or self.threads < 1:
            raise ConfigError(
                f"model {self.id!r}: num_cpus and num_gpus must not be negative, max_queued and "
                "threads must be at least 1"
            )
        if self.engine.tensor_parallel > 1 and self.num_gpus != self.engine.tensor_parallel:
            raise ConfigError(
                f"model {self.id!r}: engine.tensor_parallel is {self.engine.tensor_parallel}, so "
                f"num_gpus must be too, got {self.num_gpus:g}"
            )
