# SPDX-License-Identifier: Apache-2.0
"""The quality gate: each reason on text as models really write it."""

import pytest

from sg4v_ray.captions.quality import QualityConfig, check_language, judge
from sg4v_ray.core.errors import ConfigError
from sg4v_ray.core.rejects import Reject

ASKED = "Analyze the image in a comprehensive and detailed manner."
GOOD = (
    "In the center of the image, a vibrant blue lunch tray holds four containers, each brimming "
    "with a variety of food items. The containers, two in pink and two in yellow, are arranged in "
    "a 2x2 grid.\n\nIn the top left pink container, a slice of bread rests, lightly spread with "
    "butter and sprinkled with a handful of almonds. In the top right corner, a yellow container "
    "holds a golden-brown muffin; on the left side of the tray lies a fork, and on the right side "
    "of the tray a napkin says \"I can't believe it's Monday\"."
)
SIDES = " ".join(
    f"On the {side} of the image, there is a {what} in soft light."
    for side, what in (
        ("left side", "wooden fence with a gate"),
        ("right side", "tall oak whose leaves turn yellow"),
        ("far side", "narrow river and a stone bridge"),
        ("near side", "path of gravel between wild flowers"),
    )
)
PLACES = (
    "The photograph shows the Place de la Concorde and the Avenue des Champs-Elysees, with the "
    "Arc de Triomphe de l'Etoile and the Grand Palais in Paris, France."
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param(GOOD, None, id="a good caption"),
        pytest.param(PLACES, None, id="English full of French names"),
        pytest.param(
            "A man says he cannot see the image on his phone.", None, id="told, not meant"
        ),
        pytest.param("The sign reads: Sorry, we are closed until Monday.", None, id="a sorry sign"),
        pytest.param("The image shows a user: he types on a laptop.", None, id="the word user"),
        pytest.param("A chart of x < 3 and y > 4, drawn by hand in ink.", None, id="math signs"),
        pytest.param(SIDES, None, id="four sides of the image"),
        pytest.param("I can't help but notice the red barn behind the trees.", None, id="a figure"),
        pytest.param('The book "The Human: A Story" lies on a wooden table.', None, id="a title"),
        pytest.param(" \n ", Reject.EMPTY_TEXT, id="white space"),
        pytest.param("A dog.", Reject.TOO_SHORT, id="two words"),
        pytest.param(
            "I'm sorry, but I can't assist with identifying people in images.",
            Reject.REFUSED,
            id="refusal",
        ),
        pytest.param(
            "I\u2019m unable to view the picture you are talking about.",
            Reject.REFUSED,
            id="refusal with a curly apostrophe",
        ),
        pytest.param(
            "As an AI language model, I cannot look at images directly.",
            Reject.REFUSED,
            id="as an AI",
        ),
        *(
            pytest.param(text, Reject.REFUSED, id=text[:30])
            for text in (
                "I don't see any image attached to your message.",
                "I'm afraid I cannot view pictures at the moment.",
                "There is no image provided, so nothing can be described.",
                "As a large language model, I cannot look at things.",
            )
        ),
        pytest.param(
            "I cannot provide a description of this image.", Reject.REFUSED, id="cannot provide"
        ),
        pytest.param(
            "Analyze the image in a comprehensive and detailed manner. The image shows a dog.",
            Reject.PROMPT_ECHO,
            id="echo",
        ),
        pytest.param(
            "analyze the image in a comprehensive, and detailed, manner: a dog runs on grass",
            Reject.PROMPT_ECHO,
            id="echo with other marks",
        ),
        pytest.param(
            GOOD + " The tray is on a table." + " The man is standing next to the car." * 8,
            Reject.REPEATS,
            id="a sentence in a loop",
        ),
        pytest.param("The sky is blue blue blue blue blue blue blue", Reject.REPEATS, id="a word"),
        pytest.param("A dog runs.</s> A cat sleeps on the mat.", Reject.SPECIAL_TOKEN, id="end"),
        pytest.param("<image> A dog runs over the grass.", Reject.SPECIAL_TOKEN, id="image"),
        pytest.param("A dog. USER: And now? ASSISTANT: A cat.", Reject.SPECIAL_TOKEN, id="roles"),
        pytest.param("A dog runs <|im_end|> over the grass", Reject.SPECIAL_TOKEN, id="chat end"),
        *(
            pytest.param(f"A dog runs. {leak} A cat sleeps.", Reject.SPECIAL_TOKEN, id=leak)
            for leak in (
                "[INST]",
                "[UNUSED_TOKEN_145]",
                "<|start_header_id|>",
                "Human: What else?",
            )
        ),
        pytest.param("A sign that says caf\ufffd in red", Reject.SPECIAL_TOKEN, id="half a letter"),
        pytest.param(
            "Ein roter Kreis steht links oben auf einem hellen Hintergrund im Bild.",
            Reject.WRONG_LANGUAGE,
            id="German",
        ),
        pytest.param(
            "图像中央有一个红色的圆形 背景是浅色的 看起来很简单 没有其他物体",
            Reject.WRONG_LANGUAGE,
            id="Chinese",
        ),
    ],
)
def test_a_text_is_a_caption_or_has_a_reason(text: str, reason: Reject | None) -> None:
    found = judge(text, instruction=ASKED, config=QualityConfig(language="en"))
    assert (found.reason if found else None) is reason


def test_the_detail_of_a_loop_is_the_phrase_and_its_number() -> None:
    text = "the man is standing next to the car " * 5
    found = judge(text, instruction=ASKED, config=QualityConfig())
    assert found is not None
    assert "stands 4 times" in found.detail  # ten words of it


def test_any_language_is_accepted_unless_one_is_asked_for() -> None:
    text = "Ein roter Kreis steht links oben auf einem hellen Hintergrund."
    assert judge(text, instruction=ASKED, config=QualityConfig()) is None
    assert judge(text, instruction=ASKED, config=QualityConfig(language="de")) is None


@pytest.mark.parametrize(
    "wrong", [{"min_words": 0}, {"max_phrase_repeats": 0}, {"language": "English"}]
)
def test_bad_bounds_are_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        QualityConfig(**wrong)


def test_a_language_that_nobody_can_tell_is_refused_before_any_work() -> None:
    check_language(QualityConfig(language="en"))
    with pytest.raises(ConfigError, match="'xx' is not one of"):
        check_language(QualityConfig(language="xx"))
