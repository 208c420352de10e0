"""`longvlm.load`: from a checkpoint folder or Hub id to an engine, or to one line that says why not."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from longvlm.adapters import adapter_folder, brings_processor, read_adapter, with_adapter
from longvlm.bundled import tiny_checkpoint
from longvlm.checkpoint_faults import (
    check_files,
    check_processor_files,
    check_settings,
    check_weights,
    local_folder,
    naming_files,
)
from longvlm.modeling_longvlm.configuration_longvlm import LongVLMConfig
from longvlm.modeling_longvlm.engine_longvlm import LongVLMEngine
from longvlm.modeling_longvlm.modeling_longvlm import LongVLMForConditionalGeneration
from longvlm.processing.processing_longvlm import LongVLMProcessor
from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor
from longvlm.quantization import quantization_config

# Options of `from_pretrained` that say where to look: the processor and the configuration get them, too.
_WHERE = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder")


def load(
    model: str | Path | None = None,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    cache_bytes: int = 256 << 20,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    **options,
) -> LongVLMEngine:
    """
    Loads a LongVLM that is ready to answer.

    Args:
        model: checkpoint folder or Hub id, of a whole model or of a LoRA adapter, which is loaded with its base;
            default: the environment variable `LONGVLM_MODEL`, else the bundled `longvlm-tiny`, which knows nothing but
            the synthetic videos of Storyline.
        dtype: dtype of the weights; `"auto"`: as they were saved.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`...; default: the accelerator if there is one. Cannot be combined
            with `device_map`.
        cache_bytes: maximum size of the cache of features of earlier videos, in bytes.
        load_in_4bit, load_in_8bit: quantise the LLM with bitsandbytes; the encoder and the projector stay as they are.
        options: passed to `from_pretrained`: `revision`, `device_map`, `quantization_config`, `attn_implementation`...

    Returns:
        [`LongVLMEngine`], in evaluation mode.

    Raises:
        ValueError: there is no such model, it is of another type, a file of it is damaged, or the device or dtype
            cannot be used.
        ImportError: bitsandbytes or peft is needed and missing.
    """
    source = str(model if model is not None else os.environ.get("LONGVLM_MODEL") or tiny_checkpoint())
    if device is not None and options.get("device_map") is not None:
        raise ValueError(f'`device` "{device}" and `device_map` exclude each other; leave one of them out')
    loaded, processor = load_parts(
        source, dtype=dtype, device=device, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, **options
    )
    if getattr(loaded, "hf_device_map", None) is None and not getattr(loaded, "is_quantized", False):
        loaded.to(device if device is not None else _best_device())
    return LongVLMEngine(loaded.eval(), processor, cache_bytes=cache_bytes)


def load_parts(
    source: str,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    take_adapters: bool = True,
    **options,
) -> tuple[LongVLMForConditionalGeneration, LongVLMProcessor]:
    """
    The model, where `from_pretrained` has put it, and its processor.

    Args:
        source: checkpoint folder or Hub id.
        device: where the model will go. Quantised weights, which cannot be moved, are loaded to it.
        take_adapters: load LoRA adapters with their base; otherwise they are refused.
        dtype, load_in_4bit, load_in_8bit, options: as in `load`.

    Raises:
        ValueError, ImportError: as in `load`.
    """
    where = {name: options.pop(name) for name in _WHERE if name in options}
    check_device(device)
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f'`dtype` "{dtype}" is not known; use auto, float32, bfloat16 or float16')
    found = _find(source, where)
    if found.adapter is not None and not take_adapters:
        raise ValueError(
            f"{source} is a LoRA adapter; give the model it belongs to, or merge it: train with merge_lora: true"
        )
    base = _find_base(found) if found.adapter is not None else found
    saved = _dtype_of("auto", base.config)
    if base.is_quantized and saved not in (None, _dtype_of(dtype, base.config)):
        # transformers would convert some of the other weights and not all.
        raise ValueError(f"{base.source} is quantised, with its other weights in {saved}: leave out `dtype`")
    quantized = quantization_config(
        load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit, dtype=_dtype_of(dtype, base.config)
    )
    if quantized is not None:
        if options.get("quantization_config") is not None or base.is_quantized:
            given = (
                "`quantization_config` is given" if not base.is_quantized else f"{base.source} is quantised already"
            )
            raise ValueError(f"{given}: leave out `load_in_4bit` and `load_in_8bit`")
        options["quantization_config"] = quantized
    if device is not None and (base.is_quantized or options.get("quantization_config") is not None):
        options["device_map"] = {"": device}
    model = _load_model(base, dtype, options)
    processor_of = base
    if found.adapter is not None:
        with found.naming_files("adapter"):
            folder = adapter_folder(found.source, found.where)
            model = with_adapter(model, folder, found.adapter)
        if brings_processor(folder):
            processor_of = _Checkpoint(str(folder), {}, {}, found.adapter)
    with processor_of.naming_files("processor_config.json", _check_all):
        LongVLMVideoProcessor.from_pretrained(processor_of.source, **processor_of.where)
    with processor_of.naming_files("tokenizer (tokenizer.json, tokenizer_config.json)", _check_all):
        processor = LongVLMProcessor.from_pretrained(processor_of.source, **processor_of.where)
    if processor.tokenizer.pad_token is None:
        raise ValueError(
            f"{processor_of.source}: the tokenizer has neither pad_token nor eos_token: tokenizer_config.json is "
            "missing, or does not name them"
        )
    return model, processor


@dataclass
class _Checkpoint:
    """
    A folder or Hub id that holds a LongVLM, or an adapter for one.

    Args:
        where: options of `from_pretrained` that say where to look.
        config: the content of config.json; empty for an adapter.
        adapter: the content of adapter_config.json; `None` for a whole model.
    """

    source: str
    where: dict[str, Any]
    config: dict[str, Any]
    adapter: dict[str, Any] | None = None

    @property
    def is_quantized(self) -> bool:
        return bool(self.config.get("quantization_config"))

    def folder(self) -> Path | None:
        """Where its files are on this machine, if they are."""
        return local_folder(self.source, self.where)

    def naming_files(self, part: str, check: Callable[[Path], None] = check_files):
        """See `checkpoint_faults.naming_files`."""
        return naming_files(self.source, part, self.where, check)


def _check_all(folder: Path) -> None:
    """See `check_files` and `check_processor_files`."""
    check_files(folder)
    check_processor_files(folder)


def _find(source: str, where: dict[str, Any]) -> _Checkpoint:
    """What lies in a folder or under a Hub id, without loading it."""
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if looks_like_path:
        source = str(Path(source).expanduser())
    folder = Path(source)
    if folder.is_file():
        raise ValueError(f"{source} is a file; give the folder of the checkpoint")
    if looks_like_path and not folder.is_dir():
        raise ValueError(f"there is no model folder {source}; make one with `longvlm assemble`")
    if folder.is_dir():
        check_settings(folder / where.get("subfolder", ""))
    if (adapter := read_adapter(source, where)) is not None:
        return _Checkpoint(source, where, {}, adapter)
    if folder.is_dir() and not (folder / where.get("subfolder", "") / "config.json").is_file():
        raise ValueError(f"{source} is not a checkpoint: it has no config.json; make one with `longvlm assemble`")
    try:
        # Not AutoConfig: it would ask for permission to run a foreign model's code.
        values, _ = PreTrainedConfig.get_config_dict(source, **where)
    except OSError as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"{source} is not a folder here, and cannot be loaded from the Hub: {reason}") from error
    model_type = values.get("model_type")
    if model_type != "longvlm":
        raise ValueError(
            f"{source} is not a LongVLM (its model_type is {model_type}, says config.json): convert a LLaVA-style "
            "checkpoint with `longvlm convert llava`, or combine an encoder and a language model with `longvlm "
            "assemble`"
        )
    return _Checkpoint(source, where, values)


def _find_base(adapter: _Checkpoint) -> _Checkpoint:
    """The model that an adapter belongs to."""
    assert adapter.adapter is not None
    source = adapter.adapter["base_model_name_or_path"]
    where = {name: value for name, value in adapter.where.items() if name not in ("revision", "subfolder")}
    if adapter.adapter.get("revision"):
        where["revision"] = adapter.adapter["revision"]
    try:
        base = _find(source, where)
        if base.adapter is not None:
            raise ValueError(f"{source} is a LoRA adapter itself")
    except ValueError as error:
        raise ValueError(
            f"{adapter.source} is a LoRA adapter for {source}, which cannot be loaded ({error}): write the right name "
            "into base_model_name_or_path of adapter_config.json, or train with merge_lora: true"
        ) from error
    return base


def _load_model(found: _Checkpoint, dtype, options: dict[str, Any]) -> LongVLMForConditionalGeneration:
    # First what is quickly read, so that an error names the file.
    with found.naming_files("config.json"):
        LongVLMConfig.from_pretrained(found.source, **found.where)
    folder = found.folder()
    if folder is not None and (folder / "generation_config.json").is_file():
        with found.naming_files("generation_config.json"):
            GenerationConfig.from_pretrained(folder)
    if not found.is_quantized and options.get("quantization_config") is None:
        options = {"ignore_mismatched_sizes": True, **options}  # they are named below
    # Of a Hub id, they may only not be here yet.
    with found.naming_files("weights", check_weights if Path(found.source).is_dir() else check_files):
        try:
            model, loading = LongVLMForConditionalGeneration.from_pretrained(
                found.source, dtype=dtype, output_loading_info=True, **found.where, **options
            )
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise ValueError(
                f"the weights in {found.source} do not have the sizes that its config.json describes, with its "
                "quantization_config; copy, download or save the checkpoint again"
            ) from error
    wrong = [
        f"{name} is {tuple(stored)} and not {tuple(needed)}"
        for name, stored, needed in sorted(loading["mismatched_keys"])
    ]
    wrong += [f"{name} is missing" for name in sorted(loading["missing_keys"])]
    if wrong:  # transformers would put random numbers in their place
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"the weights in {found.source} are not those that its config.json describes: {', '.join(wrong[:3])}{more}"
            "; copy, download or save the checkpoint again"
        )
    return model


def _dtype_of(dtype: str | torch.dtype, config: dict[str, Any]) -> torch.dtype | None:
    """The dtype that the model will have, as far as one knows before loading it."""
    name = (config.get("dtype") or config.get("torch_dtype")) if dtype == "auto" else dtype
    found = getattr(torch, name.removeprefix("torch."), None) if isinstance(name, str) else name
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None


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


__all__ = ["check_device", "load", "load_parts"]
