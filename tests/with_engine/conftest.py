# SPDX-License-Identifier: Apache-2.0
"""One small random model and one started engine of each kind, shared by all tests here."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sg4v_ray.inference.engine import Engine, Generation, Pixels, Request
from sg4v_ray.inference.open import EngineConfig, open_engine
from sg4v_ray.model import weights
from sg4v_ray.model.config import ModelConfig, nano
from sg4v_ray.model.conversation import chat_template
from sg4v_ray.model.geometry import as_model_sees
from sg4v_ray.model.processor import save_processor

T = TypeVar("T")

CONFIG: ModelConfig = replace(nano(vocab_size=320), max_positions=512)
PROMPT = (1, 50, 51, CONFIG.image_token_id, 52, 53)


class RunsCoroutines(Protocol):
    def __call__(self, work: Coroutine[Any, Any, T], /) -> T: ...
