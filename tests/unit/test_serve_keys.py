# SPDX-License-Identifier: Apache-2.0
"""A key opens what it is for, is stored as a hash alone, and is changed without a restart."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import pytest

from serve import keys
from serve.keys import Key, KeyRing, Quota, main, new_key, parse
from sg4v_ray.core.errors import ConfigError

SHA = hashlib.sha256(b"sg4v-one").hexdigest()
OTHER = hashlib.sha256(b"sg4v-two").hexdigest()


def entry(name: str, sha256: str, more: str = "") -> str:
    return f"  - name: {name}\n    sha256: {sha256}\n{more}"


def test_a_key_is_found_by_itself_and_by_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + entry("one", SHA) + entry("two", OTHER, "    scopes: [metrics]\n"))
    ring = KeyRing(file=str(file))
    found = ring.find("sg4v-one")
    assert found == Key(name="one", sha256=SHA, scopes=("inference",), quota=Quota())
    assert ring.find("sg4v-two").scopes == ("metrics",)  # type: ignore[union-attr]
    for wrong in ("", "sg4v-On", "sg4v-one ", SHA, "one", "\N{SNOWMAN}"):
        assert ring.find(wrong) is None


def test_a_file_that_changes_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + entry("one", SHA))
    ring = KeyRing(file=str(file))
    assert ring.find("sg4v-two") is None
    new = tmp_path / "new"
    new.write_text("keys:\n" + entry("two", OTHER))
    new.rename(file)
    assert ring.find("sg4v-two") is not None
    assert ring.find("sg4v-one") is None, "a key that was taken out is out"


def test_a_file_that_breaks_locks_nobody_out_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + entry("one", SHA))
    ring = KeyRing(file=str(file))
    with caplog.at_level(logging.ERROR):
        file.write_text("keys:\n  - name: [")
        assert ring.find("sg4v-one") is not None
        file.unlink()
        assert ring.find("sg4v-one") is not None
    assert caplog.text.count("the keys of before stay in use") >= 2


def test_a_file_that_could_not_be_read_once_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a key that was taken out would be valid until the next change."""
    monkeypatch.setattr(keys, "_LOOK_EVERY_S", 0.0)
    file = tmp_path / "keys.yaml"
    file.write_text("keys:\n" + entry("one", SHA))
    ring, read_text = KeyRing(file=str(file)), Path.read_text
    file.write_text("keys:\n" + entry("other", OTHER))

    def fails(*_: Any, **__: Any) -> str:
        raise OSError("stale file handle")

    monkeypatch.setattr(Path, "read_text", fails)
    assert ring.find("sg4v-one") is not None
    monkeypatch.setattr(Path, "read_text", read_text)
    assert ring.find("sg4v-one") is None


def test_keys_come_from_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SG4V_KEYS", "keys:\n" + entry("one", SHA))
    assert KeyRing(variable="SG4V_KEYS").find("sg4v-one") is not None
    with pytest.raises(ConfigError, match="the environment has no OTHER"):
        KeyRing(variable="OTHER")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("keys: []", "has no keys; make one with"),
        ("[1]", "must begin with `keys:`"),
        ("keys: {", "is not YAML"),
        ("keys:\n" + entry("one", "sg4v-one"), "sha256 must be 64 hexadecimal digits"),
        ("keys:\n" + entry("a b", SHA), "key name 'a b' must be"),
        ("keys:\n" + entry("one", SHA) + entry("one", OTHER), "each name once, 'one'"),
        ("keys:\n" + entry("one", SHA) + entry("two", SHA), "each sha256 once"),
        ("keys:\n" + entry("one", SHA, "    scopes: [root]\n"), "scopes"),
        ("keys:\n" + entry("one", SHA, "    scopes: []\n"), "has no scopes"),
        ("keys:\n" + entry("one", SHA, "    quota: {requests_per_min: 0}\n"), "must be above 0"),
        ("keys:\n" + entry("one", SHA, "    qouta: {}\n"), "quota"),
    ],
)
def test_what_is_wrong_with_keys_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(text, where="keys.yaml")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no keys can be read from .*none\.yaml"):
        KeyRing(file=str(tmp_path / "none.yaml"))


def test_a_new_key_is_long_random_and_its_entry_can_be_stored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    secrets = {new_key("one")[0] for _ in range(100)}
    assert len(secrets) == 100 and all(len(one) > 40 for one in secrets)
    main(["team-a"])
    said = capsys.readouterr()
    secret = said.err.split()[-1]
    assert secret not in said.out, "what is stored in a file is no secret"
    (found,) = parse(f"keys:\n{said.out}", where="x")
    assert found.sha256 == hashlib.sha256(secret.encode()).hexdigest()
