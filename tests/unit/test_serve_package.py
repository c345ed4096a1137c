# SPDX-License-Identifier: Apache-2.0
"""What `serve deploy` gets is whole, and is another package exactly if something in it changed."""

import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from serve import package
from sg4v_ray.core.errors import ConfigError

CONFIG = Path("serve/config.easy-vqa.yaml")


def made(tmp_path: Path, config: Path = CONFIG, **more: str) -> dict[str, object]:
    given = {"config": str(config), "root": "/shared/runs", "to": str(tmp_path), **more}
    package.main([f"{name}={value}" for name, value in given.items()])
    found: dict[str, object] = yaml.safe_load((tmp_path / "serve.yaml").read_text())
    return found


def test_serve_reads_what_is_written(tmp_path: Path) -> None:
    schema = ServeDeploySchema.model_validate(made(tmp_path))
    [application] = schema.applications
    assert schema.http_options.host == "127.0.0.1"
    assert application.args == {"config": "config.yaml", "root": "/shared/runs"}
    [file] = tmp_path.glob("*.zip")
    assert application.runtime_env == {"working_dir": file.as_uri()}


def test_tracing_is_for_all_of_serve(tmp_path: Path) -> None:
    traced = tmp_path / "traced.yaml"
    traced.write_text(CONFIG.read_text() + "tracing: {sampling_ratio: 0.5}\n")
    schema = ServeDeploySchema.model_validate(made(tmp_path, traced))
    assert schema.tracing_config is not None
    assert (schema.tracing_config.enabled, schema.tracing_config.sampling_ratio) == (True, 0.5)


def test_the_page_is_an_application_of_its_own(tmp_path: Path) -> None:
    with_page = tmp_path / "page.yaml"
    with_page.write_text(CONFIG.read_text() + "page: {route: /ask}\n")
    schema = ServeDeploySchema.model_validate(made(tmp_path, with_page))
    api, page = schema.applications
    assert (api.route_prefix, page.route_prefix) == ("/", "/ask")
    assert (page.import_path, page.args) == ("serve.page.app:build", api.args)
    assert page.runtime_env == api.runtime_env


def test_the_same_code_and_config_are_the_same_package() -> None:
    assert package.package(b"a") == package.package(b"a") != package.package(b"b")


def test_what_is_packed_is_enough_to_build_the_application(tmp_path: Path) -> None:
    with zipfile.ZipFile(BytesIO(package.package(CONFIG.read_bytes()))) as packed:
        packed.extractall(tmp_path)
    [top] = tmp_path.iterdir()  # Ray takes one folder away
    code = (
        "import serve.app, serve.config, sg4v_ray.recipes.embedded as one, pathlib\n"
        "assert pathlib.Path(serve.app.__file__).is_relative_to(pathlib.Path.cwd())\n"
        "assert pathlib.Path(one.__file__).is_relative_to(pathlib.Path.cwd())\n"
        "serve.config.read({'config': 'config.yaml', 'root': '/shared/runs'})\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=top, check=True)


def test_a_package_elsewhere_is_named_by_its_address(tmp_path: Path) -> None:
    schema = ServeDeploySchema.model_validate(made(tmp_path, uri="https://files.example.org/a/"))
    [file] = tmp_path.glob("*.zip")
    expected = f"https://files.example.org/a/{file.name}"
    assert schema.applications[0].runtime_env == {"working_dir": expected}


def test_a_cache_that_nodes_would_look_for_in_the_package_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="relative"):
        made(tmp_path, cache="./cache")
