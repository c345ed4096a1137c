# SPDX-License-Identifier: Apache-2.0
"""Closing and dying: every request learns of it, and nothing is left behind."""

import asyncio
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from sg4v_ray.core.errors import ConfigError, EngineError
from sg4v_ray.inference.engine import Engine, Pixels, Request, complete
from sg4v_ray.inference.open import EngineConfig, open_engine

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Ask = Callable[..., Request]


async def _speaking(engine: Engine, requests: list[Request]) -> list[asyncio.Future[Any]]:
    """Start requests and return when the first token was made."""
    tasks = [asyncio.ensure_future(complete(engine, one)) for one in requests]
    before = engine.stats().decode_steps
    while engine.stats().decode_steps == before:
        await asyncio.sleep(0.001)
    return tasks


def _vllm_processes() -> list[psutil.Process]:
    """Of this test session; vLLM names them, and Linux cuts the names."""
    children = psutil.Process().children(recursive=True)
    return [one for one in children if one.name().startswith("VLLM::")]


def _long(ask: Ask, pictures: list[Pixels], count: int) -> list[Request]:
    return [ask(one, max_tokens=400, repetition_penalty=1.5) for one in pictures[:count]]


def test_closing_fails_what_runs_and_waits_ends_all_processes_and_may_be_repeated(
    engine: Engine, pictures: list[Pixels], ask: Ask, run: Run
) -> None:
    is_vllm = type(engine).__name__ == "VLLMEngine"
    processes = _vllm_processes() if is_vllm else []  # others' may run beside it
    assert bool(processes) == is_vllm

    async def close_in_the_middle() -> list[Any]:
        tasks = await _speaking(engine, _long(ask, pictures, engine.capacity + 2))
        await engine.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    outcomes = run(close_in_the_middle())
    assert all(isinstance(one, EngineError) and "closed" in str(one) for one in outcomes)
    assert engine.stats().running == engine.stats().waiting == 0
    run(engine.close())
    with pytest.raises(EngineError, match="call start"):
        run(complete(engine, ask(pictures[0])))
    assert [one for one in processes if one.is_running()] == []


def test_a_closed_engine_starts_again(
    engine: Engine, pictures: list[Pixels], ask: Ask, run: Run
) -> None:
    assert len(run(complete(engine, ask(pictures[0], max_tokens=3))).token_ids) == 3


@pytest.mark.vllm
@pytest.mark.timeout(900)
def test_a_killed_core_is_an_engine_error_for_all_not_a_hang(
    engines: dict[str, Engine], pictures: list[Pixels], ask: Ask, run: Run
) -> None:
    engine = engines["vllm"]
    run(engine.start())
    processes = _vllm_processes()

    async def kill_in_the_middle() -> list[Any]:
        tasks = await _speaking(engine, _long(ask, pictures, 2))
        (core,) = (one for one in processes if "EngineCor" in one.name())
        core.kill()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert all(isinstance(one, EngineError) for one in run(kill_in_the_middle()))
    with pytest.raises(EngineError):
        run(complete(engine, ask(pictures[0])))
    run(engine.close())
    _, left = psutil.wait_procs(processes, timeout=60)
    assert left == []


_STARTS_AND_WAITS = """
import asyncio, sys
from pathlib import Path
from sg4v_ray.inference.open import EngineConfig, open_engine

async def run():
    config = EngineConfig(kind="vllm", dtype="float32", max_model_len=512, compile=False)
    await open_engine(config, Path(sys.argv[1]), threads=1).start()
    print("ready", flush=True)
    await asyncio.Event().wait()

if __name__ == "__main__":
    asyncio.run(run())
"""


@pytest.mark.vllm
@pytest.mark.timeout(300)
def test_a_killed_process_takes_its_engines_core_with_it(
    model_folder: Path, tmp_path: Path
) -> None:
    # An orphan would keep the accelerator's memory from the engine that Ray starts instead.
    script = tmp_path / "starts_and_waits.py"
    script.write_text(_STARTS_AND_WAITS)
    owner = subprocess.Popen(
        [sys.executable, str(script), str(model_folder)], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    assert any(line.strip() == "ready" for line in owner.stdout)
    children = psutil.Process(owner.pid).children(recursive=True)
    assert [one for one in children if one.name().startswith("VLLM::")]
    owner.kill()
    owner.communicate()
    _, left = psutil.wait_procs(children, timeout=30)
    assert left == []


@pytest.mark.parametrize("kind", ["fake", "hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_a_context_longer_than_the_models_is_refused_before_loading(
    kind: Any, model_folder: Any, run: Run
) -> None:
    config = EngineConfig(kind=kind, dtype="float32", max_model_len=4096)
    with pytest.raises(ConfigError, match=r"set EngineConfig\.max_model_len to at most 512"):
        run(open_engine(config, model_folder, threads=1).start())


@pytest.mark.parametrize("kind", ["fake", "hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def test_a_folder_without_a_model_is_refused_by_name(kind: Any, tmp_path: Any, run: Run) -> None:
    engine = open_engine(EngineConfig(kind=kind), tmp_path, threads=1)
    with pytest.raises(ConfigError, match=f"{tmp_path} is no model folder"):
        run(engine.start())
    run(engine.close())
