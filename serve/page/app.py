# SPDX-License-Identifier: Apache-2.0
"""The chat page: a Ray Serve application of its own, and a client of the API like any other.

`python -m serve` starts it where the config has `page`. Beside a server that runs elsewhere:

    serve run --name page --route-prefix /chat serve.page.app:build config=... root=...
"""

import tempfile
from pathlib import Path
from typing import Any, Final

from ray import serve
from ray.serve import Application
from starlette.types import ASGIApp

from serve.config import ServeConfig, read
from serve.page.config import PageConfig
from sg4v_ray.core.errors import ConfigError

PAGE: Final = "page"
"""Name of the application, and of its deployment."""
_MAX_ONGOING: Final = 1000
"""An open page holds one request while it is answered, uploads others."""


def build(args: dict[str, str]) -> Application:
    """Return the page that the arguments describe: config=, root= and cache=, as for the server.

    Raises:
        ConfigError: an argument or the config does not fit, or has no page.
    """
    return application(read(args))


def application(config: ServeConfig) -> Application:
    """Return the page of a config."""
    page = _page(config)
    options: dict[str, Any] = {
        "name": PAGE,
        "num_replicas": 1,  # conversations and uploads are in one process
        "max_ongoing_requests": _MAX_ONGOING,
        "max_queued_requests": _MAX_ONGOING,
        "graceful_shutdown_timeout_s": 10.0,
        "max_constructor_retry_count": 3,
        "ray_actor_options": {"num_cpus": page.num_cpus, "num_gpus": 0},
        "logging_config": {"enable_access_log": False, "log_level": "INFO"},
    }
    return serve.deployment(**options)(PageIngress).bind(config)


def asgi(config: ServeConfig) -> ASGIApp:
    """Return the page as a web application, to be put below any path.

    Raises:
        ConfigError: the config has no page.
    """
    # Seconds and 100 MB that only the page's own process needs.
    from serve.page.web import web

    page = _page(config)
    return web(
        config,
        page,
        api=page.api or f"http://{_reachable(config.host)}:{config.port}",
        uploads=Path(tempfile.mkdtemp(prefix="sg4v-page-")),
    )


def _page(config: ServeConfig) -> PageConfig:
    if config.page is None:
        raise ConfigError("the config has no chat page; add `page: {}`")
    return config.page


def _reachable(host: str) -> str:
    """Return where a server that listens on a host is reached on its own machine."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


@serve.ingress()
class PageIngress:
    """Ray Serve deployment: the page alone."""

    def __init__(self, config: ServeConfig) -> None:
        self._config = config

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Serve after the constructor."""
        return asgi(self._config)
