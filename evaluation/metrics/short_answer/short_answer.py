"""Scores of short answers: exact match, accuracy by what an answer names, token F1; per kind, with intervals.

`evaluate.load("evaluation/metrics/longvlm_qa")` works offline; so does `LongVLMQA().compute(...)` without loading.
(`evaluate` copies this file alone and reads its imports as text: keep one plain import a line, and nothing relative.)
"""

import datasets
import evaluate
import numpy as np

_DESCRIPTION = """
Answers are normalised before they are compared: lower case; everything that is no letter, digit or point between
digits becomes a space; the articles "a", "an", "the" are dropped; spaces are made single.
"""
_INPUTS = """
Args:
    predictions: list of str, what the model said.
    references: list of str, the right answers.
    kinds: list of str, optional: the kind of each question; scores are then given per kind as well.
    choices: list of lists of str, optional: all answers that each question could have. The prediction is read as the
        choice that it names: the only one of them whose words stand in it side by side. None or several: unparsed, and
        wrong. Without choices, accuracy is exact match.
    num_resamples, confidence, seed: of the bootstrap; 1000, 0.95 and 0.

Returns:
    dict of "accuracy", "exact_match" and "f1" (words in common; mean over questions), each also with "_low" and
    "_high" (bootstrap interval), "unparsed" (part of the predictions), "count", "mean_of_kinds" (mean of the kinds'
    accuracies) and "kinds": {kind: the same scores}. All between 0 and 1. Of no predictions: count 0, and `None`
    for every score.
"""
_CITATION = ""
_ARTICLES = ("a", "an", "the")


def normalize_answer(text: str) -> str:
    """Lower case, words and numbers only, no articles, single spaces."""
    text = text.lower()
    kept = []
    for i, letter in enumerate(text):
        decimal = letter == "." and text[i - 1 : i].isdigit() and text[i + 1 : i + 2].isdigit()
        kept.append(letter if letter.isalnum() or decimal else " ")
    return " ".join(word for word in "".join(kept).split() if word not in _ARTICLES)


def token_f1(prediction: str, reference: str) -> float:
    """Harmonic mean of precision and recall of the words, counted with repetition; 1 if both have none."""
    said, right = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not said or not right:
        return float(said == right)
    common = sum(min(said.count(word), right.count(word)) for word in set(said))
    return 2 * common / (len(said) + len(right))


def name_choice(prediction: str, choices) -> str | None:
    """The only choice that the prediction names, or `None`. A choice within a longer one that is named is not."""
    said = f" {normalize_answer(prediction)} "
    named = []
    for choice in sorted(choices, key=len, reverse=True):
        words = f" {normalize_answer(choice)} "
        if words.strip() and words in said:
            named.append(choice)
            said = said.replace(words, "  ")
    return named[0] if len(named) == 1 else None


class LongVLMQA(evaluate.Metric):
    """See the module's docstring, and `LongVLMQA().inputs_description`."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, kinds=None, choices=None, num_resamples=1000, confidence=0.95, seed=0):
        for name, given in (("kinds", kinds), ("choices", choices)):
            if given is not None and len(given) != len(predictions):
                raise ValueError(
                    f"{len(given)} {name} were given for {len(predictions)} predictions; give one for each"
                )
        if not 0 < confidence < 1 or num_resamples < 1:
            raise ValueError(f"confidence={confidence}, num_resamples={num_resamples}: give 0 to 1, and 1 or more")

        exact = np.zeros(len(predictions))
        right, f1, unparsed = exact.copy(), exact.copy(), exact.copy()
        for i, (prediction, reference) in enumerate(zip(predictions, references, strict=True)):
            exact[i] = normalize_answer(prediction) == normalize_answer(reference)
            f1[i] = token_f1(prediction, reference)
            if choices is None:
                right[i] = exact[i]
            else:
                named = name_choice(prediction, choices[i])
                unparsed[i] = named is None
                right[i] = named is not None and normalize_answer(named) == normalize_answer(reference)

        def interval(values, stream):
            # How often each value comes in a resample is a draw from a multinomial distribution.
            found, counts = np.unique(values, return_counts=True)
            dice, count = np.random.default_rng([seed, stream]), len(values)
            draws = dice.multinomial(count, counts[::-1] / count, num_resamples) @ found[::-1] / count
            return np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])

        def scores(chosen, stream):
            count = int(chosen.sum())
            told: dict[str, float | None] = {}
            for name, values in (("accuracy", right), ("exact_match", exact), ("f1", f1)):
                told |= dict.fromkeys((name, f"{name}_low", f"{name}_high"))
                if count:
                    low, high = interval(values[chosen], stream)
                    told |= {
                        name: float(values[chosen].mean()),
                        f"{name}_low": float(low),
                        f"{name}_high": float(high),
                    }
            return {**told, "unparsed": float(unparsed[chosen].mean()) if count else None, "count": count}

        result = scores(np.ones(len(predictions), bool), 0)
        names = sorted(set(kinds)) if kinds is not None else []
        of_kind = np.array(kinds if kinds is not None else [], dtype=object)
        result["kinds"] = {kind: scores(of_kind == kind, 1 + number) for number, kind in enumerate(names)}
        accuracies = [result["kinds"][kind]["accuracy"] for kind in names]
        result["mean_of_kinds"] = float(np.mean(accuracies)) if accuracies else result["accuracy"]
        return result
