# SPDX-License-Identifier: Apache-2.0
"""Which version of a model answers a request, where two are served side by side.

A request for `chat` goes to the canary with the probability of its weight; one for `chat@v2` goes
to that version, whatever the weight. The weight lies with the desk, so that all processes that
answer HTTP draw with the same one (`serve.desk`), and `python -m serve.traffic` changes it.
"""

import random
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from serve import protocol
from serve.protocol import ApiError, bad_request
from serve.request import ChatModel


@dataclass(frozen=True, slots=True)
class Entry:
    """One version of a model."""

    model: ChatModel
    created: int
    fingerprint: str

    @property
    def deployment(self) -> str:
        """Return the name by which the backend knows it."""
        return self.model.config.id

    @property
    def version(self) -> str:
        """Return the artifact, as `vlm@v2`."""
        return str(self.model.config.artifact)

    def card(self, model_id: str) -> dict[str, Any]:
        """Return what /v1/models says of it."""
        max_len = self.model.config.engine.max_model_len
        return protocol.model_card(model_id, created=self.created, max_model_len=max_len)

    def head(self, model_id: str) -> dict[str, Any]:
        """Return the fields that every object of one answer shares."""
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model_id,
            "system_fingerprint": self.fingerprint,
        }


class Traffic(Protocol):
    """Whoever knows how much of a model's requests its canary gets."""

    async def weights(self) -> Mapping[str, float]:
        """Return the weight of each canary, 0 to 1, by model."""

    async def shift(self, model_id: str, weight: float) -> None:
        """Set one for all processes from now on."""


@dataclass(slots=True)
class Fixed:
    """Weights of this process alone."""

    found: dict[str, float] = field(default_factory=dict)

    async def weights(self) -> Mapping[str, float]:
        """Return them."""
        return self.found

    async def shift(self, model_id: str, weight: float) -> None:
        """Set one."""
        self.found[model_id] = weight


class Versions:
    """All models, and the canaries of some."""

    def __init__(
        self, stable: Mapping[str, Entry], canaries: Mapping[str, Entry], traffic: Traffic
    ) -> None:
        self.stable, self.canaries, self._traffic = stable, canaries, traffic
        self._exact = {
            f"{model_id}@{one.model.config.artifact.version}": one
            for model_id in canaries
            for one in (stable[model_id], canaries[model_id])
        }

    def every(self) -> list[Entry]:
        """Return all versions of all models."""
        return [*self.stable.values(), *self.canaries.values()]

    def cards(self) -> list[dict[str, Any]]:
        """Return what /v1/models says: models, and versions that can be asked for by name."""
        named = {**self.stable, **self._exact}
        return [one.card(model_id) for model_id, one in named.items()]

    def named(self, model_id: str) -> Entry:
        """Return what stands under a name, without a draw.

        Raises:
            ApiError: 404, nothing does.
        """
        found = self._exact.get(model_id) or self.stable.get(model_id)
        if found is None:
            raise ApiError(
                404,
                f"no model {model_id!r} here; GET /v1/models lists what there is",
                param="model",
                code="model_not_found",
            )
        return found

    async def draw(self, model_id: str) -> Entry:
        """Return the version that answers a request.

        Raises:
            ApiError: 404, there is no such model.
        """
        found = self.named(model_id)
        if model_id not in self.canaries:
            return found
        weight = (await self._traffic.weights()).get(model_id, 0.0)
        return self.canaries[model_id] if random.random() < weight else found

    async def table(self) -> dict[str, Any]:
        """Return the weights, as /admin/traffic tells them."""
        weights = await self._traffic.weights() if self.canaries else {}
        data = [
            {
                "model": model_id,
                "stable": self.stable[model_id].version,
                "canary": canary.version,
                "weight": weights.get(model_id, 0.0),
            }
            for model_id, canary in self.canaries.items()
        ]
        return {"object": "list", "data": data}

    async def shift(self, model_id: str, weight: float) -> None:
        """Give the canary of a model another weight.

        Raises:
            ApiError: 400, it has no canary.
        """
        self.named(model_id)
        if model_id not in self.canaries:
            known = ", ".join(self.canaries) or "no model"
            raise bad_request(f"model: {model_id!r} has no canary; {known} has one", param="model")
        await self._traffic.shift(model_id, weight)
