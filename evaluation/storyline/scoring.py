"""Scores a LongVLM on Storyline: each story encoded once, every question asked alone, answers from `generate()`.

    python -m longvlm.evaluation.storyline.scoring --model MODEL --stories 500 --frames 100

`--video swapped` shows the next story's video instead, `--video none` none at all: a score counts where it is well
above both.
"""

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from longvlm.evaluation.answers import score_answers

from .dataset import VERSION
from .questions import KINDS, Question, make_questions
from .render import frames_at, middle_times
from .story import make_story, story_seed

VIDEOS = ("true", "swapped", "none")


@torch.no_grad()
def answer_stories(
    model,
    processor,
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
    progress: bool = False,
) -> Iterator[tuple[Question, str]]:
    """
    Asks a model about stories.

    Args:
        model, processor: of one LongVLM checkpoint; the size of the frames is the processor's.
        split, num_stories, first: which stories.
        num_frames: of each video, at the middles of equal parts.
        per_kind, kinds: questions of each story.
        video: `"true"`; `"swapped"`: the next story's; `"none"`: the question alone.

    Yields:
        Each question and the model's answer, greedy, at most `max_new_tokens` tokens.
    """
    if video not in VIDEOS:
        raise ValueError(f'video="{video}" is not known; choose one of {", ".join(VIDEOS)}')
    size = processor.video_processor.size["height"]
    indices = range(first, first + num_stories)
    for index in tqdm(indices, desc=f"Storyline {split}, {num_frames} frames", unit="video", disable=not progress):
        questions = make_questions(make_story(story_seed(split, index)), kinds=kinds, per_kind=per_kind)
        features = None
        if video != "none":
            shown = make_story(story_seed(split, index if video == "true" else index + 1))
            frames = frames_at(shown, middle_times(shown, num_frames), size=size)
            pieces = processor.video_processor.iter_pixel_values(frames, do_sample_frames=False)
            features = model.encode_video(pieces)
        for start in range(0, len(questions), questions_at_a_time):
            some = questions[start : start + questions_at_a_time]
            yield from zip(some, _answers(model, processor, some, features, max_new_tokens), strict=True)


def _answers(model, processor, questions, features, max_new_tokens: int) -> list[str]:
    video = [{"type": "video"}] if features is not None else []
    prompts = processor.apply_chat_template(
        [[{"role": "user", "content": [*video, {"type": "text", "text": q.question}]}] for q in questions],
        add_generation_prompt=True,
        tokenize=False,
    )
    given: dict[str, Any] = {}
    of_video: dict[str, Any] = {}
    if features is not None:
        given["video_features"] = features.select([0] * len(questions))
        count = len(features.local_features[0]) + model.config.num_global_tokens
        of_video["num_video_tokens"] = [count] * len(questions)
    inputs = processor(
        text=prompts,
        **of_video,
        padding=True,
        padding_side="left",
        return_tensors="pt",
    ).to(model.device)
    generated = model.generate(**inputs, **given, max_new_tokens=max_new_tokens, do_sample=False)
    answers = generated[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(answers, skip_special_tokens=True)]


def score(model, processor, split: str = "test", num_stories: int = 500, **options) -> dict[str, Any]:
    """The metric's scores (see `score_answers`) of `answer_stories`, and under `"run"` what was run."""
    start = time.perf_counter()
    answered = list(answer_stories(model, processor, split, num_stories, **options))
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
    """Markdown, in percent: a row for each kind, a column for each result."""
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
    from transformers import AutoModelForImageTextToText, AutoProcessor

    import longvlm  # noqa: F401  (tells transformers the names)

    parser = argparse.ArgumentParser(description="Score a LongVLM checkpoint on Storyline.")
    parser.add_argument("--model", required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--split", default="test", choices=("train", "validation", "test"))
    parser.add_argument("--stories", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="number of the first story")
    parser.add_argument("--frames", type=int, default=100, help="frames of each video")
    parser.add_argument("--per-kind", type=int, default=1, help="questions of each kind about a story")
    parser.add_argument("--video", default="true", choices=VIDEOS)
    parser.add_argument("--device", default=None)
    parser.add_argument("--json", type=Path, help="write all scores to this file as well")
    options = parser.parse_args()
    model = AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto").eval()
    if options.device:
        model.to(options.device)
    processor = AutoProcessor.from_pretrained(options.model)
    result = score(
        model, processor, options.split, options.stories, first=options.first, num_frames=options.frames,
        per_kind=options.per_kind, video=options.video, progress=True,
    )  # fmt: skip
    print(table({f"{options.frames} frames, video: {options.video}": result}))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
