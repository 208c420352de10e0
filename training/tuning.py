"""What of a model is trained: the projector alone, LoRA adapters of the LLM, or all; and the file of a projector.

The embedding rows of the three video tokens are trained as a parameter of their own that stands in for them: the rest
of the table is frozen, has no gradient and no optimizer state. Its values are written back to the table, so what is
saved is an ordinary checkpoint.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

PROJECTOR_FILE = "projector.safetensors"
ROWS, ROWS_FILE = "added_rows", "added_rows.safetensors"
MODES = ("projector", "lora", "full")


@dataclass
class TuningArguments:
    """What is trained."""

    train: str = field(default="projector", metadata={"help": "projector, lora (of the LLM) or full."})
    train_vision_tower: bool = field(default=False, metadata={"help": "With projector or full: the encoder as well."})
    train_added_tokens: bool = field(
        default=True, metadata={"help": "With projector or lora: the embeddings of the three video tokens as well."}
    )
    init_projector: str | None = field(
        default=None, metadata={"help": "projector.safetensors of an earlier training, to start from."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their scale is lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the adapters."})
    lora_targets: list[str] | None = field(
        default=None, metadata={"help": "Names of linear layers of the LLM (q_proj v_proj ...); default: all."}
    )
    merge_lora: bool = field(default=False, metadata={"help": "Save the whole model at the end, adapters merged."})

    def __post_init__(self):
        if self.train not in MODES:
            raise ValueError(f'train: "{self.train}" is not known; use {", ".join(MODES)}')
        if self.train_vision_tower and self.train == "lora":
            raise ValueError("train_vision_tower: true goes with train: projector or full, not with lora")
        if self.merge_lora and self.train != "lora":
            raise ValueError(f"merge_lora: true needs train: lora, not {self.train}")


def prepare_model(model, arguments: TuningArguments) -> nn.Module:
    """
    Freezes what is not trained and makes what is float32; with LoRA, wraps the model.

    Args:
        model: a `LongVLMForConditionalGeneration`. Its `config.untrained_parts` lose what is trained now.

    Returns:
        The model to be trained: the same, or a `PeftModel`.
    """
    model.model.multi_modal_projector.float()  # with LoRA as well, whose copy of it is what is trained
    if arguments.init_projector is not None:
        load_projector(model, arguments.init_projector)
    trained = [model.model.multi_modal_projector]
    if arguments.train_vision_tower:
        trained.append(model.model.vision_tower)
    if arguments.train == "full":
        trained += [model.model.language_model, model.lm_head]
    model.requires_grad_(False)
    untrained = getattr(model.config, "untrained_parts", None)
    if untrained is not None:
        now = {"multi_modal_projector"} | ({"vision_tower"} if arguments.train_vision_tower else set())
        model.config.untrained_parts = [part for part in untrained if part not in now]
    if arguments.train == "lora":
        return _with_lora(model, arguments)
    for module in trained:
        module.float().requires_grad_(True)
    if arguments.train == "projector" and arguments.train_added_tokens:
        _add_rows(model)
    return model


def video_token_ids(config) -> list[int]:
    """Ids of `<vid_patch>`, `<vid_start>`, `<vid_end>`."""
    return [config.video_token_id, config.video_start_token_id, config.video_end_token_id]


# --- LoRA ---


def _with_lora(model, arguments: TuningArguments) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("train: lora needs the package peft: pip install peft") from None
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    unknown = set(arguments.lora_targets or ()) - linear
    if unknown:
        raise ValueError(
            f"lora_targets: the LLM has no {', '.join(sorted(unknown))}; it has {', '.join(sorted(linear))}"
        )
    names = "|".join(sorted(arguments.lora_targets or linear))
    embeddings = model.get_input_embeddings()
    table = next(name for name, module in model.named_modules() if module is embeddings).rsplit(".", 1)[-1]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        # The vision tower has layers of the same names.
        target_modules=rf".*\blanguage_model\..*\b({names})",
        modules_to_save=["multi_modal_projector"],
        trainable_token_indices={table: video_token_ids(model.config)} if arguments.train_added_tokens else None,
    )
    return get_peft_model(model, config)


# --- the rows of the added tokens ---


def _add_rows(model) -> None:
    embeddings, ids = model.get_input_embeddings(), video_token_ids(model.config)
    rows = embeddings.weight.detach()[ids].float().clone()
    embeddings.register_parameter(ROWS, nn.Parameter(rows))

    def replace(module, args, output: Tensor) -> Tensor:
        for number, token in enumerate(ids):
            row = getattr(module, ROWS)[number].to(output.dtype)
            output = torch.where((args[0] == token)[..., None], row, output)
        return output

    embeddings.register_forward_hook(replace)
    name = next(name for name, module in model.named_modules() if module is embeddings)
    # Neither written to a checkpoint nor missed in one.
    model._keys_to_ignore_on_save = [f"{name}.{ROWS}"]


@torch.no_grad()
def store_rows(model) -> None:
    """Writes the trained rows into the table."""
    embeddings = _embeddings(model)
    rows = getattr(embeddings, ROWS, None)
    if rows is not None:
        embeddings.weight[video_token_ids(model.config)] = rows.to(embeddings.weight.dtype)


def with_stored_rows(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """A state dict with the trained rows in the table, also where the output layer shares it."""
    key = next((name for name in state_dict if name.endswith(f".{ROWS}")), None)
    if key is None:
        return state_dict
    stored = {name: tensor for name, tensor in state_dict.items() if name != key}
    table = key.removesuffix(ROWS) + "weight"
    weight = stored[table].clone()
    weight[video_token_ids(config)] = state_dict[key].to(weight)
    stored[table] = weight
    if getattr(config, "tie_word_embeddings", False) and "lm_head.weight" in stored:
        stored["lm_head.weight"] = weight
    return stored


def save_rows(model, folder: str | Path) -> None:
    """Writes the rows `(3, LLM width)` beside a checkpoint as they are, float32: the table may be less exact."""
    rows = getattr(_embeddings(model), ROWS, None)
    if rows is not None:
        save_file({ROWS: rows.detach().cpu()}, Path(folder) / ROWS_FILE)


@torch.no_grad()
def restore_rows(model, folder: str | Path | None = None) -> None:
    """The other way, after the table was loaded; from what `save_rows` wrote into the checkpoint, if it did."""
    embeddings = _embeddings(model)
    rows = getattr(embeddings, ROWS, None)
    if rows is None:
        return
    if folder is not None and (Path(folder) / ROWS_FILE).is_file():
        with safe_open(Path(folder) / ROWS_FILE, framework="pt") as opened:
            rows.copy_(opened.get_tensor(ROWS))
    else:
        rows.copy_(embeddings.weight[video_token_ids(model.config)])


def _embeddings(model) -> nn.Module:
    return model.get_input_embeddings()


# --- the projector as a file ---


def save_projector(model, file: str | Path) -> None:
    """Writes the projector and the embeddings of the three video tokens: all that projector training changes.

    `file` is a safetensors file with `multi_modal_projector.*` and `added_tokens` `(3, LLM width)`.
    """
    store_rows(model)
    projector = model.base_model.multi_modal_projector.state_dict()
    tensors = {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
    tensors["added_tokens"] = _embeddings(model).weight[video_token_ids(model.config)]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    method = {name: getattr(model.config, name) for name in ("projector_type", "tokens_per_segment")}
    save_file(tensors, file, metadata={"format": "pt", "longvlm": json.dumps(method)})


@torch.no_grad()
def load_projector(model, file: str | Path) -> None:
    """Puts what `save_projector` wrote into a model; its other weights stay.

    Raises:
        ValueError: the file is no such file, or of a projector of another shape.
    """
    projector = model.base_model.multi_modal_projector
    wanted = {f"multi_modal_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    weight = _embeddings(model).weight
    ids = video_token_ids(model.config)
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as a projector: {' '.join(str(error).split())}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()} | {"added_tokens": (3, weight.shape[1])}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise ValueError(f"{file} does not fit the model: it has {found}, the model {shapes}")
    for name, tensor in wanted.items():
        tensor.copy_(tensors[name])
    weight[ids] = tensors["added_tokens"].to(weight)


def trainable_parameters(model) -> Sequence[str]:
    """Names of what is trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


__all__ = [
    "PROJECTOR_FILE",
    "TuningArguments",
    "load_projector",
    "prepare_model",
    "restore_rows",
    "save_projector",
    "save_rows",
    "store_rows",
    "trainable_parameters",
    "video_token_ids",
    "with_stored_rows",
]
