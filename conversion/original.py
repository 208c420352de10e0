"""Converts a checkpoint of the released LongVLM code to one of this package.

    convert_original("llama-7b", "longvlm-7b", delta="LLaVA-Lightning-7B-delta-v1-1",
                     projector="mm_projector.bin", vision="openai/clip-vit-large-patch14")

Tensors are read, summed and written one by one. All shapes are compared before the first one is read, and the folder
appears only once the written files have been checked and run.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, GenerationConfig, LlamaConfig

from longvlm.checkpoint_faults import check_size, naming_files
from longvlm.conversion.checks import check_forward, check_projector, check_tensors, refuse_differences
from longvlm.conversion.delta import DeltaSum, is_delta
from longvlm.conversion.hub import local_folder, short_name
from longvlm.conversion.key_maps import LLM, MM_PROJECTOR, ORIGINAL, PROJECTOR, VISION, first_few, map_names
from longvlm.conversion.original_features import LAYOUTS, layout_of_file
from longvlm.conversion.original_tokenizer import add_tokens, load_original_tokenizer
from longvlm.conversion.parts import as_dtype
from longvlm.conversion.progress import Progress, silent
from longvlm.conversion.vision_encoder import load_vision
from longvlm.conversion.weights import TensorInfo, Weights, WeightsWriter
from longvlm.files import check_free, output_folder, read_json_object
from longvlm.modeling_longvlm.remote_code import save_code_and_config
from longvlm.processing.processing_longvlm import VIDEO_TOKENS
from longvlm.registration import (
    LongVLMConfig,
    LongVLMForConditionalGeneration,
    LongVLMProcessor,
    LongVLMVideoProcessor,
)

CHAT_TEMPLATE = "long_vlm_v1"  # the prompt of the original's evaluation
NUM_FRAMES = 100
# The original's merging: one cosine of the mean over 16 slices, segments of 10 frames, 5 global tokens first.
METHOD: dict[str, Any] = {
    "frames_per_segment": 10,
    "num_global_layers": 5,
    "merge_similarity": "mean_head",
    "merge_num_heads": 16,
    "merge_order": "matching",
    "global_placement": "prefix",
    "vision_feature_layer": -2,
}
EMBEDDINGS, LM_HEAD = LLM + "embed_tokens.weight", "lm_head.weight"
# The fields of the original's config.json that are the language model's; the rest are LLaVA's.
LLAMA_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "initializer_range",
    "rope_theta",
    "rope_scaling",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@dataclass
class ConversionReport:
    """What the checkpoint is made of: every tensor is accounted for."""

    written: int = 0
    num_bytes: int = 0
    layout: str = "paper"
    tokens_per_video: int = 0
    left_out: list[str] = field(default_factory=list)
    replaced: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    forward_checked: bool = False

    def __str__(self) -> str:
        # Grouped: "32 x rotary_emb.inv_freq", not 32 names.
        kinds = Counter(name.split("self_attn.")[-1] for name in self.left_out)
        left_out = [f"{count} x {kind}" if count > 1 else kind for kind, count in kinds.items()]
        lists = {
            "left out": left_out,
            "replaced by mm_projector.bin": self.replaced,
            "reshaped": self.reshaped,
            "missing": self.missing,
            "unexpected": self.unexpected,
        }
        lines = [
            f"{self.written} tensors, {self.num_bytes / 1e9:.2f} GB, every one accounted for",
            *(f"{title}: {', '.join(names) or 'none'}" for title, names in lists.items()),
            f"layout: {self.layout}, {self.tokens_per_video} tokens for a video of {NUM_FRAMES} frames",
            f"forward pass on a generated clip: {'done' if self.forward_checked else 'not run'}",
        ]
        return "\n".join(lines)


@dataclass
class _LazyTensor:
    """A tensor to be written: its shape and dtype, and a function that reads it."""

    info: TensorInfo
    read: Callable[[], Tensor]


def convert_original(
    llm: str | Path,
    out: str | Path,
    *,
    delta: str | Path | None = None,
    projector: str | Path | None = None,
    vision: str | Path | None = None,
    layout: str | None = None,
    feature_file: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    forward_check: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ConversionReport:
    """
    Writes model and processor to `out`, loadable with `from_pretrained` and `pipeline`.

    Args:
        llm: folder or Hub id of the base LLaMA (with `delta`), or of a complete checkpoint: LLM with LLaVA's changes,
            with or without the projector and the three video tokens.
        out: folder to write; it appears only once everything has been checked.
        delta: folder or Hub id of LLaVA's delta to the base.
        projector: `mm_projector.bin` of a training with the released code: projector and embedding table. They
            replace those of the other files.
        vision: folder or Hub id of the CLIP model that the features were made with.
        layout: `"paper"`: M = 30, 305 tokens for a video of 100 frames; `"released"`: the schedule of the released
            script, which leaves 20 tokens per segment (of 256 patches per frame), 205 per video. `None`: the layout of
            `feature_file`, or the paper's.
        feature_file: local features (`.pkl`) that the checkpoint has to match.
        dtype: of all weights; `None` or `"auto"`: each as in its source, so nothing is lost.
        max_shard_bytes: maximum size of the files that are written.
        forward_check: run the result on a generated clip, in bounded memory (a 7B takes minutes on a CPU).
        overwrite: replace a folder that is not empty.
        progress: called as `progress(stage)` at each step; while weights are written as `progress(stage, bytes,
            total)`.

    Returns:
        What the checkpoint is made of; `str()` of it is text to show.

    Raises:
        ValueError: the sources do not fit each other, or something is missing.
        OSError: a source cannot be loaded, or the folder cannot be written.
    """
    progress = progress or silent
    out = check_free(out, overwrite=overwrite)
    if vision is None:
        raise ValueError("the original's checkpoints contain no vision encoder; give the CLIP model as `vision`")
    target = as_dtype(dtype)
    report = ConversionReport(layout=_choose_layout(layout, feature_file))

    progress("comparing the sources")
    llm_folder = local_folder(llm)
    tensors = _llm_tensors(llm_folder, None if delta is None else local_folder(delta), report)
    if projector is not None:
        _replace_by_projector(tensors, Path(projector), report)
    tokenizer, ids = _tokenizer_for(local_folder(llm if delta is None else delta), tensors)
    text_config = _text_config(llm_folder, tensors)
    text_config._name_or_path = short_name(llm)
    if projector is None and f"{PROJECTOR}linear_1.weight" not in tensors:
        raise ValueError(
            f"{llm} contains no projector (model.mm_projector.weight); give mm_projector.bin as `projector`"
        )
    _grow_lm_head(tensors, report)

    progress("loading the vision encoder")
    vision_part = load_vision(vision, dtype=target)
    vision_config = vision_part.model.config
    check_projector(
        tensors[f"{PROJECTOR}linear_1.weight"].info.shape,
        source=projector or delta or llm,
        vision=vision,
        vision_width=vision_config.hidden_size,
        text_width=text_config.hidden_size,
    )
    vision_config._name_or_path = vision_part.name
    vision_state = vision_part.model.state_dict()
    tensors |= {
        VISION + name: _LazyTensor(TensorInfo.of(tensor), partial(vision_state.__getitem__, name))
        for name, tensor in vision_state.items()
    }

    video_processor = _video_processor(vision_part.image_options)
    side = video_processor.size["height"]
    config = LongVLMConfig(
        vision_config=vision_config.to_dict(),
        text_config=text_config.to_dict(),
        video_token_id=ids[0],
        video_start_token_id=ids[1],
        video_end_token_id=ids[2],
        tie_word_embeddings=False,
        image_size=None if side == vision_config.image_size else side,
        **METHOD,
        **LAYOUTS[report.layout].method,
    )
    report.tokens_per_video = config.num_video_tokens(NUM_FRAMES)
    config.dtype = target or tensors[LM_HEAD].info.dtype
    processor = LongVLMProcessor.from_config(config, tokenizer, video_processor, chat_template=CHAT_TEMPLATE)
    plan = {name: TensorInfo(t.info.shape, target or t.info.dtype) for name, t in tensors.items()}
    refuse_differences(plan, config, "what the sources hold")

    with output_folder(out, overwrite=overwrite) as folder:
        total = sum(info.num_bytes for info in plan.values())
        with WeightsWriter(folder, plan, max_shard_bytes=max_shard_bytes) as writer:
            for name, info in plan.items():
                progress("writing", report.num_bytes, total)
                writer.write(name, tensors[name].read().to(info.dtype))
                report.num_bytes += info.num_bytes
            progress("writing", report.num_bytes, total)
        _save_rest(folder, config, llm_folder, processor)
        tensors.clear()  # frees the vision encoder, and closes the sources
        del vision_part, vision_state
        progress("checking")
        _check_tokens(folder, processor)
        report.written = check_tensors(folder, config)
        if forward_check:
            progress("running it on a generated clip")
            check_forward(folder)
            report.forward_checked = True
    return report


# --- the language model ---


def _llm_tensors(llm: Path, delta: Path | None, report: ConversionReport) -> dict[str, _LazyTensor]:
    stored = Weights(llm)
    if is_delta(stored):
        remedy = "swap `llm` and `delta`" if delta is not None else "give it as `delta`, and the base LLaMA as `llm`"
        raise ValueError(f"`llm` {llm} is a delta, not a whole model; {remedy}")
    whole: Weights | DeltaSum = stored
    if delta is not None:
        changes = Weights(delta)
        if not is_delta(changes):
            raise ValueError(f"`delta` {delta} is a whole model, not a delta; give it as `llm`, and leave `delta` out")
        whole = DeltaSum(stored, changes)
    tensors: dict[str, _LazyTensor] = {}
    for old, new in map_names(whole, ORIGINAL, llm if delta is None else delta).items():
        if new is None:
            report.left_out.append(old)
        else:
            tensors[new] = _lazy(whole, old)
    for name in (EMBEDDINGS, LM_HEAD):
        if name not in tensors:
            raise ValueError(f"{llm} contains no {name.removeprefix(LLM)}; give a complete LLaMA")
    return tensors


def _lazy(weights: Weights | DeltaSum, name: str) -> _LazyTensor:
    return _LazyTensor(weights.infos[name], partial(weights.__getitem__, name))


def _replace_by_projector(tensors: dict[str, _LazyTensor], file: Path, report: ConversionReport) -> None:
    if not file.is_file():
        raise ValueError(f"`projector` {file} does not exist; give the mm_projector.bin of a training")
    stored = Weights(file)
    replacements = map_names(stored, MM_PROJECTOR, file)
    new = {name: old for old, name in replacements.items() if name is not None}
    if f"{PROJECTOR}linear_1.weight" not in new or f"{PROJECTOR}linear_1.bias" not in new:
        raise ValueError(f"{file} contains no model.mm_projector.weight and .bias, but {first_few(stored)}")
    if EMBEDDINGS in new:
        (rows, width), (own_rows, own_width) = stored.infos[new[EMBEDDINGS]].shape, tensors[EMBEDDINGS].info.shape
        if width != own_width:
            raise ValueError(f"{file} has embeddings of width {width}, but the language model has {own_width}")
        if rows != own_rows:
            report.reshaped.append(f"model.embed_tokens.weight ({own_rows}, {width}) -> ({rows}, {width})")
    for name, old in new.items():
        if name in tensors:
            report.replaced.append(old)
        tensors[name] = _lazy(stored, old)


def _grow_lm_head(tensors: dict[str, _LazyTensor], report: ConversionReport) -> None:
    """The original saves no output rows for the video tokens: they become the mean of the others."""
    before, rows = tensors[LM_HEAD], tensors[EMBEDDINGS].info.shape[0]
    own, width = before.info.shape
    if own == rows:
        return
    report.reshaped.append(f"lm_head.weight ({own}, {width}) -> ({rows}, {width})")

    def read() -> Tensor:
        table = before.read()
        mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
        return torch.cat([table, mean.expand(rows - own, -1)])

    tensors[LM_HEAD] = _LazyTensor(TensorInfo((rows, width), before.info.dtype), read)


# --- what goes with what ---


def _choose_layout(layout: str | None, feature_file: str | Path | None) -> str:
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f'`layout` "{layout}" is not known; use one of {", ".join(LAYOUTS)}')
    if feature_file is None:
        return layout or "paper"
    fitting = layout_of_file(feature_file)
    if layout not in (None, fitting):
        raise ValueError(f"{feature_file} has the layout {fitting}, not {layout}; leave `layout` out")
    return fitting


def _tokenizer_for(folder: Path, tensors: dict[str, _LazyTensor]):
    """The tokenizer with the three video tokens, and their ids: the last rows of the embedding table."""
    with naming_files(folder, "tokenizer"):
        tokenizer = load_original_tokenizer(folder)
    before = len(tokenizer)
    ids = add_tokens(tokenizer, VIDEO_TOKENS)
    rows, outputs = tensors[EMBEDDINGS].info.shape[0], tensors[LM_HEAD].info.shape[0]
    added = len(tokenizer) - before
    if rows < len(tokenizer) or (added and rows > len(tokenizer)):
        hint = ""
        if rows == len(tokenizer) - added:
            hint = "; the video tokens' rows are missing: give mm_projector.bin as `projector`"
        elif rows > len(tokenizer):
            hint = "; is this only the base? give LLaVA's delta as `delta`, or put its tokenizer into the folder"
        raise ValueError(
            f"the embedding table has {rows} rows, but the tokenizer of {folder} has {before} tokens and {added} "
            f"video tokens to add{hint}"
        )
    if outputs not in (rows, rows - added):
        raise ValueError(
            f"lm_head.weight has {outputs} rows; expected {rows}, like the embedding table, or {added} fewer"
        )
    return tokenizer, ids


def _text_config(folder: Path, tensors: dict[str, _LazyTensor]) -> LlamaConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json; give the folder of a complete LLaMA")
    values = read_json_object(file)
    kind = values.get("model_type")
    if "text_config" in values:
        raise ValueError(f"{folder} is a {kind} in transformers' own layout; use `longvlm convert llava`")
    if kind in CONFIG_MAPPING and kind not in ("llama", "llava"):
        raise ValueError(f"{folder} is a {kind} model; the original's language model is a LLaMA")
    missing = [name for name in LLAMA_FIELDS[:4] if name not in values]
    if missing:
        raise ValueError(f"{file} is missing {first_few(missing)}; give the folder of a complete LLaMA")
    fields = {name: values[name] for name in LLAMA_FIELDS if values.get(name) is not None}
    with naming_files(folder, "config.json"):
        config = LlamaConfig(**fields, vocab_size=tensors[EMBEDDINGS].info.shape[0], tie_word_embeddings=False)
    check_size(config, str(folder))
    return config


def _video_processor(image_options: dict[str, Any]) -> LongVLMVideoProcessor:
    """The original's: 100 frames, squashed with nearest interpolation; size, mean and deviation are the encoder's."""
    kept = {
        name: image_options[name] for name in ("image_mean", "image_std", "rescale_factor") if name in image_options
    }
    size = dict(LongVLMVideoProcessor(**image_options).size)
    return LongVLMVideoProcessor(preset="original", num_frames=NUM_FRAMES, size=size, **kept)


# --- files beside the weights ---


def _save_rest(folder: Path, config: LongVLMConfig, llm: Path, processor: LongVLMProcessor) -> None:
    """Writes configuration, code and processor as `save_pretrained` of a loaded model would."""
    with torch.device("meta"):
        model = LongVLMForConditionalGeneration(config)
    save_code_and_config(model, folder)
    if (llm / "generation_config.json").is_file():
        with naming_files(llm, "generation_config.json"):
            generation = GenerationConfig.from_pretrained(llm)
    else:
        generation = GenerationConfig.from_model_config(config.text_config)
    generation.do_sample, generation.temperature, generation.top_p = False, None, None
    generation.save_pretrained(folder)
    processor.save_pretrained(folder)


def _check_tokens(folder: Path, processor: LongVLMProcessor) -> None:
    """The saved tokenizer must give the same ids as before it was saved."""
    text = f"A: <video>\nWhat? B: Well.{processor.tokenizer.eos_token}A: {VIDEO_TOKENS[1]} so"
    before, after = (
        p(text=text, video_token_counts=2)["input_ids"] for p in (processor, LongVLMProcessor.from_pretrained(folder))
    )
    if before != after:
        raise ValueError(f"the tokenizer changes when it is saved: {before} become {after}; update transformers")
