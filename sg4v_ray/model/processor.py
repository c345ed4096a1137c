# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights: tokenizer, chat template and image processor.

`save_processor` writes what AutoProcessor and vLLM load.
"""

from pathlib import Path
from typing import Final

from transformers import LlavaImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model.config import BOS_TOKEN_ID, EOS_TOKEN_ID, ModelConfig
from sg4v_ray.model.geometry import Geometry

_SPECIALS: Final = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}


def save_processor(
    folder: Path,
    *,
    config: ModelConfig,
    tokenizer_file: Path,
    chat_template: str,
    geometry: Geometry,
) -> None:
    """Write tokenizer and processor beside the weights, so that the folder is complete.

    Args:
        folder: made if absent.
        config: what the model's config.json says.
        tokenizer_file: a `tokenizer.json` with `<s>`, `</s>`, `<pad>` and `<image>`.
        chat_template: Jinja, from `model.conversation.chat_template`.
        geometry: what strangers' tools shall do to an image; ours did it before.

    Raises:
        ConfigError: the tokenizer's ids are not those of `config`, or it has too many tokens.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_file),
        **_SPECIALS,
        extra_special_tokens={"image_token": "<image>"},
        padding_side="left",
        model_max_length=config.max_positions,
        clean_up_tokenization_spaces=False,
    )
    _check_ids(tokenizer, config)
    size = config.image_size
    image_processor = LlavaImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        do_pad=geometry == "pad",
    )
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=config.patch_size,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
        num_additional_image_tokens=1,  # the class token, which "default" then drops
    ).save_pretrained(folder)


def _check_ids(tokenizer: PreTrainedTokenizerFast, config: ModelConfig) -> None:
    wanted = {
        "<s>": BOS_TOKEN_ID,
        "</s>": EOS_TOKEN_ID,
        "<pad>": config.pad_token_id,
        "<image>": config.image_token_id,
    }
    vocab = tokenizer.get_vocab()
    for token, expected in wanted.items():
        if vocab.get(token) != expected:
            raise ConfigError(
                f"the tokenizer has {token} at {vocab.get(token)}, the model {config.name} at "
                f"{expected}; change the model's config or train the tokenizer again"
            )
    if max(vocab.values()) >= config.vocab_size:
        raise ConfigError(
            f"the tokenizer has ids up to {max(vocab.values())}, but {config.name} has a "
            f"vocabulary of {config.vocab_size}; raise vocab_size"
        )
