# SPDX-License-Identifier: Apache-2.0
"""Real Ray Serve over HTTP with fake engines, and clients that keep it busy."""

import asyncio
import base64
import hashlib
import json
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import ray
import yaml
from PIL import Image
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from serve.app import build
from sg4v_ray.core.artifact import Ref
from tests.unit.serve_site import commit_model
from tests.waiting import free_port

WAIT_S = 60.0
CHAT = "/v1/chat/completions"
MODEL: dict[str, Any] = {
    "id": "chat",
    "artifact": {"name": "vlm", "version": "v1"},
    "template": "vicuna_v1",
    "geometry": "pad",
    "engine": {"kind": "fake", "capacity": 8, "max_model_len": 400},
    "generation": {"max_tokens": 60},
    "instruction": "Describe it.",
    "max_ongoing": 8,
    "max_queued": 64,
    "num_cpus": 0.1,
}


@dataclass(frozen=True)
class Server:
    """An application that runs."""

    url: str
    root: Path
    folder: Path

    def deploy(self, **config: Any) -> None:
        """Run a config, or change what runs to it; returns when it does."""
        file = self.folder / "serve.yaml"
        whole = {"auth": {"anonymous": True}, "ingress_cpus": 0.1, "desk_cpus": 0.1, **config}
        file.write_text(yaml.safe_dump(whole))
        app = build({"config": str(file), "root": str(self.root)})
        serve.run(app, name="sg4v", route_prefix="/")

    def replicas(self, deployment: str) -> int:
        """Return how many replicas of a deployment run."""
        found = serve.status().applications["sg4v"].deployments[deployment].replica_states
        return int(found.get("RUNNING", 0))

    def busy(self, model_id: str = "chat") -> int:
        """Return how many requests the engine of a model of one replica has."""
        handle = serve.get_deployment_handle(model_id, app_name="sg4v")
        stats = handle.stats.remote().result(timeout_s=WAIT_S)
        return int(stats.running + stats.waiting)

    def client(self, **more: Any) -> httpx.AsyncClient:
        """Return a client with room for a crowd."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        return httpx.AsyncClient(base_url=self.url, timeout=WAIT_S, limits=limits, **more)


@contextmanager
def running(folder: Path, model: Path, *, cpus: int = 8) -> Iterator[Server]:
    """Start Ray and Serve; the caller deploys. A model lies there in two versions."""
    for version in ("v1", "v2"):
        commit_model(folder / "root", Ref(name="vlm", version=version), model)
    port = free_port()
    ray.init("local", num_cpus=cpus, include_dashboard=False, log_to_driver=False)
    try:
        http = HTTPOptions(host="127.0.0.1", port=port, request_timeout_s=120)
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http)
        yield Server(f"http://127.0.0.1:{port}", folder / "root", folder)
    finally:
        serve.shutdown()
        ray.shutdown()


def keys(folder: Path, *entries: dict[str, Any]) -> dict[str, str]:
    """Write a file of keys, `key` of each entry hashed; return the `auth` of a config."""
    rows = [
        {**{k: v for k, v in one.items() if k != "key"}, "sha256": sha256(one["key"])}
        for one in entries
    ]
    file = folder / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": rows}))
    return {"keys_file": str(file)}


def sha256(key: str) -> str:
    """Return what a file of keys holds of one."""
    return hashlib.sha256(key.encode()).hexdigest()


def ask(
    words: str, *, model: str = "chat", image: str | None = None, **more: Any
) -> dict[str, Any]:
    """Return the body of a chat request."""
    parts: list[dict[str, Any]] = [{"type": "text", "text": words}]
    if image is not None:
        parts.append({"type": "image_url", "image_url": {"url": image}})
    return {"model": model, "messages": [{"role": "user", "content": parts}], **more}


def photo(width: int, height: int, *, seed: int, kind: str = "JPEG", **how: Any) -> str:
    """Return a `data:` URI of noise over a gradient, which compresses about as a photo does."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    pixels = np.clip(ramp + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
    data = BytesIO()
    Image.fromarray(pixels).save(data, kind, **how)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(data.getvalue()).decode()


def counted(name: str, **labels: str) -> float:
    """Return the sum of a figure over its label sets, as Prometheus would scrape it now."""
    (node,) = ray.nodes()
    text = httpx.get(f"http://127.0.0.1:{node['MetricsExportPort']}/metrics").text
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    lines = [
        line
        for line in text.splitlines()
        if line.startswith(f"ray_sg4v_serve_{name}{{") and all(one in line for one in wanted)
    ]
    # Of a figure that nobody exports no question is answered with yes.
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines) if lines else math.nan


def processes(*names: str) -> list[psutil.Process]:
    """Return the processes with such names; those of Serve that requests go through."""
    names = names or ("ProxyActor", "HAProxyManager", "bin/haproxy", "ServeReplica")
    return [
        one
        for one in psutil.Process().children(recursive=True)
        if any(name in " ".join(one.cmdline()) for name in names)
    ]


@dataclass
class Seen:
    """What came of many requests."""

    statuses: dict[int, int] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    """From sending to the last byte, of those that were answered with 200."""
    refusals: list[httpx.Response] = field(default_factory=list)
    answers: list[Any] = field(default_factory=list)

    def add(self, response: httpx.Response, seconds: float) -> None:
        """Note one."""
        self.statuses[response.status_code] = self.statuses.get(response.status_code, 0) + 1
        if response.status_code == 200:
            self.seconds.append(seconds)
            self.answers.append(response.json())
        else:
            self.refusals.append(response)

    def percentile(self, share: float) -> float:
        """Return a percentile of the seconds."""
        return float(np.percentile(self.seconds, share))


async def post(client: httpx.AsyncClient, body: dict[str, Any], seen: Seen, **more: Any) -> None:
    """Send one request and note what came of it."""
    began = time.monotonic()
    response = await client.post(CHAT, json=body, **more)
    seen.add(response, time.monotonic() - began)


@asynccontextmanager
async def load(
    client: httpx.AsyncClient, seen: Seen, *, users: int, **more: Any
) -> AsyncIterator[None]:
    """Keep users busy, each with one request at a time, while the body runs."""
    over = asyncio.Event()

    async def user(number: int) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            await post(client, ask(f"Say {number} {turn}", **more), seen)

    tasks = [asyncio.create_task(user(number)) for number in range(users)]
    try:
        yield
    finally:
        over.set()
        await asyncio.gather(*tasks)


async def in_thread(condition: Callable[[], Any]) -> Any:
    """Wait in a thread, so that users of the same loop go on."""
    return await asyncio.to_thread(condition)


async def at_rate(per_s: float, seconds: float, send: Callable[[int], Awaitable[None]]) -> None:
    """Send at a rate, whatever becomes of what was sent: an open loop."""
    clock = asyncio.get_running_loop().time
    began = clock()
    async with asyncio.TaskGroup() as group:
        for number in range(int(per_s * seconds)):
            await asyncio.sleep(max(0.0, began + number / per_s - clock()))
            group.create_task(send(number))


def lines_of(text: str) -> list[Any]:
    """Return the events of a stream; the last may be [DONE]."""
    found = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in found]
