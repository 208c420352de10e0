"""`make tiny`: trains longvlm-tiny from nothing, measures it, and writes the checkpoint with its model card.

    python -m longvlm.training.tiny.build --out longvlm/longvlm-tiny

Encoder, features, language model, scores: each stage keeps what it made in `--work`, and the same command goes on
where it was stopped.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from longvlm.conversion.feature_shards import FeatureReader
from longvlm.conversion.output_folder import output_folder
from longvlm.evaluation.storyline.scoring import score
from longvlm.training.tiny.card import card_text
from longvlm.training.tiny.language import LanguageWithHeads, train_language
from longvlm.training.tiny.lessons import load_lessons
from longvlm.training.tiny.recipe import make_config, make_model, make_processor, make_tokenizer
from longvlm.training.tiny.story_features import StoryVideos, encode_stories
from longvlm.training.tiny.vision import train_vision

# Length in frames -> stories of split train that are encoded.
STORIES = {100: 3000, 200: 250, 400: 125, 1000: 100}
# The second stage of the language model: how often each length comes.
SHARES = {100: 0.7, 200: 0.1, 400: 0.1, 1000: 0.1}
SCORES = {
    "100 frames": {"num_stories": 500, "num_frames": 100},
    "1,000 frames": {"num_stories": 200, "num_frames": 1000},
    "100 frames, video of another story": {"num_stories": 500, "num_frames": 100, "video": "swapped"},
}
# What takes longest to learn is asked most.
WEIGHTS = {"before": 2.0, "after": 2.0, "how many": 1.5, "which action": 1.5, "when": 1.5}


def build(out: Path, work: Path, *, vision_steps: int = 2600, short_steps: int = 2000, mixed_steps: int = 600) -> None:
    """Args:
    out: the checkpoint's folder; replaced when everything is done.
    work: for what the stages make.
    vision_steps, short_steps, mixed_steps: steps of the encoder, of the language model on 100 frames, and on all
        lengths.
    """
    seconds = {}

    def timed(name: str, make):
        print(f"longvlm-tiny: {name}", flush=True)
        start = time.perf_counter()
        result = make()
        seconds[name] = round(time.perf_counter() - start)
        return result

    work.mkdir(parents=True, exist_ok=True)
    vision = timed("the encoder", lambda: train_vision(work / "vision", steps=vision_steps))
    tokenizer = make_tokenizer()
    config = make_config(vision, tokenizer)
    processor, model = make_processor(config, tokenizer), make_model(config, vision)

    def encode():
        for num_frames, count in STORIES.items():
            encode_stories(
                model, processor, work / f"features-{num_frames}", StoryVideos("train", range(count), num_frames)
            )
        folders = {num_frames: work / f"features-{num_frames}" for num_frames in STORIES}
        return {
            n: load_lessons(FeatureReader(folder), processor, split="train", per_kind=8,
                            frames_per_segment=config.frames_per_segment)[n]
            for n, folder in folders.items()
        }  # fmt: skip

    lessons = timed("the features of stories", encode)
    learner = LanguageWithHeads(model)
    for name, lengths, steps, options in (
        ("the language model, 100 frames", {100: 1.0}, short_steps, {"spread": 0.25, "learning_rate": 1.5e-3}),
        ("the language model, all lengths", SHARES, mixed_steps, {"learning_rate": 7e-4}),
    ):
        folder = work / f"language-{len(lengths)}"
        chosen = {length: lessons[length] for length in lengths}
        timed(
            name,
            lambda folder=folder, chosen=chosen, lengths=lengths, steps=steps, options=options: train_language(
                learner, processor, chosen, lengths, folder, steps=steps, weights=WEIGHTS, **options
            ),
        )
    unscored = work / "checkpoint"
    with output_folder(unscored, overwrite=True) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)
        processor.save_pretrained(folder)
    results = timed("the scores", lambda: measure(unscored, work / "scores.json"))
    about = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "machine": f"{torch.get_num_threads()} threads of a {platform.machine()} CPU",
        "seconds": seconds,
    }
    with output_folder(out, overwrite=True) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (Path(folder) / "README.md").write_text(card_text(results, about), encoding="utf-8")
        (Path(folder) / "scores.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"longvlm-tiny: {out} is ready")


def measure(checkpoint: Path, file: Path) -> dict:
    """The scores of the checkpoint as users load it."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype="auto").eval()
    processor = AutoProcessor.from_pretrained(checkpoint)
    results = {name: score(model, processor, "test", progress=True, **options) for name, options in SCORES.items()}
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description="Train, measure and write longvlm-tiny.")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--work", type=Path, default=Path(".cache/tiny"), help="folder for what the stages make")
    options = parser.parse_args()
    logging.set_verbosity_error()
    build(options.out, options.work)


if __name__ == "__main__":
    main()
