"""Scores of short answers: exact match, accuracy by the choice that an answer names, token F1; per kind of question,
with bootstrap intervals. Plain functions that need numpy alone.

Answers are normalised before they are compared: lower case; everything but letters, digits and the point between
digits becomes a space; the articles "a", "an" and "the" are dropped; repeated spaces become one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

ARTICLES = ("a", "an", "the")


def normalize_answer(text: str) -> str:
    """Lower case, words and numbers only, no articles, single spaces."""
    text = text.lower()
    kept = []
    for i, letter in enumerate(text):
        decimal = letter == "." and text[i - 1 : i].isdigit() and text[i + 1 : i + 2].isdigit()
        kept.append(letter if letter.isalnum() or decimal else " ")
    return " ".join(word for word in "".join(kept).split() if word not in ARTICLES)


def exact_match(prediction: str, reference: str) -> bool:
    """Whether two answers are the same once they are normalised."""
    return normalize_answer(prediction) == normalize_answer(reference)


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, with repeated words counted; 1 if neither has any."""
    given, right = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not given or not right:
        return float(given == right)
    common = sum(min(given.count(word), right.count(word)) for word in set(given))
    return 2 * common / (len(given) + len(right))


def name_choice(prediction: str, choices: Sequence[str]) -> str | None:
    """The only choice that a prediction names, or `None`. A choice inside of a longer one does not count as named."""
    left = f" {normalize_answer(prediction)} "
    named = []
    for choice in sorted(choices, key=len, reverse=True):
        words = f" {normalize_answer(choice)} "
        if words.strip() and words in left:
            named.append(choice)
            left = left.replace(words, "  ")
    return named[0] if len(named) == 1 else None


def score_answers(
    predictions: Sequence[str],
    references: Sequence[str],
    *,
    kinds: Sequence[str] | None = None,
    choices: Sequence[Sequence[str]] | None = None,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """
    Scores the answers to many questions.

    Args:
        predictions: what the model said.
        references: the right answers.
        kinds: the kind of each question; scores are then given per kind as well.
        choices: for each question, all possible answers. A prediction is read as the choice that it names (see
            `name_choice`); if it names none or several, it is unparsed, and wrong. Without choices, accuracy is exact
            match.
        num_resamples, confidence, seed: of the bootstrap.

    Returns:
        `accuracy`, `exact_match`, `f1` (mean of `token_f1`), each also with `_low` and `_high` (bootstrap interval);
        `unparsed` (share of the predictions), `count`, `mean_of_kinds` (mean of the kinds' accuracies) and `kinds`:
        `{kind: the same scores}`. All scores are between 0 and 1; without predictions they are `None`.

    Raises:
        ValueError: lists of different lengths, or an impossible bootstrap.
    """
    for name, given in (("references", references), ("kinds", kinds), ("choices", choices)):
        if given is not None and len(given) != len(predictions):
            raise ValueError(f"{len(given)} {name} were given for {len(predictions)} predictions; give one for each")
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"`confidence` is {confidence} and `num_resamples` {num_resamples}; give a number between 0 and 1, and at "
            "least 1"
        )

    exact = np.array([exact_match(*pair) for pair in zip(predictions, references, strict=True)], dtype=float)
    f1 = np.array([token_f1(*pair) for pair in zip(predictions, references, strict=True)])
    accurate, unparsed = exact, np.zeros(len(predictions))
    if choices is not None:
        named = [name_choice(*pair) for pair in zip(predictions, choices, strict=True)]
        unparsed = np.array([choice is None for choice in named], dtype=float)
        accurate = np.array(
            [choice is not None and exact_match(choice, r) for choice, r in zip(named, references, strict=True)], float
        )
    measured = {"accuracy": accurate, "exact_match": exact, "f1": f1}

    def scores(chosen: np.ndarray, stream: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for name, values in measured.items():
            result[name] = float(values[chosen].mean()) if chosen.any() else None
            bounds = _interval(values[chosen], num_resamples, confidence, [seed, stream])
            result[f"{name}_low"], result[f"{name}_high"] = bounds
        result["unparsed"] = float(unparsed[chosen].mean()) if chosen.any() else None
        return {**result, "count": int(chosen.sum())}

    result = scores(np.ones(len(predictions), dtype=bool), 0)
    names = sorted(set(kinds)) if kinds is not None else []
    kind_of = np.array(kinds if kinds is not None else [], dtype=object)
    result["kinds"] = {kind: scores(kind_of == kind, number) for number, kind in enumerate(names, start=1)}
    accuracies = [result["kinds"][kind]["accuracy"] for kind in names]
    result["mean_of_kinds"] = float(np.mean(accuracies)) if accuracies else result["accuracy"]
    return result


def _interval(
    values: np.ndarray, num_resamples: int, confidence: float, seed: Sequence[int]
) -> tuple[float, float] | tuple[None, None]:
    """The bootstrap interval of the mean of `(n,)` values."""
    if not len(values):
        return None, None
    # How often each value occurs in a resample is a draw from a multinomial distribution.
    distinct, counts = np.unique(values, return_counts=True)
    rng = np.random.default_rng(seed)
    means = rng.multinomial(len(values), counts[::-1] / len(values), num_resamples) @ distinct[::-1] / len(values)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


__all__ = ["exact_match", "name_choice", "normalize_answer", "score_answers", "token_f1"]
