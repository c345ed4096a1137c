# SPDX-License-Identifier: Apache-2.0
"""`python -m serve.package`, then `serve deploy` on a cluster behind a token, spans included."""

import http.client
import http.server
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.storage import Storage
from sg4v_ray.recipes import embedded
from tests.page.browsing import circle
from tests.serving.site import CHAT, MODEL, ask
from tests.soak.test_job_submit import head_node
from tests.unit.serve_site import commit_model
from tests.waiting import eventually, free_port

pytestmark = [pytest.mark.serving, pytest.mark.soak, pytest.mark.timeout(900)]
BIN = Path(sys.executable).parent


class Collector(http.server.ThreadingHTTPServer):
    """An OpenTelemetry collector that keeps the attributes of each span."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Spans)
        self.spans: list[dict[str, Any]] = []


class _Spans(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                for span in scope.spans:
                    values = {one.key: one.value for one in span.attributes}
                    self.server.spans.append(
                        {key: one.string_value or one.int_value for key, one in values.items()}
                    )
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


def config_file(folder: Path, port: int, **model: Any) -> Path:
    file = folder / "config.yaml"
    whole = {
        "auth": {"anonymous": True},
        "port": port,
        "tracing": {"sampling_ratio": 1.0},
        "ingress_cpus": 0.1,
        "models": [{**MODEL, **model}],
    }
    file.write_text(yaml.safe_dump(whole))
    return file


def deploy(environment: dict[str, str], folder: Path, config: Path) -> None:
    arguments = [f"config={config}", f"root={folder / 'root'}", f"to={folder / 'dist'}"]
    for argv in (
        [sys.executable, "-m", "serve.package", *arguments],
        [str(BIN / "serve"), "deploy", str(folder / "dist" / "serve.yaml")],
    ):
        done = subprocess.run(argv, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_packaged_server_is_deployed_changed_and_traced(
    tmp_path: Path, tiny_model: Path, collector: Collector
) -> None:
    commit_model(tmp_path / "root", Ref(name="vlm", version="v1"), tiny_model)
    commit_model(tmp_path / "root", Ref(name="vlm", version="v2"), tiny_model)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    told = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_address[1]}"}

    def fingerprint() -> str | None:
        try:
            answer = httpx.post(f"{url}{CHAT}", json=ask("Say", max_tokens=2), timeout=60)
        except httpx.ConnectError:
            return None
        return answer.json()["system_fingerprint"] if answer.is_success else None

    with head_node(told) as environment:
        environment |= {"RAY_DASHBOARD_ADDRESS": environment["RAY_API_SERVER_ADDRESS"]}
        deploy(environment, tmp_path, config_file(tmp_path, port))
        eventually(lambda: fingerprint() is not None, within_s=180)
        old = fingerprint()
        version2 = {"artifact": {"name": "vlm", "version": "v2"}}
        deploy(environment, tmp_path, config_file(tmp_path, port, **version2))
        eventually(lambda: fingerprint() not in (None, old), within_s=180)
        eventually(
            lambda: any(
                one.get("gen_ai.response.model") == "vlm@v2"
                and one.get("gen_ai.usage.output_tokens") == 2
                for one in collector.spans
            ),
            within_s=30,
        )
        asked = [one for one in collector.spans if one.get("gen_ai.request.model") == "chat"]
        assert {one["gen_ai.response.model"] for one in asked} == {"vlm@v1", "vlm@v2"}


def test_the_demos_captioner_is_served_with_the_page_as_the_readme_says(tmp_path: Path) -> None:
    embedded.install_captioner(Storage(str(tmp_path / "root")))
    port = free_port()
    config = tmp_path / "config.yaml"
    config.write_text(f"port: {port}\n" + Path("serve/config.demo.yaml").read_text())
    with in_foreground(config, tmp_path / "root", port):
        url = f"http://127.0.0.1:{port}"
        upload = {"image": ("teal.png", circle("teal"), "image/png")}
        (caption,) = httpx.post(f"{url}/v1/captions", files=upload, timeout=60).json()["data"]
        assert "circle" in caption["caption"]
        assert "sg4v-ray" in httpx.get(f"{url}/chat/", timeout=60).text


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_server_that_is_told_to_stop_answers_first_what_it_accepted(
    how: signal.Signals, tmp_path: Path, tiny_model: Path
) -> None:
    commit_model(tmp_path / "root", Ref(name="vlm", version="v1"), tiny_model)
    port = free_port()
    config = config_file(tmp_path, port, engine={**MODEL["engine"], "latency_s": 0.1})
    url = f"http://127.0.0.1:{port}"
    with in_foreground(config, tmp_path / "root", port) as server:
        body = ask("Say", stream=True)  # at 0.1 s a token and at most 60 tokens
        with httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.send_signal(how)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert len(rest) > 20
        _, said = server.communicate(timeout=120)
        assert server.returncode == 0
        assert "Traceback" not in said, said


def test_a_server_that_stops_answers_what_waits_in_a_queue_and_what_takes_long(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Serve's own `delete` gives up after 60 s, and forgets what waits for a replica."""
    commit_model(tmp_path / "root", Ref(name="vlm", version="v1"), tiny_model)
    port, engine = free_port(), {**MODEL["engine"], "capacity": 1, "latency_s": 0.8}
    config = config_file(tmp_path, port, engine=engine, max_ongoing=1)
    url, headers = f"http://127.0.0.1:{port}", {"content-type": "application/json"}
    with in_foreground(config, tmp_path / "root", port) as server:
        asked = [http.client.HTTPConnection("127.0.0.1", port, timeout=200) for _ in range(2)]
        for one in asked:
            one.request("POST", CHAT, json.dumps(ask("Say")), headers)
        began = time.monotonic()
        assert httpx.get(f"{url}/v1/models").status_code == 200  # it came after them
        server.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/v1/models").status_code == 503, within_s=20)
        assert httpx.get(f"{url}/v1/models").json()["error"]["code"] == "stopping"
        assert [one.getresponse().status for one in asked] == [200, 200]
        assert time.monotonic() - began > 65, "it would show nothing"
        _, said = server.communicate(timeout=120)
        assert server.returncode == 0
        assert "Traceback" not in said, said


def test_a_second_signal_ends_a_server_at_once(tmp_path: Path, tiny_model: Path) -> None:
    commit_model(tmp_path / "root", Ref(name="vlm", version="v1"), tiny_model)
    port, engine = free_port(), {**MODEL["engine"], "latency_s": 5.0}
    url = f"http://127.0.0.1:{port}"
    config = config_file(tmp_path, port, engine=engine)
    with in_foreground(config, tmp_path / "root", port) as server:
        asked = http.client.HTTPConnection("127.0.0.1", port, timeout=200)
        headers = {"content-type": "application/json"}
        asked.request("POST", CHAT, json.dumps(ask("Say")), headers)  # five minutes of answer
        assert httpx.get(f"{url}/v1/models").status_code == 200  # it came after it
        server.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{url}/v1/models").status_code == 503, within_s=20)
        server.send_signal(signal.SIGTERM)
        _, said = server.communicate(timeout=30)
        assert "Stopping at once" in said
        assert server.returncode == 0
        assert "Traceback" not in said, said


def test_a_server_whose_model_is_damaged_says_so_and_ends(tmp_path: Path, tiny_model: Path) -> None:
    commit_model(tmp_path / "root", Ref(name="vlm", version="v1"), tiny_model)
    with (tmp_path / "root/vlm/v1/model/tokenizer.json").open("a") as damaged:
        damaged.write(" ")
    argv = command(config_file(tmp_path, free_port()), tmp_path / "root")
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 1
    (said,) = (one for one in done.stderr.splitlines() if one.startswith("error: "))
    assert said.startswith("error: the server does not start: ")
    assert "tokenizer.json" in done.stderr[done.stderr.index(said) :]


@pytest.fixture(autouse=True)
def _hears_ctrl_c() -> Iterator[None]:
    """What a shell started in the background ignores SIGINT, and so would all that we start."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def command(config: Path, root: Path) -> list[str]:
    return [sys.executable, "-m", "serve", f"config={config}", f"root={root}"]


@contextmanager
def in_foreground(config: Path, root: Path, port: int) -> Iterator["subprocess.Popen[str]"]:
    """Run `python -m serve` until the body ends; the body begins when it is ready."""
    server = subprocess.Popen(command(config, root), stderr=subprocess.PIPE, text=True)

    def is_ready() -> bool:
        assert server.poll() is None, server.communicate()
        try:
            url = f"http://127.0.0.1:{port}/health/ready"
            return httpx.get(url, timeout=30).status_code == 200
        except httpx.TransportError:  # HAProxy starts anew for the first ingress
            return False

    try:
        eventually(is_ready, within_s=180)
        yield server
    finally:
        server.terminate()
        try:
            server.communicate(timeout=120)
        finally:
            server.kill()  # what does not end would be beside all that is measured later
