"""Puts any vision encoder and any causal language model together as one LongVLM checkpoint.

    assemble("openai/clip-vit-large-patch14", "HuggingFaceTB/SmolLM2-135M-Instruct", "my-longvlm")

The projector between them starts with random weights and has to be trained; everything else is taken over as it is.
Before anything is written the result is checked: its answers to text alone must be those of the language model.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from longvlm.conversion.parts import (
    LanguagePart,
    VisionPart,
    as_dtype,
    load_language,
    load_vision,
    untrained_vision,
)
from longvlm.files import check_free, output_folder
from longvlm.processing.processing_longvlm import VIDEO_TOKENS
from longvlm.registration import (
    LongVLMConfig,
    LongVLMForConditionalGeneration,
    LongVLMProcessor,
    LongVLMVideoProcessor,
)


def assemble(
    vision: str | Path | None,
    language: str | Path,
    out: str | Path,
    *,
    vision_config: str | Path | dict | None = None,
    gguf_file: str | None = None,
    dtype: torch.dtype | str | None = None,
    image_size: int | None = None,
    video_options: dict[str, Any] | None = None,
    overwrite: bool = False,
    seed: int = 0,
    progress: Callable[[str], None] = lambda step: None,
    **method,
) -> Path:
    """Assembles a checkpoint folder: model and processor, loadable with `from_pretrained` and `pipeline`.

    Args:
        vision: folder or Hub id of a vision encoder (CLIP, SigLIP, DINOv2, ViT...), `open_clip:MODEL/TAG_OR_FILE`, or
            `None` with `vision_config`.
        language: folder or Hub id of a causal language model, or the path of a GGUF file.
        out: folder to write; it appears only when everything has been checked.
        vision_config: configuration of an untrained encoder instead: a dict, or a JSON file or folder that holds one.
        gguf_file: name of the GGUF file within `language`.
        dtype: of all weights; `None`: the language model's own.
        image_size: side of the frames in pixels; `None`: as the encoder's image processor says.
        video_options: options of `LongVLMVideoProcessor` that replace the encoder's, for example `num_frames`.
        overwrite: replace a folder that is not empty.
        seed: of the random weights.
        progress: called with one line per step.
        method: fields of `LongVLMConfig`, for example `frames_per_segment=10, tokens_per_segment=30`;
            `merge_num_heads` is by default the encoder's own number of heads (CLIP ViT-L/14: 16, as in the paper).

    Returns:
        `out` as a path.

    Raises:
        ValueError: parts that do not fit, named in one line.
        OSError: a part cannot be loaded, or the folder not be written.
    """
    out = check_free(out, overwrite=overwrite)
    if (vision is None) == (vision_config is None):
        raise ValueError("give either a vision encoder or a vision config")
    torch_dtype = as_dtype(dtype)

    progress("loading the language model")
    language_part = load_language(language, gguf_file=gguf_file, dtype=torch_dtype)
    torch_dtype = torch_dtype or language_part.model.dtype
    progress("loading the vision encoder")
    if vision_config is not None:
        vision_part = untrained_vision(vision_config, dtype=torch_dtype, seed=seed)
    else:
        assert vision is not None
        vision_part = load_vision(vision, dtype=torch_dtype)

    progress("putting them together")
    questions = probe(language_part)
    model, processor = join(
        vision_part, language_part, image_size=image_size, video_options=video_options, seed=seed, **method
    )
    progress("checking")
    check_text(model, type(language_part.model).__name__, *questions)
    check_video(model, processor)

    progress("writing")
    with output_folder(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return Path(out)


def join(
    vision: VisionPart,
    language: LanguagePart,
    *,
    image_size: int | None = None,
    video_options: dict[str, Any] | None = None,
    seed: int = 0,
    **method,
) -> tuple[LongVLMForConditionalGeneration, LongVLMProcessor]:
    """Model and processor made of the two parts. The parts' weights are taken over, not copied."""
    video_processor = _video_processor(vision, image_size, video_options or {})
    side = video_processor.size["height"]
    if side != vision.model.config.image_size:
        method.setdefault("image_size", side)
    method.setdefault("merge_num_heads", getattr(vision.model.config, "num_attention_heads", 16))

    tokenizer, llm = language.tokenizer, language.model
    if not isinstance(llm.get_output_embeddings(), nn.Linear):
        raise ValueError(f"{type(llm).__name__} has no linear output layer; it cannot be the language model")
    ids = _add_video_tokens(tokenizer, llm)
    # Only the names of parts on the Hub mean anything to somebody else.
    vision.model.config._name_or_path, llm.config._name_or_path = vision.name, language.name
    config = LongVLMConfig(
        vision_config=vision.model.config.to_dict(),
        text_config=llm.config.to_dict(),
        video_token_id=ids[0],
        video_start_token_id=ids[1],
        video_end_token_id=ids[2],
        tie_word_embeddings=bool(llm.config.tie_word_embeddings),
        lm_head_bias=llm.get_output_embeddings().bias is not None,
        untrained_parts=["multi_modal_projector"] if vision.trained else ["vision_tower", "multi_modal_projector"],
        **method,
    )
    model = _place_parts(config, vision.model, llm, seed)
    processor = LongVLMProcessor(
        video_processor=video_processor,
        tokenizer=tokenizer,
        frames_per_segment=config.frames_per_segment,
        tokens_per_segment=config.tokens_per_segment,
        num_global_tokens=config.num_global_tokens,
        patches_per_frame=config.patches_per_frame,
    )
    return model, processor


def _video_processor(vision: VisionPart, image_size: int | None, changes: dict[str, Any]) -> LongVLMVideoProcessor:
    options = dict(vision.image_options)
    if image_size is not None:
        options.pop("crop_size", None)
        options["size"] = {"height": image_size, "width": image_size}
    if "preset" in changes:  # it says how frames are brought to their size, and the encoder only what that size is
        encoder = LongVLMVideoProcessor(**options)
        options = {name: options[name] for name in options if name in ("image_mean", "image_std", "rescale_factor")}
        options["size"] = dict(encoder.size)
    return LongVLMVideoProcessor(**{**options, **changes})


def _add_video_tokens(tokenizer: PreTrainedTokenizerBase, llm) -> list[int]:
    """Adds the three tokens where they lack, and their rows; returns their ids."""
    before, rows = len(tokenizer), llm.get_input_embeddings().weight.shape[0]
    tokenizer.add_special_tokens({"additional_special_tokens": list(VIDEO_TOKENS)}, replace_extra_special_tokens=False)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    pad = tokenizer.pad_token_id
    if pad is not None:
        if llm.config.pad_token_id is None:
            llm.config.pad_token_id = pad
        if llm.generation_config is not None and llm.generation_config.pad_token_id is None:
            llm.generation_config.pad_token_id = pad

    # Tables are often larger than the vocabulary: grow them only if they are too small.
    if len(tokenizer) > rows:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(list(VIDEO_TOKENS))
    new = sorted({*range(rows, len(tokenizer)), *(row for row in ids if row >= before)})
    with torch.no_grad():
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            # The mean of the rows before, as in the original (which leaves that of <vid_patch> random: it is never
            # read).
            own = min(before, rows)
            layer.weight[new] = layer.weight[:own].mean(dim=0, dtype=torch.float32).to(layer.weight.dtype)
            if getattr(layer, "bias", None) is not None:
                layer.bias[new] = layer.bias[:own].mean()
    return ids


def _place_parts(config: LongVLMConfig, vision, llm, seed: int) -> LongVLMForConditionalGeneration:
    """The whole model around the given parts; only the projector takes new memory."""
    dtype = llm.dtype
    with torch.device("meta"):
        model = LongVLMForConditionalGeneration(config)
    base = llm.base_model
    if type(base) is not type(model.model.language_model):
        raise ValueError(
            f"{type(llm).__name__} is built around {type(base).__name__}, but AutoModel gives "
            f"{type(model.model.language_model).__name__}; it cannot be the language model"
        )
    model.model.vision_tower = vision
    model.model.language_model = base
    model.lm_head = llm.get_output_embeddings()
    projector = model.model.multi_modal_projector.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector.apply(model._init_weights)
    model.to(dtype)
    model.config.dtype = dtype
    # One config object for the whole and its parts, as when the model is loaded.
    model.config.vision_config, model.config.text_config = vision.config, base.config
    model.tie_weights()
    model.generation_config = llm.generation_config
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ValueError(f"{type(llm).__name__} does not fit: {left[0]} has no weights")
    return model.eval()


@torch.no_grad()
def probe(language: LanguagePart) -> tuple[torch.Tensor, torch.Tensor]:
    """A text and the language model's own logits for it, before anything is changed."""
    text = "A man opens the door of a car, looks around, and walks to the sea. What does he do first?"
    ids = language.tokenizer(text, return_tensors="pt").input_ids
    return ids, language.model(input_ids=ids).logits


@torch.no_grad()
def check_text(model, language_class: str, input_ids: torch.Tensor, expected: torch.Tensor) -> None:
    config = model.config
    video_token_ids = (config.video_token_id, config.video_start_token_id, config.video_end_token_id)
    logits = model(input_ids=input_ids).logits[..., : expected.shape[-1]].float()
    expected = expected[..., : logits.shape[-1]].float()
    # The three tokens may have taken rows that were there, but unused.
    taken = [row for row in video_token_ids if row < expected.shape[-1]]
    logits[..., taken] = expected[..., taken]
    if not torch.isfinite(expected).all():
        raise ValueError(
            f"{language_class} gives logits that are not finite; its weights are broken, or try a wider dtype"
        )
    # Of all logits together: in half precision a single one may be rounded far away.
    difference = ((logits - expected).norm() / expected.norm().clamp(min=1e-6)).item()
    if difference > (1e-4 if model.dtype == torch.float32 else 5e-2):
        raise ValueError(
            f"{language_class} does more than a linear layer after its last hidden states (scaling, soft capping): "
            f"text alone gives logits that differ by {difference:.1%}; this language model is not supported"
        )


@torch.no_grad()
def check_video(model, processor) -> None:
    """One pass with a short generated clip: every part must fit every other."""
    size = processor.video_processor.size
    frames = torch.randint(0, 256, (2, 3, size["height"], size["width"]), dtype=torch.uint8)
    inputs = processor(text=f"{processor.video_token} What is this?", videos=[list(frames)], return_tensors="pt")
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
    if not torch.isfinite(model(**inputs).logits).all():
        raise ValueError("the assembled model gives values that are not finite for a video; try a wider dtype")
