# SPDX-License-Identifier: Apache-2.0
"""Serve until interrupted: `python -m serve config=serve/config.easy-vqa.yaml root=/path`.

The API stands at `/`; the chat page, if the config has one, at its route. RAY_ADDRESS names the
cluster that serves; without it this machine does. SIGINT (Ctrl-C) and SIGTERM end it: what was
accepted is answered first.
"""

import logging
import os
import signal
import sys
from typing import Any, Final

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions, ProxyLocation

from serve.app import application
from serve.config import ServeConfig, Tracing, read
from serve.page import app as page
from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.observe import set_up_logging
from sg4v_ray.core.tracing import EXPORTER

API: Final = "sg4v"
_log = logging.getLogger(__name__)


def main(arguments: list[str]) -> None:
    """Serve as the config says, until a signal ends it."""
    set_up_logging()
    config = read(pairs(arguments))
    app = application(config)
    # Named, because Ray would wait for the cluster last started here, even when that is long gone.
    ray.init(os.environ.get("RAY_ADDRESS") or "local")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _run(app, config)
    except KeyboardInterrupt:
        _log.warning("Stopping: accepted requests are answered, new ones are refused.")
    finally:
        for name in (API, page.PAGE):
            serve.delete(name)


def _run(app: Application, config: ServeConfig) -> None:
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(**http_options(config)),
        tracing_config=None if config.tracing is None else tracing(config.tracing),
    )
    if config.page is not None:
        serve.run(page.application(config), name=page.PAGE, route_prefix=config.page.route)
    serve.run(app, name=API, route_prefix="/", blocking=True)


def http_options(config: ServeConfig) -> dict[str, Any]:
    """Return what Serve's proxies are told."""
    return {
        "host": config.host,
        "port": config.port,
        # Ours counts from the replica on; this one also ends waiting in queues and slow readers.
        "request_timeout_s": 2 * config.limits.timeout_s,
        "keep_alive_timeout_s": 65,  # longer than the 60 s of usual load balancers
    }


def tracing(config: Tracing) -> dict[str, Any]:
    """Return what Serve is told about spans."""
    return {
        "enabled": True,
        "exporter_import_path": EXPORTER,
        "sampling_ratio": config.sampling_ratio,
    }


def pairs(arguments: list[str]) -> dict[str, str]:
    """Return `name=value` arguments by name."""
    return {name: value for name, _, value in (one.partition("=") for one in arguments)}


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Sg4vError as error:
        sys.exit(f"error: {error}")
