# SPDX-License-Identifier: Apache-2.0
"""Serve until interrupted: `python -m serve config=serve/config.easy-vqa.yaml root=/path`."""

import sys

from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation

from serve.app import application
from serve.config import read
from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.observe import set_up_logging


def main(arguments: list[str]) -> None:
    """Start HTTP as the config says, then the application."""
    set_up_logging()
    config = read(dict(_pair(one) for one in arguments))
    app = application(config)
    http = HTTPOptions(
        host=config.host,
        port=config.port,
        # Ours counts from the replica on; this one also ends waiting in queues and slow readers.
        request_timeout_s=2 * config.limits.timeout_s,
        keep_alive_timeout_s=65,  # longer than the 60 s of usual load balancers
    )
    serve.start(proxy_location=ProxyLocation.EveryNode, http_options=http)
    serve.run(app, name="sg4v", route_prefix="/", blocking=True)


def _pair(argument: str) -> tuple[str, str]:
    name, _, value = argument.partition("=")
    return name, value


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Sg4vError as error:
        sys.exit(f"error: {error}")
