"""`longvlm.evaluation.answers` as a metric of `evaluate`: batches are collected with `add_batch`, then scored.

`evaluate.load("evaluation/metrics/short_answer")` works offline. `evaluate` copies this file alone and reads its
imports as text: keep one plain import per line, and nothing relative.
"""

import datasets
import evaluate

from longvlm.evaluation import answers

_INPUTS = """
Args:
    predictions: list of str, what the model said.
    references: list of str, the right answers.
    kinds: list of str, optional: the kind of each question; scores are then given per kind as well.
    choices: list of lists of str, optional: all possible answers of each question. A prediction is read as the only
        choice that it names; if it names none or several, it is unparsed, and wrong. Without choices, accuracy is
        exact match.
    num_resamples, confidence, seed: of the bootstrap; 1000, 0.95 and 0.

Returns:
    dict of "accuracy", "exact_match" and "f1" (words in common; mean over questions), each also with "_low" and
    "_high" (bootstrap interval), "unparsed" (share of the predictions), "count", "mean_of_kinds" (mean of the kinds'
    accuracies) and "kinds": {kind: the same scores}. All scores are between 0 and 1; without predictions they are
    None.
"""


class ShortAnswer(evaluate.Metric):
    """See `ShortAnswer().inputs_description`."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=answers.__doc__,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": text, "references": text}),
        )

    def _compute(self, predictions, references, **options):
        return answers.score_answers(predictions, references, **options)
