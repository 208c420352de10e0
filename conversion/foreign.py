"""Models of others, as transformers reads them: what it raises on a file of theirs becomes one line that names it."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from longvlm.files import check_regular, read_json_object

# What transformers reads of a model's folder, apart from weights; all of it is made of JSON objects.
SETTINGS = ("*config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
MAX_LAYERS = 10_000


def check_settings(folder: Path) -> None:
    """
    Reads the small files of a folder. transformers goes on without some of them, if they are damaged.

    Raises:
        ValueError: one of them is not a JSON object; or something in the folder is neither file nor folder, and might
            never end.
    """
    for path in folder.iterdir():
        if not path.is_dir():
            check_regular(path)
    for pattern in SETTINGS:
        for file in sorted(folder.glob(pattern)):
            read_json_object(file)


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


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """
    For the time in which transformers reads a folder, a file or a Hub id.

    Raises:
        ValueError: a file is damaged, or transformers cannot make anything of it.
    """
    folder = Path(source)
    if not str(source) or "\0" in str(source):
        raise ValueError(f"{str(source)!r} is neither a folder nor a Hub id")
    if folder.is_dir():
        check_settings(folder)
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # files of others can cause any
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ValueError(f"{source} needs code of its own, and foreign code is not run here") from error
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, "pt"):
                    pass
            except SafetensorError as damage:
                raise ValueError(f"{file} is damaged ({damage}): download it again") from error
        if isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{source} holds a pickle of more than tensors, or a damaged one, and is not read: a pickle can run "
                "code; save the weights as safetensors"
            ) from error
        if "ignore_mismatched_sizes" in text:
            raise ValueError(f"{source}: its weights do not have the shapes that its config.json says") from error
        if isinstance(error, (ValueError, OSError)) and str(source) in text:
            raise
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{source} cannot be read: {kind}{text}") from error


__all__ = ["check_settings", "check_size", "reading"]
