"""Lessons of the language model: a story's features, several questions about it, and the truth of its segments.

The video is most of what a question costs, so questions are packed behind one video. But they must not see each other:
they name what exists and who follows whom, and a model reads that instead of the video. A block mask lets each see the
video and itself alone, and each begins at the position after the video: what is computed is what would be for every
question by itself.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import IterableDataset

from longvlm.evaluation.storyline import KINDS, Question, Story, make_questions
from recipes.tiny.pieces import cut_story, windows_of
from recipes.tiny.pointing import counted_in, counting_more, event_of, named_in
from recipes.tiny.segment_truth import FIELDS, MOST, NAMED, segment_events, segment_motion, segment_truth
from recipes.tiny.story_features import story_of

TOKENS_A_STEP = 2000  # of video, in all stories of a step
MOST_STORIES = 12
IGNORED = -100
NOT_COUNTED = [-1] * MOST
Group = int | str
Plan = Sequence[tuple[int, Mapping[Group, float]]]


class Asked(NamedTuple):
    """A question. `ids`: prompt and answer after the video. `event`: where the answer is, -1: nowhere. `named`: what
    is there where the answer is, as far as the question names it; numbers in the order of `segment_truth.NAMED`.
    `counted`: 1 for each event that "how many" counts, else 0; all -1 for other kinds."""

    kind: str
    ids: list[int]
    prompt_length: int
    event: int
    named: list[int]
    counted: list[int]


@dataclass
class Lesson:
    """One story, encoded. `truth`, `motion`, `events` of each segment: see `segment_truth`."""

    local: Tensor  # (L, d)
    global_: Tensor  # (E, d)
    truth: Tensor  # (segments, heads)
    motion: Tensor  # (segments, numbers)
    events: Tensor  # (segments,)
    questions: list[Asked]


class PromptMaker:
    """Token ids exactly as the processor makes them, cut behind the video."""

    def __init__(self, processor):
        self.processor, self.tokenizer = processor, processor.tokenizer
        before, _ = self._render("").split(processor.video_token)
        self.before = self.tokenizer(before, add_special_tokens=False)["input_ids"]

    def _render(self, question: str) -> str:
        content = [{"type": "video"}, {"type": "text", "text": question}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )

    def prefix(self, num_tokens: int) -> list[int]:
        p = self.processor
        return [*self.before, p.video_start_token_id, *[p.video_token_id] * num_tokens, p.video_end_token_id]

    def questions(self, questions: Sequence[Question], story: Story) -> list[Asked]:
        if not questions:
            return []
        prompts = [self._render(question.question).split(self.processor.video_token)[1] for question in questions]
        answers = [f" {question.answer}{self.tokenizer.eos_token}" for question in questions]
        prompt_ids, answer_ids = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompts, answers))
        asked = []
        for question, prompt, answer in zip(questions, prompt_ids, answer_ids, strict=True):
            event = event_of(question, story)
            words = named_in(question.question)
            named = [values.index(words[name]) if name in words else len(values) for name, values in FIELDS]
            nothing = [len(values) for _, values in FIELDS]
            named = [*nothing, *named] if question.kind == "after" else [*named, *nothing]
            numbers = counted_in(question, story)
            counted = NOT_COUNTED if numbers is None else [int(i in numbers) for i in range(MOST)]
            where = -1 if event is None else event
            asked.append(Asked(question.kind, prompt + answer, len(prompt), where, named, counted))
        return asked


def make_lesson(story: Story, local: Tensor, global_: Tensor, prompts: PromptMaker, *, num_frames: int,
                frames_per_segment: int, per_kind: int, kinds: Sequence[str] = KINDS,
                more_counts: int = 0) -> Lesson:  # fmt: skip
    """The lesson of a story of `num_frames` frames. `local` `(L, d)`, `global_` `(E, d)`: its features. `more_counts`:
    questions of kind "how many" about what the benchmark does not count."""
    asked = make_questions(story, kinds=kinds, per_kind=per_kind)
    if more_counts:
        asked += make_questions(counting_more(story), kinds=["how many"], per_kind=more_counts)
    return Lesson(
        local.half(),
        global_.half(),
        segment_truth(story, num_frames, frames_per_segment),
        segment_motion(story, num_frames, frames_per_segment),
        segment_events(story, num_frames, frames_per_segment),
        prompts.questions(asked, story),
    )


def make_windows(story: Story, local: Tensor, global_: Tensor, prompts: PromptMaker, *, num_frames: int,
                 frames_per_segment: int, per_kind: int, most_events: int,
                 more_counts: int = 0) -> list[Lesson]:  # fmt: skip
    """The story cut into pieces of 1 to `most_events` events, from gap to gap, as lessons of their own.

    Segments do not know of each other, so their features are those of the whole story; but the global tokens are the
    whole video's, and the scene is not asked for.
    """
    segments = num_frames // frames_per_segment
    tokens = len(local) // segments
    lessons = [
        make_lesson(
            cut_story(story, start / segments * story.duration, end / segments * story.duration),
            local[start * tokens : end * tokens],
            global_,
            prompts,
            num_frames=(end - start) * frames_per_segment,
            frames_per_segment=frames_per_segment,
            per_kind=per_kind,
            kinds=[kind for kind in KINDS if kind != "scene"],
            more_counts=more_counts,
        )
        for start, end in windows_of(story, segments, most_events, story.seed)
    ]
    return [lesson for lesson in lessons if lesson.questions]


class Lessons(IterableDataset):
    """Endless batches of lessons of one group.

    Args:
        lessons: group (a length in frames, or windows) -> its lessons.
        plan: (steps, group -> how often it comes), one after the other; the last goes on for ever.
        first_step: where in the plan to begin, after an interruption.
        num_questions: about each story.
        weights: kind of question -> how often it is asked for, in proportion.
        tokens_a_step: tokens of video in a step, which says how many stories it takes; or `stories_a_step`.
        spread: the part of the batches whose segments lie further from each other, as far as a video of
            `max_position` tokens reaches: so that positions of long videos are known before the videos are.
    """

    def __init__(self, lessons: Mapping[Group, Sequence[Lesson]], plan: Plan, prompts: PromptMaker, *,
                 first_step: int = 0, num_questions: int = 14, weights: Mapping[str, float] | None = None,
                 spread: float = 0.0, max_position: int = 1600, tokens_a_step: int = TOKENS_A_STEP,
                 stories_a_step: int | None = None, seed: int = 0):  # fmt: skip
        self.lessons, self.plan, self.prompts, self.first_step = lessons, plan, prompts, first_step
        self.num_questions, self.weights = num_questions, weights or {}
        self.spread, self.max_position, self.seed = spread, max_position, seed
        self.tokens_a_step, self.stories_a_step = tokens_a_step, stories_a_step

    def __iter__(self) -> Iterator[list]:
        dice = np.random.default_rng([self.seed, self.first_step])
        orders: defaultdict[Group, list[int]] = defaultdict(list)
        sizes = {group: np.mean([len(one.local) for one in there]) for group, there in self.lessons.items()}
        step = self.first_step
        while True:
            shares = self._shares(step)
            chances = np.array(list(shares.values()), float)
            group = list(shares)[dice.choice(len(chances), p=chances / chances.sum())]
            there = self.lessons[group]
            count = self.stories_a_step or int(np.clip(round(self.tokens_a_step / sizes[group]), 1, MOST_STORIES))
            while len(orders[group]) < count:
                orders[group] += dice.permutation(len(there)).tolist()
            batch = [there[orders[group].pop()] for _ in range(count)]
            picked = [self._pick(lesson, dice) for lesson in batch]
            room = self.max_position if dice.random() < self.spread else 0
            yield [pack(batch, picked, self.prompts, [self._gaps(lesson, room, dice) for lesson in batch])]
            step += 1

    def _shares(self, step: int) -> Mapping[Group, float]:
        for steps, shares in self.plan:
            if step < steps:
                return shares
            step -= steps
        return self.plan[-1][1]

    def _pick(self, lesson: Lesson, dice) -> list[Asked]:
        chances = np.array([self.weights.get(asked.kind, 1.0) for asked in lesson.questions])
        count = min(self.num_questions, int((chances > 0).sum()))
        return [
            lesson.questions[i] for i in dice.choice(len(chances), count, replace=False, p=chances / chances.sum())
        ]

    @staticmethod
    def _gaps(lesson: Lesson, room: int, dice) -> np.ndarray:
        """Positions left out before each segment and after the last, int: about as many each time, so that the
        middle of the video stays its middle."""
        segments = len(lesson.truth)
        free = room - len(lesson.local)
        if free <= 0:
            return np.zeros(segments + 1, int)
        ends = np.arange(segments + 2) / (segments + 1) * int(free * dice.random())
        return np.diff(ends.round().astype(int))


def pack(lessons: Sequence[Lesson], questions: Sequence[list], prompts: PromptMaker, gaps=None) -> dict[str, Tensor]:
    """Lessons as a batch.

    Returns:
        `input_ids`, `position_ids`, `blocks`, `labels`, `kinds`, all `(batch, length)` int64. `blocks`: 0 the video,
        then 1, 2, ... the questions, -1 padding. `kinds`: of the label, -1 elsewhere.
        `pointers`: at the end of a prompt the event that it is about, -1 elsewhere; `named` and `counted` `(batch,
        length, ...)` there: see `Asked`. `local` `(batch, L, d)`, padded, and `lengths` `(batch,)`; `global_` `(batch,
        E, d)`; `segment_ends` `(batch, segments)`: places of the segments' last tokens; `events` `(batch, segments)`,
        -2 in padding; `truth` `(batch, segments, heads)`, -100 in padding; `motion` `(batch, segments, numbers)`, NaN
        in padding.
    """
    fill: dict = {"input_ids": 0, "position_ids": 0, "blocks": -1, "labels": IGNORED, "kinds": -1, "pointers": -1}
    no_name = [IGNORED] * len(NAMED)
    fill |= {"named": no_name, "counted": NOT_COUNTED}
    rows: dict[str, list[list]] = {name: [] for name in fill}
    ends = []
    for number, (lesson, asked) in enumerate(zip(lessons, questions, strict=True)):
        prefix = prompts.prefix(len(lesson.global_) + len(lesson.local))
        segments, first_local = len(lesson.truth), len(prefix) - 1 - len(lesson.local)
        # The last segment may be short: the others have all the same number of tokens.
        per_segment = -(-len(lesson.local) // max(segments, 1))
        starts = np.minimum(np.arange(segments + 1) * per_segment + first_local, len(prefix) - 1)
        ends.append(torch.from_numpy(starts[1:] - 1))
        positions = np.arange(len(prefix))
        if gaps is not None:
            for start, gap in zip(starts, gaps[number], strict=True):
                positions[start:] += gap
        row: dict[str, list] = {
            "input_ids": list(prefix),
            "position_ids": positions.tolist(),
            "blocks": [0] * len(prefix),
            "labels": [IGNORED] * len(prefix),
            "kinds": [-1] * len(prefix),
            "pointers": [-1] * len(prefix),
            "named": [no_name] * len(prefix),
            "counted": [NOT_COUNTED] * len(prefix),
        }
        begin = int(positions[-1]) + 1
        for block, (kind, ids, prompt_length, event, named, counted) in enumerate(asked, start=1):
            answer = len(ids) - prompt_length
            row["input_ids"] += ids
            row["position_ids"] += range(begin, begin + len(ids))
            row["blocks"] += [block] * len(ids)
            row["labels"] += [IGNORED] * prompt_length + ids[prompt_length:]
            row["kinds"] += [-1] * prompt_length + [KINDS.index(kind)] * answer
            row["pointers"] += [-1] * (prompt_length - 1) + [event] + [-1] * answer
            row["named"] += [no_name] * (prompt_length - 1) + [named] + [no_name] * answer
            row["counted"] += [NOT_COUNTED] * (prompt_length - 1) + [counted] + [NOT_COUNTED] * answer
        for name, values in row.items():
            rows[name].append(values)
    length = max(map(len, rows["input_ids"]))
    batch = {
        name: torch.tensor([row + [fill[name]] * (length - len(row)) for row in values])
        for name, values in rows.items()
    }
    return {
        **batch,
        "local": pad_sequence([one.local for one in lessons], batch_first=True),
        "lengths": torch.tensor([len(one.local) for one in lessons]),
        "global_": torch.stack([one.global_ for one in lessons]),
        "segment_ends": pad_sequence(ends, batch_first=True),
        "events": pad_sequence([one.events for one in lessons], batch_first=True, padding_value=-2),
        "motion": pad_sequence([one.motion for one in lessons], batch_first=True, padding_value=float("nan")),
        "truth": pad_sequence([one.truth for one in lessons], batch_first=True, padding_value=IGNORED),
    }


def unwrap(items: list) -> dict[str, Tensor]:
    """`DataLoader`'s collate function: the batch was packed by the dataset."""
    ((batch,),) = items
    return batch


def block_mask(blocks: Tensor) -> Tensor:
    """`(batch, length)` -> `(batch, 1, length, length)` bool: True where a token may look."""
    length = blocks.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=blocks.device).tril()
    to_video = (blocks == 0)[:, None, :]
    to_itself = blocks[:, None, :] == blocks[:, :, None]
    return ((to_video | to_itself) & causal)[:, None]


def load_lessons(reader, processor, *, split: str, frames_per_segment: int, per_kind: int,
                 windows: Sequence[int] = (), more_counts: int = 0) -> dict[Group, list[Lesson]]:  # fmt: skip
    """
    Lessons of all stories whose features are there.

    Args:
        reader: name of the video (`story_features.video_name`) -> its features.
        more_counts: see `make_lesson`.
        windows: also cut them into pieces of at most so many events; the group is then called "up to 2 events".

    Returns:
        Number of frames, or name of the windows -> lessons.
    """
    prompts = PromptMaker(processor)
    lessons: defaultdict[Group, list[Lesson]] = defaultdict(list)
    for name in reader:
        if not name.startswith(f"{split}/"):
            continue
        (story, num_frames), features = story_of(name), reader[name]
        local, global_ = features.local_features, features.global_features
        options: dict = {"num_frames": num_frames, "frames_per_segment": frames_per_segment}
        lessons[num_frames].append(
            make_lesson(story, local, global_, prompts, **options, per_kind=per_kind, more_counts=more_counts)
        )
        for most in windows:
            lessons[window_group(most)] += make_windows(
                story,
                local,
                global_,
                prompts,
                **options,
                per_kind=max(1, per_kind // 2),
                most_events=most,
                more_counts=more_counts // 2,
            )
    return dict(lessons)


def window_group(most_events: int) -> str:
    return f"up to {most_events} events"
