# SPDX-License-Identifier: Apache-2.0
"""The server in one process, without Ray: a captioner on the fake engine behind the true routes."""

import base64
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from io import BytesIO
from pathlib import Path

from PIL import Image

from serve.answer import Piece, answer
from serve.config import Limits
from serve.deployment import ModelDeployment
from serve.protocol import ApiError
from serve.request import ChatModel, Job
from serve.routes import Routes
from serve.versions import Entry
from sg4v_ray.core.artifact import Ref, begin, commit
from sg4v_ray.core.lease import hold
from sg4v_ray.core.storage import Storage
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.fake import FakeEngine
from sg4v_ray.inference.open import EngineConfig

ENGINE = EngineConfig(kind="fake", capacity=4, max_model_len=400)
DEPLOYMENT = ModelDeployment(
    id="captioner",
    artifact=Ref(name="captioner"),
    root="/nowhere",
    template="vicuna_v1",
    geometry="pad",
    engine=ENGINE,
    generation=Generation(max_tokens=60),
    instruction="Describe it.",
)
LIMITS = Limits(max_body_bytes=400_000, max_caption_images=3)


class InProcess:
    """A backend in the event loop of the test client; it remembers what it was asked."""

    def __init__(self, folder: Path, model: ChatModel) -> None:
        self.model = model
        self.engine = FakeEngine(model.config.engine, folder)
        self.jobs: list[Job] = []
        self.error: Exception | None = None
        """Raised after the first piece of an answer."""
        self.refusal: ApiError | None = None
        self.refuses_from = 0
        """How many jobs are taken before the refusal."""
        self.is_ready = True

    async def stream(self, model_id: str, job: Job) -> AsyncGenerator[Piece, None]:
        self.jobs.append(job)
        if self.refusal is not None and len(self.jobs) > self.refuses_from:
            raise self.refusal
        await self.engine.start()
        found = answer(self.engine, job, text=self.model.conversation.stream(), timeout_s=5)
        async with aclosing(found) as opened:
            async for piece in opened:
                yield piece
                if self.error is not None:
                    raise self.error

    async def complete(self, model_id: str, job: Job) -> Piece:
        found = [piece async for piece in self.stream(model_id, job)]
        return replace(found[-1], text="".join(one.text for one in found))

    async def ready(self) -> dict[str, bool]:
        return {self.model.config.id: self.is_ready}


def open_model(folder: Path) -> ChatModel:
    return ChatModel.open(DEPLOYMENT, folder)


def make_routes(backend: InProcess, limits: Limits = LIMITS) -> Routes:
    entry = Entry(backend.model, created=5, fingerprint="0123456789abcdef")
    return Routes({backend.model.config.id: entry}, backend, limits)


def routes_over(folder: Path, limits: Limits = LIMITS) -> Routes:
    """Return routes with a backend that nobody looks at."""
    return make_routes(InProcess(folder, open_model(folder)), limits)


def png(colour: str) -> bytes:
    data = BytesIO()
    Image.new("RGB", (30, 20), colour).save(data, "PNG")
    return data.getvalue()


def uri(colour: str) -> str:
    return "data:image/png;base64," + base64.b64encode(png(colour)).decode()


def commit_model(root: Path, ref: Ref, folder: Path) -> None:
    """Make a model folder an artifact."""
    storage, config = Storage(str(root)), {"made": f"for a test, {ref}"}
    home = begin(storage, ref, config)
    with hold(home) as lease:
        digests = home.upload(folder, "model")
        commit(storage, ref, config=config, inputs={}, counts={}, digests=digests, lease=lease)
