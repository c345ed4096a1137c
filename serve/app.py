# SPDX-License-Identifier: Apache-2.0
"""The Ray Serve application: one deployment for every model, and one that answers HTTP.

    serve run serve.app:build config=serve/config.easy-vqa.yaml root=/absolute/path/runs/easy-vqa

`python -m serve` with the same arguments also takes host, port and time-out from the config.
"""

from datetime import datetime
from typing import Any

from ray import serve
from ray.serve import Application

from serve.config import Limits, ServeConfig, read
from serve.deployment import DESK, INGRESS, ModelDeployment
from serve.desk import QuotaDesk
from serve.ingress import Ingress
from serve.replica import Replica, Served
from sg4v_ray.core.artifact import find
from sg4v_ray.core.storage import Storage


def build(args: dict[str, str]) -> Application:
    """Return the application that the arguments describe: config=, root= and cache=.

    Raises:
        ConfigError: an argument or the config does not fit.
        ArtifactMissing: a model is not finished; said here and not by a replica in a loop.
    """
    return application(read(args))


def application(config: ServeConfig) -> Application:
    """Return the application of a config."""
    config.auth.ring()  # said here, and not by a replica in a loop
    models = tuple(served(one) for one in config.deployments)
    handles = {
        one.config.id: serve.deployment(**model_options(one.config, config.limits))(Replica).bind(
            one, cache=config.cache, timeout_s=config.limits.timeout_s
        )
        for one in models
    }
    ingress = serve.deployment(**ingress_options(config))(Ingress)
    desk = serve.deployment(**desk_options(config))(QuotaDesk)
    canaries = {
        model_id: (str(one.artifact), one.weight) for model_id, one in config.canaries.items()
    }
    books = desk.bind(
        longest_request_s=config.limits.longest_s, state=config.auth.state, canaries=canaries
    )
    return ingress.bind(
        models,
        handles,
        books,
        auth=config.auth,
        limits=config.limits,
        cache=config.cache,
        canaries=config.canaries,
    )


def served(model: ModelDeployment) -> Served:
    """Find a model's artifact.

    Raises:
        ArtifactMissing: it is not finished.
    """
    manifest = find(Storage(model.root), model.artifact)
    return Served(
        config=model,
        digests=manifest.digests,
        fingerprint=manifest.fingerprint,
        created=int(datetime.fromisoformat(manifest.provenance["at"]).timestamp()),
    )


def model_options(model: ModelDeployment, limits: Limits) -> dict[str, Any]:
    """Return the options of a model's deployment."""
    return {
        **_shared_options(limits),
        **_replicas(model),
        "name": model.id,
        "max_ongoing_requests": model.max_ongoing,
        "max_queued_requests": model.max_queued,
        "max_surge_percent": model.max_surge_percent,
        "ray_actor_options": {"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
    }


def ingress_options(config: ServeConfig) -> dict[str, Any]:
    """Return the options of the deployment that answers HTTP."""
    return {
        **_shared_options(config.limits),
        "name": INGRESS,
        "graceful_shutdown_timeout_s": config.limits.longest_s + 10,  # a replica's, and its way
        "num_replicas": config.ingress_replicas,
        "max_ongoing_requests": config.max_ingress_ongoing,
        "max_surge_percent": 100,  # new ones first: they need no GPU
        # Reached only when clients outrun our own refusals; Serve then answers for us.
        "max_queued_requests": 128,
        "backpressure_config": {"status_code": 503, "retry_after_s": 1},
        "ray_actor_options": {"num_cpus": config.ingress_cpus, "num_gpus": 0},
    }


def desk_options(config: ServeConfig) -> dict[str, Any]:
    """Return the options of the deployment that keeps the books of all keys."""
    return {
        **_shared_options(config.limits),
        "name": DESK,
        "num_replicas": 1,  # one book: more would each count their own part
        "max_surge_percent": 0,  # and its successor reads what it saved
        "max_ongoing_requests": 1000,
        "max_queued_requests": 1000,
        "ray_actor_options": {"num_cpus": config.desk_cpus, "num_gpus": 0},
    }


def _replicas(model: ModelDeployment) -> dict[str, Any]:
    if model.min_replicas == model.max_replicas:
        return {"num_replicas": model.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": model.min_replicas,
            "initial_replicas": model.min_replicas,
            "max_replicas": model.max_replicas,
            "target_ongoing_requests": model.target_ongoing,
            "upscale_delay_s": model.upscale_delay_s,
            "downscale_delay_s": model.downscale_delay_s,
            # Also the period over which requests, open and queued, are averaged.
            "look_back_period_s": min(30.0, model.upscale_delay_s),
        }
    }


def _shared_options(limits: Limits) -> dict[str, Any]:
    return {
        # A replica that is stopped may finish what it has begun; 10 s are for freeing the model.
        "graceful_shutdown_timeout_s": limits.timeout_s + 10,
        "graceful_shutdown_wait_loop_s": 1.0,
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        # A model that does not load will not load the twentieth time either.
        "max_constructor_retry_count": 3,
        "rolling_update_percentage": 0.2,  # one in five at a time
        # Method, route, status and seconds. Bodies are never logged, by us or by Serve.
        "logging_config": {"enable_access_log": True, "log_level": "INFO"},
    }
