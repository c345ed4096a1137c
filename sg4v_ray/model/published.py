# SPDX-License-Identifier: Apache-2.0
"""config.json of others <-> ModelConfig: LLaVA and ShareGPT4V as published, llava-hf, Llama, CLIP.

A source may only differ from us in what ModelConfig can say. Everything else that decides what a
model computes is compared with what we would build, and refused by field and value.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from sg4v_ray.core.errors import ConfigError
from sg4v_ray.model.config import BOS_TOKEN_ID, EOS_TOKEN_ID, ModelConfig, to_transformers
from sg4v_ray.model.convert import padded_rows
from sg4v_ray.model.geometry import Geometry
from sg4v_ray.model.source_files import read_json

_LLAVA_TYPES: Final = ("share4v", "llava", "llava_llama")
# What LLaVA means when a field is absent, and what we can do. Source: the defaults of getattr in
# share4v/model/builder.py and in LLaVA's multimodal_projector/builder.py and clip_encoder.py.
_LLAVA_FIELDS: Final[tuple[tuple[str, Any, tuple[Any, ...]], ...]] = (
    ("mm_projector_type", "linear", ("mlp2x_gelu",)),
    ("mm_use_im_start_end", False, (False,)),
    ("mm_use_im_patch_token", True, (False,)),
    ("mm_vision_select_feature", "patch", ("patch",)),
    ("mm_resampler_type", None, (None,)),
    ("mm_patch_merge_type", None, (None, "flat")),
    ("image_aspect_ratio", "square", ("square", "pad")),
    ("quantization_config", None, (None,)),
)
_LLAMA_FIELDS: Final = (
    "hidden_act", "rms_norm_eps", "rope_parameters", "head_dim", "attention_bias", "mlp_bias",
    "tie_word_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip
_CLIP_FIELDS: Final = ("hidden_act", "layer_norm_eps", "num_channels")
_LLAVA_HF_FIELDS: Final = (
    "projector_hidden_act", "multimodal_projector_bias", "vision_feature_select_strategy",
)  # fmt: skip
_UNK_TOKEN_ID: Final = 0  # with which the published models pad


def read_llama(folder: Path) -> LlamaConfig:
    """Return the language model that a Vicuna (Llama) folder says it is.

    Raises:
        ConfigError: it is another kind of model.
    """
    file = folder / "config.json"
    fields = read_json(file)
    _check_type(file, fields, ("llama",), "a Llama such as Vicuna")
    return LlamaConfig.from_dict(fields)


def read_llava(folder: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """Return the language model of a published LLaVA or ShareGPT4V folder, and all its fields.

    Raises:
        ConfigError: a field asks for what this model does not have; the text says for what.
    """
    file = folder / "config.json"
    fields = read_json(file)
    _check_type(file, fields, _LLAVA_TYPES, "LLaVA-1.5 or ShareGPT4V")
    if "text_config" in fields:
        raise ConfigError(f"{file} has a text_config, so it is llava-hf's; use --kind llava-hf")
    for name, absent, allowed in _LLAVA_FIELDS:
        if (value := fields.get(name, absent)) not in allowed:
            raise ConfigError(
                f"{file}: {name} is {value!r}; only {' or '.join(map(repr, allowed))} can be "
                "imported"
            )
    if not isinstance(fields.get("mm_vision_select_layer"), int):
        raise ConfigError(f"{file}: mm_vision_select_layer must be a number such as -2")
    return LlamaConfig.from_dict(fields), fields


def read_clip(folder: Path) -> CLIPVisionConfig:
    """Return the vision tower of a CLIPVisionModel's or a whole CLIPModel's folder.

    Raises:
        ConfigError: it is another kind of model.
    """
    file = folder / "config.json"
    fields = read_json(file)
    _check_type(file, fields, ("clip_vision_model", "clip"), "a CLIP vision tower")
    return CLIPVisionConfig.from_dict(fields.get("vision_config", fields))


def read_pixels(folder: Path) -> Mapping[str, Any]:
    """Return the image processor's settings of a folder, under its older or its newer name.

    Raises:
        ConfigError: there are none, or they have no mean and deviation.
    """
    nested = folder / "processor_config.json"
    file = folder / "preprocessor_config.json"
    if not file.is_file() and nested.is_file():
        return _pixels(nested, read_json(nested).get("image_processor", {}))
    return _pixels(file, read_json(file))


def read_llava_hf(folder: Path, *, name: str) -> ModelConfig:
    """Return the shape of a llava-hf folder.

    Raises:
        ConfigError: a field asks for what this model does not have.
    """
    file = folder / "config.json"
    fields = read_json(file)
    _check_type(file, fields, ("llava",), "a llava-hf model")
    if "text_config" not in fields:
        raise ConfigError(f"{file} has no text_config, so it is LLaVA's own; use --kind published")
    theirs = LlavaConfig.from_dict(fields)
    text = theirs.text_config
    config = model_config(
        name,
        text,
        theirs.vision_config,
        pixels=read_pixels(folder),
        feature_layer=theirs.vision_feature_layer,
        ids=(theirs.image_token_index, fields.get("pad_token_id", text.pad_token_id)),
        where=file,
    )
    _refuse_other(file, theirs, to_transformers(config), _LLAVA_HF_FIELDS)
    return config


def model_config(
    name: str,
    text: LlamaConfig,
    vision: CLIPVisionConfig,
    *,
    pixels: Mapping[str, Any],
    feature_layer: int,
    where: Path,
    ids: tuple[int, int] | None = None,
) -> ModelConfig:
    """Return the shape of a language model and a vision tower together.

    Args:
        name: of the new model.
        text: of the source; without `ids` its rows are all text tokens, and are padded.
        vision: of the source.
        pixels: with `image_mean` and `image_std`.
        feature_layer: which hidden state of the tower is projected.
        where: file for error texts.
        ids: of `<image>` and `<pad>`, where the source has them.

    Raises:
        ConfigError: the source is built in a way that ModelConfig cannot say.
    """
    if not isinstance(feature_layer, int):
        raise ConfigError(f"{where}: vision_feature_layer is {feature_layer!r}; it must be one int")
    if vision.hidden_act not in ("quick_gelu", "gelu"):
        raise ConfigError(
            f"{where}: the vision tower's hidden_act is {vision.hidden_act!r}; it must be "
            "'quick_gelu' or 'gelu'"
        )
    rows = text.vocab_size
    image_id, pad_id = (rows, rows + 1) if ids is None else ids
    config = ModelConfig(
        name=name,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        vision_width=vision.hidden_size,
        vision_mlp=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        vision_heads=vision.num_attention_heads,
        text_width=text.hidden_size,
        text_mlp=text.intermediate_size,
        text_layers=text.num_hidden_layers,
        text_heads=text.num_attention_heads,
        text_kv_heads=text.num_key_value_heads,
        vocab_size=padded_rows(rows) if ids is None else rows,
        max_positions=text.max_position_embeddings,
        image_token_id=image_id,
        pad_token_id=pad_id,
        image_mean=tuple(pixels["image_mean"]),
        image_std=tuple(pixels["image_std"]),
        init_std=text.initializer_range,
        feature_layer=feature_layer,
        vision_act=vision.hidden_act,
    )
    ours = to_transformers(config)
    _refuse_other(where, text, ours.text_config, _LLAMA_FIELDS)
    _refuse_other(where, vision, ours.vision_config, _CLIP_FIELDS)
    return config


def llava_fields(config: ModelConfig, *, dtype: str, geometry: Geometry) -> dict[str, Any]:
    """Return config.json of the published layout, as transformers 4.31 reads it.

    Source: the fields that share4v's and LLaVA's loaders read; class and model_type are share4v's.
    """
    text = to_transformers(config).text_config
    return {
        "architectures": ["Share4VLlamaForCausalLM"],
        "model_type": "share4v",
        "bos_token_id": BOS_TOKEN_ID,
        "eos_token_id": EOS_TOKEN_ID,
        "pad_token_id": _UNK_TOKEN_ID,
        "hidden_act": text.hidden_act,
        "hidden_size": config.text_width,
        "intermediate_size": config.text_mlp,
        "num_hidden_layers": config.text_layers,
        "num_attention_heads": config.text_heads,
        "num_key_value_heads": config.text_kv_heads,
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": config.image_token_id,
        "image_aspect_ratio": "pad" if geometry == "pad" else "square",
        "mm_hidden_size": config.vision_width,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.feature_layer,
        "mm_vision_tower": "vision_tower",
        "use_mm_proj": True,
    }


def _check_type(file: Path, fields: Mapping[str, Any], allowed: tuple[str, ...], what: str) -> None:
    if (found := fields.get("model_type")) not in allowed:
        raise ConfigError(
            f"{file}: model_type is {found!r}; {what} has {' or '.join(map(repr, allowed))}. "
            "Models of other kinds, and those that come with code of their own, are not imported"
        )


def _refuse_other(file: Path, theirs: Any, ours: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(theirs, name) != getattr(ours, name):
            raise ConfigError(
                f"{file}: {name} is {getattr(theirs, name)!r} in {type(theirs).__name__}; only "
                f"{getattr(ours, name)!r} can be imported"
            )


def _pixels(file: Path, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    for name in ("image_mean", "image_std"):
        if not isinstance(fields.get(name), list):
            raise ConfigError(f"{file} has no {name}; copy the file that belongs to these weights")
    return fields
