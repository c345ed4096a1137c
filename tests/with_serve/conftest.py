# SPDX-License-Identifier: Apache-2.0
"""One Ray, one Serve, one application with two fake models, for all tests of this folder."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.handle import DeploymentHandle

from serve.app import build
from serve.lean import private_folder, settings
from sg4v_ray.core.artifact import Ref
from tests.unit.serve_site import commit_model
from tests.waiting import free_port

SILENT_S = 4
# Now: a Ray of other tests, which starts before ours, may be used.
_folder = private_folder()  # it goes when this process ends
os.environ.update(settings(Path(_folder.name), host="127.0.0.1", silent_s=SILENT_S, longest_s=120))
KEY, LIMITED, READER = "sg4v-test-key", "sg4v-limited-key", "sg4v-metrics-key"
CONFIG = """
auth: {keys_file: KEYS_FILE}
limits: {max_body_bytes: 2000000, timeout_s: 20, image: {max_bytes: 1000000}}
ingress_cpus: 0.5
models:
  - id: captioner
    artifact: {name: captioner}
    template: vicuna_v1
    geometry: pad
    engine: {kind: fake, capacity: 4, max_model_len: 400}
    generation: {max_tokens: 60}
    instruction: Describe it.
    max_ongoing: 4
    num_cpus: 0.5
  - id: slow
    artifact: {name: vlm}
    template: vicuna_v1
    geometry: square
    engine: {kind: fake, capacity: 2, max_model_len: 400, latency_s: 2.0}
    generation: {max_tokens: 60}
    max_ongoing: 2
    max_queued: 1
    num_cpus: 0.5
"""


@dataclass(frozen=True)
class Server:
    """Where the application listens."""

    url: str

    @property
    def client(self) -> openai.OpenAI:
        """A client that does not try again: a test wants the first answer."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=30)

    def handle(self, model_id: str) -> DeploymentHandle:
        """The deployment of a model, for looking at its engine."""
        return serve.get_deployment_handle(model_id, app_name="sg4v")


def _sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("serve")
    for name in ("captioner", "vlm"):
        commit_model(folder / "root", Ref(name=name), tiny_model)
    keys = folder / "keys.yaml"
    keys.write_text(
        "keys:\n"
        f"  - {{name: tester, sha256: {_sha256(KEY)}}}\n"
        f"  - {{name: reader, sha256: {_sha256(READER)}, scopes: [metrics]}}\n"
        f"  - {{name: limited, sha256: {_sha256(LIMITED)},"
        " quota: {requests_per_min: 6, tokens_per_min: 100000, concurrency: 1}}\n"
    )
    (folder / "serve.yaml").write_text(CONFIG.replace("KEYS_FILE", str(keys)))
    app = build({"config": str(folder / "serve.yaml"), "root": str(folder / "root")})
    port = free_port()
    own_ray = not ray.is_initialized()  # tests/with_ray keeps its Ray to the end of the session
    if own_ray:
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        http = HTTPOptions(host="127.0.0.1", port=port)
        serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=http)
        serve.run(app, name="sg4v", route_prefix="/")
        yield Server(f"http://127.0.0.1:{port}")
    finally:
        serve.shutdown()
        if own_ray:
            ray.shutdown()
