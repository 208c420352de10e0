"""`make smollm2`: a real language model learns to read a small encoder's videos; a larger check than longvlm-tiny.

    python -m recipes.smollm2.run --out .cache/smollm2 --report docs/smollm2.md

SmolLM2-135M-Instruct and the encoder of longvlm-tiny are assembled, Storyline's train stories are encoded once, the
projector is trained, then LoRA adapters together with it; questions about stories of the test split are asked one at a
time. Every stage keeps its results in `--out`: the same command resumes an interrupted run, in training at the last
checkpoint.

A whole story is 150 tokens of video for an answer of two or three: too little to learn seeing from. So the projector
learns to describe single events ("stripes: red star moves left"), cut out of the stories' features; then LoRA learns
from pieces of up to three events to describe and to answer; only then from questions about whole stories. (Whole
stories alone were tried: 160 steps of description and 120 of answers, 8 rows per step, ended at chance.)
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

import longvlm
from longvlm.conversion.assemble import assemble
from longvlm.evaluation.storyline import KINDS, Story, chance_levels, make_questions, make_story, story_seed
from longvlm.evaluation.storyline.blind import questions_of
from longvlm.evaluation.storyline.questions import DOES
from longvlm.evaluation.storyline.scoring import score
from longvlm.features.extract import extract_features
from longvlm.features.store import FeatureReader, FeatureWriter
from longvlm.files import atomic_write
from longvlm.training.arguments import parse_arguments
from longvlm.training.train import train
from longvlm.training.trainer import last_whole_checkpoint
from longvlm.training.tuning import PROJECTOR_FILE
from recipes.progress import ProgressBar
from recipes.smollm2.events import TELL, tell_events
from recipes.smollm2.language_model import smollm2_gguf
from recipes.smollm2.report import page
from recipes.tiny.pieces import piece_of, windows_of
from recipes.tiny.recipe import MEAN, METHOD, STD
from recipes.tiny.story_features import StoryVideos, video_name
from recipes.wheel_data import DataUnavailable

# SmolLM2's own turns, without its system text, which would cost 20 tokens per question.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}
    {%- else -%}
        {{- message.content + '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# name -> what is trained, on which rows, from which checkpoint (or projector)
TRAININGS: dict[str, dict[str, str]] = {
    "projector": {"train": "projector", "rows": "events", "model": "model"},
    "lora-pieces": {"train": "lora", "rows": "pieces", "model": "model", "init_projector": "projector"},
    "lora-stories": {"train": "lora", "rows": "stories", "model": "lora-pieces"},
}
# Rows per step, as a multiple of those of whole stories: events and pieces are shorter.
ROWS_PER_STEP = {"events": 2, "pieces": 2, "stories": 1}
MOST_EVENTS = {"events": 1, "pieces": 3}
QUESTIONS_PER_PIECE = 3
FRAMES_PER_SEGMENT = METHOD["frames_per_segment"]
EVENTS: dict[str, tuple[str, bool]] = {  # name -> checkpoint, whether another story's events are shown
    "projector": ("projector", False),
    "projector, another story's events": ("projector", True),
    "lora-pieces": ("lora-pieces", False),
    "lora-pieces, another story's events": ("lora-pieces", True),
}
SCORES: dict[str, tuple[str, str]] = {  # name -> checkpoint, video
    "untrained, no video": ("model", "none"),
    "trained": ("lora-stories", "true"),
    "trained, another story's video": ("lora-stories", "swapped"),
    "trained, no video": ("lora-stories", "none"),
}


class Stages:
    """Finished stages and their results, in `results.json`. A stage that is in there is not run again.

    Raises:
        ValueError: the folder holds the results of other options.
    """

    def __init__(self, out: Path, options: Mapping[str, Any]):
        self.file = out / "results.json"
        out.mkdir(parents=True, exist_ok=True)
        self.results: dict[str, Any] = {"options": dict(options), "stages": {}, "events": {}, "scores": {}}
        if self.file.exists():
            self.results = json.loads(self.file.read_text(encoding="utf-8"))
            before = self.results["options"]
            for name in options:
                if before.get(name) != options[name]:
                    raise ValueError(
                        f"{out} holds a run with {name}={before.get(name)}, not {options[name]}; give another --out"
                    )

    def do(self, group: str, name: str, make: Callable[[], Mapping[str, Any]]) -> None:
        """Runs `make` and keeps its result, and the seconds it took, under `results[group][name]`."""
        if name in self.results.setdefault(group, {}):
            print(f"{name}: done before", flush=True)
            return
        print(f"{name} ...", flush=True)
        start = time.perf_counter()
        result = make()
        self.results[group][name] = {**result, "seconds": round(time.perf_counter() - start, 1)}
        self.save()

    def save(self) -> None:
        with atomic_write(self.file) as partial:
            partial.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")


# --- the stages; each returns what goes into the results ---


def put_together(out: Path, vision: Path, language: Path, num_frames: int) -> dict[str, Any]:
    """The checkpoint `out/model`: SmolLM2, the encoder, an untrained projector."""
    method, mean, std = dict(METHOD), [MEAN] * 3, [STD] * 3
    if AutoConfig.from_pretrained(vision).model_type == "longvlm":
        whole = AutoModelForImageTextToText.from_pretrained(vision, dtype="auto")
        prepared = AutoProcessor.from_pretrained(vision).video_processor
        method = {name: getattr(whole.config, name) for name in METHOD}
        for name in ("frames_per_segment", "tokens_per_segment"):  # which decide how pieces are cut out
            if method[name] != METHOD[name]:
                raise ValueError(
                    f"{vision} has {name}={method[name]}; give an encoder with {METHOD[name]}, as in longvlm-tiny"
                )
        mean, std = prepared.image_mean, prepared.image_std
        vision = out / "encoder"
        whole.model.vision_tower.save_pretrained(vision)
    folder = assemble(
        vision,
        language,
        out / "model",
        video_options={"num_frames": num_frames, "image_mean": list(mean), "image_std": list(std)},
        projector_type="mlp2x_gelu",
        overwrite=True,
        **method,
    )
    processor = AutoProcessor.from_pretrained(folder)
    processor.chat_template = CHAT_TEMPLATE
    processor.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    return {"video_tokens": config.num_video_tokens(num_frames)}


def pieces_of(story: Story, num_frames: int) -> list[tuple[str, tuple[int, int]]]:
    """The kind of row, and the frames of the story that it is about: from gap to gap, in whole segments."""
    return [
        (name, (start * FRAMES_PER_SEGMENT, end * FRAMES_PER_SEGMENT))
        for name, most in MOST_EVENTS.items()
        for start, end in windows_of(story, num_frames // FRAMES_PER_SEGMENT, most, story.seed)
    ]


def write_rows(out: Path, num_stories: int, num_frames: int) -> dict[str, Any]:
    """Writes `events.jsonl`, `pieces.jsonl` and `stories.jsonl`, one question per row: several would give
    away what is in the video."""
    rows: dict[str, list[dict]] = {name: [] for name in ROWS_PER_STEP}
    for index in range(num_stories):
        story, whole = make_story(story_seed("train", index)), video_name("train", index, num_frames)
        rows["stories"] += [row(whole, one.question, one.answer) for one in make_questions(story)]
        for name, (first, end) in pieces_of(story, num_frames):
            piece, video = (
                piece_of(story, num_frames, first, end),
                video_name("train", index, num_frames, (first, end)),
            )
            events = ", ".join(f"{event.object} {DOES[event.action]}" for event in piece.events)
            rows[name].append(row(video, TELL, f"{piece.scene_at(piece.duration / 2).kind}: {events}"))
            if name == "pieces":
                questions = make_questions(piece, kinds=[kind for kind in KINDS if kind != "scene"])
                questions = Random(f"{index} {first}").sample(questions, min(QUESTIONS_PER_PIECE, len(questions)))
                rows[name] += [row(video, one.question, one.answer) for one in questions]
    for name, content in rows.items():
        write_text(out / f"{name}.jsonl", (json.dumps(one) + "\n" for one in content))
    return {name: len(content) for name, content in rows.items()}


def write_text(file: Path, lines: Iterable[str]) -> None:
    with atomic_write(file) as partial:
        partial.write_text("".join(lines), encoding="utf-8")


def row(video: str, question: str, answer: str) -> dict[str, Any]:
    content = [{"type": "video", "video": video}, {"type": "text", "text": question}]
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]}


def encode(out: Path, num_stories: int, num_frames: int) -> dict[str, Any]:
    """Extracts the features of the stories. Those of their pieces are cut out, since segments are independent.

    The global features of a piece are those of the whole story.
    """
    engine = longvlm.load(out / "model", dtype=torch.bfloat16)
    videos = StoryVideos("train", range(num_stories), num_frames)
    options = {"do_sample_frames": False}
    report = extract_features(
        videos,
        out / "features",
        model=engine.model,
        processor=engine.processor,
        video_options=options,
        progress=ProgressBar("video"),
    )
    whole, tokens = FeatureReader(out / "features"), METHOD["tokens_per_segment"]
    with FeatureWriter(out / "pieces", num_global_layers=whole.num_global_layers, metadata=whole.metadata) as writer:
        for index in range(num_stories):
            features = whole[video_name("train", index, num_frames)]
            for _, (first, end) in pieces_of(make_story(story_seed("train", index)), num_frames):
                name = video_name("train", index, num_frames, (first, end))
                start, stop = (frame // FRAMES_PER_SEGMENT * tokens for frame in (first, end))
                if name not in writer:
                    writer.add(name, features.local_features[start:stop], features.all_global_features)
        pieces = len(writer)
    return {"stories": num_stories, "pieces": pieces, "report": str(report)}


def fine_tune(out: Path, name: str, *, steps: int, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """One training into `out/name`, with the options in `out/name.yaml`; `longvlm train` does the same with them."""
    plan = TRAININGS[name]
    config = {
        "model": str(out / plan["model"]),
        "dtype": "bfloat16",
        "train": plan["train"],
        "train_data": [str(out / f"{plan['rows']}.jsonl")],
        "features": [str(out / ("features" if plan["rows"] == "stories" else "pieces"))],
        "output_dir": str(out / name),
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": options.batch_size * ROWS_PER_STEP[plan["rows"]],
        "bf16": True,
        "seed": options.seed,
        "logging_steps": options.logging_steps,
        "save_steps": 50,
        "save_total_limit": 1,
        "report_to": "none",
        "resume_from_checkpoint": "auto",
    }
    if plan["train"] == "lora":
        config |= {"lora_r": options.lora_r, "lora_alpha": 2 * options.lora_r, "lora_dropout": 0.0, "merge_lora": True}
    if "init_projector" in plan:
        config["init_projector"] = str(out / plan["init_projector"] / PROJECTOR_FILE)
    file = out / f"{name}.yaml"
    write_text(file, yaml.safe_dump(config, sort_keys=False))
    checkpoint = last_whole_checkpoint(out / name)
    before = int(checkpoint.rsplit("-", 1)[1]) if checkpoint else 0
    trainer = train(*parse_arguments([str(file)]))
    history, now = trainer.state.log_history, trainer.state.global_step - before
    runtime = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return {
        "steps": trainer.state.global_step,
        "batch_size": config["per_device_train_batch_size"],
        "learning_rate": rate,
        "steps_before_it_was_stopped": before,
        "seconds_per_step": round(runtime / now, 2) if now else None,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
        "losses": [[entry["step"], round(entry["loss"], 4)] for entry in history if "loss" in entry],
    }


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all stages; returns the content of `results.json`."""
    out = options.out
    vision = options.vision or longvlm.tiny_checkpoint()
    asked = {name: value for name, value in vars(options).items() if name not in ("out", "report", "vision")}
    stages = Stages(out, asked)
    stages.results |= {
        "versions": {name: version(name) for name in ("longvlm", "torch", "transformers", "peft")},
        "machine": f"{torch.get_num_threads()} threads, {platform.machine()} CPU",
        "chance": chance_levels(questions_of("test", options.test_stories)),
    }
    stages.do("stages", "assemble", lambda: put_together(out, vision, smollm2_gguf(), options.frames))
    stages.do("stages", "rows", lambda: write_rows(out, options.stories, options.frames))
    stages.do("stages", "features", lambda: encode(out, options.stories, options.frames))
    lengths = {
        "projector": (options.projector_steps, options.projector_rate),
        "lora-pieces": (options.piece_steps, options.lora_rate),
        "lora-stories": (options.story_steps, options.lora_rate),
    }
    for name, (steps, rate) in lengths.items():

        def fit(name: str = name, steps: int = steps, rate: float = rate) -> dict[str, Any]:
            return fine_tune(out, name, steps=steps, rate=rate, options=options)

        stages.do("stages", name, fit)
    for name, (checkpoint, swapped) in EVENTS.items():

        def tell(checkpoint: str = checkpoint, swapped: bool = swapped) -> dict[str, Any]:
            engine = longvlm.load(out / checkpoint, dtype=torch.bfloat16)
            return tell_events(engine, options.test_stories, options.frames, swapped=swapped)

        stages.do("events", name, tell)
    for name, (checkpoint, video) in SCORES.items():

        def ask(checkpoint: str = checkpoint, video: str = video) -> dict[str, Any]:
            engine = longvlm.load(out / checkpoint, dtype=torch.bfloat16)
            return score(
                engine, "test", options.test_stories, num_frames=options.frames, video=video,
                max_new_tokens=16, progress=ProgressBar("video"),
            )  # fmt: skip

        stages.do("scores", name, ask)
    stages.save()
    return stages.results


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description="SmolLM2-135M-Instruct learns to answer Storyline's questions.")
    made.add_argument("--out", type=Path, required=True, help="folder for the results of all stages")
    made.add_argument("--report", type=Path, help="write the numbers as a page of Markdown here")
    made.add_argument("--vision", type=Path, help="vision encoder, or a LongVLM that has one (default: longvlm-tiny)")
    made.add_argument("--stories", type=int, default=800, help="stories of split train")
    made.add_argument("--test-stories", type=int, default=40, help="stories of split test, one question of each kind")
    made.add_argument("--frames", type=int, default=100, help="number of frames per video")
    made.add_argument("--projector-steps", type=int, default=150, help="projector alone, on single events")
    made.add_argument("--piece-steps", type=int, default=160, help="LoRA and projector, on pieces of few events")
    made.add_argument("--story-steps", type=int, default=120, help="LoRA and projector, on whole stories")
    made.add_argument("--batch-size", type=int, default=8, help="whole stories per step; twice as many pieces")
    made.add_argument("--projector-rate", type=float, default=2e-3, help="learning rate")
    made.add_argument("--lora-rate", type=float, default=1e-3, help="learning rate")
    made.add_argument("--lora-r", type=int, default=16, help="rank of the adapters")
    made.add_argument("--logging-steps", type=int, default=5)
    made.add_argument("--seed", type=int, default=0)
    return made


def main(arguments: list[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    logging.set_verbosity_error()
    try:
        results = run(options)
    except (ValueError, OSError, DataUnavailable) as error:
        sys.exit(f"smollm2: {error}")
    text = page(results)
    if options.report:
        write_text(options.report, text)
    print(text)


if __name__ == "__main__":
    main()
