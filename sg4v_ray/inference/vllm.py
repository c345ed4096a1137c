# SPDX-License-Identifier: Apache-2.0
"""VLLMEngine: vLLM's AsyncLLM, which refills every row of its batch as soon as one ends.

It lives on an event loop of its own thread: whoever blocks the caller's loop (Ray Data does, when
its output queue is full) must not stop the accelerator.
"""

import asyncio
import itertools
import multiprocessing
import os
import subprocess
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop
from PIL import Image

from sg4v_ray.core.errors import ConfigError, EngineDead, EngineError
from sg4v_ray.inference.engine import Delta, EngineStats, Generation, Request
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.inference.prompt import PromptRules, refuse_beams

T = TypeVar("T")

_GRACE_S: Final = 30.0
"""How long vLLM's processes may take to end by themselves before vLLM kills them. Its own default
of 5 s is too short for a busy machine, and a killed core leaves shared memory behind."""

_Put = Callable[[Delta | EngineError], None]


_KEEP_MEMORY: Final = {
    # glibc gives every large block back to the system and takes it anew, page by page: with
    # tensors of 16 MB, two cores wrote 5 GB/s that way and 24 GB/s into memory that was kept.
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""mallopt(3) for the processes that vLLM starts, in bytes."""


class VLLMEngine:
    """vLLM's engine core in processes of its own, fed from this one."""

    def __init__(self, config: EngineConfig, model: Path, *, threads: int) -> None:
        self.capacity = config.capacity
        self._config = config
        self._model = model
        self._threads = threads
        self._ids = itertools.count()
        self._pumps: dict[Future[None], _Put] = {}
        self._steps = _StepLog()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        """Load the model; see `Engine.start`.

        Raises:
            EngineError: vLLM did not start; its own log says why.
        """
        if self._loop is not None:
            return
        self._rules = PromptRules.read(self._model, max_model_len=self._config.max_model_len)
        os.environ.update(environment(self._threads))  # before vLLM's first import
        # Not that of asyncio: on 2 cores a short prompt had its first token in 102 ms, not 114
        # (medians of 150 through the server, by hand, 2026-11).
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vllm-engine", daemon=True
        )
        self._thread.start()
        building = self._submit(self._build())
        await asyncio.wait([asyncio.wrap_future(building)])
        if error := building.exception():
            await self._stop_loop()
            if isinstance(error, ConfigError):
                raise error
            raise EngineError(f"vLLM did not start: {error}") from error

    async def generate(self, request: Request) -> AsyncGenerator[Delta, None]:
        """Yield what each decode step makes; see `Engine.generate`."""
        if self._loop is None:
            raise EngineError("the engine is not running; call start() first")
        refuse_beams(request.generation, kind="vllm")
        limit = self._rules.check(request)
        deltas: asyncio.Queue[Delta | EngineError] = asyncio.Queue()
        caller = asyncio.get_running_loop()

        def put(item: Delta | EngineError) -> None:
            caller.call_soon_threadsafe(deltas.put_nowait, item)

        pump = self._submit(self._pump(request, limit, put))
        self._pumps[pump] = put
        pump.add_done_callback(partial(_report, put))
        try:
            while True:
                delta = await deltas.get()
                if isinstance(delta, EngineError):
                    raise delta
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            pump.cancel()  # closes vLLM's generator, which aborts the request
            self._pumps.pop(pump, None)

    def stats(self) -> EngineStats:
        """Return what the engine does now, as of the last decode step."""
        present = len(self._pumps)
        running = min(self._steps.running, present)
        return EngineStats(running, present - running, self._steps.count)

    async def close(self) -> None:
        """Abort what runs and end vLLM's processes; a closed engine may be started again."""
        if self._loop is None:
            return
        for pump, put in self._pumps.items():
            pump.cancel()
            put(EngineError("the engine was closed while the request ran"))
        await asyncio.wrap_future(self._submit(self._shut_down()))
        for process in self._processes:  # ended by now, but not yet reaped
            await asyncio.to_thread(process.join)
        await self._stop_loop()

    async def _build(self) -> None:
        try:
            from vllm.engine.arg_utils import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ConfigError(
                f"the engine 'vllm' cannot be imported ({error}); install the packages of "
                "requirements-gpu.lock or requirements-cpu.lock, or use the engine 'hf'"
            ) from error
        settings = arguments(
            self._config,
            self._model,
            num_image_tokens=self._rules.num_image_tokens,
            on_cpu=current_platform.is_cpu(),
        )
        args = AsyncEngineArgs(**settings)
        others = set(multiprocessing.active_children())
        self._llm = AsyncLLM.from_engine_args(args, stat_loggers=[self._steps.attach])
        self._processes = set(multiprocessing.active_children()) - others
        self._guard = _end_with_us(self._processes)

    async def _pump(self, request: Request, limit: int, put: _Put) -> None:
        """Run one request on vLLM's loop and pass on what it makes."""
        prompt: dict[str, Any] = {"prompt_token_ids": list(request.token_ids)}
        if request.images:
            # The squares have the size the processor would make, so its resize does nothing.
            prompt["multi_modal_data"] = {"image": [Image.fromarray(one) for one in request.images]}
        (rendered,) = await self._llm.renderer.render_cmpl_async([prompt])
        name = str(next(self._ids))
        params = _sampling(request.generation, limit, eos_token=self._rules.eos_token)
        async with aclosing(self._llm.generate(rendered, params, name)) as outputs:
            async for output in outputs:
                (made,) = output.outputs
                if made.finish_reason not in (None, "stop", "length"):
                    raise EngineError(f"vLLM ended a request with {made.finish_reason!r}")
                put(Delta(tuple(made.token_ids), made.finish_reason))

    async def _shut_down(self) -> None:
        self._llm.shutdown(timeout=_GRACE_S)
        self._guard.kill()
        self._guard.communicate()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        del self._llm

    def _submit(self, work: Coroutine[Any, Any, T]) -> "Future[T]":
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _stop_loop(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._loop.stop)
        await asyncio.to_thread(self._thread.join)
        self._loop.close()
        self._loop = None


def environment(threads: int) -> dict[str, str]:
    """Return what vLLM reads from the environment only."""
    unless_set = {"VLLM_NO_USAGE_STATS": "1", **_KEEP_MEMORY}
    return {
        # Without these, vLLM's CPU build pins itself to the first cores of the machine, and two
        # engines of one node would share them.
        "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **{name: os.environ.get(name, value) for name, value in unless_set.items()},
    }


def arguments(
    config: EngineConfig, model: Path, *, num_image_tokens: int, on_cpu: bool
) -> dict[str, Any]:
    """Return the fields of vLLM's engine arguments, which are also the flags of its own server."""
    settings = {
        "model": str(model),
        "dtype": config.dtype,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.capacity,
        "tensor_parallel_size": config.tensor_parallel,
        "distributed_executor_backend": _executor(on_cpu, config.tensor_parallel),
        "enforce_eager": not config.compile,
        "kv_cache_memory_bytes": int(config.kv_cache_gb * 2**30) if on_cpu else None,
        "limit_mm_per_prompt": {"image": max(1, config.max_model_len // num_image_tokens)},
        # The system prompt is the same for every row: an eighth of a short prompt. Of it whole
        # blocks are shared, so small ones; vLLM's CPU build would take 128 tokens.
        "enable_prefix_caching": True,
        "block_size": 32 if on_cpu else None,
        # Every image is captioned once: a cache of its features would never be hit.
        "mm_processor_cache_gb": 0,
        "generation_config": "vllm",  # nothing but what a request asks for
        "disable_log_stats": True,
    }
    return {name: value for name, value in settings.items() if value is not None}


def _end_with_us(processes: Iterable[Any]) -> "subprocess.Popen[bytes]":
    """Start a shell that kills these processes when this one is gone, in whatever way.

    vLLM's core does not notice that its parent was killed, and keeps an accelerator's memory from
    the engine that is started in its place. The shell waits for the end of a pipe, which the
    system closes for a process that cannot do so any more.
    """
    wait_and_kill = 'read -r _; kill -9 "$@"'
    pids = [str(one.pid) for one in processes]
    return subprocess.Popen(
        ["sh", "-c", wait_and_kill, "end-with-parent", *pids],
        stdin=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # whoever kills our group must not kill it before it has done so
    )


def _executor(on_cpu: bool, tensor_parallel: int) -> str | None:
    """Name the class that runs the model; None is vLLM's own choice.

    On CPUs vLLM runs it in one process more, and the scheduler's process spins while it waits: on
    two cores, both busy with the model, that cost a quarter of the speed. vLLM does so to bind
    threads to cores, which we do not ask for.
    """
    if not on_cpu or tensor_parallel > 1:
        return None
    return "vllm.v1.executor.uniproc_executor.UniProcExecutor"


def _sampling(how: Generation, limit: int, *, eos_token: int) -> Any:
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=limit,
        temperature=how.temperature,
        top_p=how.top_p,
        repetition_penalty=how.repetition_penalty,
        seed=how.seed if how.temperature > 0 else None,
        stop_token_ids=[eos_token],
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _report(put: _Put, pump: "Future[None]") -> None:
    """Pass on why a request failed, if it did."""
    from vllm.v1.engine.exceptions import EngineDeadError

    if not pump.cancelled() and (error := pump.exception()):
        kind = EngineDead if isinstance(error, EngineDeadError) else EngineError
        put(error if isinstance(error, EngineError) else kind(f"vLLM failed: {error}"))


class _StepLog:
    """What vLLM's scheduler says after each step; has the methods of its StatLoggerBase."""

    def __init__(self) -> None:
        self.running = 0
        self.count = 0

    def attach(self, vllm_config: object, engine_index: int = 0) -> "_StepLog":
        """Give vLLM this object where it expects to make one."""
        return self

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: object = None,
        engine_idx: int = 0,
    ) -> None:
        """Count a step that made tokens."""
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
        if iteration_stats is not None and iteration_stats.num_generation_tokens:
            self.count += 1

    def log_engine_initialized(self) -> None:
        """Nothing to say."""

    def log(self) -> None:
        """Nothing to say."""

    def record_sleep_state(self, is_awake: int, level: int) -> None:
        """Nothing to say."""
