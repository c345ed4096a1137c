# SPDX-License-Identifier: Apache-2.0
"""Shift requests between two versions of a model, or roll back, on a server that runs.

    python -m serve.traffic                   says what each canary gets
    python -m serve.traffic chat 0.25         a quarter of the requests for `chat`
    python -m serve.traffic chat rollback     none
    python -m serve.traffic chat promote      all

SG4V_API_KEY holds a key with the scope `admin`. What is set holds for every process that answers
HTTP within a second or two, and over restarts where `auth.state` is set, until the config names
another canary or another weight.
"""

import argparse
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Final

import httpx

from sg4v_ray.core.errors import Sg4vError
from sg4v_ray.core.storage import Storage

_log = logging.getLogger(__name__)
_FILE: Final = "traffic.json"
_WORDS: Final = {"rollback": 0.0, "promote": 1.0}
_WAIT_S: Final = 30.0


class Weights:
    """The weights of all canaries, and where they are kept."""

    def __init__(self, canaries: Mapping[str, tuple[str, float]], home: Storage | None) -> None:
        """Take the configured weights, or those that were set since they were configured.

        Args:
            canaries: artifact and configured weight, by model.
            home: where to keep what is set; None forgets it with the process.
        """
        self._canaries, self._home = canaries, home
        self._set = self._load()

    def found(self) -> dict[str, float]:
        """Return the weight of each canary, by model."""
        return {
            model_id: self._set.get(model_id, configured)
            for model_id, (_, configured) in self._canaries.items()
        }

    def shift(self, model_id: str, weight: float) -> None:
        """Set one; it is kept before it holds."""
        found = {**self._set, model_id: weight}
        if self._home is not None:
            rows = {one: [*self._canaries[one], value] for one, value in found.items()}
            self._home.put(_FILE, json.dumps(rows).encode())
        self._set = found
        _log.warning("%s of the requests for %s go to its canary now", f"{weight:.1%}", model_id)

    def _load(self) -> dict[str, float]:
        if self._home is None or not self._home.exists(_FILE):
            return {}
        rows = json.loads(self._home.get(_FILE))
        return {
            model_id: weight
            for model_id, (artifact, configured, weight) in rows.items()
            # Another canary, or a weight that was edited since, is a newer decision than this one.
            if self._canaries.get(model_id) == (artifact, configured)
        }


class SharedWeights:
    """The `Traffic` of one process: the desk's weights, asked for once a second."""

    def __init__(self, desk: Any, configured: Mapping[str, float]) -> None:
        """`desk` is a `serve.desk.DeskHandle`; until it answers, weights are as configured."""
        self._desk, self._found, self._until = desk, dict(configured), 0.0

    async def weights(self) -> Mapping[str, float]:
        """Return the weights; without the desk, the last ones that it told."""
        if time.monotonic() >= self._until:
            self._until = time.monotonic() + 1.0
            found = await self._desk.weights()
            if found is not None:
                self._found = found
        return self._found

    async def shift(self, model_id: str, weight: float) -> None:
        """Set one for all processes.

        Raises:
            ApiError: 503, the desk cannot be reached or cannot keep it.
        """
        await self._desk.shift(model_id, weight)
        self._until = 0.0


def main(arguments: list[str]) -> None:
    """Show the weights, or set one and show them."""
    parser = argparse.ArgumentParser(prog="python -m serve.traffic")
    parser.add_argument("model", nargs="?")
    parser.add_argument("weight", nargs="?", help="0 to 1, rollback or promote")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    given = parser.parse_args(arguments)
    if given.model is not None and given.weight is None:
        parser.error("give a weight: 0 to 1, rollback or promote")
    key = os.environ.get("SG4V_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise Sg4vError("SG4V_API_KEY holds no key; set it to one with the scope 'admin'")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=given.url, headers=headers, timeout=_WAIT_S) as client:
        body = None if given.model is None else (given.model, _weight(given.weight, parser))
        for one in table(client, body):
            sys.stdout.write(
                f"{one['model']}: {one['weight']:.1%} to {one['canary']}, "
                f"the rest to {one['stable']}\n"
            )


def table(client: httpx.Client, shift: tuple[str, float] | None) -> list[dict[str, Any]]:
    """Set a weight if one is given; return all of them.

    Raises:
        Sg4vError: the server cannot be reached, or refuses.
    """
    try:
        if shift is None:
            answer = client.get("/admin/traffic")
        else:
            answer = client.post("/admin/traffic", json={"model": shift[0], "weight": shift[1]})
    except httpx.HTTPError as error:
        raise Sg4vError(f"no server at {client.base_url}: {error}; give --url") from error
    try:
        said = answer.json()
        if answer.is_success:
            found: list[dict[str, Any]] = said["data"]
            return found
        message = said["error"]["message"]
    except (ValueError, KeyError, TypeError):
        raise Sg4vError(
            f"what answers at {client.base_url} is not this server; give its address as --url"
        ) from None
    is_about_key = answer.status_code in (401, 403)
    hint = "; SG4V_API_KEY must hold a key with the scope 'admin'" if is_about_key else ""
    raise Sg4vError(f"{message}{hint}")


def _weight(text: str, parser: argparse.ArgumentParser) -> float:
    if text in _WORDS:
        return _WORDS[text]
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not 0 <= weight <= 1:
        parser.error(f"{text!r} is no weight; give 0 to 1, rollback or promote")
    return weight


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Sg4vError as error:
        sys.exit(f"error: {error}")
