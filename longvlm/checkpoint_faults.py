"""
Models of others, as transformers reads them: what is raised on a file of theirs becomes one line that names the file.
The errors of the libraries name a place in a file, and not the file.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from longvlm.files import check_regular, read_json_object

# Objects in JSON, all small. The tokenizer's own files are larger, and read only once something has failed.
SETTINGS = ("*config.json", "added_tokens.json", "chat_template.json", "special_tokens_map.json")
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
OTHER_VIDEO_PROCESSORS = ("video_preprocessor_config.json", "preprocessor_config.json")
MAX_LAYERS = 10_000
REMEDY = "copy, download or save the checkpoint again"


def check_settings(folder: Path) -> None:
    """Reads the small files: without that, transformers goes on without a generation_config.json that is damaged.

    Raises:
        ValueError: one of them is damaged; or something in the folder is neither file nor folder, and might never end.
    """
    for path in folder.iterdir():
        if not path.is_dir():
            check_regular(path)
    for pattern in SETTINGS:
        for file in sorted(folder.glob(pattern)):
            _read_object(file)
    for file in [folder / "chat_template.jinja", *sorted(folder.glob("additional_chat_templates/*.jinja"))]:
        if file.is_file():
            _check_template(file)


def check_size(config: PreTrainedConfig, name: str) -> None:
    """
    Refuses what only a damaged or hostile configuration asks for, before time or memory is spent on it.

    Raises:
        ValueError: too many layers.
    """
    for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
        layers = getattr(part, "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise ValueError(
                f"{name} has {layers:,} layers, says its configuration; at most {MAX_LAYERS:,} are loaded"
            )


def check_files(folder: Path) -> None:
    """Reads all files that a model, a tokenizer and a processor may have, of weights only the headers.

    Raises:
        ValueError: one of them is damaged, or a shard is missing.
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
    if (folder / "vocab.json").is_file():
        _read_object(folder / "vocab.json")


def check_weights(folder: Path) -> None:
    """As `check_files`.

    Raises:
        ValueError: a file is damaged, or there are no weights.
    """
    check_files(folder)
    if not any(file for pattern in ("*.safetensors*", "pytorch_model*.bin*") for file in folder.glob(pattern)):
        raise ValueError(f"{folder} has no weights (model.safetensors); {REMEDY}")


def check_processor_files(folder: Path) -> None:
    """
    Raises:
        ValueError: there is no tokenizer, or no video processor.
    """
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise ValueError(f"{folder} has no tokenizer (tokenizer.json); {REMEDY}")
    processor = folder / "processor_config.json"
    has_video_processor = processor.is_file() and "video_processor" in _read_object(processor)
    if not has_video_processor and not any((folder / name).is_file() for name in OTHER_VIDEO_PROCESSORS):
        raise ValueError(f"{processor} is missing, or has no video_processor; {REMEDY}")


@contextmanager
def naming_files(
    source: str | Path, part: str, where: Mapping[str, Any] | None = None, check: Callable[[Path], None] = check_files
) -> Iterator[None]:
    """
    Turns what libraries raise on the files of a folder or Hub id into one line that names the file.

    Args:
        part: what is read: the name of a file, or of what several files make.
        where: options of `from_pretrained` that say where to look.
        check: reads the files that it may have been, and raises `ValueError` at a damaged one.

    Raises:
        ValueError: in place of all errors, except missing packages and too little memory, which pass.
    """
    if not str(source) or "\0" in str(source):
        raise ValueError(f"{str(source)!r} is neither a folder nor a Hub id")
    if Path(source).is_dir():
        check_settings(Path(source))
    try:
        yield
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # foreign files can cause any
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise ValueError(f"{source} needs code of its own, and foreign code is not run here") from error
        folder = local_folder(source, where)
        if folder is not None:
            check(folder)
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{source} holds a pickle of more than tensors, or a damaged one, and is not read: a pickle can run "
                "code; save the weights as safetensors"
            ) from error
        if "ignore_mismatched_sizes" in reason:
            raise ValueError(f"{source}: its weights do not have the shapes that its config.json says") from error
        if isinstance(error, (ValueError, OSError)) and str(source) in reason:
            raise
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"the {part} of {source} cannot be used: {kind}{reason[:300]}") from error


def local_folder(source: str | Path, where: Mapping[str, Any] | None = None) -> Path | None:
    """Where the files of a folder or Hub id are on this machine, if they are."""
    if Path(source).is_dir():
        return Path(source)
    options = {**(where or {}), "local_files_only": True, "force_download": False}
    for name in ("config.json", "adapter_config.json"):
        try:
            file = cached_file(str(source), name, _raise_exceptions_for_missing_entries=False, **options)
        except OSError:
            return None
        if file is not None:
            return Path(file).parent
    return None


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


__all__ = [
    "check_files",
    "check_processor_files",
    "check_settings",
    "check_size",
    "check_weights",
    "local_folder",
    "naming_files",
]
