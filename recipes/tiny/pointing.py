"""Which event a question is about: the language model is shown where to look.

Finding in the video what a question names is the hardest thing to learn: until attention finds it by chance, the
answer teaches nothing. So some attention heads of one layer are taught, while training, to look from the end of a
question at the event that holds the answer. Another is taught to count: to share its attention equally among all
events that are counted and the first token of all, so that n events leave 1 / (n + 1) for that one.
"""

import re
from collections import defaultdict
from dataclasses import replace

import numpy as np

from longvlm.evaluation.storyline import ACTIONS, COLOURS, SHAPES, Question, Story
from longvlm.evaluation.storyline.questions import DOES


def named_in(text: str) -> dict[str, str]:
    """Colour, shape and action that a question names."""
    text = text.lower()
    named = {}
    for field, words in (
        ("colour", {colour: (colour,) for colour in COLOURS}),
        ("shape", {shape: (shape, f"{shape}s", f"{shape}es") for shape in SHAPES}),
        ("action", {action: (action, DOES[action]) for action in ACTIONS}),
    ):
        for value, forms in words.items():
            if re.search(rf"\b({'|'.join(forms)})\b", text):
                named[field] = value
    return named


def event_of(question: Question, story: Story) -> int | None:
    """The number of the event where the answer is to be read, or `None` where there is no such event.

    "before" is read at the event that is named, which knows what came before it; "after" at the one that follows; "how
    many in all" at the last, which knows its own number.
    """
    named, last = named_in(question.question), len(story.events) - 1
    if question.kind == "first":
        return 0
    if question.kind == "last" or (question.kind == "how many" and not named):
        return last
    if question.kind in ("how many", "scene") or question.answer == "no":
        return None
    return _matching(named, story)[0] + (question.kind == "after")


def counted_in(question: Question, story: Story) -> list[int] | None:
    """The numbers of the events that are counted, or `None` where nothing is."""
    return _matching(named_in(question.question), story) if question.kind == "how many" else None


def counting_more(story: Story) -> Story:
    """The story, of which "how many" asks for other colours, shapes and actions than it does in the benchmark.

    There a story has one value, or two, that may be counted, and a model that has seen the story a few times knows the
    number by heart. All values are taken that occur twice or more, and of those that occur once or never as many each.
    """
    by_number: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    for field, values in (("colour", COLOURS), ("shape", SHAPES), ("action", ACTIONS)):
        for value in values:
            by_number[sum(getattr(event, field) == value for event in story.events)].append((field, value))
    counted = [pair for number in by_number if number > 1 for pair in by_number[number]]
    few, dice = max(2, len(counted)), np.random.default_rng(story.seed)
    for number in (0, 1):
        counted += [by_number[number][i] for i in dice.permutation(len(by_number[number]))[:few]]
    return replace(story, counted=tuple(counted), num_events_range=(0, 0))


def _matching(named: dict[str, str], story: Story) -> list[int]:
    return [i for i, event in enumerate(story.events) if all(getattr(event, field) == named[field] for field in named)]
