"""`make demo`: makes a video that tells a story, asks longvlm-tiny about it, and shows the answers next to the truth.

    python -m examples.demo [--story N] [--duration SECONDS] [--out FOLDER]

Nothing is downloaded. The story is of Storyline's test split, which the model was not trained on, and every answer is
shown, also the wrong ones.
"""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STORY, SECONDS, FPS, SIZE = 4, 60.0, 10, 256


class Clock:
    """Wall-clock seconds of each step, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        print(f"{step} ...", file=sys.stderr, flush=True)
        start = time.perf_counter()
        yield
        self.seconds[step] = time.perf_counter() - start


def shown(path: Path) -> str:
    """As a user would type it: relative to where the demo was started, if it lies there."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def columns(rows: list[tuple[str, ...]]) -> str:
    """Rows of text, aligned; two spaces before each."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def ask(engine, video: Path, question: str) -> tuple[str, float, float]:
    """-> the answer, seconds of decoding and encoding the video (0 if it is known already), seconds of answering."""
    start = encoded = time.perf_counter()

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal encoded
        if stage == "encode":
            encoded = time.perf_counter()

    content = [{"type": "video", "video": str(video)}, {"type": "text", "text": question}]
    answer = engine.generate([{"role": "user", "content": content}], progress=progress)
    return answer, encoded - start, time.perf_counter() - encoded


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description="Ask longvlm-tiny about a story.")
    parser.add_argument("--story", type=int, default=STORY, help=f"number of a story of the test split ({STORY})")
    parser.add_argument("--duration", type=float, default=SECONDS, help=f"length of the video, seconds ({SECONDS:g})")
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the video and the pictures (demo)")
    options = parser.parse_args(arguments)
    try:
        demo(options.story, options.duration, options.out)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"demo: error: {error}")


def demo(number: int, duration: float, out: Path) -> None:
    clock = Clock()
    with clock.time("load Python's libraries"):
        from transformers.utils import logging

        import longvlm
        from longvlm.evaluation import storyline
        from longvlm.evaluation.answers import name_choice
        from longvlm.evaluation.merge_picture import draw_merging

        logging.set_verbosity_error()
        logging.disable_progress_bar()

    checkpoint = longvlm.tiny_checkpoint()
    story = storyline.make_story(storyline.story_seed("test", number), duration=duration)
    questions = storyline.make_questions(story)
    video, sheet, tokens = (out / f"story-{number}{end}" for end in (".mp4", ".png", "-tokens.png"))
    with clock.time(f"make a video of {duration:g} seconds, {SIZE} x {SIZE} pixels, {FPS} frames a second"):
        storyline.write_video(story, video, fps=FPS, size=SIZE)
    with clock.time("draw the contact sheet"):
        storyline.contact_sheet(story, sheet)
    with clock.time("load longvlm-tiny"):
        engine = longvlm.load(checkpoint)

    print("ask ...", file=sys.stderr, flush=True)
    rows: list[tuple[str, ...]] = [("kind", "question", "answer", "truth", "", "seconds")]
    right = 0
    for question in questions:
        answer, encoding, answering = ask(engine, video, question.question)
        if question is questions[0]:
            frames = engine.processor.video_processor.num_frames
            clock.seconds[f"decode the video and encode up to {frames} frames of it, once"] = encoding
        is_right = name_choice(answer, question.choices) == question.answer
        right += is_right
        mark = "right" if is_right else "WRONG"
        rows.append((question.kind, question.question, answer or "(none)", question.answer, mark, f"{answering:.2f}"))
    clock.seconds[f"answer {len(questions)} questions, one by one"] = sum(float(row[-1]) for row in rows[1:])
    with clock.time("draw which patches became one token"):
        draw_merging(engine, str(video), tokens)

    guessed = sum(question.chance for question in questions)
    command = shlex.join(
        [shown(Path(sys.executable).parent / "longvlm"), "ask", shown(video), "What is the last object?"]
    )
    print(
        f"""
Story {number} of Storyline's test split: {len(story.events)} events in {duration:g} seconds

{columns(rows)}

{right} of {len(questions)} are right; blind guesses would be right {guessed:.1f} times on average.

Seconds
"""
        + "\n".join(f"  {seconds:6.1f}  {step}" for step, seconds in clock.seconds.items())
        + f"""

What this is worth
  longvlm-tiny knows this synthetic world only: what it says of a real video means nothing. How often it is right over
  many stories stands in its model card, {shown(checkpoint / "README.md")}.

Look at
  {shown(video)}  the video
  {shown(sheet)}  what happens in it, event by event
  {shown(tokens)}  how its frames were condensed: which patches became one token

What next
  ask yourself   {command}
  another story  {shlex.join([shown(Path(sys.executable)), "-m", "examples.demo", "--story", str(number + 1)])}
  your own       README.md, section "A LongVLM of your own\""""
    )


if __name__ == "__main__":
    main()
