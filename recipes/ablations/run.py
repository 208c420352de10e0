"""Trains and compares the variants: `python -m recipes.ablations.run --out FOLDER`.

All variants start from longvlm-tiny (encoder, projector, language model) and are fine-tuned on their own tokens, with
the same stories, questions and steps. A run is one variant with one seed; what is finished in the folder is not run
again, and several runs go beside each other (`--jobs`). At the end the table and the plot are made (`report.py`).
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, CLIPVisionModel
from transformers.utils import logging

from longvlm.evaluation.storyline import KINDS, frames_at, middle_times
from longvlm.features.store import FeatureReader, FeatureWriter
from longvlm.files import atomic_write
from recipes.ablations.report import write_report
from recipes.ablations.variants import VARIANTS, Variant, condense
from recipes.tiny.language import LanguageWithHeads, train_language
from recipes.tiny.lessons import Group, PromptMaker, load_lessons, pack
from recipes.tiny.pieces import find_pieces
from recipes.tiny.recipe import make_config, make_model, make_processor, make_tokenizer
from recipes.tiny.story_features import story_of, video_name
from recipes.tiny.vision import FRAME_SIZE, normalised

NUM_FRAMES = 100
PIECE = 40  # frames; every K divides them
SHARES: Mapping[Group, float] = {NUM_FRAMES: 0.75, PIECE: 0.25}  # how often each comes


def longvlm_tiny():
    """The checkpoint that comes with the package, float32."""
    import longvlm

    return AutoModelForImageTextToText.from_pretrained(longvlm.tiny_checkpoint(), dtype=torch.float32)


@torch.no_grad()
def encode(vision: CLIPVisionModel, split: str, num_stories: int, folder: Path) -> None:
    """Every story goes through the encoder once, and is condensed in every way: one folder of features a variant.

    Of split train, two pieces of few events are condensed as videos of their own as well: to learn from.
    """
    writers = [
        FeatureWriter(folder / variant.name, num_global_layers=0, metadata={"variant": str(variant)})
        for variant in VARIANTS
    ]
    try:
        for index in tqdm(range(num_stories), desc=f"Encoding {split}", unit="video", mininterval=10):
            whole = video_name(split, index, NUM_FRAMES)
            waiting = [pair for pair in zip(VARIANTS, writers, strict=True) if whole not in pair[1]]
            if not waiting:
                continue
            story, _ = story_of(whole)
            frames = frames_at(story, middle_times(story, NUM_FRAMES), size=FRAME_SIZE)
            pixels = normalised(torch.from_numpy(frames)).to(vision.dtype)
            states = vision(pixel_values=pixels, output_hidden_states=True).hidden_states
            patches = states[-1][:, 1:].float()
            class_tokens = torch.stack([state[:, 0].float() for state in states[1:]])
            parts = [(0, NUM_FRAMES)]
            if split == "train":
                parts += find_pieces(story, NUM_FRAMES, PIECE, 2, index)
            for variant, writer in waiting:
                # The whole one last: where it is, the pieces are.
                for first, end in parts[::-1]:
                    name = whole if end - first == NUM_FRAMES else video_name(split, index, NUM_FRAMES, (first, end))
                    if name not in writer:
                        local, global_ = condense(variant, patches[first:end], class_tokens[:, first:end])
                        # A video without local tokens cannot be stored: its one row is left out when it is read.
                        stored = local if len(local) else torch.zeros(1, patches.shape[-1])
                        writer.add(name, stored.half(), global_.half())
    finally:
        for writer in writers:
            writer.close()


class _Stored:
    def __init__(self, variant: Variant, local, memory):
        self.local_features = local[:0] if variant.pooling == "none" else local
        self.global_features = memory


def lessons_of(variant: Variant, folder: Path, split: str, processor, per_kind: int):
    """Number of frames -> lessons."""
    reader = FeatureReader(folder / split / variant.name)
    stored = {name: _Stored(variant, reader[name].local_features, reader[name].all_global_features) for name in reader}
    return load_lessons(stored, processor, split=split, frames_per_segment=variant.k, per_kind=per_kind)


def run_one(start, variant: Variant, seed: int, folder: Path, *, steps: int) -> dict:
    """-> accuracy on the test stories, of all questions and per kind, and what it took. `start`: a LongVLM."""
    tokenizer = make_tokenizer()
    width = start.config.text_config.hidden_size
    config = make_config(start.model.vision_tower, tokenizer, width=width, num_global_layers=variant.e)
    processor, model = make_processor(config, tokenizer), make_model(config, start.model.vision_tower, seed=seed)
    for name in ("multi_modal_projector", "language_model"):
        getattr(model.model, name).load_state_dict(getattr(start.model, name).state_dict())
    # Without a scaffold: its heads would be untrained, and their first gradients undo what has been learned.
    learner = LanguageWithHeads(model, scaffold=0.0)
    lessons = {split: lessons_of(variant, folder, split, processor, per_kind=6 if split == "train" else 2)
               for split in ("train", "test")}  # fmt: skip
    begun = time.perf_counter()
    # The same number of stories a step whatever their tokens: the same data in the same order for all.
    whole = lessons["train"][NUM_FRAMES]
    train_language(
        learner, processor, lessons["train"], [(steps, SHARES)],
        folder / f"{variant.name}-{seed}", seed=seed, num_questions=10, stories_a_step=12,
        learning_rate=5e-4,
    )  # fmt: skip
    seconds = time.perf_counter() - begun
    prompts, right = PromptMaker(processor), []
    learner.eval()
    test = lessons["test"][NUM_FRAMES]
    for some in (test[first : first + 10] for first in range(0, len(test), 10)):
        right += learner.right_answers(pack(some, [one.questions for one in some], prompts))
    by_kind = {kind: [hit for its, hit in right if its == kind] for kind in KINDS}
    return {
        "variant": variant.name,
        "seed": seed,
        "tokens": len(whole[0].local) + len(whole[0].global_),
        "steps": steps,
        "seconds": round(seconds),
        "questions": len(right),
        "accuracy": sum(hit for _, hit in right) / len(right),
        "kinds": {kind: sum(hits) / len(hits) for kind, hits in by_kind.items() if hits},
    }


def planned(seeds: int) -> list[tuple[Variant, int]]:
    return [(variant, seed) for seed in range(seeds) for variant in VARIANTS if variant.main or seed == 0]


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare ways to condense a video, on Storyline.")
    parser.add_argument("--out", type=Path, default=Path(".cache/ablations"), help="folder for features and results")
    parser.add_argument("--report", type=Path, default=Path("docs"), help="folder of ablations.md and its plot")
    parser.add_argument("--train", type=int, default=600, help="stories to learn from")
    parser.add_argument("--test", type=int, default=200, help="stories to score on")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3, help="of the main rows")
    parser.add_argument("--jobs", type=int, default=2, help="runs beside each other")
    parser.add_argument("--encode-only", action="store_true", help="make the features, and no run")
    parser.add_argument("--only", nargs=2, metavar=("VARIANT", "SEED"), help="one run, and no report")
    options = parser.parse_args()
    logging.set_verbosity_error()
    start = longvlm_tiny()
    results = options.out / "results"
    results.mkdir(parents=True, exist_ok=True)
    if options.only:
        torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))
        (variant,) = [variant for variant in VARIANTS if variant.name == options.only[0]]
        result = run_one(start, variant, int(options.only[1]), options.out, steps=options.steps)
        file = results / f"{variant.name}-{options.only[1]}.json"
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return
    for split, count in (("train", options.train), ("test", options.test)):
        print(f"ablations: encoding {count} stories of {split}", flush=True)
        encode(start.model.vision_tower.to(torch.bfloat16), split, count, options.out / split)
    if options.encode_only:
        return
    todo = [(v.name, str(s)) for v, s in planned(options.seeds) if not (results / f"{v.name}-{s}.json").exists()]
    given = ["--out", str(options.out), "--steps", str(options.steps), "--jobs", str(options.jobs)]
    running: list[tuple[tuple[str, str], subprocess.Popen]] = []
    while todo or running:
        while todo and len(running) < options.jobs:
            one = todo.pop(0)
            print(f"ablations: {one[0]}, seed {one[1]}; {len(todo)} more to begin", flush=True)
            command = [sys.executable, "-m", "recipes.ablations.run", *given, "--only", *one]
            log = open(options.out / f"{one[0]}-{one[1]}.log", "w")
            running.append((one, subprocess.Popen(command, stdout=log, stderr=log)))
        time.sleep(1)
        for one, process in [pair for pair in running if pair[1].poll() is not None]:
            running.remove((one, process))
            if process.returncode:
                print(f"ablations: {one[0]}, seed {one[1]} failed: see {options.out}/{one[0]}-{one[1]}.log")
    write_report(results, options.report)


if __name__ == "__main__":
    main()
