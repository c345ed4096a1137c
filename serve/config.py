# SPDX-License-Identifier: Apache-2.0
"""What is served, and within which limits: a YAML file, loaded strictly.

Every default of Ray Serve that matters has a value here. Its own are 5 requests a replica, an
endless queue and no deadline, each of them wrong for an engine that batches.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from serve.deployment import Canary, ModelDeployment
from serve.keys import KeyRing
from serve.page.config import PageConfig
from sg4v_ray.core.config import load, read_yaml
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.fetch import FetchConfig
from sg4v_ray.core.images import ImageLimits
from sg4v_ray.core.retry import RetryPolicy
from sg4v_ray.core.storage import check_root

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")
"""Hosts that mean this machine alone."""

_COUNTS = (
    *("max_body_bytes", "max_images", "max_caption_images", "max_messages", "max_n", "timeout_s"),
    *("decode_threads", "fetch_timeout_s", "body_timeout_s"),
)
_ARGUMENTS = ("config", "root", "cache")


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one request may ask for. Refused before the work that it would cost."""

    max_body_bytes: int = 16 * 2**20
    """Bytes of a request body, counted as they arrive."""
    body_timeout_s: float = 60.0
    """How long a body may take to arrive: a client that sends a byte now and then holds a place."""
    image: ImageLimits = field(
        default_factory=lambda: ImageLimits(max_bytes=10 * 2**20, max_pixels=40_000_000)
    )
    """Of each image. Smaller than in batch jobs: many requests are decoded at once."""
    max_images: int = 1
    """Images of a request, over all its messages. The models are trained on one."""
    allowed_media_domains: tuple[str, ...] = ()
    """Hosts that images may be fetched from over http(s), ports 80 and 443; `.example.org` also
    allows every host below it. None by default: images come as `data:` URIs. What resolves to an
    address that is not public is refused, and each redirect is checked the same."""
    fetch_timeout_s: float = 10.0
    """For one image, redirects included."""
    max_caption_images: int = 16
    """Images of one call of /v1/captions; each is a request of its own to the model."""
    max_messages: int = 64
    max_n: int = 4
    """Answers to one request (`n`); each is a request of its own to the model."""
    timeout_s: float = 300.0
    """From the moment a replica takes a request to its last token."""
    decode_threads: int = 2
    """Requests that are parsed, decoded and tokenised at the same time in one ingress."""

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) <= 0:
                raise ConfigError(f"limits.{name} must be above 0, got {getattr(self, name)}")
        if "*" in self.allowed_media_domains:
            raise ConfigError(
                "limits.allowed_media_domains has '*'; name the hosts that strangers may have "
                "fetched from inside your network"
            )
        self.fetching()

    @property
    def longest_s(self) -> float:
        """How long the proxy lets a request be open. Our own deadlines come first: those of the
        body, the images and the answer, and as long again for queues and slow readers."""
        return self.body_timeout_s + self.fetch_timeout_s + 2 * self.timeout_s

    def fetching(self) -> FetchConfig:
        """Return how images are fetched."""
        return FetchConfig(
            allow_hosts=self.allowed_media_domains,
            allow_ports=(80, 443),
            timeout_s=self.fetch_timeout_s,
            max_redirects=3,
            retry=RetryPolicy(max_tries=1),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Auth:
    """Who may call: the keys of a file, those of an environment variable, or anybody."""

    keys_file: str | None = None
    """Path on every node, e.g. of a mounted secret; read again when it changes. `serve.keys` says
    what is in it."""
    keys_env: str | None = None
    """Name of a variable that holds the same text, in the environment that Ray starts in."""
    anonymous: bool = False
    """Everybody who reaches the port may call; for a machine of one's own."""
    state: str | None = None
    """Absolute path or URI of a folder where tokens used today are kept over a restart."""

    def __post_init__(self) -> None:
        ways = (self.keys_file is not None, self.keys_env is not None, self.anonymous)
        if sum(ways) != 1:
            raise ConfigError(
                "auth needs one of keys_file, keys_env and anonymous: true; make a key with "
                "`python -m serve.keys NAME`"
            )
        if self.state is not None:
            check_root(self.state)

    def ring(self) -> KeyRing | None:
        """Return the keys, or None where everybody may call.

        Raises:
            ConfigError: they cannot be read.
        """
        if self.anonymous:
            return None
        return KeyRing(file=self.keys_file, variable=self.keys_env)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracing:
    """Spans for an OpenTelemetry collector; `sg4v_ray.core.tracing` says which one."""

    sampling_ratio: float = 0.01
    """Share of the requests, 0 to 1, unless the caller's `traceparent` decides."""

    def __post_init__(self) -> None:
        if not 0 <= self.sampling_ratio <= 1:
            raise ConfigError(
                f"tracing.sampling_ratio must be between 0 and 1, got {self.sampling_ratio}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """One Ray Serve application."""

    models: tuple[ModelDeployment, ...]
    auth: Auth
    limits: Limits = field(default_factory=Limits)
    host: str = "127.0.0.1"
    """Address that `python -m serve` listens on. Behind a proxy that ends TLS: keys are sent as
    they are. `serve.package` writes it for `serve deploy`; `serve run` has options of its own."""
    port: int = 8000
    ingress_replicas: int = 1
    """Processes that answer HTTP, decode images and tokenise."""
    ingress_cpus: float = 1.0
    """CPUs that each of them reserves."""
    desk_cpus: float = 0.1
    """CPUs that the deployment reserves which keeps the books of all keys."""
    tracing: Tracing | None = None
    """None sends no spans."""
    cache: str = "~/.cache/sg4v-models"
    """Folder of a node's local disk for weights; not used when the root is local."""
    page: PageConfig | None = None
    """The chat page; None serves none."""

    def __post_init__(self) -> None:
        ids = [model.id for model in self.deployments]
        if not ids or len(set(ids)) < len(ids):
            raise ConfigError(f"models must have ids, each once, got {', '.join(ids) or 'none'}")
        if self.auth.anonymous and self.host not in LOOPBACK:
            raise ConfigError(
                f"host is {self.host!r} and auth.anonymous lets everybody in; give auth.keys_file, "
                "or listen on 127.0.0.1"
            )
        if self.ingress_replicas < 1 or self.ingress_cpus < 0 or self.desk_cpus < 0:
            raise ConfigError(
                "ingress_replicas must be at least 1, ingress_cpus and desk_cpus not negative, got "
                f"{self.ingress_replicas}, {self.ingress_cpus:g} and {self.desk_cpus:g}"
            )
        if not 1 <= self.port <= 65_535:
            raise ConfigError(f"port must be 1 to 65535, got {self.port}")

    @property
    def deployments(self) -> tuple[ModelDeployment, ...]:
        """The models and their canaries."""
        canaries = self.canaries.items()
        by_id = {model.id: model for model in self.models}
        return (*self.models, *(by_id[one].with_canary(canary) for one, canary in canaries))

    @property
    def canaries(self) -> dict[str, Canary]:
        """The second versions, by the id of their model."""
        return {model.id: model.canary for model in self.models if model.canary is not None}

    @property
    def max_ingress_ongoing(self) -> int:
        """Requests in one ingress: all that models take or queue, and some that are refused.

        So it is a model's queue that runs full, and the client gets our 503, not a bare one.
        """
        taken = sum(one.max_replicas * one.max_ongoing + one.max_queued for one in self.deployments)
        return taken + 32


def read(args: Mapping[str, str]) -> ServeConfig:
    """Read the config that the arguments name; `root` and `cache` replace what it says.

    Raises:
        ConfigError: an unknown argument, no such file, or a file that does not fit.
    """
    for name in args:
        if name not in _ARGUMENTS:
            raise ConfigError(f"unknown argument {name!r} (known: {', '.join(_ARGUMENTS)})")
    file = Path(args.get("config", ""))
    if not file.is_file():
        raise ConfigError(f"no config file {str(file)!r}; give config=serve/config.easy-vqa.yaml")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    data = read_yaml(text, where=str(file))
    return load(ServeConfig, _override(data, args), path=file.name)


def _override(data: Any, args: Mapping[str, str]) -> Any:
    """Put arguments in their places; what has not the right shape is left for `load` to name."""
    if not isinstance(data, dict):
        return data
    if "cache" in args:
        data = {**data, "cache": args["cache"]}
    if "root" in args and isinstance(data.get("models"), list):
        models = [
            {**one, "root": args["root"]} if isinstance(one, dict) else one
            for one in data["models"]
        ]
        data = {**data, "models": models}
    return data
