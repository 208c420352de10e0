"""Makes one LongVLM checkpoint of any vision encoder and any causal language model.

    assemble("openai/clip-vit-large-patch14", "HuggingFaceTB/SmolLM2-135M-Instruct", "my-longvlm")

The projector between them starts with random weights and has to be trained; everything else keeps its weights.
The result is checked before anything is written: its answers to text alone must be those of the language model.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from longvlm.conversion.checks import check_text, check_video, probe
from longvlm.conversion.language_model import load_language
from longvlm.conversion.parts import LanguagePart, VisionPart, as_dtype
from longvlm.conversion.progress import Progress, silent
from longvlm.conversion.vision_encoder import load_vision, untrained_vision
from longvlm.files import check_free, output_folder
from longvlm.processing.processing_longvlm import VIDEO_TOKENS
from longvlm.registration import (
    LongVLMConfig,
    LongVLMForConditionalGeneration,
    LongVLMProcessor,
    LongVLMVideoProcessor,
)

MAX_IMAGE_SIZE = 4096


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
    progress: Progress | None = None,
    **method,
) -> Path:
    """
    Assembles a checkpoint folder: model and processor, loadable with `from_pretrained` and `pipeline`.

    Args:
        vision: folder or Hub id of a vision encoder (CLIP, SigLIP, DINOv2, ViT...), `open_clip:MODEL/TAG_OR_FILE`, or
            `None` with `vision_config`.
        language: folder or Hub id of a causal language model, or the path of a GGUF file.
        out: folder to write; it appears only once everything has been checked.
        vision_config: configuration of an untrained encoder instead: a dict, a JSON file, or a folder with a
            `config.json`.
        gguf_file: name of the GGUF file within `language`.
        dtype: of all weights; `None` or "auto": the language model's own.
        image_size: side of the frames in pixels; `None`: as the encoder's image processor says.
        video_options: options of `LongVLMVideoProcessor` that replace the encoder's, for example `num_frames`.
        overwrite: replace a folder that is not empty.
        seed: of the random weights.
        progress: called as `progress(stage)` at each step.
        method: fields of `LongVLMConfig`, for example `frames_per_segment=10, tokens_per_segment=30`;
            `merge_num_heads` is by default the encoder's own number of heads (CLIP ViT-L/14: 16, as in the paper).

    Returns:
        `out` as a path.

    Raises:
        ValueError: the parts do not fit each other.
        OSError: a part cannot be loaded, or the folder cannot be written.
    """
    progress = progress or silent
    out = check_free(out, overwrite=overwrite)
    if (vision is None) == (vision_config is None):
        raise ValueError("give either `vision` or `vision_config`")
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
    """
    Model and processor made of the two parts. Their weights are used as they are, not copied.

    Args: as for [`assemble`].

    Raises:
        ValueError: the parts do not fit each other.
    """
    video_processor = _video_processor(vision, image_size, video_options or {})
    side = video_processor.size["height"]
    if side != vision.model.config.image_size:
        method.setdefault("image_size", side)
    method.setdefault("merge_num_heads", getattr(vision.model.config, "num_attention_heads", 16))

    tokenizer, llm = language.tokenizer, language.model
    if not isinstance(llm.get_output_embeddings(), nn.Linear):
        raise ValueError(f"{type(llm).__name__} has no linear output layer; it cannot be the language model")
    ids = _add_video_tokens(tokenizer, llm)
    # Names only: no path of this machine is published.
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
    return model, LongVLMProcessor.from_config(config, tokenizer, video_processor)


def _video_processor(vision: VisionPart, image_size: int | None, changes: dict[str, Any]) -> LongVLMVideoProcessor:
    options = dict(vision.image_options)
    if image_size is not None:
        if not 1 <= image_size <= MAX_IMAGE_SIZE:
            raise ValueError(f"`image_size` is {image_size}; it can be 1 to {MAX_IMAGE_SIZE} pixels")
        options.pop("crop_size", None)
        options["size"] = {"height": image_size, "width": image_size}
    if "preset" in changes:  # it decides how frames are resized, and the encoder only to what size
        encoder = LongVLMVideoProcessor(**options)
        options = {name: options[name] for name in options if name in ("image_mean", "image_std", "rescale_factor")}
        options["size"] = dict(encoder.size)
    return LongVLMVideoProcessor(**{**options, **changes})


def _add_video_tokens(tokenizer: PreTrainedTokenizerBase, llm) -> list[int]:
    """Adds the missing ones of the three tokens, and their rows; returns the ids of all."""
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

    # Tables are often larger than the vocabulary: they grow only if they are too small.
    if len(tokenizer) > rows:
        llm.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = tokenizer.convert_tokens_to_ids(list(VIDEO_TOKENS))
    new = sorted({*range(rows, len(tokenizer)), *(row for row in ids if row >= before)})
    with torch.no_grad():
        for layer in (llm.get_input_embeddings(), llm.get_output_embeddings()):
            # The mean of the existing rows, as in the original (which leaves that of <vid_patch> random: it is never
            # read).
            own = min(before, rows)
            layer.weight[new] = layer.weight[:own].mean(dim=0, dtype=torch.float32).to(layer.weight.dtype)
            if getattr(layer, "bias", None) is not None:
                layer.bias[new] = layer.bias[:own].mean()
    return ids


def _place_parts(config: LongVLMConfig, vision, llm, seed: int) -> LongVLMForConditionalGeneration:
    """The model around the given parts; only the projector takes new memory."""
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
    # The parts share the config objects of the whole, as in a loaded model.
    model.config.vision_config, model.config.text_config = vision.config, base.config
    model.tie_weights()
    model.generation_config = llm.generation_config
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    if left:
        raise ValueError(f"{type(llm).__name__} has no weights for {left[0]}; it cannot be the language model")
    return model.eval()
