"""Questions about a story, with exact short answers from closed sets, that cannot be guessed from their words.

What keeps an answer from being guessed:
- a question that asks for one of colour, shape and action names only one other (two would tell in which combinations
  the third is allowed); only questions about order and time, which the combination says nothing about, name more;
- an event is named only by what no other event of the story has, so the answer is unique;
- yes and no are equally likely, and a "no" is near the truth: everything but one word of it happened;
- only what was drawn with a uniform number can be counted (see `Story.counted`).
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .dice import Dice
from .story import ACTIONS, COLOURS, MAX_COUNT, SCENES, SHAPES, Event, Story, combinations_of

KINDS = (
    "first",
    "last",
    "before",
    "after",
    "how many",
    "did it happen",
    "what colour",
    "which action",
    "when",
    "scene",
)
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
QUARTERS = ("first", "second", "third", "fourth")
OBJECTS = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)
DOES = {action: action.replace("move", "moves") if " " in action else f"{action}s" for action in ACTIONS}
_ASPECTS = {"object": OBJECTS, "colour": COLOURS, "shape": SHAPES, "action": ACTIONS}
_DISTANCE_TO_QUARTER = 0.01  # of the video: so far an event asked for by "when" keeps from the other quarters


@dataclass(frozen=True)
class Question:
    """`template` names the wording and what is asked (`"first/colour/2"`); `choices` are all answers it could have."""

    question: str
    answer: str
    kind: str
    template: str
    choices: tuple[str, ...]

    @property
    def chance(self) -> float:
        """How often a guess is right that picks one of the choices blindly."""
        return 1 / len(self.choices)


def make_questions(story: Story, *, kinds: Sequence[str] = KINDS, per_kind: int = 1) -> list[Question]:
    """Questions about a story, the same each time: at most `per_kind` of each kind, none twice.

    A kind is left out where the story allows no unambiguous question of it.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f'kind of question "{unknown[0]}" is not known; choose from {", ".join(KINDS)}')
    questions: list[Question] = []
    for kind in kinds:
        dice = Dice(story.seed, 100 + KINDS.index(kind))
        found: dict[str, Question] = {}
        for _ in range(4 * per_kind):
            if len(found) < per_kind and (question := _MAKERS[kind](story, dice)) is not None:
                found.setdefault(question.question, question)
        questions += found.values()
    return questions


def chance_levels(questions: Iterable[Question]) -> dict[str, float]:
    """kind -> the accuracy of blind picks among the choices; `"all"`: over all questions."""
    chances: dict[str, list[float]] = {}
    for question in questions:
        for key in (question.kind, "all"):
            chances.setdefault(key, []).append(question.chance)
    return {kind: sum(values) / len(values) for kind, values in sorted(chances.items())}


# --- one function for each kind: (story, dice) -> a question, or None where there is none ---

_END_WORDINGS = {
    "object": ("Which object is seen {end}?", "What is the {end} object?", "Name the object that is seen {end}."),
    "colour": ("What colour is the {end} object?", "Which colour does the object seen {end} have?"),
    "shape": ("What shape is the {end} object?", "Which shape does the object seen {end} have?"),
    "action": ("What does the {end} object do?", "Which action is seen {end}?"),
}
_NEXT_WORDINGS = {
    "object": ("Which object is seen right {side} the {object}?", "What is the next object {side} the {object}?"),
    "colour": ("What colour is the object right {side} the {object}?",),
    "shape": ("What shape is the object right {side} the {object}?",),
    "action": (
        "What does the object right {side} the {object} do?",
        "Which action is seen right {side} the {object}?",
    ),
}
_NAMES: dict[str, Callable[[Event], str]] = {
    "object": lambda event: f"the {event.object}",
    "colour": lambda event: f"the {event.colour} object",
    "shape": lambda event: f"the {event.shape}",
    "action": lambda event: f"the object that {DOES[event.action]}",
}


def _ask(dice: Dice, kind: str, aspect: str, wordings: Sequence[str], answer: str, choices, **words) -> Question:
    number = dice.below(len(wordings))
    return Question(wordings[number].format(**words), answer, kind, f"{kind}/{aspect}/{number}", tuple(choices))


def _end(kind: str):
    def make(story: Story, dice: Dice) -> Question:
        event = story.events[0 if kind == "first" else -1]
        aspect = dice.pick(tuple(_ASPECTS))
        return _ask(dice, kind, aspect, _END_WORDINGS[aspect], getattr(event, aspect), _ASPECTS[aspect], end=kind)

    return make


def _next(kind: str):
    step = -1 if kind == "before" else 1

    def make(story: Story, dice: Dice) -> Question | None:
        last = len(story.events) - 1
        known = [i for i in _unique(story, "object") if 0 <= i + step <= last]
        if not known:
            return None
        i = dice.pick(known)
        aspect = dice.pick(tuple(_ASPECTS))
        answer = getattr(story.events[i + step], aspect)
        words = {"side": kind, "object": story.events[i].object}
        return _ask(dice, kind, aspect, _NEXT_WORDINGS[aspect], answer, _ASPECTS[aspect], **words)

    return make


def _how_many(story: Story, dice: Dice) -> Question:
    fewest, most = story.num_events_range
    askable: list[tuple[str, str]] = list(story.counted)
    if fewest < most < len(NUMBERS):
        askable.append(("all", ""))
    aspect, value = dice.pick(askable)
    if aspect == "all":
        wordings = ("How many objects are seen in all?", "How many objects does the video show?")
        return _ask(dice, "how many", aspect, wordings, NUMBERS[len(story.events)], NUMBERS[fewest : most + 1])
    count = sum(getattr(event, aspect) == value for event in story.events)
    what = {"colour": f"{value} objects", "shape": f"{value}s".replace("crosss", "crosses")}.get(aspect)
    if what:
        wordings = ("How many {what} are seen?", "How many {what} does the video show?")
        return _ask(dice, "how many", aspect, wordings, NUMBERS[count], NUMBERS[: MAX_COUNT + 1], what=what)
    wordings = ("How many objects {action}?", "How many of the objects {action}?")
    return _ask(dice, "how many", aspect, wordings, NUMBERS[count], NUMBERS[: MAX_COUNT + 1], action=value)


def _did_it_happen(story: Story, dice: Dice) -> Question | None:
    answer = ("no", "yes")[dice.below(2)]
    aspect = dice.pick(("object", "event"))
    happened = {(event.colour, event.shape, event.action) for event in story.events}
    if aspect == "object":
        there = {combination[:2] for combination in happened}
        # The colour is seen, and the shape is, but not together.
        near = [
            (colour, shape, "")
            for colour in sorted({colour for colour, _ in there})
            for shape in sorted({shape for _, shape in there})
            if (colour, shape) not in there
        ]
        wordings = ("Is a {0} {1} seen?", "Is there a {0} {1} in the video?", "Does the video show a {0} {1}?")
    else:
        # Of combinations that the split does not have, the answer would always be no.
        pairs = {pair for combination in happened for pair in _pairs(combination)}
        near = [
            combination
            for combination in combinations_of(story.split)
            if combination not in happened and not pairs.isdisjoint(_pairs(combination))
        ]
        wordings = ("Does a {0} {1} {2}?", "Is there a {0} {1} that {3}?", "Does the video show that a {0} {1} {3}?")
    pool = sorted(happened) if answer == "yes" else near
    if not pool:
        return None
    colour, shape, action = dice.pick(pool)
    number = dice.below(len(wordings))
    text = wordings[number].format(colour, shape, action, DOES.get(action)).replace("a orange", "an orange")
    return Question(text, answer, "did it happen", f"did it happen/{aspect}/{number}", ("no", "yes"))


@functools.cache
def _pairs(combination: tuple[str, str, str]) -> frozenset[tuple[str | None, ...]]:
    """The combination without its colour, without its shape, and without its action."""
    return frozenset((*combination[:i], None, *combination[i + 1 :]) for i in range(3))


def _what_colour(story: Story, dice: Dice) -> Question | None:
    known = _unique_names(story, ("shape", "action"))
    if not known:
        return None
    aspect, i = dice.pick(known)
    wordings = ("What colour is {name}?", "Which colour does {name} have?", "What is the colour of {name}?")
    event = story.events[i]
    return _ask(dice, "what colour", aspect, wordings, event.colour, COLOURS, name=_NAMES[aspect](event))


def _which_action(story: Story, dice: Dice) -> Question | None:
    known = _unique_names(story, ("shape", "colour"))
    if not known:
        return None
    aspect, i = dice.pick(known)
    wordings = ("What does {name} do?", "Which action does {name} perform?", "What is {name} doing?")
    event = story.events[i]
    return _ask(dice, "which action", aspect, wordings, event.action, ACTIONS, name=_NAMES[aspect](event))


def _when(story: Story, dice: Dice) -> Question | None:
    names = _unique_names(story, ("object", "colour", "shape", "action"))
    within = [[(aspect, i) for aspect, i in names if _lies_in_quarter(story, i, quarter)] for quarter in range(4)]
    # More events lie within an outer quarter than an inner one. Where both of a half can be asked for, neither is
    # likelier; and the halves mirror each other.
    half = dice.below(2)
    quarter = 2 * half + dice.below(2)
    if not (within[2 * half] and within[2 * half + 1]):
        return None
    aspect, i = dice.pick(within[quarter])
    wordings = ("In which quarter of the video is {name} seen?", "Which quarter of the video shows {name}?")
    return _ask(dice, "when", aspect, wordings, QUARTERS[quarter], QUARTERS, name=_NAMES[aspect](story.events[i]))


def _lies_in_quarter(story: Story, i: int, quarter: int) -> bool:
    start, end = (time / story.duration for time in (story.events[i].start, story.events[i].end))
    from_left = start - quarter / 4 if quarter > 0 else 1
    from_right = (quarter + 1) / 4 - end if quarter < 3 else 1
    return start >= quarter / 4 and end <= (quarter + 1) / 4 and min(from_left, from_right) >= _DISTANCE_TO_QUARTER


def _scene(story: Story, dice: Dice) -> Question:
    shares = story.scene_shares()
    wordings = (
        "What is the scene for most of the video?",
        "Which background does most of the video have?",
        "What is behind the objects most of the time?",
    )
    return _ask(dice, "scene", "scene", wordings, max(shares, key=shares.__getitem__), SCENES)


def _unique(story: Story, aspect: str) -> list[int]:
    """The events that no other event shares this aspect with."""
    times = Counter(getattr(event, aspect) for event in story.events)
    return [i for i, event in enumerate(story.events) if times[getattr(event, aspect)] == 1]


def _unique_names(story: Story, aspects: Sequence[str]) -> list[tuple[str, int]]:
    return [(aspect, i) for aspect in aspects for i in _unique(story, aspect)]


_MAKERS: dict[str, Callable[[Story, Dice], Question | None]] = {
    "first": _end("first"),
    "last": _end("last"),
    "before": _next("before"),
    "after": _next("after"),
    "how many": _how_many,
    "did it happen": _did_it_happen,
    "what colour": _what_colour,
    "which action": _which_action,
    "when": _when,
    "scene": _scene,
}
