"""How far one gets without the video: guessers that read only the question, learned on one split, scored on another.

`python -m longvlm.evaluation.storyline.blind` prints the table of docs/storyline.md. A model's score on a kind of
question means something where it is well above these, and above the same model's with the video left out or swapped.
"""

import argparse
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import numpy as np

from .questions import KINDS, Question, chance_levels, make_questions
from .story import make_story, story_seed


class _Lookup:
    """Answers what was most often right for the same key; an unknown key falls back on the template."""

    def __init__(self, questions: Iterable[Question], key: Callable[[Question], object]):
        self.key = key
        answers: defaultdict[object, Counter[str]] = defaultdict(Counter)
        for question in questions:
            for name in ((question.template, None), (question.template, key(question))):
                answers[name][question.answer] += 1
        self.best = {name: max(sorted(count), key=count.__getitem__) for name, count in answers.items()}

    def __call__(self, question: Question) -> str:
        known = self.best.get((question.template, self.key(question)))
        return known or self.best.get((question.template, None)) or question.choices[0]


def constant_guesser(questions: Iterable[Question]) -> Callable[[Question], str]:
    """Always the most frequent answer of the question's template."""
    return _Lookup(questions, lambda question: None)


def lookup_guesser(questions: Iterable[Question]) -> Callable[[Question], str]:
    """The most frequent answer to a question of the same words."""
    return _Lookup(questions, lambda question: frozenset(words_of(question)))


def naive_bayes_guesser(questions: Iterable[Question]) -> Callable[[Question], str]:
    """The likeliest answer among the choices, by how often each word went with it in questions of the template."""
    answers: Counter[tuple[str, str]] = Counter()
    pairs: Counter[tuple[str, str, str]] = Counter()
    for question in questions:
        answers[question.template, question.answer] += 1
        pairs.update((question.template, question.answer, word) for word in set(words_of(question)))

    def guess(question: Question) -> str:
        def score(choice: str) -> float:
            times = answers[question.template, choice]
            found = [pairs[question.template, choice, word] for word in sorted(set(words_of(question)))]
            return float(np.log(times + 1) + np.log((np.array(found) + 1) / (times + 2)).sum())

        return max(question.choices, key=score)

    return guess


GUESSERS = {"constant": constant_guesser, "lookup": lookup_guesser, "naive Bayes": naive_bayes_guesser}


def words_of(question: Question) -> list[str]:
    return re.findall(r"[a-z]+", question.question.lower())


def questions_of(split: str, num_stories: int, *, per_kind: int = 1) -> list[Question]:
    """The questions about the first stories of a split."""
    stories = (make_story(story_seed(split, index)) for index in range(num_stories))
    return [question for story in stories for question in make_questions(story, per_kind=per_kind)]


def accuracy_by_kind(guess: Callable[[Question], str], questions: Iterable[Question]) -> dict[str, float]:
    """kind -> part of the questions that `guess` answers rightly; `"all"`: over all."""
    right: defaultdict[str, list[bool]] = defaultdict(list)
    for question in questions:
        for key in (question.kind, "all"):
            right[key].append(guess(question) == question.answer)
    return {kind: sum(hits) / len(hits) for kind, hits in right.items()}


def chance_table(num_train: int = 2000, num_test: int = 1000) -> str:
    """Markdown: chance and every guesser's accuracy, by kind; learned on train, scored on test, in percent."""
    train, test = questions_of("train", num_train), questions_of("test", num_test)
    columns = {"chance": chance_levels(test)}
    columns |= {name: accuracy_by_kind(make(train), test) for name, make in GUESSERS.items()}
    times = Counter(question.kind for question in test)
    lines = [f"| kind | questions | {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) + 1)}"]
    for kind in (*KINDS, "all"):
        values = " | ".join(f"{100 * column[kind]:.1f}" for column in columns.values())
        lines.append(f"| {kind} | {times[kind] or len(test)} | {values} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What can be guessed of Storyline without seeing a video.")
    parser.add_argument("--train", type=int, default=2000, help="stories to learn from")
    parser.add_argument("--test", type=int, default=1000, help="stories to score on")
    options = parser.parse_args()
    print(chance_table(options.train, options.test))


if __name__ == "__main__":
    main()
