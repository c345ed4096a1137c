# SPDX-License-Identifier: Apache-2.0
"""Equal configs have equal fingerprints; a wrong file is refused with the place and the cure."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import pytest

from sg4v_ray.core.config import fingerprint, load, read_yaml, to_plain
from sg4v_ray.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    rate: float = 0.5

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise ConfigError(f"size must be above 0, got {self.size}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    parts: tuple[Inner, ...] = ()
    limit: int | None = None


CONFIG = Outer(name="x", parts=(Inner(size=1), Inner(size=2, rate=0.1)), limit=3)


def test_the_fingerprint_depends_on_values_alone() -> None:
    assert fingerprint(CONFIG) == fingerprint(replace(CONFIG))
    assert fingerprint(CONFIG) != fingerprint(replace(CONFIG, limit=4))
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})


def test_the_fingerprint_is_the_same_in_every_release() -> None:
    """A change here would make every finished artifact look drifted."""
    assert fingerprint({"a": [1, 2.5, None, "x", True]}) == "309dd3b1a5da88d2"


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, object(), {1: "a"}], ids=repr)
def test_a_value_without_a_stable_form_is_refused(value: object) -> None:
    with pytest.raises(ConfigError):
        fingerprint(value)


def test_a_config_loads_from_its_plain_form() -> None:
    assert load(Outer, to_plain(CONFIG)) == CONFIG


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param({"name": "x", "limt": 3}, "no field 'limt'; did you mean 'limit'", id="typo"),
        pytest.param({}, "needs the field 'name'", id="missing"),
        pytest.param({"name": 3}, r"Outer\.name must be of type str, got 3", id="type"),
        pytest.param({"name": "x", "kind": "c"}, r"Outer\.kind must be one of 'a', 'b'", id="kind"),
        pytest.param({"name": "x", "limit": True}, r"Outer\.limit must be of type int", id="bool"),
        pytest.param(
            {"name": "x", "parts": [{"size": 1}, {"size": "2"}]},
            r"Outer\.parts\[1\]\.size must be of type int, got '2'",
            id="nested",
        ),
        pytest.param({"name": "x", "parts": 5}, r"Outer\.parts must be a list", id="list"),
        pytest.param(
            {"name": "x", "parts": [{"size": 1, "rate": float("nan")}]},
            r"Outer\.parts\[0\]\.rate must be a number that is finite, got nan",
            id="nan",
        ),
        pytest.param(
            {"name": "x", "parts": [{"size": -1}]},
            r"Outer\.parts\[0\]: size must be above 0, got -1",
            id="value",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_place(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(Outer, data)


def test_a_record_of_what_was_measured_may_hold_what_is_no_number() -> None:
    """The loss of a step that went wrong is NaN; its checkpoint has to be read all the same."""
    data = {"name": "x", "parts": [{"size": 1, "rate": math.nan}, {"size": 1, "rate": math.inf}]}
    rates = [one.rate for one in load(Outer, data, finite=False).parts]
    assert math.isnan(rates[0]) and math.isinf(rates[1])


def test_a_key_of_a_yaml_text_that_stands_twice_is_refused() -> None:
    """Else its first value, or a whole block of keys, is lost without a word."""
    assert read_yaml("a: 1\nb: {a: 2}", where="f") == {"a": 1, "b": {"a": 2}}
    merged = read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\n1: 4\n'1': 5", where="f")
    assert merged == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, 1: 4, "1": 5}
    with pytest.raises(ConfigError, match="f is not YAML"):
        read_yaml("!!map a", where="f")
    with pytest.raises(ConfigError, match="f is not YAML: 'a' is there twice"):
        read_yaml("b: {a: 1, a: 2}", where="f")
