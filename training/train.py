"""Fine-tuning: `longvlm train CONFIG.yaml [--flag value ...]`, `python -m longvlm.training.train`, `accelerate launch
-m longvlm.training.train`.

The configuration has the fields of `ModelArguments`, `DataArguments`, `TuningArguments` and transformers'
`TrainingArguments`, in one flat list; flags win over it. See docs/training.md.
"""

import difflib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments, set_seed
from transformers.utils import logging

from longvlm.features.extract import check_features, feature_metadata
from longvlm.features.store import FeatureReader
from longvlm.registration import LongVLMForConditionalGeneration, LongVLMProcessor
from longvlm.training.chat_encoding import TOO_LONG
from longvlm.training.collator import LongVLMDataCollator
from longvlm.training.data import build_dataset
from longvlm.training.trainer import LongVLMTrainer, last_whole_checkpoint
from longvlm.training.tuning import TuningArguments, prepare_model, trainable_parameters

logger = logging.get_logger(__name__)

REPORT = "data_report.json"


@dataclass
class ModelArguments:
    """Where the training starts."""

    model: str = field(metadata={"help": "LongVLM checkpoint: folder or Hub id."})
    dtype: str = field(default="auto", metadata={"help": "Of what is frozen; what is trained is float32."})
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager..."})


@dataclass
class DataArguments:
    """What it is trained on."""

    train_data: list[str] = field(metadata={"help": "Files of rows (.json, .jsonl, .parquet), folders, Hub ids."})
    train_weights: list[float] | None = field(
        default=None, metadata={"help": "How often the rows of each come in an epoch (1)."}
    )
    eval_data: list[str] | None = field(default=None, metadata={"help": "Likewise, for eval_strategy."})
    video_folders: list[str] = field(default_factory=list, metadata={"help": "Where the videos lie."})
    features: list[str] = field(
        default_factory=list, metadata={"help": "Instead: folders that `longvlm extract` made."}
    )
    check_features: bool = field(
        default=True, metadata={"help": "Refuse features that another model or other settings made."}
    )
    num_frames: int | None = field(default=None, metadata={"help": "Of each video; as `longvlm extract` was given."})
    fps: float | None = field(default=None, metadata={"help": "Instead: frames of a second, likewise."})
    max_frames: int | None = field(default=None, metadata={"help": "At most so many frames, likewise."})
    max_length: int | None = field(default=2048, metadata={"help": "Tokens of a row at most, videos included."})
    too_long: str = field(default="drop", metadata={"help": "drop longer rows, or truncate the end of their text."})
    chat_template: str | None = field(default=None, metadata={"help": "Instead of the processor's."})

    def __post_init__(self):
        if self.too_long not in TOO_LONG:
            raise ValueError(f'too_long: "{self.too_long}" is not known; use {" or ".join(TOO_LONG)}')

    @property
    def video_options(self) -> dict[str, Any]:
        """Of the video processor."""
        options = {"num_frames": self.num_frames, "fps": self.fps, "max_frames": self.max_frames}
        return {name: value for name, value in options.items() if value is not None}


def parse_arguments(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TuningArguments, TrainingArguments]:
    """
    Args:
        arguments: flags, with or without a YAML or JSON file before them.

    Raises:
        ValueError: one line: an unknown field (with the one that was meant), a missing or impossible value.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TuningArguments, TrainingArguments))

    def error(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = error  # type: ignore[method-assign]
    # Without it, several processes on a machine without accelerators would each train alone.
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    if arguments and not arguments[0].startswith("-"):
        config = _read_config(arguments[0])
        known = {action.dest: action for action in parser._actions}
        for name in config:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"{arguments[0]}: {name} is no option of the training{hint}")
            known[name].required = False
            if known[name].nargs == "+" and known[name].type in (str, int, float) and config[name] is not None:
                config[name] = _as_list(config[name], known[name], f"{arguments[0]}: {name}")
        parser.set_defaults(**config)
        arguments = arguments[1:]
    model, data, tuning, training = parser.parse_args_into_dataclasses(args=arguments)
    # What the collator needs are not arguments of the model, and only the loss is asked for in evaluation.
    training.remove_unused_columns = False
    training.prediction_loss_only = True
    training.label_names = ["labels"]
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False
    return model, data, tuning, training


def _as_list(value: Any, option: Any, where: str) -> list:
    """A list's values in their type; argparse does so for flags only. One value alone is a list of one."""
    wanted = "single values" if option.type is str else "numbers"
    values = []
    for one in value if isinstance(value, list) else [value]:
        try:
            if one is None or isinstance(one, (dict, list)):
                raise ValueError
            values.append(option.type(one))
        except ValueError:
            raise ValueError(f"{where} must be a list of {wanted}, not hold {one!r:.60}") from None
    return values


def _read_config(file: str) -> dict[str, Any]:
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))  # JSON is YAML
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text, so no YAML") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold options, one a line, as `name: value`")
    return config


def train(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    tuning: TuningArguments,
    training: TrainingArguments,
) -> LongVLMTrainer:
    """
    Trains, and saves into `output_dir`: the model (with LoRA the adapter, unless `merge_lora`), the processor,
    `data_report.json`, and in projector training `projector.safetensors`.

    Returns:
        The trainer, after training.

    Raises:
        ValueError: something does not fit; one line.
    """
    out = Path(training.output_dir)
    resume = _checkpoint_to_resume(training)
    processor = LongVLMProcessor.from_pretrained(model_arguments.model)
    options = (
        {"attn_implementation": model_arguments.attn_implementation} if model_arguments.attn_implementation else {}
    )
    model = LongVLMForConditionalGeneration.from_pretrained(
        model_arguments.model, dtype=model_arguments.dtype, **options
    )
    readers = [FeatureReader(folder) for folder in data_arguments.features]
    if readers:
        _check_readers(readers, model, processor, data_arguments, tuning)
    datasets, reports = {}, {}
    for name, sources in (("train", data_arguments.train_data), ("eval", data_arguments.eval_data)):
        if sources:
            datasets[name], reports[name] = build_dataset(
                sources,
                processor,
                weights=data_arguments.train_weights if name == "train" else None,
                video_folders=data_arguments.video_folders,
                features=readers,
                max_length=data_arguments.max_length,
                too_long=data_arguments.too_long,
                chat_template=data_arguments.chat_template,
                video_options=data_arguments.video_options,
                seed=training.seed,
                progress=not training.disable_tqdm and training.should_log,
            )
    if training.should_save:
        out.mkdir(parents=True, exist_ok=True)
        for name, report in reports.items():
            report.save(out / (REPORT if name == "train" else f"{name}_{REPORT}"))
            print(f"{name} data: {report}", file=sys.stderr)
    set_seed(training.seed)  # adapters begin at random
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
            too_long=data_arguments.too_long,
            chat_template=data_arguments.chat_template,
            video_options=data_arguments.video_options,
        ),
        train_dataset=datasets["train"],
        eval_dataset=datasets.get("eval"),
        processing_class=processor,
        save_projector_file=tuning.train == "projector",
    )
    trainer.train(resume_from_checkpoint=resume)
    if tuning.merge_lora:
        if training.should_save:
            trainer.accelerator.unwrap_model(trainer.model).merge_and_unload().save_pretrained(out)
            processor.save_pretrained(out)
    else:
        trainer.save_model(str(out))
    trainer.save_state()
    return trainer


def _checkpoint_to_resume(training: TrainingArguments) -> str | None:
    wanted = training.resume_from_checkpoint
    found = last_whole_checkpoint(training.output_dir)
    if wanted in ("auto", True, "true", "True"):
        return found
    if wanted in (None, False, "false", "False"):
        if found is not None:
            raise ValueError(
                f"{training.output_dir} has checkpoints of an earlier training ({Path(found).name}); go on with it by "
                "resume_from_checkpoint: auto, or give another output_dir"
            )
        return None
    if last_whole_checkpoint(Path(wanted).parent) is None or not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(f"resume_from_checkpoint: {wanted} is no whole checkpoint")
    return str(wanted)


def _check_readers(readers, model, processor, arguments: DataArguments, tuning: TuningArguments) -> None:
    if tuning.train_vision_tower:
        raise ValueError("train_vision_tower: true needs videos; features are made by an encoder that stays as it is")
    config = model.config
    for reader in readers:
        if reader.width not in (None, config.vision_config.hidden_size):
            raise ValueError(
                f"the features in {reader.folder} have width {reader.width}, the model's encoder "
                f"{config.vision_config.hidden_size}"
            )
        if reader.num_global_layers != config.num_global_layers:
            raise ValueError(
                f"the features in {reader.folder} have {reader.num_global_layers} global layers, the model "
                f"{config.num_global_layers}"
            )
        if arguments.check_features:
            metadata = feature_metadata(model, processor.video_processor, arguments.video_options)
            check_features(reader, metadata, config.num_global_layers)


def main(arguments: list[str] | None = None) -> None:
    """Entry point: reads the arguments and trains."""
    trainer = train(*parse_arguments(sys.argv[1:] if arguments is None else arguments))
    if trainer.args.should_save:
        losses = [entry for entry in trainer.state.log_history if "train_loss" in entry]
        if losses:
            print(json.dumps({"train_loss": losses[-1]["train_loss"], "steps": trainer.state.global_step}))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as mistake:
        if os.environ.get("LONGVLM_TRACEBACK"):
            raise
        print(f"longvlm: error: {' '.join(str(mistake).split())}", file=sys.stderr)
        sys.exit(2)
