# SPDX-License-Identifier: Apache-2.0
"""Reports each storage request below a local folder to the tests, and waits for their answer.

Python imports this module at its start from PYTHONPATH, in drivers and in Ray's worker processes.
Without SG4V_CRASH_SOCKET it does nothing. The product is not changed on disk: functions of obstore
and of `sg4v_ray.core.storage` are wrapped when they are imported, and an audit hook reports the
system calls between them.
"""

import os
import sys

_SOCKET = os.environ.get("SG4V_CRASH_SOCKET", "")
_FOLDER = os.environ.get("SG4V_CRASH_FOLDER", "")

if _SOCKET and _FOLDER:
    import functools
    import importlib.abc
    import importlib.machinery
    import json
    import socket
    import threading
    from collections.abc import Callable, Sequence
    from types import ModuleType
    from typing import Any

    _local = threading.local()

    def _report(operation: str, phase: str, path: str) -> None:
        """Send one event; return when the tests let this process continue."""
        if not path.startswith(_FOLDER):
            return
        if getattr(_local, "pid", None) != os.getpid():  # the first event, or a forked process
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(_SOCKET)
            _local.pid, _local.stream = os.getpid(), connection.makefile("rw")
        event = {"pid": os.getpid(), "operation": operation, "phase": phase, "path": path}
        _local.stream.write(json.dumps(event) + "\n")
        _local.stream.flush()
        _local.stream.readline()

    def _reported(function: Callable[..., Any], operation: str, path_of: Any) -> Any:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            path = path_of(*args)
            _report(operation, "before", path)
            result = function(*args, **kwargs)
            _report(operation, "after", path)
            return result

        return wrapper

    def _object_path(store: Any, path: Any = "", *_: Any) -> str:
        """Return the local path of an object; '' for a bucket, whose requests a proxy reports."""
        prefix = getattr(store, "prefix", None)
        is_local = type(store).__name__ == "LocalStore"
        return f"{prefix}/{path or ''}" if is_local else ""

    def _wrap(storage: ModuleType) -> None:
        obstore: Any = sys.modules["obstore"]
        names = {"put": "put", "get": "get", "head": "head", "list_with_delimiter": "list"}
        for name, operation in names.items():
            setattr(obstore, name, _reported(getattr(obstore, name), operation, _object_path))
        made: Any = storage
        made._link_new = _reported(made._link_new, "create", lambda target, data: str(target))
        made.Storage.sizes = _reported(
            made.Storage.sizes,
            "list",
            lambda self, prefix="": f"{self.root.removeprefix('file://')}/{prefix}",
        )

    class _Loader(importlib.abc.Loader):
        def __init__(self, loader: Any) -> None:
            self._loader = loader

        def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
            module: ModuleType | None = self._loader.create_module(spec)
            return module

        def exec_module(self, module: ModuleType) -> None:
            self._loader.exec_module(module)
            _wrap(module)

    class _Finder(importlib.abc.MetaPathFinder):
        def find_spec(
            self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
        ) -> importlib.machinery.ModuleSpec | None:
            if name != "sg4v_ray.core.storage":
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            assert spec is not None
            spec.loader = _Loader(spec.loader)
            return spec

    def _audit(name: str, args: tuple[Any, ...]) -> None:
        """Report the steps inside a conditional create, and the reading of local images."""
        if name not in ("os.link", "os.remove", "open"):
            return
        path = args[0]
        if not isinstance(path, str | os.PathLike) or _FOLDER not in (path := os.fspath(path)):
            return
        if name == "os.link":
            _report("create", "written", os.fspath(args[1]))
        elif name == "os.remove" and "#" in path:
            _report("create", "linked", path.rpartition("#")[0])
        elif name == "open" and path.endswith(".png") and args[1] == "r":
            _report("get", "before", path)

    sys.meta_path.insert(0, _Finder())
    sys.addaudithook(_audit)
