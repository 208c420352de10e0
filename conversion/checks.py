"""Checks of a converted checkpoint: parts that fit, the LLM's own answers to text, every tensor, a forward pass.

`check_forward` runs a checkpoint folder without loading it: each linear layer and embedding gets its weights from the
files when its turn comes and gives them back, so a 7B model runs within about a gigabyte, in float32.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import PrefixedDataset, set_module_tensor_to_device
from torch import Tensor, nn

from longvlm.conversion.key_maps import first_few
from longvlm.conversion.parts import LanguagePart
from longvlm.conversion.weights import TensorInfo, Weights
from longvlm.registration import LongVLMConfig, LongVLMForConditionalGeneration, LongVLMProcessor

# --- parts ---


def check_projector(shape: Sequence[int], *, source, vision, vision_width: int, text_width: int) -> None:
    """
    Args:
        shape: of the projector's first layer's weights, `(outputs, inputs)`.
        source: where the projector comes from, for the message.
        vision: where the vision encoder comes from.
        vision_width: width of its features.
        text_width: width of the language model's embeddings.

    Raises:
        ValueError: the projector does not fit between the two.
    """
    outputs, inputs = shape
    if inputs != vision_width:
        raise ValueError(
            f"the projector of {source} takes features of width {inputs}, but {vision} gives {vision_width}; give the "
            "encoder that it was trained with as `vision`"
        )
    if outputs != text_width:
        raise ValueError(
            f"the projector of {source} gives {outputs} channels, but the language model has {text_width}"
        )


# --- a model in memory ---


@torch.no_grad()
def probe(language: LanguagePart) -> tuple[Tensor, Tensor]:
    """A text and the language model's own logits for it, before anything is changed: `(1, n)` and `(1, n, vocab)`."""
    text = "A man opens the door of a car, looks around, and walks to the sea. What does he do first?"
    ids = language.tokenizer(text, return_tensors="pt").input_ids
    return ids, language.model(input_ids=ids).logits


@torch.no_grad()
def check_text(model, language_class: str, input_ids: Tensor, expected: Tensor) -> None:
    """
    The model must answer to text alone as its language model did (see `probe`).

    Raises:
        ValueError: the logits differ, or are not finite.
    """
    config = model.config
    video_token_ids = (config.video_token_id, config.video_start_token_id, config.video_end_token_id)
    logits = model(input_ids=input_ids).logits[..., : expected.shape[-1]].float()
    expected = expected[..., : logits.shape[-1]].float()
    # The three tokens may have taken rows that existed, but were unused.
    taken = [row for row in video_token_ids if row < expected.shape[-1]]
    logits[..., taken] = expected[..., taken]
    if not torch.isfinite(expected).all():
        raise ValueError(
            f"{language_class} gives logits that are not finite; its weights are damaged, or `dtype` is too narrow"
        )
    # Of all logits together: in half precision a single one may be rounded far away.
    difference = ((logits - expected).norm() / expected.norm().clamp(min=1e-6)).item()
    if difference > (1e-4 if model.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{language_class} does more than a linear layer after its last hidden states (scaling, soft capping): "
            f"text alone gives logits that differ by {difference:.1%}; this language model is not supported"
        )


@torch.no_grad()
def check_video(model, processor: LongVLMProcessor) -> None:
    """
    One pass with a generated clip of two frames and a question: every part must fit every other.

    Raises:
        ValueError: the logits are not finite.
    """
    size = processor.video_processor.size
    shape = (2, 3, size["height"], size["width"])
    frames = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inputs = processor(text=f"{processor.video_token} What is this?", videos=[list(frames)], return_tensors="pt")
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
    if not torch.isfinite(model(**inputs).logits).all():
        raise ValueError(
            "the model gives values that are not finite for a video; one of its sources is damaged, or `dtype` is "
            "too narrow (try float32)"
        )


# --- a folder ---


def expected_tensors(config: LongVLMConfig) -> dict[str, TensorInfo]:
    """Every tensor that a checkpoint with this configuration holds."""
    with torch.device("meta"):
        state = LongVLMForConditionalGeneration(config).state_dict()
    return {name: TensorInfo.of(tensor) for name, tensor in state.items()}


def refuse_differences(found: Mapping[str, TensorInfo], config: LongVLMConfig, what: str) -> None:
    """
    Raises:
        ValueError: a tensor is missing or unexpected, or does not have the shape that the configuration gives it.
    """
    expected = expected_tensors(config)
    differences = {
        "missing": set(expected) - set(found),
        "unexpected": set(found) - set(expected),
        "reshaped": {
            f"{name} {found[name].shape} instead of {expected[name].shape}"
            for name in set(found) & set(expected)
            if found[name].shape != expected[name].shape
        },
    }
    said = [f"{len(names)} {kind}: {first_few(sorted(names))}" for kind, names in differences.items() if names]
    if said:
        raise ValueError(f"{what} does not fit its configuration; {'; '.join(said)}")


def check_tensors(folder: Path, config: LongVLMConfig) -> int:
    """
    Reads back the headers of what was written to `folder`.

    Returns:
        The number of tensors.

    Raises:
        ValueError: some are missing, unexpected, or of another shape.
    """
    weights = Weights(folder)
    refuse_differences(weights.infos, config, "the checkpoint that was written")
    return len(weights)


def check_forward(folder: Path) -> None:
    """
    As `check_video`, of a checkpoint folder, in bounded memory.

    Raises:
        ValueError: the logits are not finite.
    """
    check_video(_streaming_model(folder), LongVLMProcessor.from_pretrained(folder))


def _streaming_model(folder: Path) -> LongVLMForConditionalGeneration:
    with init_empty_weights(include_buffers=False):
        model = LongVLMForConditionalGeneration(LongVLMConfig.from_pretrained(folder)).float().eval()
    weights = Weights(folder)  # accelerate converts each tensor to the model's dtype
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
            if full in weights:
                set_module_tensor_to_device(model, full, "cpu", value=weights[full])
    return model
