"""Lessons of the language model: a story's features, several questions about it, and the truth of its segments.

The video is most of what a question costs, so questions are packed behind one video. But they must not see each other:
they name what exists and who follows whom, and a model reads that instead of the video. A block mask lets each see the
video and itself alone, and each begins at the position after the video: what is computed is what would be for every
question by itself.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from longvlm.evaluation.storyline import KINDS, Question, Story, make_questions, make_story, story_seed
from longvlm.training.tiny.segment_truth import segment_truth

TOKENS_A_STEP = 2000  # of video, in all stories of a step
IGNORED = -100


@dataclass
class Lesson:
    """One story, encoded. `questions`: (kind, ids of prompt and answer after the video, length of the prompt)."""

    local: Tensor  # (L, d)
    global_: Tensor  # (E, d)
    truth: Tensor  # (segments, heads)
    questions: list[tuple[str, list[int], int]]


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

    def questions(self, questions: Sequence[Question]) -> list[tuple[str, list[int], int]]:
        if not questions:
            return []
        prompts = [self._render(question.question).split(self.processor.video_token)[1] for question in questions]
        answers = [f" {question.answer}{self.tokenizer.eos_token}" for question in questions]
        prompt_ids, answer_ids = (self.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompts, answers))
        return [(q.kind, p + a, len(p)) for q, p, a in zip(questions, prompt_ids, answer_ids, strict=True)]


def make_lesson(story: Story, features, prompts: PromptMaker, *, num_frames: int, frames_per_segment: int,
                per_kind: int, kinds: Sequence[str] = KINDS) -> Lesson:  # fmt: skip
    return Lesson(
        features.local_features.half(),
        features.global_features.half(),
        segment_truth(story, num_frames, frames_per_segment),
        prompts.questions(make_questions(story, kinds=kinds, per_kind=per_kind)),
    )


class Lessons(IterableDataset):
    """Endless batches; stories of one length together, fewer of the long ones.

    Args:
        lessons: length in frames -> lessons; `shares`: how often each length comes.
        weights: kind of question -> how often it is asked for, in proportion.
        tokens_a_step: tokens of video in a step, which says how many stories it takes; or `stories_a_step`.
        spread: the part of the batches whose segments lie at random positions, up to `max_position`: so that positions
            of long videos are known before the videos are.
    """

    def __init__(self, lessons: Mapping[int, Sequence[Lesson]], shares: Mapping[int, float], prompts: PromptMaker, *,
                 num_questions: int = 14, weights: Mapping[str, float] | None = None, spread: float = 0.0,
                 max_position: int = 1100, tokens_a_step: int = TOKENS_A_STEP, stories_a_step: int | None = None,
                 seed: int = 0):  # fmt: skip
        self.lessons, self.shares, self.prompts = lessons, shares, prompts
        self.num_questions, self.weights = num_questions, weights or {}
        self.spread, self.max_position, self.seed = spread, max_position, seed
        self.tokens_a_step, self.stories_a_step = tokens_a_step, stories_a_step

    def __iter__(self) -> Iterator[list]:
        dice = np.random.default_rng(self.seed)
        lengths = sorted(self.lessons)
        chances = np.array([self.shares[length] for length in lengths], float)
        orders: defaultdict[int, list[int]] = defaultdict(list)
        while True:
            length = int(dice.choice(lengths, p=chances / chances.sum()))
            there = self.lessons[length]
            count = self.stories_a_step or max(1, round(self.tokens_a_step / len(there[0].local)))
            while len(orders[length]) < count:
                orders[length] += dice.permutation(len(there)).tolist()
            batch = [there[orders[length].pop()] for _ in range(count)]
            picked = [self._pick(lesson, dice) for lesson in batch]
            room = self.max_position if dice.random() < self.spread else 0
            yield [pack(batch, picked, self.prompts, [self._gaps(lesson, room, dice) for lesson in batch])]

    def _pick(self, lesson: Lesson, dice) -> list[tuple[str, list[int], int]]:
        chances = np.array([self.weights.get(kind, 1.0) for kind, _, _ in lesson.questions])
        count = min(self.num_questions, int((chances > 0).sum()))
        return [
            lesson.questions[i] for i in dice.choice(len(chances), count, replace=False, p=chances / chances.sum())
        ]

    @staticmethod
    def _gaps(lesson: Lesson, room: int, dice) -> np.ndarray:
        """Positions left out before each segment and after the last, int."""
        segments = len(lesson.truth)
        free = room - len(lesson.local)
        if free <= 0:
            return np.zeros(segments + 1, int)
        free = int(free * dice.random())
        cuts = np.sort(dice.integers(0, free + 1, segments))
        return np.diff(np.concatenate([[0], cuts, [free]]))


def pack(lessons: Sequence[Lesson], questions: Sequence[list], prompts: PromptMaker, gaps=None) -> dict[str, Tensor]:
    """Lessons of one length as a batch.

    Returns:
        `input_ids`, `position_ids`, `blocks`, `labels`, `kinds`, all `(batch, length)` int64. `blocks`: 0 the video,
        then 1, 2, ... the questions, -1 padding. `kinds`: of the label, -1 elsewhere. `local` `(batch, L, d)`,
        `global_` `(batch, E, d)`; `segment_ends` `(batch, segments)`: places of the segments' last tokens; `truth`.
    """
    local, global_ = (torch.stack([getattr(one, name) for one in lessons]) for name in ("local", "global_"))
    prefix = prompts.prefix(global_.shape[1] + local.shape[1])
    segments = lessons[0].truth.shape[0]
    # The last segment may be short: the others have all the same number of tokens.
    per_segment = -(-local.shape[1] // max(segments, 1))
    first_local = len(prefix) - 1 - local.shape[1]
    ends = torch.arange(1, segments + 1).mul(per_segment).clamp(max=local.shape[1]) - 1 + first_local
    fill = {"input_ids": 0, "position_ids": 0, "blocks": -1, "labels": IGNORED, "kinds": -1}
    rows: dict[str, list[list[int]]] = {name: [] for name in fill}
    for number, asked in enumerate(questions):
        positions = np.arange(len(prefix))
        if gaps is not None:
            starts = np.minimum(np.arange(segments + 1) * per_segment + first_local, len(prefix) - 1)
            for start, gap in zip(starts, gaps[number], strict=True):
                positions[start:] += gap
        row = {
            "input_ids": list(prefix),
            "position_ids": positions.tolist(),
            "blocks": [0] * len(prefix),
            "labels": [IGNORED] * len(prefix),
            "kinds": [-1] * len(prefix),
        }
        begin = int(positions[-1]) + 1
        for block, (kind, ids, prompt_length) in enumerate(asked, start=1):
            answer = len(ids) - prompt_length
            row["input_ids"] += ids
            row["position_ids"] += range(begin, begin + len(ids))
            row["blocks"] += [block] * len(ids)
            row["labels"] += [IGNORED] * prompt_length + ids[prompt_length:]
            row["kinds"] += [-1] * prompt_length + [KINDS.index(kind)] * answer
        for name, values in row.items():
            rows[name].append(values)
    length = max(map(len, rows["input_ids"]))
    batch = {
        name: torch.tensor([row + [fill[name]] * (length - len(row)) for row in values])
        for name, values in rows.items()
    }
    truth = torch.stack([one.truth for one in lessons])
    return {**batch, "local": local, "global_": global_, "segment_ends": ends.expand(len(lessons), -1), "truth": truth}


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
                 kinds: Sequence[str] = KINDS) -> dict[int, list[Lesson]]:  # fmt: skip
    """Lessons of all stories whose features are there, by their number of frames."""
    prompts, lessons = PromptMaker(processor), defaultdict(list)
    for name in reader:
        its_split, index, num_frames = name.split("/")
        if its_split == split:
            story = make_story(story_seed(split, int(index)))
            lessons[int(num_frames)].append(
                make_lesson(story, reader[name], prompts, num_frames=int(num_frames),
                            frames_per_segment=frames_per_segment, per_kind=per_kind, kinds=kinds)
            )  # fmt: skip
    return dict(lessons)
