"""Says which file of a checkpoint is damaged. The errors of the libraries name a place in a file, and not the file."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from longvlm.files import read_json_object

# Objects in JSON, all small. The tokenizer's own files are larger, and read only once something has failed.
SETTINGS = (
    "adapter_config.json",
    "added_tokens.json",
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
OTHER_VIDEO_PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")
REMEDY = "copy, download or save the checkpoint again"


def check_settings(folder: Path) -> None:
    """Reads the small files: without that, transformers goes on without a generation_config.json that is damaged.

    Raises:
        ValueError: one of them is damaged.
    """
    for name in SETTINGS:
        if (folder / name).is_file():
            _read_object(folder / name)
    for file in [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if file.is_file():
            _check_template(file)


def check_files(folder: Path) -> None:
    """Reads all files, of weights only the headers.

    Raises:
        ValueError: one of them is damaged or missing.
    """
    check_settings(folder)
    shards: set[str] = set()
    for file in sorted(folder.glob("*.safetensors.index.json")):
        names = _read_object(file).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f'{file} names no shards (it has no "weight_map"); {REMEDY}')
        shards |= set(names.values())
    for name in sorted(shards):
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing, although the index of the weights names it; {REMEDY}")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged: {error}; {REMEDY}") from None
    for file in sorted(folder.glob("pytorch_model*.bin")):
        try:
            torch.load(file, map_location="meta", weights_only=True)
        except Exception:  # whatever the bytes make of it
            raise ValueError(f"{file} is damaged, or holds more than tensors; {REMEDY}") from None
    if (folder / "tokenizer.json").is_file():
        _check_tokenizer(folder / "tokenizer.json")
    elif not any((folder / name).is_file() for name in OTHER_TOKENIZERS):
        raise ValueError(f"{folder} has no tokenizer (tokenizer.json); {REMEDY}")
    if (folder / "vocab.json").is_file():
        _read_object(folder / "vocab.json")
    processor = folder / "processor_config.json"
    has_video_processor = processor.is_file() and "video_processor" in _read_object(processor)
    if not has_video_processor and not any((folder / name).is_file() for name in OTHER_VIDEO_PROCESSORS):
        raise ValueError(f"{processor} is missing, or has no video_processor; {REMEDY}")


def _read_object(file: Path) -> dict:
    try:
        return read_json_object(file)
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None


def _check_template(file: Path) -> None:
    from jinja2 import TemplateSyntaxError
    from transformers.utils.chat_template_utils import _compile_jinja_template

    try:
        text = file.read_text(encoding="utf-8")
        if "{" in text:
            _compile_jinja_template(text)
            return
        reason = "it holds no Jinja"
    except (UnicodeDecodeError, TemplateSyntaxError) as error:
        reason = str(error).splitlines()[0]
    raise ValueError(f"{file} is not a chat template: {reason}; {REMEDY}")


def _check_tokenizer(file: Path) -> None:
    from tokenizers import Tokenizer

    _read_object(file)
    try:
        Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more specific
        raise ValueError(f"{file} is not a tokenizer: {error}; {REMEDY}") from None


__all__ = ["check_files", "check_settings"]
