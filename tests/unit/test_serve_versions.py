# SPDX-License-Identifier: Apache-2.0
"""Two versions of a model side by side: a weight decides, one command shifts it or rolls back."""

import asyncio
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from serve import traffic
from serve.config import Auth, ServeConfig
from serve.deployment import Canary
from serve.request import ChatModel
from serve.routes import Routes
from serve.traffic import SharedWeights, Weights, table
from serve.versions import Entry, Fixed
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ConfigError, Sg4vError
from sg4v_ray.core.storage import Storage
from tests.unit.serve_site import DEPLOYMENT, LIMITS, InProcess, open_model

pytestmark = pytest.mark.serving

OLD, NEW = "0123", "4567"
CANARY = Canary(artifact=Ref(name="captioner", version="v2"), weight=0.25)
CONFIGURED = {"captioner": ("captioner@v2", 0.25)}


@pytest.fixture
def shared() -> Fixed:
    return Fixed({"captioner": 0.25})


@pytest.fixture
def client(tiny_model: Path, shared: Fixed) -> Iterator[TestClient]:
    new = ChatModel.open(DEPLOYMENT.with_canary(CANARY), tiny_model)
    routes = Routes(
        {"captioner": Entry(open_model(tiny_model), created=5, fingerprint=OLD)},
        InProcess(tiny_model, new),
        LIMITS,
        canaries={"captioner": Entry(new, created=6, fingerprint=NEW)},
        traffic=shared,
    )
    with TestClient(routes.app()) as client:
        yield client


def ask(client: TestClient, model: str = "captioner") -> Any:
    messages = [{"role": "user", "content": "What is it?"}]
    body = {"model": model, "messages": messages, "max_tokens": 1}
    return client.post("/v1/chat/completions", json=body)


def drawn(client: TestClient, times: int) -> Counter[str]:
    return Counter(ask(client).json()["system_fingerprint"] for _ in range(times))


def test_a_canary_gets_its_share(client: TestClient) -> None:
    found = drawn(client, 400)
    assert found[OLD] + found[NEW] == 400
    assert 60 <= found[NEW] <= 140  # 100 are expected; 4.6 standard deviations either way


def test_one_command_promotes_and_rolls_back(client: TestClient, shared: Fixed) -> None:
    for weight, all_go_to in ((1.0, NEW), (0.0, OLD)):
        [row] = table(client, ("captioner", weight))
        assert (row["stable"], row["canary"]) == ("captioner@v1", "captioner@v2")
        assert row["weight"] == weight
        assert drawn(client, 20) == {all_go_to: 20}


def test_either_version_can_be_asked_by_name(client: TestClient, shared: Fixed) -> None:
    shared.found["captioner"] = 1.0
    ids = [one["id"] for one in client.get("/v1/models").json()["data"]]
    assert ids == ["captioner", "captioner@v1", "captioner@v2"]
    for name, fingerprint in (("captioner@v1", OLD), ("captioner@v2", NEW)):
        answer = ask(client, name).json()
        assert (answer["model"], answer["system_fingerprint"]) == (name, fingerprint)


def test_a_model_without_a_canary_has_no_weight(client: TestClient) -> None:
    for model, status in (("captioner@v2", 400), ("nothing", 404)):
        with pytest.raises(Sg4vError, match=r"canary|no model"):
            table(client, (model, 0.5))
        response = client.post("/admin/traffic", json={"model": model, "weight": 0.5})
        assert response.status_code == status


@pytest.mark.parametrize("weight", ["1.5", "-0.1", "half", "nan"])
def test_a_weight_that_is_none_is_refused_before_anything_is_sent(weight: str) -> None:
    with pytest.raises(SystemExit):
        traffic.main(["captioner", weight, "--url", "http://127.0.0.1:9"])


def test_a_server_that_is_not_there_is_said() -> None:
    with (
        httpx.Client(base_url="http://127.0.0.1:9") as client,
        pytest.raises(Sg4vError, match="give --url"),
    ):
        table(client, None)


def test_what_was_set_holds_over_a_restart(tmp_path: Path) -> None:
    home = Storage(str(tmp_path))
    Weights(CONFIGURED, home).shift("captioner", 0.75)
    assert Weights(CONFIGURED, home).found() == {"captioner": 0.75}
    assert Weights(CONFIGURED, None).found() == {"captioner": 0.25}


@pytest.mark.parametrize("newer", [("captioner@v3", 0.25), ("captioner@v2", 0.1)])
def test_another_canary_or_weight_in_the_config_is_the_newer_decision(
    tmp_path: Path, newer: tuple[str, float]
) -> None:
    home = Storage(str(tmp_path))
    Weights(CONFIGURED, home).shift("captioner", 0.75)
    assert Weights({"captioner": newer}, home).found() == {"captioner": newer[1]}


def test_without_the_desk_weights_stay_as_they_were() -> None:
    answers: list[dict[str, float] | None] = [{"captioner": 0.5}, None]

    class Gone:
        async def weights(self) -> dict[str, float] | None:
            return answers.pop(0)

    async def body() -> None:
        shared = SharedWeights(Gone(), {"captioner": 0.25})
        for _ in range(2):
            shared._until = 0.0
            assert await shared.weights() == {"captioner": 0.5}

    asyncio.run(body())


def test_a_canary_of_the_same_version_is_refused() -> None:
    same = Canary(artifact=Ref(name="captioner"), weight=0.1)
    with pytest.raises(ConfigError, match="name another one"):
        replace(DEPLOYMENT, canary=same)


def test_a_canary_is_a_deployment_of_its_own() -> None:
    config = ServeConfig(models=(replace(DEPLOYMENT, canary=CANARY),), auth=Auth(anonymous=True))
    stable, canary = config.deployments
    assert (stable.id, str(stable.artifact)) == ("captioner", "captioner@v1")
    assert (canary.id, str(canary.artifact)) == ("captioner.canary", "captioner@v2")


@pytest.mark.parametrize("said", [{"text": "<html>"}, {"json": {}}, {"json": []}])
def test_another_server_is_told_from_this_one(said: dict[str, Any]) -> None:
    other = httpx.MockTransport(lambda _: httpx.Response(404, **said))
    with (
        httpx.Client(base_url="http://other.example", transport=other) as client,
        pytest.raises(Sg4vError, match="is not this server"),
    ):
        table(client, None)


def test_a_canary_that_does_not_run_is_told_and_makes_no_server_unready(tiny_model: Path) -> None:
    backend = InProcess(tiny_model, open_model(tiny_model))

    async def ready() -> dict[str, bool]:
        return {"captioner": True, "captioner.canary": False}

    backend.ready = ready  # type: ignore[method-assign]
    second = ChatModel.open(DEPLOYMENT.with_canary(CANARY), tiny_model)
    routes = Routes(
        {"captioner": Entry(backend.model, 0, OLD)},
        backend,
        LIMITS,
        canaries={"captioner": Entry(second, 0, NEW)},
    )
    with TestClient(routes.app()) as client:
        found = client.get("/health/ready")
    assert found.status_code == 200
    assert found.json()["models"] == {"captioner": True, "captioner.canary": False}


@pytest.mark.parametrize("key", ["bad\nkey", "clé"])
def test_a_variable_that_holds_no_key_is_named_and_not_shown(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SG4V_API_KEY", key)
    with pytest.raises(Sg4vError, match="SG4V_API_KEY holds no key") as error:
        traffic.main([])
    assert key not in str(error.value)
