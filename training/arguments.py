"""The options of a training: dataclasses, and how they are read from a file and from flags.

Every field is one option of `longvlm train`; transformers' `TrainingArguments` come on top. See docs/training.md.
"""

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import HfArgumentParser, TrainingArguments

from longvlm.files import parse_yaml

MODES = ("projector", "lora", "full")
# Options that have another name by now -> what to write instead.
RENAMED = {"too_long": "`truncation`: true (too_long: truncate) or false (too_long: drop)"}


@dataclass
class ModelArguments:
    """Which model is trained."""

    model: str = field(metadata={"help": "LongVLM checkpoint: folder or Hub id."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of frozen weights; trained weights are float32."})
    load_in_4bit: bool = field(
        default=False, metadata={"help": "With train lora: load the LLM in 4 bits. Needs bitsandbytes."}
    )
    load_in_8bit: bool = field(
        default=False, metadata={"help": "With train lora: load the LLM in 8 bits. Needs bitsandbytes."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "sdpa, flash_attention_2, eager..."})


@dataclass
class DataArguments:
    """What the model is trained on."""

    train_data: list[str] = field(metadata={"help": "Files of rows (.json, .jsonl, .parquet), folders, Hub ids."})
    train_weights: list[float] | None = field(
        default=None, metadata={"help": "How often the rows of each source occur in an epoch. Default: 1."}
    )
    eval_data: list[str] | None = field(default=None, metadata={"help": "The same, for eval_strategy."})
    video_folders: list[str] = field(default_factory=list, metadata={"help": "Folders that hold the videos."})
    features: list[str] = field(
        default_factory=list, metadata={"help": "Instead of videos: folders made by `longvlm extract`."}
    )
    check_features: bool = field(
        default=True, metadata={"help": "Refuse features made by another model or with other settings."}
    )
    num_frames: int | None = field(
        default=None, metadata={"help": "Number of frames taken from each video; must match extraction."}
    )
    fps: float | None = field(
        default=None, metadata={"help": "Frames taken per second instead; must match extraction."}
    )
    max_frames: int | None = field(default=None, metadata={"help": "Maximum number of frames; must match extraction."})
    video_start: float | None = field(
        default=None, metadata={"help": "Take frames from this second of each video on only; must match extraction."}
    )
    video_end: float | None = field(
        default=None, metadata={"help": "Take frames before this second only; must match extraction."}
    )
    video_stream: int | None = field(
        default=None,
        metadata={"help": "Number of the video stream in files with several; must match extraction."},
    )
    max_length: int | None = field(
        default=2048, metadata={"help": "Maximum length of a row in tokens, including its videos."}
    )
    truncation: bool = field(
        default=False, metadata={"help": "Cut the text of longer rows at the end. Default: drop these rows."}
    )
    chat_template: str | None = field(default=None, metadata={"help": "Replaces the processor's chat template."})

    @property
    def video_options(self) -> dict[str, Any]:
        """The options of the video processor that were given."""
        names = ("num_frames", "fps", "max_frames", "video_start", "video_end", "video_stream")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass
class TuningArguments:
    """Which parts of the model are trained."""

    train: str = field(default="projector", metadata={"help": "projector, lora (of the LLM) or full."})
    train_vision_tower: bool = field(
        default=False, metadata={"help": "With projector or full: train the encoder as well."}
    )
    train_added_tokens: bool = field(
        default=True,
        metadata={"help": "With projector or lora: train the embeddings of the three video tokens as well."},
    )
    init_projector: str | None = field(
        default=None, metadata={"help": "projector.safetensors of an earlier training, to start from."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "The adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Names of linear layers of the LLM (q_proj v_proj ...). Default: all."}
    )
    merge_lora: bool = field(
        default=False, metadata={"help": "Merge the adapters at the end and save the whole model."}
    )

    def __post_init__(self):
        if self.train not in MODES:
            raise ValueError(f'`train` is "{self.train}"; use one of {", ".join(MODES)}')
        if self.train_vision_tower and self.train == "lora":
            raise ValueError("`train_vision_tower` works with `train` projector or full, not with lora")
        if self.merge_lora and self.train != "lora":
            raise ValueError(f"`merge_lora` needs `train` lora, not {self.train}")


OWN = {own.name for options in (ModelArguments, DataArguments, TuningArguments) for own in fields(options)}


def parse_arguments(arguments: list[str]) -> tuple[ModelArguments, DataArguments, TuningArguments, TrainingArguments]:
    """
    Reads the options of a training.

    Args:
        arguments: flags, optionally after a YAML or JSON file; flags take precedence over the file.

    Raises:
        ValueError: in one line: an unknown option (with a similar one), a missing or impossible value.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, TuningArguments, TrainingArguments))

    def error(message: str) -> NoReturn:
        raise ValueError(message)

    parser.error = error  # type: ignore[method-assign]
    # Otherwise several processes on a machine without accelerators would each train alone.
    parser.set_defaults(use_cpu=not torch.accelerator.is_available())
    if arguments and not arguments[0].startswith("-"):
        parser.set_defaults(**_options_of(arguments[0], parser))
        arguments = arguments[1:]
    for flag in arguments:
        if flag.startswith("--"):
            _refuse_old_name(flag.removeprefix("--").partition("=")[0], flag)
    model, data, tuning, training = parser.parse_args_into_dataclasses(args=arguments)
    # The collator needs columns that the model does not take, and evaluation needs only the loss.
    training.remove_unused_columns = False
    training.prediction_loss_only = True
    training.label_names = ["labels"]
    if training.ddp_find_unused_parameters is None:
        training.ddp_find_unused_parameters = False
    return model, data, tuning, training


def _options_of(file: str, parser: HfArgumentParser) -> dict[str, Any]:
    """The options in a file, each known to the parser, which no longer requires them as flags."""
    config = _read_config(file)
    known = {action.dest: action for action in parser._actions}
    for name in config:
        if name not in known:
            _refuse_old_name(name, f"{file}: {name}")
            close = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{file}: {name} is not a training option{hint}")
        known[name].required = known[name].required and config[name] is None
        if (
            isinstance(config[name], (list, dict))
            and known[name].nargs is None
            and known[name].type in (str, int, float)
        ):
            raise ValueError(f"{file}: {name} must be a single value, not {config[name]!r:.60}")
        if known[name].nargs == "+" and known[name].type in (str, int, float) and config[name] is not None:
            config[name] = _as_list(config[name], known[name], f"{file}: {name}")
    return config


def _refuse_old_name(name: str, where: str) -> None:
    if name in RENAMED:
        raise ValueError(f"{where} was renamed; give {RENAMED[name]}")


def _as_list(value: Any, option: Any, where: str) -> list:
    """A list with its values converted; argparse does that for flags only. A single value is a list of one."""
    values = []
    for item in value if isinstance(value, list) else [value]:
        try:
            if item is None or isinstance(item, (dict, list)):
                raise ValueError
            values.append(option.type(item))
        except ValueError:
            expected = "single values" if option.type is str else "numbers"
            raise ValueError(f"{where} must be a list of {expected}, not hold {item!r:.60}") from None
    return values


def _read_config(file: str) -> dict[str, Any]:
    config = parse_yaml(Path(file).read_bytes(), file)  # JSON is YAML
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold options, one per line, as name: value")
    return config


__all__ = ["DataArguments", "ModelArguments", "TuningArguments", "parse_arguments"]
