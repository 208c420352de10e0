"""Scores a LongVLM on Storyline: each story is encoded once, and every question is asked in a conversation of its own.

    python -m longvlm.evaluation.storyline.scoring --model MODEL --stories 500 --frames 100

`--video swapped` shows the video of the next story instead, `--video none` no video at all: a score means something
only where it is well above both.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longvlm.evaluation.answers import score_answers
from longvlm.files import atomic_write

from .dataset import VERSION
from .questions import KINDS, Question, make_questions
from .render import frames_at, middle_times
from .story import make_story, story_seed

VIDEOS = ("true", "swapped", "none")


def answer_stories(
    engine,
    split: str = "test",
    num_stories: int = 500,
    *,
    first: int = 0,
    num_frames: int = 100,
    per_kind: int = 1,
    kinds: Sequence[str] = KINDS,
    video: str = "true",
    max_new_tokens: int = 8,
    questions_at_a_time: int = 32,
    progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[tuple[Question, str]]:
    """
    Asks a model about stories.

    Args:
        engine: a `LongVLMEngine`; its processor says how large the frames are.
        split, num_stories, first: which stories.
        num_frames: number of frames per video, at the middles of equal parts.
        per_kind, kinds: number and kinds of the questions per story.
        video: `"true"`; `"swapped"`: the video of the next story; `"none"`: the question alone.
        max_new_tokens: maximum length of an answer, in tokens.
        questions_at_a_time: number of questions that go through the language model together.
        progress: called as `progress("stories", done, total)`.

    Yields:
        Each question and the model's answer, decoded greedily.
    """
    if video not in VIDEOS:
        raise ValueError(f'video="{video}" is not known; choose one of {", ".join(VIDEOS)}')
    size = engine.processor.video_processor.size["height"]
    for done, index in enumerate(range(first, first + num_stories)):
        questions = make_questions(make_story(story_seed(split, index)), kinds=kinds, per_kind=per_kind)
        content: list[dict[str, Any]] = []
        if video != "none":
            shown = make_story(story_seed(split, index if video == "true" else index + 1))
            frames = frames_at(shown, middle_times(shown, num_frames), size=size)
            content = [{"type": "video", "video": engine.encode(frames, do_sample_frames=False)}]
        for start in range(0, len(questions), questions_at_a_time):
            batch = questions[start : start + questions_at_a_time]
            conversations = [
                [{"role": "user", "content": [*content, {"type": "text", "text": question.question}]}]
                for question in batch
            ]
            answers = engine.generate(conversations, max_new_tokens=max_new_tokens, do_sample=False)
            yield from zip(batch, answers, strict=True)
        if progress is not None:
            progress("stories", done + 1, num_stories)


def score(engine, split: str = "test", num_stories: int = 500, **options) -> dict[str, Any]:
    """The scores of `answer_stories` (see `score_answers`), and under `"run"` the settings."""
    start = time.perf_counter()
    answered = list(answer_stories(engine, split, num_stories, **options))
    questions, answers = [question for question, _ in answered], [answer for _, answer in answered]
    result = score_answers(
        predictions=answers,
        references=[question.answer for question in questions],
        kinds=[question.kind for question in questions],
        choices=[list(question.choices) for question in questions],
    )
    options = {name: value for name, value in options.items() if name != "progress"}
    run = {"storyline": VERSION, "split": split, "num_stories": num_stories, "num_frames": 100, "video": "true"}
    return {**result, "run": {**run, **options, "seconds": round(time.perf_counter() - start, 1)}}


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table, in percent: a row per kind, a column per result."""
    lines = [f"| kind | {' | '.join(results)} |", f"|---|{'---:|' * len(results)}"]
    for kind in KINDS:
        cells = [f"{100 * r['kinds'][kind]['accuracy']:.1f}" if kind in r["kinds"] else "" for r in results.values()]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    cells = [
        f"**{100 * r['accuracy']:.1f}** ({100 * r['accuracy_low']:.1f} to {100 * r['accuracy_high']:.1f})"
        for r in results.values()
    ]
    return "\n".join([*lines, f"| all | {' | '.join(cells)} |"])


def main() -> None:
    from longvlm.loading import load

    parser = argparse.ArgumentParser(description="Score a LongVLM checkpoint on Storyline.")
    parser.add_argument("--model", help="checkpoint folder or Hub id (default: longvlm-tiny)")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--stories", type=int, default=500, help="number of stories")
    parser.add_argument("--first", type=int, default=0, help="number of the first story")
    parser.add_argument("--frames", type=int, default=100, help="number of frames per video")
    parser.add_argument("--per-kind", type=int, default=1, help="number of questions of each kind per story")
    parser.add_argument("--video", default="true", choices=VIDEOS)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", type=Path, help="also write all scores to this file")
    options = parser.parse_args()
    engine = load(options.model, device=options.device)
    with _show_progress(f"Storyline {options.split}, {options.frames} frames") as progress:
        result = score(
            engine, options.split, options.stories, first=options.first, num_frames=options.frames,
            per_kind=options.per_kind, video=options.video, progress=progress,
        )  # fmt: skip
    print(table({f"{options.frames} frames, video: {options.video}": result}))
    if options.json:
        with atomic_write(options.json) as file:
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _show_progress(name: str) -> Iterator[Callable[[str, int, int], None]]:
    """Gives a `progress` that draws a bar on stderr."""
    with tqdm(desc=name, unit="video") as bar:

        def progress(stage: str, done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress


if __name__ == "__main__":
    main()
