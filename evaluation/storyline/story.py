"""What happens in a video of Storyline: events, scenes and distractors, all determined by one seed.

A story is a sequence of events that do not overlap: one object of some shape, colour and size that does one thing.
Behind it is a scene; one scene fills most of the video. Grey dots and bars drift about and mean nothing.

Splits differ by seeds and by combinations. Numbered, colour + shape + action modulo 5 says to which split a
combination belongs; so every pair (red star, red turning, star turning) occurs in every split, and equally often,
but no triple in two of them. Everything is in proportion to the duration: the same story fits ten seconds and
three hours.

Lengths and places are in fractions of the frame's side, from the left and from the top; times in seconds.
"""

import dataclasses
import functools
import json
import math
from dataclasses import dataclass

from .dice import Dice

SHAPES = ("square", "triangle", "star", "cross", "moon")
COLOURS = ("red", "green", "blue", "yellow", "white", "orange", "purple", "cyan", "pink", "black")
SIZES = ("small", "medium", "large")
ACTIONS = (
    "move left",
    "move right",
    "move up",
    "move down",
    "grow",
    "shrink",
    "blink",
    "turn",
    "appear",
    "leave",
)
SCENES = ("gradient", "stripes", "checker", "dots", "rings", "noise")
SPLITS = ("train", "validation", "test")

RADII = {"small": 0.11, "medium": 0.145, "large": 0.18}
SEEDS_PER_SPLIT = 1_000_000_000
NUM_EVENTS = (4, 8)  # more than 8 would last less than 6 of 100 frames each
MAX_COUNT = 4  # the most that a question "how many red objects" counts
_SPLIT_OF_REMAINDER = ("test", "validation", "train", "train", "train")


@dataclass(frozen=True)
class Event:
    """One object on stage from `start` to `end`. `x`, `y`: its centre at the start; `dx`, `dy`: how far it moves."""

    start: float
    end: float
    shape: str
    colour: str
    size: str
    action: str
    x: float
    y: float
    dx: float
    dy: float
    angle: float  # degrees, at the start

    @property
    def object(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A background from `start` to `end`: two muted RGB colours, a pattern, and how it moves."""

    start: float
    end: float
    kind: str
    colours: tuple[tuple[int, int, int], tuple[int, int, int]]
    direction: float  # degrees
    repeats: float  # of the pattern, over the frame's side
    speed: float  # repeats that pass by in the whole video
    seed: int


@dataclass(frozen=True)
class Distractor:
    """A small grey thing that drifts about; `shape` is "dot" or "bar". It bounces off the frame's sides."""

    shape: str
    grey: int
    radius: float
    x: float
    y: float
    dx: float  # sides of the frame that it drifts in the whole video
    dy: float


@dataclass(frozen=True)
class Story:
    """All that is to know about a video. `counted`: what "how many" may ask about; its number is 0 to 4, uniformly."""

    seed: int
    split: str
    duration: float
    events: tuple[Event, ...]
    scenes: tuple[Scene, ...]
    distractors: tuple[Distractor, ...]
    counted: tuple[tuple[str, str], ...]
    num_events_range: tuple[int, int]
    grain: int  # of the noise on every pixel, in steps of 256

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Story":
        fields = json.loads(text)
        fields["events"] = tuple(Event(**event) for event in fields["events"])
        fields["scenes"] = tuple(
            Scene(**{**scene, "colours": tuple(tuple(colour) for colour in scene["colours"])})
            for scene in fields["scenes"]
        )
        fields["distractors"] = tuple(Distractor(**distractor) for distractor in fields["distractors"])
        fields["counted"] = tuple(tuple(pair) for pair in fields["counted"])
        fields["num_events_range"] = tuple(fields["num_events_range"])
        return cls(**fields)

    def event_at(self, time: float) -> Event | None:
        return next((event for event in self.events if event.start <= time < event.end), None)

    def scene_at(self, time: float) -> Scene:
        return next((scene for scene in self.scenes if scene.start <= time < scene.end), self.scenes[-1])

    def scene_shares(self) -> dict[str, float]:
        """kind of scene -> its part of the video, 0 to 1."""
        shares: dict[str, float] = {}
        for scene in self.scenes:
            shares[scene.kind] = shares.get(scene.kind, 0.0) + (scene.end - scene.start) / self.duration
        return shares


def split_of_combination(colour: str, shape: str, action: str) -> str:
    """The only split in which objects of this colour and shape do this."""
    number = COLOURS.index(colour) + SHAPES.index(shape) + ACTIONS.index(action)
    return _SPLIT_OF_REMAINDER[number % 5]


@functools.cache
def combinations_of(split: str) -> tuple[tuple[str, str, str], ...]:
    """All (colour, shape, action) of a split: 300 in train, 100 in validation, 100 in test."""
    _check_split(split)
    every = ((colour, shape, action) for colour in COLOURS for shape in SHAPES for action in ACTIONS)
    return tuple(combination for combination in every if split_of_combination(*combination) == split)


def story_seed(split: str, index: int) -> int:
    """The seed of the `index`-th story of a split. No seed belongs to two splits."""
    _check_split(split)
    if not 0 <= index < SEEDS_PER_SPLIT:
        raise ValueError(f"story index {index} is out of range; a split has {SEEDS_PER_SPLIT} stories, from 0")
    return SPLITS.index(split) * SEEDS_PER_SPLIT + index


def split_of_seed(seed: int) -> str:
    if not 0 <= seed < len(SPLITS) * SEEDS_PER_SPLIT:
        raise ValueError(f"seed {seed} belongs to no split; use story_seed(split, index)")
    return SPLITS[seed // SEEDS_PER_SPLIT]


def make_story(seed: int, *, duration: float | None = None, num_events: int | tuple[int, int] = NUM_EVENTS) -> Story:
    """The story of a seed.

    Args:
        seed: tells the split, too; see `story_seed`.
        duration: seconds, at least 1; `None`: 10 to 120, drawn so that every doubling is equally likely.
        num_events: how many, or the range from which the number is drawn uniformly (both ends included). At least 4.
    """
    split = split_of_seed(seed)
    fewest, most = (num_events, num_events) if isinstance(num_events, int) else num_events
    if not MAX_COUNT <= fewest <= most:
        raise ValueError(f"num_events={num_events} is not possible: at least {MAX_COUNT}, and the lower number first")
    dice = Dice(seed, 0)
    drawn = 10 * 2 ** dice.uniform(0, math.log2(12))
    seconds = float(round(drawn, 1) if duration is None else duration)
    if not (math.isfinite(seconds) and seconds >= 1):
        raise ValueError(f"duration={duration} is not possible: a story lasts at least 1 second")

    count = fewest + dice.below(most - fewest + 1)
    combinations, counted = _cast(split, count, Dice(seed, 1))
    times = _timetable(count, seconds, Dice(seed, 2))
    stage = Dice(seed, 3)
    return Story(
        seed=seed,
        split=split,
        duration=seconds,
        events=tuple(_event(time, who, stage) for time, who in zip(times, combinations, strict=True)),
        scenes=_scenery(seconds, Dice(seed, 4)),
        distractors=_distractors(Dice(seed, 5)),
        counted=counted,
        num_events_range=(fewest, most),
        grain=8 + dice.below(9),
    )


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f'split "{split}" is not known; choose one of {", ".join(SPLITS)}')


def _cast(split: str, count: int, dice: Dice):
    """-> the (colour, shape, action) of every event, and what can be counted.

    Left to chance, most counts would be 0 or 1, and the question alone would tell the answer. So a few values are
    drawn with their number, 0 to 4. A colour and a shape can be counted in one story, or an action: with all three, a
    split that knows 2 actions of every object would not have the combinations that are needed.
    """
    allowed = combinations_of(split)
    leading = dice.pick(allowed)
    fields = (("colour", 0), ("shape", 1)) if dice.below(2) else (("action", 2),)
    chosen = {}
    for _, field in fields:
        chosen[field] = set(dice.sample(range(count), dice.below(MAX_COUNT + 1)))
    cast = []
    for number in range(count):
        fitting = [
            combination
            for combination in allowed
            if all((combination[field] == leading[field]) == (number in chosen[field]) for field in chosen)
        ]
        cast.append(dice.pick(fitting))
    return cast, tuple((name, leading[field]) for name, field in fields)


def _timetable(count: int, duration: float, dice: Dice) -> list[tuple[float, float]]:
    """Start and end of every event; gaps before, between and after them."""
    gaps = [dice.uniform(0.15, 0.9) for _ in range(count + 1)]
    lengths = [dice.uniform(0.8, 1.4) for _ in range(count)]
    unit = duration / (sum(gaps) + sum(lengths))
    times, now = [], 0.0
    for gap, length in zip(gaps, lengths, strict=False):
        start = now + gap
        now = start + length
        times.append((round(start * unit, 3), round(now * unit, 3)))
    return times


def _event(time: tuple[float, float], who: tuple[str, str, str], dice: Dice) -> Event:
    (start, end), (colour, shape, action) = time, who
    # Drawn for every action alike, so that the place of a still object has the same spread.
    x, y, way = dice.uniform(0.28, 0.72), dice.uniform(0.28, 0.72), dice.uniform(0.4, 0.5)
    dx = {"move left": -way, "move right": way}.get(action, 0.0)
    dy = {"move up": -way, "move down": way}.get(action, 0.0)
    centre = dice.uniform(0.47, 0.53)
    x = centre - dx / 2 if dx else x
    y = centre - dy / 2 if dy else y
    return Event(
        start=start,
        end=end,
        shape=shape,
        colour=colour,
        size=dice.pick(SIZES),
        action=action,
        x=round(x, 4),
        y=round(y, 4),
        dx=round(dx, 4),
        dy=round(dy, 4),
        angle=round(dice.uniform(-12, 12), 2),
    )


def _scenery(duration: float, dice: Dice) -> tuple[Scene, ...]:
    """One scene, or one that leaves 12 to 35 % of the video to another, at the start, in the middle or at the end."""
    main, other = dice.sample(SCENES, 2)
    first, second = _scene_drawer(main, dice), _scene_drawer(other, dice)
    length, place, shift = dice.uniform(0.12, 0.35), dice.below(4), dice.uniform(0.1, 0.5)
    if place == 0:
        return (first(0.0, duration),)
    start = {1: 0.0, 2: shift, 3: 1 - length}[place] * duration
    cuts = [round(start, 3), round(start + length * duration, 3)]
    if place == 1:
        return second(0.0, cuts[1]), first(cuts[1], duration)
    if place == 3:
        return first(0.0, cuts[0]), second(cuts[0], duration)
    return first(0.0, cuts[0]), second(*cuts), first(cuts[1], duration)


def _scene_drawer(kind: str, dice: Dice):
    dark = dice.uniform(65, 85)
    greys = dice.shuffled([dark, dark + dice.uniform(40, 60)])
    # Muted: no channel is so far from grey that a background could be taken for an object.
    first, second = (tuple(int(grey + dice.uniform(-14, 14)) for _ in range(3)) for grey in greys)
    repeats = {"gradient": dice.uniform(0.5, 0.6), "noise": float(6 + dice.below(4))}.get(kind, dice.uniform(3, 5))
    scene = Scene(
        start=0.0,
        end=0.0,
        kind=kind,
        colours=(first, second),  # type: ignore[arg-type]
        direction=round(dice.uniform(0, 360), 2),
        repeats=round(repeats, 3),
        speed=round(dice.uniform(3, 8), 3),
        seed=dice.below(1 << 31),
    )
    return lambda start, end: dataclasses.replace(scene, start=start, end=end)


def _distractors(dice: Dice) -> tuple[Distractor, ...]:
    def one() -> Distractor:
        return Distractor(
            shape=dice.pick(("dot", "bar")),
            grey=dice.pick((35, 45, 165, 180)) + dice.below(10),
            radius=round(dice.uniform(0.02, 0.035), 4),
            x=round(dice.uniform(), 4),
            y=round(dice.uniform(), 4),
            dx=round(dice.uniform(-6, 6), 4),
            dy=round(dice.uniform(-6, 6), 4),
        )

    return tuple(one() for _ in range(dice.below(5)))
