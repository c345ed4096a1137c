# SPDX-License-Identifier: Apache-2.0
"""`python -m serve` says what is wrong before anything starts."""

import inspect
import socket

import pytest
from ray.serve._private import constants

from serve import __main__ as module
from serve import package
from serve.config import Auth, ServeConfig
from sg4v_ray.core.errors import ConfigError
from tests.unit.serve_site import DEPLOYMENT


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


def test_settings_of_serve_are_ones_that_it_reads() -> None:
    """It takes no notice of a name that it does not know, for example after an upgrade."""
    known = inspect.getsource(constants)
    assert [name for name in module.LEAN if f'"{name}"' not in known] == []


@pytest.mark.parametrize("main", [module.main, package.main])
def test_who_asks_for_help_gets_it(main: object, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])  # type: ignore[operator]
    assert ended.value.code == 0
    assert "config=serve/config.easy-vqa.yaml" in capsys.readouterr().out
