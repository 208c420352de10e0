"""Trains the embeddings of the three video tokens while the rest of the embedding table stays frozen.

The three rows are a parameter of their own that stands in for them: the table has no gradient and no optimizer state.
Their values are written back to the table, so that what is saved is an ordinary checkpoint.

peft's TrainableTokens does the same, and with LoRA we use it (see `tuning.py`). Not in projector training, since by
its own docstring training with FSDP or DeepSpeed "might not yet be fully supported", and since it has no
`modules_to_save`: the projector could not be trained and saved along with it.
"""

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longvlm.files import atomic_write

PARAMETER, FILE = "added_rows", "added_rows.safetensors"  # both are found in checkpoints


def video_token_ids(config) -> list[int]:
    """The ids of `<vid_patch>`, `<vid_start>` and `<vid_end>`."""
    return [config.video_token_id, config.video_start_token_id, config.video_end_token_id]


def train_token_rows(model) -> None:
    """Makes the three embeddings trainable; what else is trained does not change."""
    embeddings, ids = model.get_input_embeddings(), video_token_ids(model.config)
    embeddings.register_parameter(PARAMETER, nn.Parameter(embeddings.weight.detach()[ids].float().clone()))

    def replace(module, args, output: Tensor) -> Tensor:
        for number, token in enumerate(ids):
            trained = getattr(module, PARAMETER)[number].to(output.dtype)
            output = torch.where((args[0] == token)[..., None], trained, output)
        return output

    embeddings.register_forward_hook(replace)
    name = next(name for name, module in model.named_modules() if module is embeddings)
    # Neither written to a checkpoint nor missing from one.
    model._keys_to_ignore_on_save = [f"{name}.{PARAMETER}"]


@torch.no_grad()
def write_to_table(model) -> None:
    """Copies the trained embeddings into the table, if there are any."""
    embeddings = model.get_input_embeddings()
    trained = getattr(embeddings, PARAMETER, None)
    if trained is not None:
        embeddings.weight[video_token_ids(model.config)] = trained.to(embeddings.weight.dtype)


def with_token_rows_in_table(state_dict: dict[str, Tensor], config) -> dict[str, Tensor]:
    """A state dict with the trained embeddings in the table, also where the output layer shares it."""
    key = next((name for name in state_dict if name.endswith(f".{PARAMETER}")), None)
    if key is None:
        return state_dict
    written = {name: tensor for name, tensor in state_dict.items() if name != key}
    table = key.removesuffix(PARAMETER) + "weight"
    weight = written[table].clone()
    weight[video_token_ids(config)] = state_dict[key].to(weight)
    written[table] = weight
    if getattr(config, "tie_word_embeddings", False) and "lm_head.weight" in written:
        written["lm_head.weight"] = weight
    return written


def save_token_rows(model, folder: str | Path) -> None:
    """Writes the trained embeddings `(3, LLM width)` into a checkpoint in float32: the table may be less exact."""
    trained = getattr(model.get_input_embeddings(), PARAMETER, None)
    if trained is not None:
        with atomic_write(Path(folder) / FILE) as partial:
            save_file({PARAMETER: trained.detach().cpu()}, partial)


@torch.no_grad()
def restore_token_rows(model, folder: str | Path | None = None) -> None:
    """Restores the trained embeddings after a checkpoint was loaded: from the file of `save_token_rows` if the
    checkpoint has it, otherwise from the table."""
    embeddings = model.get_input_embeddings()
    trained = getattr(embeddings, PARAMETER, None)
    if trained is None:
        return
    if folder is not None and (Path(folder) / FILE).is_file():
        with safe_open(Path(folder) / FILE, framework="pt") as opened:
            trained.copy_(opened.get_tensor(PARAMETER))
    else:
        trained.copy_(embeddings.weight[video_token_ids(model.config)])


__all__ = [
    "restore_token_rows",
    "save_token_rows",
    "train_token_rows",
    "video_token_ids",
    "with_token_rows_in_table",
    "write_to_table",
]
