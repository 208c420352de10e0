"""Loads the language model of a LongVLM: a folder, a Hub id, or a GGUF file."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from longvlm.checkpoint_faults import check_size, naming_files
from longvlm.conversion.hub import short_name
from longvlm.conversion.parts import LanguagePart


def load_language(
    source: str | Path, *, gguf_file: str | None = None, dtype: torch.dtype | None = None
) -> LanguagePart:
    """
    Loads a causal language model and its tokenizer.

    Args:
        source: folder, Hub id, or the path of a GGUF file (its weights are dequantised).
        gguf_file: name of the GGUF file within `source`, if `source` is a folder or Hub id.
        dtype: of the weights; `None`: as saved (GGUF: float32).

    Raises:
        ValueError: it is not a plain language model, is quantised, or a file of it is damaged or incomplete.
        OSError: nothing can be loaded from there.
    """
    path = Path(source)
    if gguf_file is None and path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        source, gguf_file = path.parent, path.name
    read = path if path.is_file() else source  # next to a GGUF file, anything may lie
    options: dict[str, Any] = {"trust_remote_code": False}  # else transformers asks for permission to run code
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    # Checked before the weights are loaded, which costs minutes and gigabytes.
    with naming_files(read, "config.json"):
        config = AutoConfig.from_pretrained(source, **options)
    check_size(config, str(source))
    if config.get_text_config() is not config:
        raise ValueError(
            f"{source} is a {config.model_type} model with parts of its own, not a plain language model; "
            "give the causal language model alone"
        )
    with naming_files(read, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    with naming_files(read, "weights"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or (torch.float32 if gguf_file else "auto"),
            output_loading_info=True,
            **options,
        )
    if info["missing_keys"]:  # transformers has put random numbers in their place
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{source} is missing {len(missing)} weights of {type(model).__name__}, for example {missing[0]}; "
            "give the folder or Hub id of a complete language model"
        )
    _forget_quantisation_of_gguf(model)
    return LanguagePart(model.eval(), tokenizer, short_name(gguf_file.removesuffix(".gguf") if gguf_file else source))


def _forget_quantisation_of_gguf(model: PreTrainedModel) -> None:
    """The weights have been dequantised; with a config that says otherwise they could not be loaded again."""
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    if str(getattr(method, "value", method)) != "gguf":
        raise ValueError(
            f"the language model is quantised ({getattr(method, 'value', method)}); give its unquantised weights, "
            "and quantise the assembled model when loading it"
        )
    del model.config.quantization_config
