"""Scores are those that one gets by hand, as plain functions and as a metric of `evaluate`."""

import math

import evaluate
import pytest

from longvlm.evaluation.answers import exact_match, name_choice, normalize_answer, score_answers, token_f1
from longvlm.evaluation.metrics.short_answer.short_answer import ShortAnswer
from tests.helpers.paths import ROOT

PREDICTIONS = ["The red star.", "blue cross", "yes", "It is a RED one", "two"]
REFERENCES = ["red star", "red cross", "no", "red", "two"]
KINDS = ["first", "first", "did it happen", "what colour", "how many"]
CHOICES = [
    ["red star", "red cross", "blue cross"],
    ["red star", "red cross", "blue cross"],
    ["no", "yes"],
    ["red", "blue"],
    ["one", "two"],
]


def test_scores_are_those_computed_by_hand():
    scores = score_answers(predictions=PREDICTIONS, references=REFERENCES, kinds=KINDS, choices=CHOICES)
    assert scores["count"] == 5
    assert scores["exact_match"] == pytest.approx(2 / 5)  # 1st, 5th
    assert scores["accuracy"] == pytest.approx(3 / 5)  # and the 4th, which names "red" in a sentence
    # 1; one of two words each way; 0; "it is red one" (4 words) and "red": 2 * 1 / (4 + 1); 1
    assert scores["f1"] == pytest.approx((1 + 1 / 2 + 0 + 2 / 5 + 1) / 5)
    assert scores["unparsed"] == 0
    assert scores["kinds"]["first"]["accuracy"] == 0.5 and scores["kinds"]["first"]["count"] == 2
    assert scores["mean_of_kinds"] == pytest.approx((0.5 + 0 + 1 + 1) / 4)


def test_evaluate_loads_the_folder_and_gives_the_same():
    loaded = evaluate.load(str(ROOT / "evaluation" / "metrics" / "short_answer"))
    arguments = {"predictions": PREDICTIONS, "references": REFERENCES, "kinds": KINDS, "choices": CHOICES}
    assert loaded.compute(**arguments) == score_answers(**arguments) == ShortAnswer().compute(**arguments)


def test_batches_add_up_to_the_same_scores():
    metric = ShortAnswer()
    metric.add_batch(predictions=PREDICTIONS[:2], references=REFERENCES[:2])
    metric.add_batch(predictions=PREDICTIONS[2:], references=REFERENCES[2:])
    assert metric.compute(kinds=KINDS) == score_answers(predictions=PREDICTIONS, references=REFERENCES, kinds=KINDS)


def test_no_predictions_have_no_scores_and_raise_nothing():
    scores = score_answers(predictions=[], references=[], kinds=[], choices=[])
    assert scores["count"] == 0 and scores["kinds"] == {}
    assert scores["accuracy"] is scores["f1"] is scores["mean_of_kinds"] is None


def test_intervals_are_seeded_and_as_wide_as_theory_says():
    count, right = 400, 300
    arguments = {"predictions": ["a1"] * right + ["b"] * (count - right), "references": ["a1"] * count}
    first = score_answers(**arguments, num_resamples=4000)
    assert first == score_answers(**arguments, num_resamples=4000)
    other = score_answers(**arguments, num_resamples=4000, seed=1)
    assert (other["accuracy_low"], other["accuracy_high"]) != (0.75, 0.75)
    half_width = 1.96 * math.sqrt(0.75 * 0.25 / count)
    assert first["accuracy_low"] == pytest.approx(0.75 - half_width, abs=0.01)
    assert first["accuracy_high"] == pytest.approx(0.75 + half_width, abs=0.01)
    for name in ("exact_match", "f1"):  # here the same numbers
        assert (first[f"{name}_low"], first[f"{name}_high"]) == (first["accuracy_low"], first["accuracy_high"])
    narrow = score_answers(**arguments, num_resamples=4000, confidence=0.5)
    assert first["accuracy_low"] < narrow["accuracy_low"] < narrow["accuracy_high"] < first["accuracy_high"]


def test_the_interval_of_f1_is_that_of_its_own_spread():
    # F1 of 2/3 and of 1, half each: a standard deviation of 1/6.
    count = 400
    scores = score_answers(predictions=["red", "red star"] * (count // 2), references=["red star"] * count)
    half_width = 1.96 / 6 / math.sqrt(count)
    assert scores["f1_low"] == pytest.approx(5 / 6 - half_width, abs=0.003)
    assert scores["f1_high"] == pytest.approx(5 / 6 + half_width, abs=0.003)
    assert scores["exact_match_high"] - scores["exact_match_low"] > 4 * half_width


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The Red,  STAR! ", "red star"),
        ("an orange moon", "orange moon"),
        ("12.5s", "12.5s"),
        ("end. of", "end of"),
        ("Ärger", "ärger"),
        ("", ""),
        (".", ""),
    ],
)
def test_normalisation_is_what_the_description_says(text, normal):
    assert normalize_answer(text) == normal
    assert exact_match(text, normal)


def test_an_answer_counts_only_if_it_names_one_choice():
    assert name_choice("I think it moves: move left", ["move left", "move right"]) == "move left"
    assert name_choice("red or blue", ["red", "blue"]) is None
    assert name_choice("I do not know", ["no", "yes"]) is None  # "no" within "not" and "know" is no word
    assert name_choice("red star", ["star", "red star"]) == "red star"
    assert name_choice("", ["no", "yes"]) is None
    scores = score_answers(predictions=["red or blue"], references=["red"], choices=[["red", "blue"]])
    assert scores["unparsed"] == 1 and scores["accuracy"] == 0


def test_f1_counts_repeated_words_once_for_each_time_they_are_right():
    assert token_f1("red red red", "red star") == pytest.approx(2 * 1 / 5)
    assert token_f1("", "red") == 0 and token_f1("the", "") == 1


def test_lists_of_different_lengths_are_refused_in_one_line():
    with pytest.raises(ValueError, match=r"^1 kinds were given for 2 predictions; give one for each$"):
        score_answers(predictions=["a", "b"], references=["a", "b"], kinds=["first"])
    with pytest.raises(ValueError, match=r"^1 references were given for 2 predictions; give one for each$"):
        score_answers(["a", "b"], ["a"])
    with pytest.raises(ValueError, match=r"`confidence` is 1\.5"):
        score_answers(["a"], ["a"], confidence=1.5)
