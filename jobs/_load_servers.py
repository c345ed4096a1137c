# SPDX-License-Identifier: Apache-2.0
"""The two servers of the serving bench: ours, and vLLM's own around the same engine.

Both run with the niceness that Ray gives its workers, and with the same threads for the model.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import psutil
import yaml

from jobs import _bench_site as site
from jobs import _load_site as load_site
from jobs._load_client import Endpoint
from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.inference.vllm import arguments, environment

ENGINE: Final = EngineConfig(
    kind="vllm", dtype="float32", capacity=32, max_model_len=512, compile=False
)
MODEL_ID: Final = "bench"
_RAYS_NICENESS: Final = 15
_START_S: Final = 300.0
_STOP_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison."""

    endpoint: Endpoint
    process: psutil.Process | None = None
    """None of a server that others run."""

    def cpu_s(self) -> dict[int, tuple[str, float]]:
        """Return CPU seconds so far of each of its processes: pid to name and seconds."""
        if self.process is None:
            return {}
        found = {}
        for one in (self.process, *self.process.children(recursive=True)):
            with suppress(psutil.Error):  # ended meanwhile
                times = one.cpu_times()
                found[one.pid] = (_name(one.cmdline()), times.user + times.system)
        return found


def _name(argv: Sequence[str]) -> str:
    """Return what a process is called: Ray and vLLM set titles, other programs have arguments."""
    first, *others = " ".join(argv).split() or ["?"]
    return " ".join([Path(first).name, *others[:2]])[:60]


@contextmanager
def ours(root: Path, *, threads: int) -> Iterator[Side]:
    """Run `python -m serve` over the bench's model."""
    port, file = _free_port(), root / "serve.yaml"
    file.write_text(yaml.safe_dump(config(root, port, threads=threads)))
    # Never the Ray of somebody else on this machine.
    settings = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0"}
    argv = [sys.executable, "-m", "serve", f"config={file}"]
    with _started("ours", argv, settings, f"http://127.0.0.1:{port}", "/health/ready", root) as one:
        yield one


def config(root: Path, port: int, *, threads: int) -> dict[str, Any]:
    """Return the config of our server over the bench's model."""
    model = {
        "id": MODEL_ID,
        "artifact": asdict(site.CAPTIONER),
        "root": str(root),
        "template": "vicuna_v1",
        "geometry": "pad",
        "engine": asdict(ENGINE),
        "generation": {"max_tokens": 200},
        "max_ongoing": 2 * ENGINE.capacity,
        "threads": threads,
    }
    # Ray counts CPUs and does not bind to them; on two cores all of this must fit.
    return {
        "auth": {"anonymous": True},
        "port": port,
        "ingress_cpus": 0.5,
        "models": [{**model, "num_cpus": 1.0}],
    }


@contextmanager
def bare(root: Path, *, threads: int) -> Iterator[Side]:
    """Run vLLM's own server over the same folder, with the engine's settings."""
    port = _free_port()
    # Not `vllm serve`, which looks for the package `vllm`: the CPU build is named otherwise.
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    flags = bare_flags(root / site.CAPTIONER.path / "model", port)
    argv = ["nice", "-n", str(_RAYS_NICENESS), *server, *flags]
    url = f"http://127.0.0.1:{port}"
    with _started("bare", argv, environment(threads), url, "/health", root) as one:
        yield one


def bare_flags(folder: Path, port: int) -> list[str]:
    """Return the arguments of vLLM's server that say what our engine says to vLLM."""
    settings = arguments(
        ENGINE, folder, num_image_tokens=load_site.MODEL.num_image_tokens, on_cpu=True
    )
    settings |= {
        "served_model_name": MODEL_ID,
        "host": "127.0.0.1",
        "port": port,
        "chat_template_content_format": "openai",  # ours reads a message's parts
    }
    return [_flag(name, value) for name, value in settings.items()]


def _flag(name: str, value: Any) -> str:
    words = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{words}" if value else f"--no-{words}"
    return f"--{words}={json.dumps(value) if isinstance(value, dict) else value}"


@contextmanager
def _started(
    name: str, argv: Sequence[str], settings: Mapping[str, str], url: str, probe: str, root: Path
) -> Iterator[Side]:
    log = root / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            argv, stdout=out, stderr=out, env=os.environ | settings, start_new_session=True
        )
    try:
        _wait_until_ready(process, url + probe, log)
        yield Side(Endpoint(name=name, url=url, model=MODEL_ID), psutil.Process(process.pid))
    finally:
        _stop(process)


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path) -> None:
    deadline_s = time.monotonic() + _START_S
    while not _is_well(url):
        if process.poll() is not None:
            raise Sg4vError(f"the server ended before it was ready; {log} says why")
        if time.monotonic() > deadline_s:
            raise Sg4vError(f"the server was not ready within {_START_S:g} s; see {log}")
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)


def _is_well(url: str) -> bool:
    try:
        return httpx.get(url, timeout=10, trust_env=False).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """Ask the server to end as Ctrl-C does; then end what is left of it."""
    with suppress(psutil.NoSuchProcess):
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_STOP_S)
        _, alive = psutil.wait_procs(below, timeout=10)
        for one in alive:
            with suppress(psutil.NoSuchProcess):
                one.kill()
    process.kill()
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
