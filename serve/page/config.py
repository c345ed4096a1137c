# SPDX-License-Identifier: Apache-2.0
"""Where the chat page stands, and within which bounds."""

import re
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from sg4v_ray.core.errors import ConfigError

_ROUTE: Final = re.compile(r"(/[A-Za-z0-9_-]+)+")
_TAKEN: Final = ("/v1", "/health", "/admin", "/openapi.json", "/-")
"""What the API answers: a page there would hide it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PageConfig:
    """The chat page: an application of its own, and a client of the API with its users' keys."""

    route: str = "/chat"
    """Path below which it is served."""
    api: str | None = None
    """Address of the server that it asks, without /v1; None for the one that it is started with."""
    max_images: int = 100
    """Images that the tab for captions takes at once."""
    max_sessions: int = 200
    """Open pages that are remembered, with their conversation and its image in memory; the one
    that was used longest ago has to connect again."""
    keep_s: int = 3600
    """How long uploads stay on the disk of the page's node, and a conversation in memory after it
    was last used."""
    num_cpus: float = 0.25
    """CPUs that the page reserves."""

    def __post_init__(self) -> None:
        first = f"/{self.route.split('/')[1]}" if "/" in self.route else ""
        if not _ROUTE.fullmatch(self.route) or first in _TAKEN:
            raise ConfigError(
                f"page.route {self.route!r} must be a path such as /chat, of letters, digits, "
                f"'-' and '_', and not below {', '.join(_TAKEN)}"
            )
        if self.api is not None:
            _check_address(self.api)
        if min(self.max_images, self.max_sessions, self.keep_s) < 1 or self.num_cpus < 0:
            raise ConfigError(
                "page.max_images, page.max_sessions and page.keep_s must be at least 1 and "
                f"page.num_cpus not negative, got {self.max_images}, {self.max_sessions}, "
                f"{self.keep_s} and {self.num_cpus:g}"
            )


def _check_address(api: str) -> None:
    place = urlsplit(api)
    extra = place.query or place.fragment or place.username or place.path.strip("/")
    if place.scheme not in ("http", "https") or not place.hostname or extra:
        raise ConfigError(
            f"page.api {api!r} must be the server's address alone, such as http://127.0.0.1:8000"
        )
