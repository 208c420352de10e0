"""The tokenizer of a LLaMA-like checkpoint, as it worked in 2023, with every version of transformers.

LLaMA's fast tokenizer of 2023 put a space in front of EVERY stretch of text between special tokens. Today's puts it
in front of the first one only, or of every one, depending on the class that a folder's configuration happens to
select. So the behaviour is written into the tokenizer itself, which is saved under a class that leaves it alone.
"""

from importlib.util import find_spec
from pathlib import Path

from tokenizers import AddedToken, normalizers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

INSTALL = 'pip install "longvlm[convert]"'


def load_original_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """
    The tokenizer in `folder` (`tokenizer.model` or `tokenizer.json`) with a space mark after every special token.

    Raises:
        ValueError: the folder has no tokenizer.
        ImportError: a package that reads `tokenizer.model` is not installed.
    """
    folder = Path(folder)
    if not (folder / "tokenizer.json").is_file():
        if not (folder / "tokenizer.model").is_file():
            raise ValueError(f"{folder} has no tokenizer: tokenizer.model (or tokenizer.json) is missing")
        for module in ("sentencepiece", "google.protobuf"):
            if not _is_installed(module):
                raise ImportError(f"reading {folder / 'tokenizer.model'} needs {module}: {INSTALL}")
    tokenizer = LlamaTokenizer.from_pretrained(folder)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None
    names = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    # Not a LlamaTokenizer: that class replaces the normalizer when it is loaded.
    pinned = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: token for name, token in names.items() if token is not None},
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    return pinned


def add_tokens(tokenizer: PreTrainedTokenizerFast, tokens: tuple[str, ...]) -> list[int]:
    """Adds the missing ones as special tokens, in this order; returns the ids of all."""
    # normalized=False: found in the text as it was written.
    added = [AddedToken(token, special=True, normalized=False) for token in tokens]
    tokenizer.add_tokens(added, special_tokens=True)
    return tokenizer.convert_tokens_to_ids(list(tokens))


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):  # its parent package is missing
        return False
