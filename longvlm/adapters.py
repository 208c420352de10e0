"""LoRA adapters: a folder of peft (`adapter_config.json`) that changes a model which lies elsewhere, its base."""

import warnings
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers.utils import cached_file

from longvlm.files import read_json_object

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
FILES = ["*.json", "*.jinja", "*.model", "*.txt", "adapter_model.*"]


def read_adapter(source: str, where: dict[str, Any]) -> dict[str, Any] | None:
    """
    The `adapter_config.json` of a folder or Hub id; `None` if there is none.

    Args:
        where: options of `from_pretrained` that say where to look.

    Raises:
        ValueError: it is damaged, or does not name its base.
    """
    try:
        file = cached_file(source, CONFIG, _raise_exceptions_for_missing_entries=False, **where)
    except OSError:
        return None  # no such repository: whoever looks for the model says so
    if file is None:
        return None
    config = read_json_object(file)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{source} is a LoRA adapter, but {CONFIG} does not name its model: write it there, as "
            "base_model_name_or_path"
        )
    return config


def adapter_folder(source: str, where: dict[str, Any]) -> Path:
    """The local folder of an adapter; one on the Hub is downloaded, since it is small.

    Args:
        where: as in `read_adapter`.

    Raises:
        OSError: it cannot be downloaded.
    """
    options = {name: value for name, value in where.items() if name != "subfolder"}
    folder = (
        Path(source) if Path(source).is_dir() else Path(snapshot_download(source, allow_patterns=FILES, **options))
    )
    return folder / where.get("subfolder", "")


def with_adapter(model, folder: Path, config: dict[str, Any]):
    """
    The model with an adapter: merged into its weights, or beside them if they are quantised.

    Args:
        model: the adapter's base.
        folder: of `adapter_folder`.
        config: of `read_adapter`.

    Raises:
        ImportError: peft is missing.
        ValueError: the adapter has no weights, does not fit the model, or is not LoRA or one of its kin.
    """
    try:
        from peft import PeftModel
    except ImportError:
        raise ImportError(f"{folder} is a LoRA adapter, which needs the package peft: pip install peft") from None
    if not any((folder / name).is_file() for name in WEIGHTS):
        raise ValueError(f"{folder} has no {WEIGHTS[0]}: copy, download or save the adapter again")
    try:
        with warnings.catch_warnings():
            # Otherwise peft would leave random weights in their place.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            adapted = PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, KeyError, TypeError, AttributeError, Warning) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 200 else f"{reason[:200]}..."
        base = config["base_model_name_or_path"]
        raise ValueError(f"{folder} is not an adapter that fits {base}: {type(error).__name__}: {reason}") from error
    if not hasattr(adapted.base_model, "merge_and_unload"):
        raise ValueError(
            f"{folder} is an adapter of the kind {config.get('peft_type')}, not a LoRA; merge it with peft"
        )
    model = adapted.get_base_model() if getattr(model, "is_quantized", False) else adapted.merge_and_unload()
    untrained = getattr(model.config, "untrained_parts", None)
    if untrained:
        model.config.untrained_parts = [
            part for part in untrained if part not in (config.get("modules_to_save") or ())
        ]
    return model


def brings_processor(folder: Path) -> bool:
    """Whether an adapter has a tokenizer and a video processor of its own, as those of `longvlm train` do."""
    return all((folder / name).is_file() for name in ("tokenizer_config.json", "processor_config.json"))


__all__ = ["adapter_folder", "brings_processor", "read_adapter", "with_adapter"]
