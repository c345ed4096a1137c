# SPDX-License-Identifier: Apache-2.0
"""What every job does alike: recipe and placement from the command line, Ray, errors, logs."""

import dataclasses
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import ray
import tyro

from sg4v_ray.core.artifact import Manifest
from sg4v_ray.core.errors import ConfigError, Sg4vError, Stopped
from sg4v_ray.core.observe import set_up_logging
from sg4v_ray.core.storage import STORAGE_ERRORS, first_line
from sg4v_ray.core.where import Where
from sg4v_ray.exactly_once.capacity import in_ray_job, joins_cluster
from sg4v_ray.recipes.catalogue import RECIPES
from sg4v_ray.recipes.line import Line

_log = logging.getLogger(__name__)
T = TypeVar("T")
_ROOT = "--where.root"
_STDOUT = 1
_RENAMED_FLAGS = {
    "flow.rows-per-block": "batching.rows-per-part",
    "flow.batch-size": "batching.rows-per-task",
    "flow.batches-in-flight": None,
}
"""Flags of version 0.1; None for a flag without a successor."""


def main(
    run: Callable[[], None],
    *,
    stopped: str = "committed work is kept, run the same command again to resume",
) -> None:
    """Run a job: errors raised on purpose end it with their text alone, and exit code 1; Ctrl-C
    ends it with 130, as shells have it, and says what it leaves (`stopped`). A job that SIGTERM
    told to save and to stop ends with 143.
    """
    set_up_logging()
    try:
        run()
        sys.stdout.flush()
    except Stopped as error:
        print(error, file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)
    except Sg4vError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(1)
    except STORAGE_ERRORS as error:
        if isinstance(error, BrokenPipeError) and _stdout_has_no_reader():
            # Python flushes stdout at its end, which would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
            sys.exit(128 + signal.SIGPIPE)
        _log.debug("the traceback of the storage error", exc_info=True)
        text = first_line(getattr(error, "cause", error))  # Ray adds the traceback of a worker
        print(f"StorageError: {text}; {stopped}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _stdout_has_no_reader() -> bool:
    """Return True if stdout is a pipe whose reader has ended, as that of `| head`.

    A connection to a store or to a worker process raises the same error.
    """
    poll = select.poll()
    poll.register(_STDOUT, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def parse(
    doc: str | None, pick: Callable[[Line], T | None], args: Sequence[str]
) -> tuple[T, Where]:
    """Read `RECIPE [flags]` and return what `pick` takes of the recipe, and the placement.

    Args:
        doc: the job's docstring, shown by --help.
        pick: the part of a recipe that this job runs; each of its fields becomes a flag.
        args: the command line without the program.

    Raises:
        ConfigError: no such recipe, a recipe without this part, or a relative root in a
            submitted job.
    """
    name, flags = _recipe_name(doc, args)
    _refuse_renamed(flags)
    part = pick(RECIPES[name]())
    if part is None or part == ():
        raise ConfigError(f"the recipe {name!r} has no such step; `python -m jobs` lists them")
    where = Where(root=str(Path("runs", name).absolute()))
    settings = dataclasses.make_dataclass(
        "Settings", [("step", _flags_of(part)), ("where", Where)], frozen=True
    )
    given = tyro.cli(
        settings,
        default=settings(part, where),
        args=_with_absolute_root(flags),
        description=doc,
        prog=f"RECIPE {name}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    return given.step, given.where


def _recipe_name(doc: str | None, args: Sequence[str]) -> tuple[str, list[str]]:
    known = "\n".join(
        f"  {key:24} {(make.__doc__ or '').splitlines()[0]}" for key, make in RECIPES.items()
    )
    if not args or args[0] in ("-h", "--help"):
        print(f"{(doc or '').strip()}\n\nFirst a recipe, then flags (RECIPE --help):\n{known}")
        sys.exit(0 if args else 2)
    if args[0] not in RECIPES:
        raise ConfigError(f"no recipe {args[0]!r}; there are\n{known}")
    return args[0], list(args[1:])


def _refuse_renamed(flags: Sequence[str]) -> None:
    for flag in flags:
        given = flag.removeprefix("--").removeprefix("no-").partition("=")[0].replace("_", "-")
        for old, new in _RENAMED_FLAGS.items():
            if given != old and not given.endswith(f".{old}"):
                continue
            if new is None:
                raise ConfigError(
                    f"--{given} no longer exists: each actor holds twice as many rows as its "
                    "engine's capacity. Remove the flag"
                )
            raise ConfigError(f"--{given} is now --{given.removesuffix(old)}{new}")


def _flags_of(part: Any) -> Any:
    """Return the type from which tyro makes flags: a single step's have no prefix."""
    if isinstance(part, tuple):
        kind = type(part[0])
        return tuple[kind, ...]  # type: ignore[valid-type]
    return Annotated[type(part), tyro.conf.arg(name="")]


def _with_absolute_root(flags: list[str]) -> list[str]:
    """Make a relative root absolute on this machine; refuse it, or none, in a submitted job.

    A submitted job runs in a temporary copy of the working folder: results below a relative root
    would be deleted with it.
    """
    flags = [piece for flag in flags for piece in _split(flag)]
    place = flags.index(_ROOT) + 1 if _ROOT in flags else len(flags)
    given = flags[place] if place < len(flags) else ""
    absolute = given.startswith("/") or "://" in given
    if in_ray_job() and not absolute:
        raise ConfigError(
            f"{_ROOT} is {given!r}; a submitted job runs in a temporary copy of the folder, so "
            f"write {_ROOT} $PWD/{given or 'runs'} (your shell fills in $PWD) or a URI such as "
            "s3://bucket/runs"
        )
    if given and not absolute:
        flags[place] = str(Path(given).absolute())
    return flags


def _split(flag: str) -> list[str]:
    return flag.split("=", 1) if flag.startswith(f"{_ROOT}=") else [flag]


@contextmanager
def ray_session(*, trains: bool = False) -> Iterator[None]:
    """Join the cluster of a submitted job or of RAY_ADDRESS, else start Ray on this machine.

    Args:
        trains: the job trains. Ray Train asks the dashboard that it finds on port 8265 whether its
            controller lives, and removes the workers when that is another cluster's, which does
            not know it. So a session that trains has a dashboard of its own.
    """
    quiet: dict[str, Any] = {"log_to_driver": True, "logging_level": logging.WARNING}
    if joins_cluster():
        ray.init(address="auto", **quiet)
    else:
        # Logical CPUs: beside the engine, light tasks read, decode and write.
        start_ray(num_cpus=max(4, os.cpu_count() or 1), include_dashboard=trains, **quiet)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def start_ray(*, num_cpus: int, include_dashboard: bool = False, **settings: Any) -> None:
    """Start Ray on this machine alone."""
    ray.init(
        "local",
        num_cpus=num_cpus,
        include_dashboard=include_dashboard,
        _system_config={
            # Ray ends idle workers after a second as soon as it has more of them than CPUs, actors
            # counted. On a small machine that is always: each task would import Ray anew.
            "idle_worker_killing_time_threshold_ms": 60_000,
            # Every process reports its tasks each second, to a table that only grows: 40 MB in a
            # million rows. It is for `ray list tasks`, which a session of one job does without.
            "task_events_report_interval_ms": 0,
        },
        **settings,
    )


def summary(manifest: Manifest) -> str:
    """Return one line about a finished artifact."""
    counts = ", ".join(f"{value} {key}" for key, value in manifest.counts.items())
    return f"{manifest.name}@{manifest.version}: {counts}"
