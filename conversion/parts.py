"""The two parts of a LongVLM before they are joined: a vision encoder and a causal language model.

They are plain transformers objects that know nothing of LongVLM. `vision_encoder.py`, `openclip_vision.py` and
`language_model.py` load them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class VisionPart:
    """A vision encoder, how images are prepared for it, and whether it is trained."""

    model: PreTrainedModel
    name: str
    image_options: dict[str, Any] = field(default_factory=dict)
    trained: bool = True


@dataclass
class LanguagePart:
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """
    A dtype by its name; `None` for "auto".

    Raises:
        ValueError: there is no floating-point dtype of that name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f'`dtype` "{dtype}" is not known; use float32, bfloat16 or float16')
    return value
