# SPDX-License-Identifier: Apache-2.0
"""Build training data: captions and questions in, conversations out, nothing dropped unnamed.

captions@v, caption-scores@v, questions@v, sft-mix@v, LLaVA JSON -> parts -> dataset@v
(one Arrow file and a card)

Rejected captions stay in their own artifact; here they are counted by reason and left out.
"""

import hashlib
import random
import re
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa

from sg4v_ray.core.artifact import Manifest, Ref, begin, commit, find, is_finished
from sg4v_ray.core.errors import ConfigError, ContractError
from sg4v_ray.core.identity import identity_keys
from sg4v_ray.core.lease import hold
from sg4v_ray.core.records import CaptionRow, Question, Sample, Turn, schema, to_table
from sg4v_ray.core.rows import read_rows
from sg4v_ray.core.sampling import HoldOut
from sg4v_ray.core.storage import Storage
from sg4v_ray.core.where import Where
from sg4v_ray.dataset import conversations
from sg4v_ray.dataset.card import card
from sg4v_ray.dataset.conversations import JsonPart, MixPart
from sg4v_ray.dataset.filter import CaptionFilter, left_out
from sg4v_ray.model.instructions import training_question

SAMPLES = "samples.arrow"
CARD = "README.md"
HELD_OUT = "held_out"
_ROWS_PER_BATCH = 10_000


@identity_keys(
    "CaptionsPart",
    captions="captions",
    only_words="only_words",
    filter="filter",
    hold_out="hold_out",
)
@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionsPart:
    """Captions as conversations: a short question and the caption."""

    captions: Ref
    only_words: tuple[str, ...] = ()
    """Shrink each caption to those of its words that are listed here, in the order of this list;
    empty keeps it whole."""
    filter: CaptionFilter | None = None
    """What is left out by scores (`jobs.score_captions`); None leaves out rejects alone."""
    hold_out: HoldOut = HoldOut()
    """What is kept for people to read (`jobs.review_captions`) and not trained on."""


@identity_keys("QuestionsPart", questions="questions")
@dataclass(frozen=True, kw_only=True, slots=True)
class QuestionsPart:
    """Questions as conversations: all questions about an image in one, in seeded order."""

    questions: Ref


Part: TypeAlias = CaptionsPart | QuestionsPart | JsonPart | MixPart


@identity_keys("BuildConfig", parts="parts", seed="seed")
@dataclass(frozen=True, kw_only=True, slots=True)
class BuildConfig:
    """What a dataset is made of."""

    parts: tuple[Part, ...]
    seed: int
    """Draws the question of each caption and the order of each image's questions."""

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError(
                "a dataset needs at least one part; name captions, questions or a LLaVA JSON"
            )


def run(config: BuildConfig, *, out: Ref, where: Where) -> Manifest:
    """Write the dataset `out`; open it if it is finished.

    Raises:
        ArtifactMissing: a part is not finished.
        ContractError: two parts give samples of one id, or nothing is left.
    """
    storage = where.storage
    inputs: dict[str, str] = {}
    for part in config.parts:
        inputs |= _inputs(storage, part)
    if is_finished(storage, out, config=config, inputs=inputs):
        return find(storage, out)
    home = storage.sub(out.path)
    counts: Counter[str] = Counter()
    with hold(home) as lease, tempfile.TemporaryDirectory() as folder:
        if is_finished(storage, out, config=config, inputs=inputs):  # since the first check
            return find(storage, out)
        begin(storage, out, config, inputs=inputs, lease=lease)
        _write(Path(folder) / SAMPLES, _samples(where, config, counts))
        if not counts["samples"]:
            raise ContractError(
                f"{out} would be empty: every row of {', '.join(inputs)} is rejected"
            )
        (Path(folder) / CARD).write_text(card(str(out), inputs, counts), encoding="utf-8")
        digests = home.upload(Path(folder), "")
        return commit(
            storage,
            out,
            config=config,
            inputs=inputs,
            counts=dict(sorted(counts.items())),
            digests=digests,
            lease=lease,
        )


def _inputs(storage: Storage, part: Part) -> dict[str, str]:
    if isinstance(part, JsonPart | MixPart):
        return conversations.inputs_of(storage, part)
    if isinstance(part, QuestionsPart):
        refs: tuple[Ref, ...] = (part.questions,)
    else:
        refs = (part.captions, part.filter.scores) if part.filter else (part.captions,)
    return {str(ref): find(storage, ref).fingerprint for ref in refs}


def _write(file: Path, samples: Iterator[Sample]) -> None:
    ids: set[str] = set()
    with pa.ipc.new_file(str(file), schema(Sample)) as writer:
        batch: list[Sample] = []
        for sample in samples:
            if sample.id in ids:
                raise ContractError(f"two parts of the dataset have a sample {sample.id!r}")
            ids.add(sample.id)
            batch.append(sample)
            if len(batch) == _ROWS_PER_BATCH:
                writer.write_table(to_table(Sample, batch))
                batch = []
        writer.write_table(to_table(Sample, batch))


def _samples(where: Where, config: BuildConfig, counts: Counter[str]) -> Iterator[Sample]:
    for part in config.parts:
        for sample in _from(part, where, config.seed, counts):
            counts["samples"] += 1
            counts[f"samples_{sample.source}"] += 1
            counts["turns"] += len(sample.turns)
            yield sample


def _from(part: Part, where: Where, seed: int, counts: Counter[str]) -> Iterator[Sample]:
    if isinstance(part, CaptionsPart):
        return _from_captions(where.storage, part, seed, counts)
    if isinstance(part, QuestionsPart):
        return _from_questions(where.storage, part, seed)
    return conversations.samples(where.storage, part, counts, show=where.progress)


def _from_captions(
    storage: Storage, part: CaptionsPart, seed: int, counts: Counter[str]
) -> Iterator[Sample]:
    unwanted = left_out(storage, part.filter, part.captions) if part.filter else {}
    rows: list[CaptionRow] = read_rows(storage, part.captions, CaptionRow)
    held_out = part.hold_out.of((one.id, one.source) for one in rows)
    unwanted |= dict.fromkeys(held_out, HELD_OUT)
    for row in rows:
        reason = row.reject or unwanted.get(row.id)
        if reason is not None:
            counts[f"left_out_{reason}"] += 1
            continue
        text = shrink(row.text or "", part.only_words) if part.only_words else row.text
        if text is None:
            counts["left_out_without_word"] += 1
            continue
        question = training_question(row.id, seed)
        turns = (Turn(role="user", text=question), Turn(role="assistant", text=text))
        yield Sample(id=row.id, source=row.source, uri=row.uri, turns=turns)


def shrink(text: str, words: tuple[str, ...]) -> str | None:
    """Return those of `words` that a text has, in the order of `words`, or None.

    One order for all texts: in the order of each text, what comes first would be chance, which no
    model can learn.
    """
    found = set(re.findall(r"\w+", text.lower()))
    return " ".join(one for one in words if one in found) or None


def _from_questions(storage: Storage, part: QuestionsPart, seed: int) -> Iterator[Sample]:
    by_image: dict[str, list[Question]] = {}
    for row in read_rows(storage, part.questions, Question):
        by_image.setdefault(row.image_id, []).append(row)
    for image_id, questions in sorted(by_image.items()):
        digest = hashlib.sha256(f"{seed}/{image_id}".encode()).digest()
        random.Random(digest).shuffle(questions)
        turns = tuple(
            turn
            for one in questions
            for turn in (
                Turn(role="user", text=one.text),
                Turn(role="assistant", text=one.answers[0]),
            )
        )
        yield Sample(id=image_id, source="questions", uri=questions[0].uri, turns=turns)
