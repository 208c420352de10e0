"""Evaluation: scores of short answers, the synthetic benchmark Storyline, and pictures of what was merged.

from longvlm.evaluation import score_answers
"""

from importlib import import_module
from typing import Any

_FILES = {
    "answers": ("exact_match", "name_choice", "normalize_answer", "score_answers", "token_f1"),
    "merge_picture": ("draw_merging",),
}
_FILE_OF = {name: file for file, names in _FILES.items() for name in names}

__all__ = sorted(_FILE_OF)


def __getattr__(name: str) -> Any:
    if name not in _FILE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_FILE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
