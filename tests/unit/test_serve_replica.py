# SPDX-License-Identifier: Apache-2.0
"""A replica without Ray: Serve only calls its methods."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

import serve.replica
from serve.deployment import ModelDeployment
from serve.replica import Replica, Served
from serve.request import Job
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import EngineError, StorageError
from sg4v_ray.core.storage import Storage
from sg4v_ray.inference.engine import Delta, Generation, Request
from sg4v_ray.inference.open import EngineConfig

# Serve awaits __del__; the garbage collector calls it a second time and does not.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'Replica.__del__'")

JOB = Job(
    Request(token_ids=(1, 70, 71), images=(), generation=Generation(max_tokens=5)),
    stop=(),
    num_prompt_tokens=3,
)


@pytest.fixture
def served(tmp_path: Path, tiny_model: Path) -> Served:
    config = ModelDeployment(
        id="chat",
        artifact=Ref(name="vlm"),
        root=str(tmp_path),
        template="vicuna_v1",
        geometry="pad",
        engine=EngineConfig(kind="fake", max_model_len=400),
        generation=Generation(max_tokens=60),
    )
    digests = Storage(str(tmp_path)).upload(tiny_model, "vlm/v1/model")
    return Served(config=config, digests=digests, fingerprint="f", created=0)


def with_replica(
    served: Served, check: Callable[[Replica], Coroutine[Any, Any, None]], timeout_s: float = 5
) -> None:
    async def run() -> None:
        replica = Replica.__new__(Replica)
        await replica.__init__(served, cache="/nowhere", timeout_s=timeout_s)  # type: ignore[misc]
        await check(replica)
        await replica.__del__()

    asyncio.run(run())


def test_the_whole_answer_is_the_sum_of_its_pieces(served: Served) -> None:
    async def check(replica: Replica) -> None:
        whole = await replica.complete(JOB)
        pieces = [piece async for piece in replica.stream(JOB)]
        assert whole.text == "".join(one.text for one in pieces) != ""
        assert (whole.num_tokens, whole.finish_reason) == (5, "length")
        assert replica.stats().running == 0

    with_replica(served, check)


def test_a_dead_engine_is_unhealthy_from_its_first_error_on(served: Served) -> None:
    async def check(replica: Replica) -> None:
        await replica.check_health()
        await replica._engine.close()
        with pytest.raises(EngineError):
            await replica.complete(JOB)
        with pytest.raises(EngineError):
            await replica.check_health()

    with_replica(served, check)


def test_an_engine_that_recovers_is_healthy_again(served: Served) -> None:
    async def check(replica: Replica) -> None:
        await replica._engine.close()
        with pytest.raises(EngineError):
            await replica.complete(JOB)
        await replica._engine.start()
        await replica.check_health()
        steps = replica.stats().decode_steps
        await replica.check_health()
        assert replica.stats().decode_steps == steps  # a healthy engine is left alone

    with_replica(served, check)


def test_a_stuck_engine_is_unhealthy_and_one_that_works_on_is_not(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serve.replica, "_PROBE_S", 0.1)

    async def never(request: Request) -> AsyncGenerator[Delta, None]:
        await asyncio.Event().wait()
        yield Delta(())

    async def check(replica: Replica) -> None:
        works, replica._engine.generate = replica._engine.generate, never  # type: ignore[method-assign]
        with pytest.raises(TimeoutError):
            await replica.complete(JOB)
        with pytest.raises(TimeoutError):
            await replica.check_health()
        replica._engine.generate = works  # type: ignore[method-assign]
        await replica.complete(JOB)
        replica._engine.generate = never  # type: ignore[method-assign]
        await replica.check_health()  # it has made tokens since, so it is not asked for one

    with_replica(served, check, timeout_s=0.1)


def test_weights_that_changed_after_the_commit_are_not_served(served: Served) -> None:
    (Path(served.config.root) / "vlm/v1/model/config.json").write_text("{}")
    with pytest.raises(StorageError, match="changed after it was committed"):
        served.localise("/nowhere")
