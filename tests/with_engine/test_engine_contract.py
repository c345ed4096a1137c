# SPDX-License-Identifier: Apache-2.0
"""What every engine promises, whatever is inside it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sg4v_ray.core.errors import ConfigError, EngineError, ImageTokenMismatch
from sg4v_ray.inference.engine import Completion, Delta, Engine, Pixels, Request, complete
from sg4v_ray.model.config import EOS_TOKEN_ID, ModelConfig

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Ask = Callable[..., Request]
Pictures = list[Pixels]

LONG = 48
real_engines = pytest.mark.parametrize(
    "engine", ["hf", pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True
)


async def _complete_all(engine: Engine, requests: Sequence[Request]) -> list[Completion]:
    return await asyncio.gather(*(complete(engine, one) for one in requests))


async def _read(deltas: AsyncIterator[Delta], count: int) -> None:
    for _ in range(count):
        await anext(deltas)


async def _until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something holds; pytest's timeout is the limit."""
    while not condition():
        await asyncio.sleep(0.001)


@pytest.fixture
def talkative(engine: Engine, pictures: Pictures, ask: Ask, run: Run) -> list[Request]:
    """Requests that this engine answers with many tokens, up to LONG."""
    requests = [ask(one, max_tokens=LONG) for one in pictures[:16]]
    answers = run(_complete_all(engine, requests))
    pairs = zip(requests, answers, strict=True)
    long = [one for one, answer in pairs if len(answer.token_ids) >= LONG // 2]
    assert len(long) >= engine.capacity + 1, "the test model ends too early; change its seed"
    return long


def test_tokens_are_streamed_while_the_rest_is_being_made(
    engine: Engine, talkative: list[Request], run: Run
) -> None:
    async def stream() -> tuple[list[Delta], int]:
        before, deltas, steps_at_first = engine.stats().decode_steps, [], 0
        async for delta in engine.generate(talkative[0]):
            steps_at_first = steps_at_first or engine.stats().decode_steps - before
            deltas.append(delta)
        return deltas, steps_at_first

    deltas, steps_at_first = run(stream())
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert steps_at_first < len(tokens) / 2
    assert len(deltas) > len(tokens) / 4
    assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert tuple(tokens) == run(complete(engine, talkative[0])).token_ids


def test_every_row_of_a_batch_stops_at_its_own_max_tokens(
    engine: Engine, talkative: list[Request], run: Run
) -> None:
    generation = talkative[0].generation
    limits = [1, 8, 2, 7, 3, 5]
    requests = [
        replace(talkative[0], generation=replace(generation, max_tokens=limit)) for limit in limits
    ]
    answers = run(_complete_all(engine, requests))
    assert [len(one.token_ids) for one in answers] == limits
    assert {one.finish_reason for one in answers} == {"length"}
    assert all(one.token_ids == answers[1].token_ids[: len(one.token_ids)] for one in answers)


def test_an_answer_that_stops_ends_with_the_only_end_token(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    # So hot that the end token, which the model has no reason to say, comes up now and then.
    requests = [ask(pictures[0], max_tokens=200, temperature=2.0, seed=seed) for seed in range(12)]
    answers = run(_complete_all(engine, requests))
    assert "stop" in {one.finish_reason for one in answers}
    for one in answers:
        ends = [index for index, token in enumerate(one.token_ids) if token == EOS_TOKEN_ID]
        stopped = one.finish_reason == "stop"
        assert ends == ([len(one.token_ids) - 1] if stopped else [])
        assert stopped or len(one.token_ids) == 200


def test_greedy_answers_are_equal_whatever_the_seed(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    requests = [ask(pictures[0], max_tokens=16, seed=seed) for seed in (0, 0, 7)]
    one, again, other_seed = (run(complete(engine, request)) for request in requests)
    assert one == again == other_seed


def test_the_answer_depends_on_the_image(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    answers = run(_complete_all(engine, [ask(one) for one in pictures[:8]]))
    assert len({one.token_ids for one in answers}) >= 6


def test_a_greedy_answer_does_not_depend_on_its_batch_mates(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    requests = [
        ask(*pictures[index : index + images], words=words, max_tokens=24)
        for index, (images, words) in enumerate([(1, 4), (0, 9), (2, 1), (1, 40)])
    ]
    alone = [run(complete(engine, one)) for one in requests]
    assert run(_complete_all(engine, requests)) == alone
    assert run(_complete_all(engine, requests[::-1])) == alone[::-1]


def test_a_seed_gives_the_same_sample_in_any_batch_and_order(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    requests = [
        ask(pictures[0], words=3 + seed % 3, max_tokens=16, temperature=2.0, top_p=0.9, seed=seed)
        for seed in range(6)
    ]
    alone = [run(complete(engine, one)) for one in requests]
    assert run(_complete_all(engine, requests[::-1])) == alone[::-1]
    assert run(_complete_all(engine, requests[1::2])) == alone[1::2]
    same_prompt = {one.token_ids for one in alone[::3]}
    assert len(same_prompt) == 2, "another seed should give another sample"


def test_greedy_and_sampling_rows_share_a_batch(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    greedy = ask(pictures[0], max_tokens=16)
    hot = ask(pictures[0], max_tokens=16, temperature=2.0, seed=1)
    alone = [run(complete(engine, one)) for one in (greedy, hot)]
    assert run(_complete_all(engine, [greedy, hot])) == alone
    assert alone[0] != alone[1]


@real_engines
def test_sampling_from_a_tiny_top_p_is_greedy(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    greedy = run(complete(engine, ask(pictures[0], max_tokens=16)))
    narrow = ask(pictures[0], max_tokens=16, temperature=2.0, top_p=1e-6, seed=5)
    assert run(complete(engine, narrow)) == greedy


@real_engines
def test_a_large_penalty_forbids_what_was_said_before(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    request = ask(pictures[0], words=30, max_tokens=24, repetition_penalty=1e6)
    # A batch mate with a longer prompt, so that the row is padded.
    answer, _ = run(_complete_all(engine, [request, ask(pictures[0], words=90, max_tokens=24)]))
    tokens = answer.token_ids
    assert len(set(tokens)) == len(tokens)
    assert not set(tokens) & set(request.token_ids)


def test_more_requests_than_capacity_all_finish_and_never_run_at_once(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    requests = [ask(one, max_tokens=4 + index) for index, one in enumerate(pictures[:11])]
    seen = []

    async def watched(request: Request) -> int:
        count = 0
        async for delta in engine.generate(request):
            seen.append(engine.stats())
            count += len(delta.token_ids)
        return count

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*map(watched, requests))

    counts = run(all_of_them())
    assert all(0 < count <= 4 + index for index, count in enumerate(counts))
    assert max(one.running for one in seen) <= engine.capacity
    assert max(one.waiting for one in seen) > 0
    run(_until(lambda: engine.stats().running == engine.stats().waiting == 0))


def test_an_abort_frees_the_row_within_two_decode_steps(
    engine: Engine, talkative: list[Request], run: Run
) -> None:
    async def steps_until_the_waiting_request_speaks() -> int:
        streams = [engine.generate(one) for one in talkative[: engine.capacity]]
        await asyncio.gather(*(_read(one, 2) for one in streams))
        waiting = engine.generate(talkative[engine.capacity])
        first = asyncio.ensure_future(anext(waiting))
        await _until(lambda: engine.stats().waiting == 1)
        for stream in streams:
            await stream.aclose()
        before = engine.stats().decode_steps
        await first
        steps = engine.stats().decode_steps - before
        await waiting.aclose()
        return steps

    # Two to free the rows, and the one that makes the token we waited for.
    assert run(steps_until_the_waiting_request_speaks()) <= 3


def test_an_aborted_row_does_not_count_as_running_while_its_batch_goes_on(
    engine: Engine, talkative: list[Request], run: Run
) -> None:
    async def running_after_an_abort() -> int:
        kept, dropped = (engine.generate(one) for one in talkative[:2])
        await asyncio.gather(_read(kept, 2), _read(dropped, 2))
        assert engine.stats().running == 2
        await dropped.aclose()
        before = engine.stats().decode_steps
        await _until(lambda: engine.stats().decode_steps >= before + 2)
        running = engine.stats().running
        await kept.aclose()
        return running

    assert run(running_after_an_abort()) <= 1


def test_a_caller_that_is_cancelled_aborts_its_request(
    engine: Engine, talkative: list[Request], run: Run
) -> None:
    async def cancel_one() -> None:
        task = asyncio.ensure_future(complete(engine, talkative[0]))
        await _until(lambda: engine.stats().running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await _until(lambda: engine.stats().running == 0)

    run(cancel_one())


def test_a_request_that_waits_can_be_aborted(
    engine: Engine, talkative: list[Request], run: Run
) -> None:
    async def abort_while_waiting() -> None:
        tasks = [
            asyncio.ensure_future(complete(engine, one)) for one in talkative[: engine.capacity + 1]
        ]
        await _until(lambda: engine.stats().waiting == 1)
        tasks[-1].cancel()
        await _until(lambda: engine.stats().waiting == 0)
        done = await asyncio.gather(*tasks[:-1])
        assert all(len(one.token_ids) >= LONG // 2 for one in done)

    run(abort_while_waiting())


def test_several_images_keep_their_order(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    first, second = pictures[:2]
    requests = [ask(first, second), ask(second, first), ask(first, second)]
    forth, back, again = run(_complete_all(engine, requests))
    assert forth == again != back


def test_a_prompt_may_have_no_image(engine: Engine, ask: Ask, run: Run) -> None:
    assert len(run(complete(engine, ask(max_tokens=4))).token_ids) == 4


@pytest.mark.parametrize(("placeholders", "images"), [(0, 1), (1, 0), (2, 1)])
def test_placeholders_and_images_must_be_as_many(
    engine: Engine,
    pictures: Pictures,
    ask: Ask,
    run: Run,
    placeholders: int,
    images: int,
) -> None:
    request = replace(ask(*pictures[:placeholders]), images=tuple(pictures[:images]))
    says = f"{placeholders} image placeholders for {images} images"
    with pytest.raises(ImageTokenMismatch, match=says):
        run(complete(engine, request))


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(
    engine: Engine, model: ModelConfig, pictures: Pictures, ask: Ask, run: Run
) -> None:
    words = model.max_positions - model.num_image_tokens - 2
    with pytest.raises(EngineError, match=r"512 tokens with its images, the context 512"):
        run(complete(engine, ask(pictures[0], words=words)))
    run(complete(engine, ask(pictures[0])))  # the engine goes on


def test_the_context_ends_an_answer_before_max_tokens_does(
    engine: Engine, model: ModelConfig, talkative: list[Request], ask: Ask, run: Run
) -> None:
    words = model.max_positions - model.num_image_tokens - 2 - 3
    answer = run(complete(engine, ask(*talkative[0].images, words=words, max_tokens=LONG)))
    assert len(answer.token_ids) == 3
    assert answer.finish_reason == "length"


def test_an_image_that_is_not_the_models_square_is_refused(
    engine: Engine, ask: Ask, run: Run
) -> None:
    with pytest.raises(EngineError, match="as_model_sees"):
        run(complete(engine, ask(np.zeros((63, 64, 3), np.uint8))))


@pytest.mark.parametrize("token", [-1, 320])
def test_a_token_outside_the_vocabulary_is_refused_and_spares_its_batch_mates(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run, token: int
) -> None:
    good = ask(pictures[0])

    async def both() -> list[Completion | BaseException]:
        bad = replace(good, token_ids=(*good.token_ids, token))
        work = (complete(engine, one) for one in (good, bad))
        return await asyncio.gather(*work, return_exceptions=True)

    answer, error = run(both())
    assert answer == run(complete(engine, good))
    assert isinstance(error, EngineError)
    assert f"{token}" in str(error)


def test_an_empty_prompt_is_refused(engine: Engine, ask: Ask, run: Run) -> None:
    with pytest.raises(EngineError, match="prompt is empty"):
        run(complete(engine, replace(ask(), token_ids=())))


@pytest.mark.parametrize(
    "engine", ["fake", pytest.param("vllm", marks=pytest.mark.vllm)], indirect=True
)
def test_an_engine_without_beams_says_so(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    with pytest.raises(ConfigError, match="num_beams is 3"):
        run(complete(engine, ask(pictures[0], num_beams=3)))


def test_starting_a_running_engine_changes_nothing(
    engine: Engine, pictures: Pictures, ask: Ask, run: Run
) -> None:
    before = engine.stats()
    run(engine.start())
    assert engine.stats() == before
    run(complete(engine, ask(pictures[0])))
