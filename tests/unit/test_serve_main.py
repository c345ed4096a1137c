# SPDX-License-Identifier: Apache-2.0
"""`python -m serve` says what is wrong before anything starts."""

import inspect
import os
import socket
import tempfile
from pathlib import Path

import pytest
from ray.serve._private import constants

from serve import __main__ as module
from serve import package
from serve.config import Auth, ServeConfig
from serve.lean import settings
from sg4v_ray.core.errors import ConfigError
from tests.unit.serve_site import DEPLOYMENT
from tests.waiting import free_port


def test_a_port_that_somebody_has_is_named() -> None:
    """Proxies share their port: of two servers each would get a part of the requests."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        config = ServeConfig(models=(DEPLOYMENT,), auth=Auth(anonymous=True), port=port)
        with pytest.raises(
            ConfigError, match=f"127.0.0.1:{port} .*in use.*; set `host` and `port`"
        ):
            module._check_port(config)
    module._check_port(config)


def test_settings_of_serve_are_ones_that_it_reads(tmp_path: Path) -> None:
    """It takes no notice of a name that it does not know, for example after an upgrade."""
    known = inspect.getsource(constants)
    given = settings(tmp_path, host="127.0.0.1", silent_s=1, longest_s=2)
    assert [name for name in given if f'"{name}"' not in known] == []


class Started(Exception):
    """Ray would start now."""


@pytest.mark.parametrize(("address", "is_ours"), [(None, True), ("ray.example:6379", False)])
def test_a_ray_of_this_machine_starts_with_settings_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str | None, is_ours: bool
) -> None:
    """Ports and files too: a second server here would use those of the first."""
    for name in settings(tmp_path, host="127.0.0.1", silent_s=1, longest_s=2):
        monkeypatch.setenv(name, "")  # so that it is taken back at the end
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "7")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(tempfile, "tempdir", "/" + 100 * "x")
    seen: dict[str, str] = {}

    def init(_: str) -> None:
        seen.update(os.environ)
        raise Started

    monkeypatch.setattr(module.ray, "init", init)
    monkeypatch.setattr(module, "application", lambda _: None)
    port = free_port()
    monkeypatch.setattr(
        module,
        "read",
        lambda _: ServeConfig(models=(DEPLOYMENT,), auth=Auth(anonymous=True), port=port),
    )
    with pytest.raises(Started):
        module.main([])
    assert seen["RAY_SERVE_CONTROL_LOOP_INTERVAL_S"] == "7", "what is set stays"
    assert (seen.get("RAY_SERVE_ENABLE_HA_PROXY") == "1") == is_ours
    if is_ours:
        folder = Path(seen["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert folder.name.startswith("sg4v-")
        assert len(str(folder)) + 85 <= 107, "no socket has a longer name"
        assert not folder.exists(), "it goes with the server"


def test_two_servers_of_a_machine_have_other_ports_and_a_folder_each(tmp_path: Path) -> None:
    first, second = (
        settings(Path(tempfile.mkdtemp(dir=tmp_path)), host="localhost", silent_s=1, longest_s=2)
        for _ in "ab"
    )
    places = [name for name in first if name.endswith(("_PORT", "_LOC", "_PATH", "_BASE", "_FILE"))]
    assert len(places) == 9
    assert [name for name in places if first[name] == second[name]] == []


@pytest.mark.parametrize("host", ["::1", "192.0.2.2"])
def test_an_address_at_which_haproxy_finds_no_ingress_is_served_without_it(host: str) -> None:
    assert (
        settings(Path("/folder"), host=host, silent_s=1, longest_s=2)["RAY_SERVE_ENABLE_HA_PROXY"]
        == "0"
    )


@pytest.mark.parametrize("main", [module.main, package.main])
def test_who_asks_for_help_gets_it(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])  # type: ignore[operator]
    assert ended.value.code == 0
    assert "config=serve/config.easy-vqa.yaml" in capsys.readouterr().out


def test_where_programs_cannot_be_started_from_the_folder_python_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = str(tmp_path)  # as where it is mounted noexec
    monkeypatch.setattr(os, "access", lambda path, _: not str(path).startswith(here))
    found = settings(tmp_path, host="127.0.0.1", silent_s=1, longest_s=2)
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == "0"
    assert "noexec" in caplog.text
