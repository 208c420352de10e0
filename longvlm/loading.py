"""Loads a checkpoint folder or Hub id, with errors that say what to do."""

from pathlib import Path

import torch
from transformers import AutoConfig, pipeline

from longvlm.registration import TASK


def load_pipeline(model: str, *, dtype: str = "auto", device: str | None = None):
    """The pipeline of a checkpoint folder or Hub id.

    Raises:
        ValueError: the folder does not exist, or holds another kind of model.
    """
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1
    if looks_like_path and not Path(model).expanduser().is_dir():
        raise ValueError(f"there is no model folder {model}; make one with `longvlm assemble`")
    model = str(Path(model).expanduser()) if looks_like_path else model
    try:
        model_type = AutoConfig.from_pretrained(model).model_type
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{model} is no folder here, and as a Hub id it cannot be loaded: {reason}") from error
    if model_type != "longvlm":
        raise ValueError(f"{model} is a {model_type} model, not a LongVLM; make one of it with `longvlm assemble`")
    return pipeline(TASK, model=model, dtype=dtype, device=_usable(device))


def _usable(device: str | None) -> str | None:
    try:
        if device is not None:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'--device "{device}" cannot be used here: {reason}') from error
    return device
