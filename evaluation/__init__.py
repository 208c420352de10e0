"""Evaluation: scores of short answers, the synthetic benchmark Storyline, and pictures of what was merged.

from longvlm.evaluation import score_answers
"""

from longvlm.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "answers": ("exact_match", "name_choice", "normalize_answer", "score_answers", "token_f1"),
        "merge_picture": ("draw_merging",),
    },
)
