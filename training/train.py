"""Fine-tuning: `longvlm train CONFIG.yaml [--option value ...]`, or `accelerate launch -m longvlm train ...`.

`python -m longvlm.training.train` does the same without a progress bar before the training. For the options see
`longvlm.training.arguments` and docs/training.md.
"""

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments, set_seed
from transformers.utils import logging

from longvlm.features.fingerprint import check_features, feature_metadata
from longvlm.features.store import FeatureReader
from longvlm.loading import load_parts
from longvlm.training.arguments import DataArguments, ModelArguments, TuningArguments, parse_arguments
from longvlm.training.collator import LongVLMDataCollator
from longvlm.training.data import VideoChatDataset, build_dataset
from longvlm.training.trainer import LongVLMTrainer, last_whole_checkpoint
from longvlm.training.tuning import check_trainable, prepare_model, trainable_parameters

logger = logging.get_logger(__name__)

REPORT = "data_report.json"


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    tuning: TuningArguments,
    training: TrainingArguments,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> LongVLMTrainer:
    """
    Trains, and saves into `output_dir`: the model (with LoRA the adapter, unless `merge_lora`), the processor,
    `data_report.json`, and with `train: projector` also `projector.safetensors`.

    Args:
        progress: called as `progress(stage, done, total)` until training starts, by the first process of a machine
            and not with `disable_tqdm`; from then on `Trainer` shows its own bar.

    Returns:
        The trainer, after training.

    Raises:
        ValueError: in one line: options, data, features or checkpoints that do not fit together.
    """
    if training.disable_tqdm or not training.should_log:
        progress = None
    resume = _checkpoint_to_resume(training)
    model, processor = _load_parts(model_arguments, training)
    check_trainable(model, tuning)
    readers = _open_features(data_arguments, tuning, model, processor)
    datasets = _build_datasets(data_arguments, training, processor, readers, progress)
    set_seed(training.seed)  # adapters start at random
    model = prepare_model(model, tuning)
    if training.should_log:
        trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
        logger.info(f"{sum(trained.values()):,} parameters are trained: {', '.join(trainable_parameters(model)[:8])}")
    trainer = LongVLMTrainer(
        model=model,
        args=training,
        data_collator=LongVLMDataCollator(
            processor,
            max_length=data_arguments.max_length,
            truncation=data_arguments.truncation,
            chat_template=data_arguments.chat_template,
            video_options=data_arguments.video_options,
        ),
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=processor,
        save_projector_file=tuning.train == "projector",
    )
    with _errors_of_workers_as_their_own():
        trainer.train(resume_from_checkpoint=resume)
    _save_result(trainer, merge_lora=tuning.merge_lora)
    return trainer


def _checkpoint_to_resume(training: TrainingArguments) -> str | None:
    requested = training.resume_from_checkpoint
    latest = last_whole_checkpoint(training.output_dir)
    if requested in ("auto", True, "true", "True"):
        return latest
    if requested in (None, False, "false", "False"):
        if latest is not None:
            raise ValueError(
                f"{training.output_dir} has checkpoints of an earlier training ({Path(latest).name}); resume it with "
                "`resume_from_checkpoint` auto, or give another `output_dir`"
            )
        return None
    requested = str(requested)
    if last_whole_checkpoint(Path(requested).parent) is None or not (Path(requested) / "trainer_state.json").is_file():
        raise ValueError(f"`resume_from_checkpoint` {requested} is not a complete checkpoint")
    return requested


def _load_parts(arguments: ModelArguments, training: TrainingArguments):
    """The model and its processor."""
    options = {"attn_implementation": arguments.attn_implementation} if arguments.attn_implementation else {}
    return load_parts(
        arguments.model,
        dtype=arguments.dtype,
        device=training.device,
        load_in_4bit=arguments.load_in_4bit,
        load_in_8bit=arguments.load_in_8bit,
        take_adapters=False,
        **options,
    )


def _open_features(arguments: DataArguments, tuning: TuningArguments, model, processor) -> list[FeatureReader]:
    """The folders of features, if any, each checked against the model."""
    if not arguments.features:
        return []
    if tuning.train_vision_tower:
        raise ValueError("`train_vision_tower` needs videos: features come from an encoder that does not change")
    config, readers, metadata = model.config, [], None
    for folder in arguments.features:
        reader = FeatureReader(folder, num_global_layers=config.num_global_tokens)
        if reader.width not in (None, config.vision_config.hidden_size):
            raise ValueError(
                f"the features in {reader.folder} have width {reader.width}, the model's encoder "
                f"{config.vision_config.hidden_size}; extract them again with this model"
            )
        if arguments.check_features:
            metadata = metadata or feature_metadata(model, processor.video_processor, arguments.video_options)
            check_features(reader, metadata, config.num_global_tokens)
        readers.append(reader)
    return readers


def _build_datasets(
    arguments: DataArguments, training: TrainingArguments, processor, readers: list[FeatureReader], progress
) -> dict[str, VideoChatDataset]:
    """`"train"` and, if asked for, `"eval"`; the reports are written to `output_dir` and summed up on stderr."""
    datasets = {}
    for name, sources in (("train", arguments.train_data), ("eval", arguments.eval_data)):
        if not sources:
            continue
        datasets[name], report = build_dataset(
            sources,
            processor,
            weights=arguments.train_weights if name == "train" else None,
            video_folders=arguments.video_folders,
            features=readers,
            max_length=arguments.max_length,
            truncation=arguments.truncation,
            chat_template=arguments.chat_template,
            video_options=arguments.video_options,
            seed=training.seed,
            progress=progress,
        )
        if training.should_save:
            report.save(Path(training.output_dir) / (REPORT if name == "train" else f"{name}_{REPORT}"))
            print(f"{name} data: {report}", file=sys.stderr)
    return datasets


@contextmanager
def _errors_of_workers_as_their_own() -> Iterator[None]:
    """An error in a worker of the `DataLoader` comes with that process's traceback as its message; not ours."""
    try:
        yield
    except (ValueError, OSError) as error:
        lines = str(error).strip().splitlines()
        if not lines or not re.match(r"Caught \w+ in DataLoader worker", lines[0]):
            raise
        raise type(error)(re.sub(r"^[\w.]+: ", "", lines[-1])) from error


def _save_result(trainer: LongVLMTrainer, *, merge_lora: bool) -> None:
    out = trainer.args.output_dir
    if not merge_lora:
        trainer.save_model(out)
    elif trainer.args.should_save:
        trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(out)
        trainer.processing_class.save_pretrained(out)
    trainer.save_state()


def main(arguments: list[str] | None = None, *, progress: Callable[[str, int, int], None] | None = None) -> None:
    """Entry point: reads the options (default: of the command line), trains, and prints the result as JSON."""
    trainer = train(*parse_arguments(sys.argv[1:] if arguments is None else arguments), progress=progress)
    if trainer.args.should_save:
        losses = [entry for entry in trainer.state.log_history if "train_loss" in entry]
        if losses:
            print(json.dumps({"train_loss": losses[-1]["train_loss"], "steps": trainer.state.global_step}))


__all__ = ["main", "train"]

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as mistake:
        if os.environ.get("LONGVLM_TRACEBACK"):
            raise
        print(f"longvlm: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        sys.exit(2)
