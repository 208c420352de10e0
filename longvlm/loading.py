"""`longvlm.load`: from a checkpoint folder or Hub id to an engine, or to one line that says why not."""

import os
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from longvlm.bundled import tiny_checkpoint
from longvlm.files import read_json_object
from longvlm.modeling_longvlm.engine_longvlm import LongVLMEngine
from longvlm.modeling_longvlm.modeling_longvlm import LongVLMForConditionalGeneration
from longvlm.processing.processing_longvlm import LongVLMProcessor

# Options of `from_pretrained` that say where to look: the processor and the configuration get them, too.
_WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def load(
    model: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    cache_bytes: int = 256 << 20,
    **options,
) -> LongVLMEngine:
    """
    Loads a LongVLM that is ready to answer.

    Args:
        model: checkpoint folder or Hub id; default: the environment variable `LONGVLM_MODEL`, else the bundled
            `longvlm-tiny`, which knows nothing but the synthetic videos of Storyline.
        dtype: dtype of the weights; `"auto"`: as they were saved.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`...; default: the accelerator if there is one. Cannot be combined
            with `device_map`.
        cache_bytes: maximum size of the cache of features of earlier videos, in bytes.
        options: passed to `from_pretrained`: `revision`, `device_map`, `quantization_config`, `attn_implementation`...

    Returns:
        [`LongVLMEngine`], in evaluation mode.

    Raises:
        ValueError: there is no such model, it is of another type, or the device or dtype cannot be used.
    """
    source = str(model if model is not None else os.environ.get("LONGVLM_MODEL") or tiny_checkpoint())
    where = {name: options[name] for name in _WHERE if name in options}
    source, is_quantized = _check_kind(source, where)
    if device is not None and options.get("device_map") is not None:
        raise ValueError(f'`device` "{device}" and `device_map` exclude each other; leave one of them out')
    check_device(device)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f'`dtype` "{dtype}" is not known; use auto, float32, bfloat16 or float16')
    if device is not None and (is_quantized or options.get("quantization_config") is not None):
        options["device_map"] = {"": device}  # quantised weights cannot be moved afterwards
    loaded = LongVLMForConditionalGeneration.from_pretrained(source, dtype=dtype, **options).eval()
    if getattr(loaded, "hf_device_map", None) is None and not getattr(loaded, "is_quantized", False):
        loaded.to(device if device is not None else _best_device())
    return LongVLMEngine(loaded, LongVLMProcessor.from_pretrained(source, **where), cache_bytes=cache_bytes)


def _check_kind(source: str, where: dict) -> tuple[str, bool]:
    """Returns the folder or Hub id, and whether its weights are quantised."""
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path:
        source = str(Path(source).expanduser())
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file; give the folder of the checkpoint")
    if looks_like_path and not folder.is_dir():
        raise ValueError(f"there is no model folder {source}; make one with `longvlm assemble`")
    if folder.is_dir() and "subfolder" not in where:
        if (folder / "adapter_config.json").is_file():
            raise ValueError(f"{source} is a LoRA adapter, not a whole model; train with merge_lora: true")
        if not (folder / "config.json").is_file():
            raise ValueError(f"{source} is not a checkpoint: it has no config.json; make one with `longvlm assemble`")
        read_json_object(folder / "config.json")  # says what is wrong with a damaged one
    try:
        # Not AutoConfig: it would ask for permission to run a foreign model's code.
        values, _ = PreTrainedConfig.get_config_dict(source, **where)
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{source} is not a folder here, and cannot be loaded from the Hub: {reason}") from error
    model_type = values.get("model_type")
    if model_type != "longvlm":
        raise ValueError(
            f"{source} is not a LongVLM (its model_type is {model_type}): convert a LLaVA-style checkpoint with "
            "`longvlm convert llava`, or combine an encoder and a language model with `longvlm assemble`"
        )
    return source, "quantization_config" in values


def check_device(device: str | torch.device | None) -> None:
    """
    Raises:
        ValueError: nothing can be computed on the device.
    """
    try:
        if device is not None:
            torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f'`device` "{device}" cannot be used here: {reason}') from error


def _best_device() -> torch.device:
    if torch.accelerator.is_available():
        return torch.device(torch.accelerator.current_accelerator())
    return torch.device("cpu")


__all__ = ["check_device", "load"]
