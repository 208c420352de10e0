"""`make tiny`: trains longvlm-tiny from nothing, measures it, and writes the checkpoint with its model card.

    python -m recipes.tiny.build --out longvlm/longvlm-tiny

Encoder, features, language model, scores: each stage keeps what it made in `--work`, and the same command goes on
where it was stopped.
"""

import argparse
import hashlib
import json
import platform
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_NAME, logging

import longvlm
from longvlm.evaluation.storyline.scoring import score
from longvlm.files import output_folder
from longvlm.modeling_longvlm.remote_code import remove_code
from recipes.progress import ProgressBar
from recipes.tiny.card import card_text
from recipes.tiny.language import LanguageWithHeads, is_trained, train_language
from recipes.tiny.lessons import Plan, load_lessons, window_group
from recipes.tiny.recipe import make_config, make_model, make_processor, make_tokenizer
from recipes.tiny.story_features import StoryVideos, encode_stories
from recipes.tiny.vision import ROUNDS, train_vision


@dataclass(frozen=True)
class Stage:
    """A stage of the language model.

    `plan`: steps, and how often lessons of each length in frames come in them. `spread`: the part of the steps whose
    segments lie at random positions. `more_counts`: see `lessons.make_lesson`; `counting`: see `LanguageWithHeads`.
    """

    name: str
    lengths: tuple[int, ...]
    plan: Plan
    learning_rate: float
    spread: float
    windows: tuple[int, ...] = ()
    more_counts: int = 0
    counting: float = 1.0


# Length in frames -> stories of split train that are encoded.
STORIES = {100: 3000, 200: 150, 400: 80, 1000: 60}
FEW = window_group(4)
# First to see, on whole stories; then also windows of few events, which are cheap and ask for others.
SHORT: Plan = ((300, {100: 1.0}), (1700, {100: 0.75, FEW: 0.25}))
LONG: Plan = ((1200, {100: 0.7, 200: 0.1, 400: 0.1, 1000: 0.1}),)
STAGES = (
    Stage("language model, 100 frames", (100,), SHORT, 1.5e-3, spread=0.25, windows=(4,)),
    Stage("language model, all lengths", (100, 200, 400, 1000), LONG, 1e-3, spread=0.0, more_counts=16, counting=3.0),
)
# What takes longest to learn is asked most.
WEIGHTS = {"before": 1.5, "after": 2.5, "how many": 2.5, "which action": 1.5, "when": 1.5, "did it happen": 2.0}
SCORES = {
    "100 frames": {"num_stories": 500, "num_frames": 100},
    "1,000 frames": {"num_stories": 100, "num_frames": 1000},
    "100 frames, video of another story": {"num_stories": 200, "num_frames": 100, "video": "swapped"},
    "no video": {"num_stories": 200, "num_frames": 100, "video": "none"},
}


class Clock:
    """Seconds of each stage, added up over interruptions."""

    def __init__(self, file: Path):
        self.file = file
        self.seconds: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}

    @contextmanager
    def time(self, name: str):
        print(f"longvlm-tiny: {name}", flush=True)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0) + round(time.perf_counter() - start)
            self.file.write_text(json.dumps(self.seconds, indent=1) + "\n", encoding="utf-8")


def build(out: Path, work: Path, *, rounds=ROUNDS, stages=STAGES, stories=STORIES, scores=SCORES) -> None:
    """Trains, measures and writes the checkpoint; see the module.

    Args:
        out: the checkpoint's folder; replaced when everything is done.
        work: folder for what the stages make.
        rounds, stages: how the encoder and the language model are trained.
        stories: length in frames -> stories that are encoded.
        scores: name -> options of `scoring.score`.
    """
    work.mkdir(parents=True, exist_ok=True)
    clock = Clock(work / "seconds.json")
    with clock.time("encoder"):
        vision = train_vision(work / "vision", rounds)
    tokenizer = make_tokenizer()
    config = make_config(vision, tokenizer)
    processor, model = make_processor(config, tokenizer), make_model(config, vision)
    learner = LanguageWithHeads(model)
    for number, stage in enumerate(stages):
        lessons: dict = {}
        for length in stage.lengths:
            with clock.time(f"features of {length:,} frames"):
                videos = StoryVideos("train", range(stories[length]), length)
                features = encode_stories(model, processor, work / f"features-{length}", videos)
            if not is_trained(work / f"language-{number}"):
                with clock.time(f"questions about {length:,} frames"):
                    lessons |= load_lessons(
                        features,
                        processor,
                        split="train",
                        per_kind=8,
                        more_counts=stage.more_counts,
                        frames_per_segment=config.frames_per_segment,
                        windows=stage.windows,
                    )
        learner.counting = stage.counting
        with clock.time(stage.name):
            train_language(
                learner,
                processor,
                lessons,
                stage.plan,
                work / f"language-{number}",
                learning_rate=stage.learning_rate,
                spread=stage.spread,
                weights=WEIGHTS,
                seed=number,
            )
    unscored = work / "checkpoint"
    with output_folder(unscored, overwrite=True) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
    with clock.time("scores"):
        results = measure(unscored, work / "scores.json", scores)
    lengths = ", ".join(f"{count:,} of {length:,} frames" for length, count in stories.items())
    about = {
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers")),
        "machine": f"{torch.get_num_threads()} CPU cores ({platform.machine()})",
        "seconds": clock.seconds,
        "vision_training": f"{sum(one.steps for one in rounds):,} steps of 96 frames",
        "stories": lengths,
        "language_training": f"{sum(n for stage in stages for n, _ in stage.plan):,} steps of at most 12 stories",
    }
    with output_folder(out, overwrite=True) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        remove_code(folder)  # it comes with the package; a copy would become outdated
        for name, values in (("scores.json", results), ("training.json", about)):
            (Path(folder) / name).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        (Path(folder) / "README.md").write_text(card_text(folder, results, about), encoding="utf-8")
    print(f"longvlm-tiny: {out} is ready")


def measure(checkpoint: Path, file: Path, scores) -> dict:
    """The scores of the checkpoint as users load it; those in `file` are kept, if they are of the same weights."""
    weights, known = hashlib.sha256((checkpoint / SAFE_WEIGHTS_NAME).read_bytes()).hexdigest(), {}
    if file.exists() and (before := json.loads(file.read_text(encoding="utf-8"))).get("weights") == weights:
        known = before["results"]
    if missing := [name for name in scores if name not in known]:
        engine = longvlm.load(checkpoint)
        for name in missing:
            known[name] = score(engine, "test", progress=ProgressBar("video"), **scores[name])
    results = {name: known[name] for name in scores}
    file.write_text(json.dumps({"weights": weights, "results": results}, indent=1) + "\n", encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, measure and write longvlm-tiny.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path(".cache/tiny"), help="folder for what the stages make")
    options = parser.parse_args()
    logging.set_verbosity_error()
    # Asked to stop, it leaves through the clock, which counts the seconds of an unfinished stage.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    build(options.out, options.work)


if __name__ == "__main__":
    main()
