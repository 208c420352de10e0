"""Weights in 4 or 8 bits, as `load_in_4bit` and `load_in_8bit` ask for them: bitsandbytes, the LLM alone.

The encoder and the projector stay as they were saved. They are small beside the LLM, and small differences decide
which patches are merged: with a quantised encoder, a video becomes other tokens.
"""

from importlib.util import find_spec

import torch
from transformers import BitsAndBytesConfig

# `llm_int8_skip_modules`. A name counts from the start: "vision_tower" alone would match nothing.
NOT_QUANTIZED = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]


def quantization_config(
    *, load_in_4bit: bool = False, load_in_8bit: bool = False, dtype: torch.dtype | None = None
) -> BitsAndBytesConfig | None:
    """
    Args:
        load_in_4bit: NF4 with double quantisation.
        load_in_8bit: LLM.int8().
        dtype: in which 4-bit layers compute; default: float32.

    Returns:
        The `quantization_config` of `from_pretrained`, or `None` if neither is asked for.

    Raises:
        ValueError: both are asked for.
        ImportError: bitsandbytes is missing.
    """
    if not load_in_4bit and not load_in_8bit:
        return None
    if load_in_4bit and load_in_8bit:
        raise ValueError("`load_in_4bit` and `load_in_8bit` exclude each other; give one of them")
    if find_spec("bitsandbytes") is None:
        asked = "load_in_4bit" if load_in_4bit else "load_in_8bit"
        raise ImportError(f"`{asked}` needs the package bitsandbytes: pip install bitsandbytes")
    if load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


__all__ = ["NOT_QUANTIZED", "quantization_config"]
