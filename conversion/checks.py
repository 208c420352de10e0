"""Checks of a checkpoint folder that was written: every tensor in its place, and a forward pass in bounded memory.

The pass does not load the model: each linear layer and embedding gets its weights from the files when its turn comes
and gives them back, so a model of 7B is run within about a gigabyte, in float32.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import PrefixedDataset, set_module_tensor_to_device
from torch import Tensor, nn

from longvlm.conversion.shards import TensorReader, compare, some
from longvlm.registration import LongVLMConfig, LongVLMForConditionalGeneration, LongVLMProcessor


def expected_tensors(config: LongVLMConfig) -> Mapping[str, Tensor]:
    """Every tensor that a checkpoint with this configuration holds; without memory (`meta`)."""
    with torch.device("meta"):
        return LongVLMForConditionalGeneration(config).state_dict()


def check_tensors(folder: Path, config: LongVLMConfig) -> int:
    """Reads back what lies in `folder`; returns the number of tensors.

    Raises:
        ValueError: some are missing, unexpected, or of another shape.
    """
    reader = TensorReader(folder)
    refuse_differences(compare(reader.infos, expected_tensors(config)), "the checkpoint that was written")
    return len(reader.infos)


def refuse_differences(differences: dict[str, list[str]], what: str) -> None:
    """Raises `ValueError` with the names, if there are any differences (see `shards.compare`)."""
    found = [f"{len(names)} {kind}: {some(names)}" for kind, names in differences.items() if names]
    if found:
        raise ValueError(f"{what} does not fit its configuration; {'; '.join(found)}")


@torch.no_grad()
def check_forward(folder: Path) -> None:
    """One pass with a generated clip of two frames and a question; nothing but finite numbers may come out.

    Raises:
        ValueError: something else came out.
    """
    processor = LongVLMProcessor.from_pretrained(folder)
    model = _streaming_model(folder)
    size = processor.video_processor.size
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, size["height"], size["width"])
    frames = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    inputs = processor(text=f"{processor.video_token} What is this?", videos=[list(frames)], return_tensors="pt")
    if not torch.isfinite(model(**inputs).logits).all():
        raise ValueError(
            "the converted model gives values that are not finite for a video; one of the sources is broken "
            "(or, if --dtype is float16, try a wider one)"
        )


class _Weights(Mapping):
    """The tensors of a folder in float32, read when they are asked for."""

    def __init__(self, reader: TensorReader):
        self.reader = reader

    def __getitem__(self, name: str) -> Tensor:
        return self.reader.get(name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.reader)

    def __len__(self) -> int:
        return len(self.reader.infos)


def _streaming_model(folder: Path) -> LongVLMForConditionalGeneration:
    with init_empty_weights(include_buffers=False):
        model = LongVLMForConditionalGeneration(LongVLMConfig.from_pretrained(folder)).float().eval()
    weights = _Weights(TensorReader(folder))
    for name, module in model.named_modules():
        # The projector is asked for its device, and encoders read their position embeddings themselves.
        of_llm = name.startswith(("model.language_model.", "lm_head"))
        large = isinstance(module, nn.Linear) and "multi_modal_projector" not in name
        if large or (of_llm and isinstance(module, nn.Embedding)):
            mine = PrefixedDataset(weights, f"{name}.")
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True, weights_map=mine))
            continue
        for key, _ in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            full = f"{name}.{key}" if name else key
            if full in weights.reader:
                set_module_tensor_to_device(model, full, "cpu", value=weights[full])
    return model
