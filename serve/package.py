# SPDX-License-Identifier: Apache-2.0
"""Pack the server for `serve deploy`: its code and config in one file, and what Serve reads.

    python -m serve.package config=serve/config.easy-vqa.yaml root=/shared/runs to=/shared/deploy
    serve deploy /shared/deploy/serve.yaml

Every node must be able to read `to`: a shared folder, or a copy of the package at an address that
`uri=https://...` (s3, gs, azure, file) names. The name of a package follows from its contents, so
that deploying a changed one is a rolling update, and deploying the same one is none.
"""

import hashlib
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import yaml

from serve.__main__ import API, http_options, pairs, tracing
from serve.config import LOOPBACK, ServeConfig, read
from serve.page.app import PAGE
from sg4v_ray.core.errors import ConfigError, Sg4vError

_TOP: Final = "sg4v-ray"
"""Ray takes one folder at the top of a package away."""
_CONFIG: Final = "config.yaml"
_LONG_AGO: Final = (1980, 1, 1, 0, 0, 0)
_SOURCES: Final = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> None:
    """Write a package and `serve.yaml`, and say what to do with them."""
    given = pairs(arguments, __doc__)
    target = Path(given.pop("to", "dist")).resolve()
    uri = given.pop("uri", "")
    config = read(given)
    data = package(Path(given["config"]).read_bytes())
    file = target / f"sg4v-ray-{hashlib.sha256(data).hexdigest()[:12]}.zip"
    target.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    described = describe(config, given, f"{uri.rstrip('/')}/{file.name}" if uri else file.as_uri())
    (target / "serve.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    sys.stdout.write(f"{file}\nserve deploy {target / 'serve.yaml'}\n")
    if config.host in LOOPBACK:
        sys.stderr.write(
            f"note: host is {config.host}, so each node answers itself alone; for a load balancer "
            "set host: 0.0.0.0\n"
        )


def package(config: bytes) -> bytes:
    """Return the code of this server and a config as a zip file; equal inputs give equal bytes."""
    files = {_CONFIG: config}
    for name in ("serve", "sg4v_ray"):
        for path in sorted((_SOURCES / name).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                files[str(path.relative_to(_SOURCES))] = path.read_bytes()
    data = BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            packed.writestr(zipfile.ZipInfo(f"{_TOP}/{name}", _LONG_AGO), content)
    return data.getvalue()


def describe(config: ServeConfig, args: dict[str, str], uri: str) -> dict[str, Any]:
    """Return what `serve deploy` reads.

    Raises:
        ConfigError: a cache that nodes would look for in the package.
    """
    if not config.cache.startswith(("/", "~")):
        raise ConfigError(f"cache {config.cache!r} is relative; give an absolute path, or ~/...")
    return {
        "proxy_location": "EveryNode",
        "http_options": http_options(config),
        **({} if config.tracing is None else {"tracing_config": tracing(config.tracing)}),
        "applications": [
            {
                "name": name,
                "route_prefix": route,
                "import_path": build,
                "args": {**args, "config": _CONFIG},
                "runtime_env": {"working_dir": uri},
            }
            for name, route, build in _applications(config)
        ],
    }


def _applications(config: ServeConfig) -> list[tuple[str, str, str]]:
    """Return name, route and builder of each."""
    page = [] if config.page is None else [(PAGE, config.page.route, "serve.page.app:build")]
    return [(API, "/", "serve.app:build"), *page]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Sg4vError as error:
        sys.exit(f"error: {error}")
