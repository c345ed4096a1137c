# SPDX-License-Identifier: Apache-2.0
"""Serve until interrupted: `python -m serve config=serve/config.easy-vqa.yaml root=/path`.

The API stands at `/`; the chat page, if the config has one, at its route.
"""

import sys
from typing import Any

from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from serve.app import application
from serve.config import ServeConfig, Tracing, read
from serve.page import app as page
from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.observe import set_up_logging
from sg4v_ray.core.tracing import EXPORTER


def main(arguments: list[str]) -> None:
    """Start HTTP as the config says, then the applications."""
    set_up_logging()
    config = read(pairs(arguments))
    app = application(config)
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(**http_options(config)),
        tracing_config=None if config.tracing is None else tracing(config.tracing),
    )
    if config.page is not None:
        serve.run(page.application(config), name=page.PAGE, route_prefix=config.page.route)
    serve.run(app, name="sg4v", route_prefix="/", blocking=True)


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
