# SPDX-License-Identifier: Apache-2.0
"""Serve until interrupted: `python -m serve config=serve/config.easy-vqa.yaml root=/path`.

The API stands at `/`; the chat page, if the config has one, at its route. RAY_ADDRESS names the
cluster that serves (`serve.lean.LEAN` is for its nodes); without it this machine does.
SIGINT (Ctrl-C) and SIGTERM end it: what was accepted is answered first, which takes up to
`limits.longest_s`, and new requests are refused. A second one ends it at once.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException

from serve.app import application
from serve.config import ServeConfig, Tracing, read
from serve.deployment import INGRESS
from serve.lean import private_folder, settings
from serve.page import app as page
from sg4v_ray.core.errors import ConfigError, Sg4vError
from sg4v_ray.core.observe import set_up_logging
from sg4v_ray.core.tracing import EXPORTER

API: Final = "sg4v"
_log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Serve as the config says, until a signal ends it."""
    set_up_logging()
    config = read(pairs(arguments, __doc__))
    app = application(config)
    cluster = os.environ.get("RAY_ADDRESS") or "local"
    with ExitStack() as stack:
        if cluster == "local":
            _check_port(config)
            folder = stack.enter_context(private_folder())
            _set_up(Path(folder), config)
        # Named, because Ray would wait for the cluster last started here, even when that is gone.
        ray.init(cluster)
        stack.callback(ray.shutdown)  # before the folder goes
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        _serve(app, config)


def _set_up(folder: Path, config: ServeConfig) -> None:
    limits = config.limits
    silent_s = limits.body_timeout_s + 5  # our own words come first
    found = settings(folder, host=config.host, silent_s=silent_s, longest_s=limits.longest_s)
    for name, value in found.items():
        os.environ.setdefault(name, value)


def _serve(app: Application, config: ServeConfig) -> None:
    waits = True
    try:
        _run(app, config)
        threading.Event().wait()
    except KeyboardInterrupt:
        waits = _drain(config.limits.longest_s)
    finally:
        for name in (API, page.PAGE):
            _delete(name, waits=waits)


def _delete(name: str, *, waits: bool) -> None:
    try:
        serve.delete(name, _blocking=waits)
    except TimeoutError as error:
        _log.error("%s; a Ray of this machine ends with this process", error)


def _drain(longest_s: float) -> bool:
    """Wait until every ingress has answered what it accepted; False if told to stop at once."""
    _log.warning(
        "Stopping: accepted requests are answered, for %.0f s at most, new ones are refused. "
        "Once more stops at once.",
        longest_s,
    )
    try:
        if _has_begun():
            asyncio.run(_drained(longest_s))
    except (RayError, RayServeException, TimeoutError) as error:
        _log.error("Not all that was accepted is answered: %s", error)
    except KeyboardInterrupt:
        _log.warning("Stopping at once.")
        return False
    return True


async def _drained(longest_s: float) -> None:
    # Inside an event loop, without which `LEAN` lets nobody use a handle.
    ingress = serve.get_deployment_handle(INGRESS, API)
    drained = ingress.broadcast("drain")
    for found in await drained.results_async(timeout_s=longest_s, return_exceptions=True):
        if isinstance(found, BaseException):  # the others go on answering
            _log.error("An ingress ended before it had answered all: %s", found)


def _has_begun() -> bool:
    """Say whether an ingress runs; it answers before `serve.run` returns."""
    app = serve.status().applications.get(API)
    ingress = None if app is None else app.deployments.get(INGRESS)
    return ingress is not None and ingress.replica_states.get("RUNNING", 0) > 0


def _run(app: Application, config: ServeConfig) -> None:
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(**http_options(config)),
        tracing_config=None if config.tracing is None else tracing(config.tracing),
    )
    try:
        if config.page is not None:
            serve.run(page.application(config), name=page.PAGE, route_prefix=config.page.route)
        serve.run(app, name=API, route_prefix="/")
    except RuntimeError as error:
        raise Sg4vError(f"the server does not start: {_why(error)}") from error


def _check_port(config: ServeConfig) -> None:
    """Raise if somebody listens there: two servers of ours would each get a part of the requests,
    for proxies share their port."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed ones may linger
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigError(
                f"nothing can listen at {config.host}:{config.port} ({error.strerror}); set `host` "
                "and `port` in the config"
            ) from error


def _why(error: RuntimeError) -> str:
    """Return what Serve says of each deployment that did not start."""
    said = [
        f"{name}: {one.message}"
        for app in serve.status().applications.values()
        for name, one in app.deployments.items()
        if one.message
    ]
    return "; ".join(said) or str(error)


def http_options(config: ServeConfig) -> dict[str, Any]:
    """Return what Serve's proxies are told."""
    return {
        "host": config.host,
        "port": config.port,
        "request_timeout_s": config.limits.longest_s,
        "keep_alive_timeout_s": 65,  # longer than the 60 s of usual load balancers
    }


def tracing(config: Tracing) -> dict[str, Any]:
    """Return what Serve is told about spans."""
    return {
        "enabled": True,
        "exporter_import_path": EXPORTER,
        "sampling_ratio": config.sampling_ratio,
    }


def pairs(arguments: list[str], usage: str | None) -> dict[str, str]:
    """Return `name=value` arguments by name; say how a program is used to whom asks for help."""
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(usage or "")
        sys.exit(0)
    return {name: value for name, _, value in (one.partition("=") for one in arguments)}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Sg4vError as error:
        sys.exit(f"error: {error}")
