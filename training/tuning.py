"""Which parts of a model are trained: the projector alone, LoRA adapters of the LLM, or everything; and the projector
as a file of its own."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from longvlm.files import atomic_write
from longvlm.training.added_token_rows import train_token_rows, video_token_ids, write_to_table
from longvlm.training.arguments import TuningArguments

PROJECTOR_FILE = "projector.safetensors"


def prepare_model(model, arguments: TuningArguments) -> nn.Module:
    """
    Freezes what is not trained, turns what is trained into float32, and with LoRA wraps the model.

    Args:
        model: a `LongVLMForConditionalGeneration`. The parts that are now trained are removed from its
            `config.untrained_parts`.

    Returns:
        The model to train: the same, or a `PeftModel`.

    Raises:
        ValueError: see `check_trainable`; or the file of a projector does not fit.
        ImportError: peft is needed and missing.
    """
    check_trainable(model, arguments)
    model.model.multi_modal_projector.float()  # also with LoRA, which trains a copy of it
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
        train_token_rows(model)
    return model


def check_trainable(model, arguments: TuningArguments) -> None:
    """
    Raises:
        ValueError: the weights are quantised, and cannot be trained like this.
    """
    if not getattr(model, "is_quantized", False):
        return
    if arguments.train != "lora":
        raise ValueError(
            f"`train` {arguments.train} needs weights that are not quantised; train lora, or load them as they are"
        )
    if arguments.merge_lora:
        raise ValueError(
            "`merge_lora` would round the adapters to the quantised weights; leave it out: the adapter's folder loads "
            "as it is, quantised or not"
        )
    parameters = model.model.multi_modal_projector.parameters()
    if not all(parameter.is_floating_point() and parameter.element_size() > 1 for parameter in parameters):
        raise ValueError(
            "the projector is quantised, but it is to be trained; name it in llm_int8_skip_modules of "
            'quantization_config: "model.multi_modal_projector"'
        )


def _with_lora(model, arguments: TuningArguments) -> nn.Module:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise ImportError("`train` lora needs the package peft: pip install peft") from None
    linear = {
        name.rsplit(".", 1)[-1]
        for name, module in model.model.language_model.named_modules()
        if isinstance(module, nn.Linear)
    }
    unknown = set(arguments.lora_targets or ()) - linear
    if unknown:
        raise ValueError(
            f"`lora_targets`: the LLM has no {', '.join(sorted(unknown))}; use some of {', '.join(sorted(linear))}"
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


def trainable_parameters(model) -> list[str]:
    """The names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


# --- the projector as a file ---


def save_projector(model, file: str | Path) -> None:
    """Writes the projector and the embeddings of the three video tokens: everything that projector training changes.

    `file` is a safetensors file with `multi_modal_projector.*` and `added_tokens` `(3, LLM width)`.
    """
    write_to_table(model)
    projector = model.base_model.multi_modal_projector.state_dict()
    tensors = {f"multi_modal_projector.{name}": tensor for name, tensor in projector.items()}
    tensors["added_tokens"] = model.get_input_embeddings().weight[video_token_ids(model.config)]
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    method = {name: getattr(model.config, name) for name in ("projector_type", "tokens_per_segment")}
    with atomic_write(file) as partial:
        save_file(tensors, partial, metadata={"format": "pt", "longvlm": json.dumps(method)})


@torch.no_grad()
def load_projector(model, file: str | Path) -> None:
    """Loads a file of `save_projector` into a model; the other weights stay.

    Raises:
        ValueError: it is not such a file, or the projector has another shape.
    """
    projector = model.base_model.multi_modal_projector
    expected = {f"multi_modal_projector.{name}": tensor for name, tensor in projector.state_dict().items()}
    weight = model.get_input_embeddings().weight
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as a projector: {' '.join(str(error).split())}") from None
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()} | {"added_tokens": (3, weight.shape[1])}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != shapes:
        raise ValueError(f"{file} does not fit the model: it has {found}, the model {shapes}")
    for name, tensor in expected.items():
        tensor.copy_(tensors[name])
    weight[video_token_ids(model.config)] = tensors["added_tokens"].to(weight)


__all__ = [
    "PROJECTOR_FILE",
    "check_trainable",
    "load_projector",
    "prepare_model",
    "save_projector",
    "trainable_parameters",
]
