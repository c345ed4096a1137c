# SPDX-License-Identifier: Apache-2.0
"""The quality gate: why a text is no caption. Pure functions of the text and what was asked.

An empty or cut-off text is rejected before this (`exactly_once.generate.judge`).
"""

import functools
import itertools
import re
from collections import Counter
from dataclasses import dataclass
from typing import Final

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.images import Rejected
from sg4v_ray.core.rejects import Reject

_PHRASE: Final = 10
"""Words of a phrase. Good captions repeat up to nine: "side of the image, there is a large"."""
_MIN_WORDS_TO_TELL: Final = 8
"""Fewer words than this and names of places decide which language it seems to be."""
_MARGIN_NATS: Final = 25.0
"""How much likelier another language must be. English captions full of French street names were
up to 15 nats likelier to be French (py3langid 0.4, 2026-11)."""

_REFUSAL: Final = re.compile(
    r"^\W*(?:i(?:'|\u2019)?m sorry|i am sorry|sorry,|i apologi[sz]e|as an ai\b|"
    r"as a large language model|unfortunately,? i (?:can|am)|"
    r"there (?:is|was) no image (?:provided|attached|uploaded|given|visible|to|in)\b|"
    r"no image (?:is|was|has been) (?:provided|attached|uploaded|given)|"
    r"i(?: am|(?:'|\u2019)m) (?:unable|not able|afraid(?: that)? i)\b|"
    r"i (?:do(?: not|n(?:'|\u2019)t)) (?:actually )?see (?:any|an|the) image|"
    r"i (?:can(?:no|(?:'|\u2019))t|can not|won(?:'|\u2019)t|do(?: not|n(?:'|\u2019)t) have) "
    r"(?:actually )?(?:be able|assist|help(?! but)|see|view|identify|describe|provide|analy[sz]e|"
    r"process|comply|access|the ability))",
    re.IGNORECASE,
)
_SPECIAL: Final = re.compile(
    r"<\|[^|<>\s]{1,40}\|>|</?(?:image|im_patch|im_start|im_end|s|unk|pad|user|bot|assistant)>"
    r"|(?i:\[/?inst\])|\[UNUSED_TOKEN_\d+\]|\b(?:USER|ASSISTANT): "
    r"|(?:^|[.!?\n]\s*)(?:Human|Bot): |\ufffd",
)
"""Special tokens of Llama, Vicuna and InternLM chat formats, role names, undecodable bytes."""

_WORD: Final = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")
"""A run of characters without white space, or one character of Chinese or Japanese."""


@identity_keys(
    "QualityConfig",
    min_words="min_words",
    max_phrase_repeats="max_phrase_repeats",
    max_word_run="max_word_run",
    language="language",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class QualityConfig:
    """Bounds of an acceptable caption."""

    min_words: int = 5
    """Shorter captions say nothing that a label would not."""
    max_phrase_repeats: int = 3
    """How often one phrase of ten words may stand in a caption; a decoding loop goes on."""
    max_word_run: int = 5
    """How often one word may follow itself."""
    language: str | None = None
    """ISO 639-1 code that captions must be in, e.g. `en`; None asks for none."""

    def __post_init__(self) -> None:
        for name in ("min_words", "max_phrase_repeats", "max_word_run"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.language is not None and not re.fullmatch("[a-z]{2}", self.language):
            raise ConfigError(f"language must be two lower-case letters, got {self.language!r}")


def judge(text: str, *, instruction: str, config: QualityConfig) -> Rejected | None:
    """Return why a text is no acceptable caption, or None if it is one."""
    words = _WORD.findall(text)
    if not words:
        return Rejected(Reject.EMPTY_TEXT, "only white space")
    if (leak := _SPECIAL.search(text)) is not None:
        return Rejected(Reject.SPECIAL_TOKEN, f"{leak[0]!r} in: {text}")
    if _REFUSAL.search(text) is not None:
        return Rejected(Reject.REFUSED, text)
    if _echoes(text, instruction):
        return Rejected(Reject.PROMPT_ECHO, text)
    if (loop := _loop(words, config)) is not None:
        return Rejected(Reject.REPEATS, f"{loop} in: {text}")
    if len(words) < config.min_words:
        return Rejected(Reject.TOO_SHORT, f"{len(words)} words: {text}")
    if config.language is not None and (other := _other_language(words, config.language)):
        return Rejected(Reject.WRONG_LANGUAGE, f"{other} instead of {config.language}: {text}")
    return None


def _plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


_asked = functools.lru_cache(maxsize=8)(_plain)
"""The instruction of a job, once. Few: in a server clients write them."""


def _echoes(text: str, instruction: str) -> bool:
    """Say whether a text begins with what was asked, whatever its case and punctuation."""
    asked = _asked(instruction)
    return bool(asked) and _plain(text).startswith(asked)


def _loop(words: list[str], config: QualityConfig) -> str | None:
    run = 1
    for before, word in itertools.pairwise(words):
        run = run + 1 if word == before else 1
        if run > config.max_word_run:
            return f"{word!r} follows itself {run} times"
    phrases = list(zip(*(words[n:] for n in range(_PHRASE)), strict=False))
    if len(phrases) - len(set(phrases)) < config.max_phrase_repeats:
        return None  # told quickly, as nearly every caption is
    phrase, times = Counter(phrases).most_common(1)[0]
    return (
        f"{' '.join(phrase)!r} stands {times} times" if times > config.max_phrase_repeats else None
    )


def _other_language(words: list[str], wanted: str) -> str | None:
    """Return the language that a text is in if it is surely not the wanted one."""
    if len(words) < _MIN_WORDS_TO_TELL and all(word.isascii() for word in words):
        return None
    import py3langid  # loads a model: most jobs ask for no language

    scores = py3langid.rank(" ".join(words))
    best, top = scores[0]
    mine = dict(scores).get(wanted, float("-inf"))
    return str(best) if best != wanted and top - mine > _MARGIN_NATS else None


def check_language(config: QualityConfig) -> None:
    """Raise ConfigError if captions must be in a language that nobody here can tell."""
    if config.language is None:
        return
    import py3langid

    known = sorted(name for name, _ in py3langid.rank("any text"))
    if config.language not in known:
        raise ConfigError(f"language {config.language!r} is not one of {', '.join(known)}")
