# SPDX-License-Identifier: Apache-2.0
"""The config of the HTTP application: strict, and wrong values are found before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serve import config as module
from serve.config import Auth, ServeConfig, read
from serve.deployment import ModelDeployment
from sg4v_ray.core.artifact import Ref
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.inference.engine import Generation
from sg4v_ray.inference.open import EngineConfig
from sg4v_ray.model.instructions import UNIFIED
from sg4v_ray.recipes import easy_vqa, embedded, paper

OPEN = Auth(anonymous=True)
ENGINE = EngineConfig(kind="fake", capacity=4, max_model_len=400)
DEPLOYMENT = ModelDeployment(
    id="chat",
    artifact=Ref(name="vlm"),
    root="/nowhere",
    template="vicuna_v1",
    geometry="pad",
    engine=ENGINE,
    generation=Generation(max_tokens=60),
)


def config_file(tmp_path: Path, extra: str = "") -> str:
    file = tmp_path / "serve.yaml"
    file.write_text(
        f"""
auth: {{anonymous: true}}
models:
  - id: chat
    artifact: {{name: vlm}}
    template: vicuna_v1
    geometry: pad
    engine: {{kind: fake, capacity: 4}}
    generation: {{max_tokens: 16}}
{extra}"""
    )
    return str(file)


def test_a_root_given_as_argument_is_every_models(tmp_path: Path) -> None:
    config = read({"config": config_file(tmp_path), "root": "/runs", "cache": "/fast"})
    assert (config.models[0].root, config.cache) == ("/runs", "/fast")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "root=/absolute/path"),
        ({"root": "runs"}, "relative"),
        ({"root": "/runs", "rooot": "x"}, "unknown argument 'rooot'"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, args: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        read({"config": config_file(tmp_path), **args})


def test_an_unknown_key_of_a_config_is_named_with_the_nearest(tmp_path: Path) -> None:
    file = config_file(tmp_path, "    max_queue: 3\n")
    with pytest.raises(ConfigError, match="did you mean 'max_queued'"):
        read({"config": file, "root": "/runs"})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "a/b"}, "model id"),
        ({"id": "ingress"}, "model id"),
        ({"template": "plain"}, "no place for a question"),
        ({"generation": Generation(max_tokens=400)}, "no room"),
        ({"generation": Generation(max_tokens=4, num_beams=3)}, "beams"),
        ({"min_replicas": 2}, "min_replicas"),
        ({"max_ongoing": 3}, "rows of the batch"),
        ({"engine": EngineConfig(kind="vllm", tensor_parallel=2)}, "tensor_parallel"),
        ({"threads": 0}, "threads"),
    ],
)
def test_a_model_that_cannot_be_served_fails_at_construction(
    change: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        replace(DEPLOYMENT, **change)


def test_two_models_cannot_share_an_id() -> None:
    with pytest.raises(ConfigError, match="each once"):
        ServeConfig(auth=OPEN, models=(DEPLOYMENT, DEPLOYMENT))


def test_a_full_queue_is_noticed_by_the_ingress_not_by_the_proxy() -> None:
    config = ServeConfig(auth=OPEN, models=(replace(DEPLOYMENT, max_replicas=3),))
    model = config.models[0]
    assert config.max_ingress_ongoing > 3 * model.max_ongoing + model.max_queued


def shipped(name: str) -> ServeConfig:
    file = Path(module.__file__).with_name(f"config.{name}.yaml")
    return read({"config": str(file), "root": "/runs"})


@pytest.mark.parametrize(
    ("name", "served"),
    [
        ("demo", [embedded.CAPTIONER]),
        ("easy-vqa", [easy_vqa.CAPTIONER, easy_vqa.VLM]),
        ("sharegpt4v", [paper.CAPTIONER, paper.VLM]),
    ],
)
def test_a_shipped_config_serves_what_its_recipe_makes_as_it_was_taught(
    name: str, served: list[Ref]
) -> None:
    config = shipped(name)
    assert [one.artifact for one in config.models] == served
    assert config.models[0].instruction == UNIFIED
    assert {(one.template, one.geometry) for one in config.models} == {("vicuna_v1", "pad")}


@pytest.mark.parametrize("name", ["demo", "easy-vqa"])
def test_a_nano_config_fits_a_machine_with_two_cores(name: str) -> None:
    config = shipped(name)
    cpus = config.ingress_cpus * config.ingress_replicas + config.desk_cpus
    cpus += 0.1  # for the page, as the comment in it says
    cpus += sum(one.num_cpus * one.max_replicas for one in config.models)
    assert cpus <= 2


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "one of keys_file, keys_env and anonymous"),
        ({"keys_file": "/k", "anonymous": True}, "one of keys_file, keys_env and anonymous"),
        ({"keys_env": "KEYS", "state": "runs"}, "relative"),
    ],
)
def test_who_may_call_is_said_in_one_way(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Auth(**fields)


def test_a_server_without_keys_listens_to_its_own_machine_alone() -> None:
    with pytest.raises(ConfigError, match=r"host is '0\.0\.0\.0' and auth\.anonymous"):
        ServeConfig(auth=OPEN, models=(DEPLOYMENT,), host="0.0.0.0")
