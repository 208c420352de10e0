"""Models of others, as transformers reads them: what it raises on a file of theirs becomes one line that names it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from longvlm.files import read_json_object

# What transformers reads of a model's folder, apart from weights; all of it is made of JSON objects.
SETTINGS = ("*config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")


def check_settings(folder: Path) -> None:
    """
    Reads the small files of a folder. transformers goes on without some of them, if they are damaged.

    Raises:
        ValueError: one of them is not a JSON object.
    """
    for pattern in SETTINGS:
        for file in sorted(folder.glob(pattern)):
            read_json_object(file)


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """
    For the time in which transformers reads a folder or Hub id.

    Raises:
        ValueError: a file is damaged, or transformers cannot make anything of it.
    """
    folder = Path(source)
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
        if isinstance(error, (ValueError, OSError)) and str(source) in text:
            raise
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{source} cannot be read: {kind}{text}") from error


__all__ = ["check_settings", "reading"]
