# SPDX-License-Identifier: Apache-2.0
"""Bench: our server beside vLLM's own, around the same engine with the same weights.

python -m jobs.bench_serving [--root FOLDER] [flags]

With --url and --model it measures any server that runs, and with --bare-url it compares two.
Every request has a photograph that its server has not seen, and asks for a set number of tokens.
Loads alternate between the two, so that what else the machine does slows both alike. Prints a
JSON line a load, a table, and last the ratios; all of it is in report.json.
"""

import asyncio
import dataclasses
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import tyro

from jobs import _bench_site as site
from jobs import _load_servers as servers
from jobs import _load_site as load_site
from jobs._bench_parts import machine
from jobs._bench_run import empty
from jobs._cli import main
from jobs._load_client import Endpoint
from jobs._load_run import Loads
from jobs._load_samples import Sample, Slo, arrivals
from jobs._load_servers import Side
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.text_table import text_table

REPORT: Final = "report.json"
_SEED: Final = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What is measured, and how much of it."""

    root: str = str(Path("runs/bench-serving").absolute())
    """Folder for photographs, model, logs and results: a new one, or one that an earlier bench
    filled, which is emptied first."""
    url: str | None = None
    """Measure a server that runs, up to and without /v1; OPENAI_API_KEY is its key, if it has one.
    Without it both servers are started here."""
    bare_url: str | None = None
    """Another server that runs, to compare it with."""
    model: str = servers.MODEL_ID
    """What `model` says in requests to `url`."""
    threads: int = 1
    """CPU threads of each engine. One core less than the machine has: an engine on accelerators
    does not take the CPUs that feed it either."""
    clients: int = 16
    """Clients of the closed loop, each with one request open at a time."""
    requests: int = 64
    """Requests of one pass of the closed loop."""
    passes: int = 3
    """Passes of the closed loop over each server."""
    pairs: int = 50
    """Requests of a single client, to each server in turn."""
    rate: float = 0.5
    """Requests a second of the open loop, a Poisson process."""
    seconds: float = 60.0
    """How long requests of the open loop arrive."""
    slo: Slo = field(default_factory=Slo)
    """What a good request keeps."""

    def __post_init__(self) -> None:
        for name in ("clients", "requests", "passes", "pairs", "rate", "seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.due():
            raise ConfigError(
                f"no request arrives in {self.seconds:g} s at a rate of {self.rate:g}; set a "
                "longer --seconds"
            )
        if self.bare_url is not None and self.url is None:
            raise ConfigError("--bare-url is compared with --url; give both")

    def due(self) -> list[float]:
        """Return when the requests of the open loop arrive."""
        return arrivals(self.rate, self.seconds, seed=_SEED)

    @property
    def num_photos(self) -> int:
        """Photographs that are needed for every server to see each once."""
        return self.clients + self.requests * self.passes + self.pairs + len(self.due())


@contextmanager
def sides_of(bench: Bench) -> Iterator[list[Side]]:
    """Yield the servers, ours first; those of this bench run meanwhile."""
    root = Path(bench.root)
    if bench.url is None:
        load_site.make_model(Storage(bench.root))
        with ExitStack() as stack:
            started = [
                stack.enter_context(servers.bare(root, threads=bench.threads)),
                stack.enter_context(servers.ours(root, threads=bench.threads)),
            ]
            yield started[::-1]
        return
    key = os.environ.get("OPENAI_API_KEY")
    urls = {"server": bench.url} if bench.bare_url is None else {
        "ours": bench.url, "bare": bench.bare_url
    }  # fmt: skip
    yield [
        Side(Endpoint(name=name, url=url, model=bench.model, key=key)) for name, url in urls.items()
    ]


def ratios(loads: Sequence[dict[str, Any]], single: dict[str, list[Sample]]) -> dict[str, float]:
    """Return ours against the bare server: medians over passes, and over pairs of requests."""
    rates = {
        name: [
            one["tokens_per_s"] for one in loads if (one["load"], one["server"]) == ("closed", name)
        ]
        for name in ("ours", "bare")
    }
    over = [ours / bare for ours, bare in zip(rates["ours"], rates["bare"], strict=True)]
    pairs = zip(single["ours"], single["bare"], strict=True)
    extra_s = [ours.ttft_s - bare.ttft_s for ours, bare in pairs]
    return {
        "throughput_over_bare": round(statistics.median(over), 3),
        "ttft_p50_extra_ms": round(1000 * statistics.median(extra_s), 1),
    }


def table(loads: Sequence[dict[str, Any]]) -> str:
    """Return the loads as lines of a terminal."""
    head = ("load", "server", "requests/s", "tokens/s", "goodput")
    times = ("ttft_ms", "itl_ms", "tpot_ms", "e2e_ms")
    lines = [(*head, *(f"{name} p50/p95/p99" for name in times))]
    for one in loads:
        rates = [one.get(name, "") for name in ("requests_per_s", "tokens_per_s", "goodput_share")]
        cells = ["/".join(f"{ms:.0f}" for ms in one.get(name, {}).values()) for name in times]
        lines.append((one["load"], one["server"], *map(str, rates), *cells))
    return text_table(lines)


async def measure(bench: Bench, sides: Sequence[Side], photos: Sequence[Path]) -> dict[str, Any]:
    """Send all loads; return the report."""
    async with Loads(sides, photos, bench.slo).connected() as loads:
        await loads.warm_up(bench.clients)
        single = await loads.single(bench.pairs)
        for number in range(bench.passes):
            await loads.closed(number, requests=bench.requests, clients=bench.clients)
        await loads.open(bench.due())
    found = {"case": "ratios", **ratios(loads.loads, single)} if len(sides) > 1 else {}
    return {
        "machine": machine(bench.threads),
        "bench": dataclasses.asdict(bench),
        "engine": dataclasses.asdict(servers.ENGINE) if bench.url is None else None,
        "loads": loads.loads,
        "same_text_share": _same_text(list(single.values())),
        "ratios": found,
    }


def _same_text(answers: Sequence[Sequence[Sample]]) -> float:
    """Return the share of requests to which all servers said the same."""
    pairs = list(zip(*answers, strict=True))
    return sum(len({one.text.strip() for one in pair}) == 1 for pair in pairs) / len(pairs)


def run() -> None:
    """Run the bench with the flags of this process."""
    bench = tyro.cli(Bench, description=__doc__)
    bench = dataclasses.replace(bench, root=str(Path(bench.root).absolute()))
    root = Path(bench.root)
    empty(root)
    photos = site.make_photos(root / "photos", bench.num_photos)
    with sides_of(bench) as sides:
        report = asyncio.run(measure(bench, sides, photos))
    (root / REPORT).write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["loads"]))
    print(json.dumps(report["ratios"] or report["loads"][-1]), flush=True)


if __name__ == "__main__":
    main(run, stopped="nothing was measured, a bench begins anew")
