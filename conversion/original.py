"""A checkpoint of the released LongVLM code becomes one of this package.

    convert_original("llama-7b", "longvlm-7b", delta="LLaVA-Lightning-7B-delta-v1-1",
                     projector="mm_projector.bin", vision="openai/clip-vit-large-patch14")

The sources are read, summed and written tensor by tensor. All shapes are compared before the first one is read, and
the folder appears only after the written files have been checked and run.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CONFIG_MAPPING, GenerationConfig, LlamaConfig
from transformers.dynamic_module_utils import custom_object_save

from longvlm.conversion.checks import check_forward, check_tensors, expected_tensors, refuse_differences
from longvlm.conversion.hub import local_folder, short_name
from longvlm.conversion.key_maps import LLM, MM_PROJECTOR, ORIGINAL, PROJECTOR, VISION, KeyMap, map_key
from longvlm.conversion.original_features import LAYOUTS, layout_of_file
from longvlm.conversion.original_tokenizer import add_tokens, load_original_tokenizer
from longvlm.conversion.parts import as_dtype, load_vision
from longvlm.conversion.shards import TensorInfo, TensorReader, TensorWriter, compare, some
from longvlm.files import check_free, output_folder, read_json_object
from longvlm.modeling_longvlm.modeling_longvlm import AUTO_MAP, CUSTOM_PIPELINES
from longvlm.processing.processing_longvlm import VIDEO_TOKENS
from longvlm.registration import (
    LongVLMConfig,
    LongVLMForConditionalGeneration,
    LongVLMProcessor,
    LongVLMVideoProcessor,
)

# In the order in which the original adds them.
CHAT_TEMPLATE = "long_vlm_v1"  # the prompt of the original's evaluation
NUM_FRAMES = 100
# The original's merging: one cosine of the mean over 16 slices, segments of 10 frames, 5 global tokens in front.
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
# What of the original's config.json belongs to the language model; the rest is LLaVA's.
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
    """What became of every tensor."""

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
        # By kind: "32 x rotary_emb.inv_freq", not 32 names.
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
class _Piece:
    """A tensor to be written: how it will look, and how to get it."""

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
    progress: Callable[[str], None] | None = None,
) -> ConversionReport:
    """Writes model and processor to `out`, loadable with `from_pretrained` and `pipeline`.

    Args:
        llm: folder or Hub id of the base LLaMA (with `delta`), or of a whole checkpoint: LLM with LLaVA's changes,
            with or without the projector and the three video tokens.
        delta: folder or Hub id of LLaVA's delta to the base.
        projector: `mm_projector.bin` of a training with the released code: projector and embedding table. It replaces
            what the other files hold.
        vision: folder or Hub id of the CLIP model that the features were made with.
        layout: `"paper"`: M = 30, 305 tokens a video of 100 frames; `"released"`: the schedule of the released
            script, 20 tokens a segment of 256 patches a frame, 205 tokens. `None`: what fits `feature_file`, or paper.
        feature_file: local features (`.pkl`) that the checkpoint shall fit.
        dtype: of all weights; `None` or `"auto"`: each as in its source, so nothing is lost.
        max_shard_bytes: of the files that are written.
        forward_check: run the result on a generated clip, in bounded memory (a 7B takes minutes on a CPU).
        overwrite: replace a folder that is not empty.
        progress: called with one line per step; without it there is no progress bar either.

    Raises:
        ValueError: sources that do not fit each other, or lack something; named in one line.
        OSError: a source cannot be loaded, or the folder not be written.
    """
    out = check_free(out, overwrite=overwrite)
    say = progress or (lambda step: None)
    if vision is None:
        raise ValueError("the original's checkpoints hold no vision encoder; give the CLIP model with --vision")
    target = as_dtype(dtype)
    report = ConversionReport(layout=_choose_layout(layout, feature_file))

    say("comparing the sources")
    llm_folder = local_folder(llm)
    pieces = _llm_pieces(llm_folder, None if delta is None else local_folder(delta), report)
    if projector is not None:
        _replace_by_projector(pieces, Path(projector), report)
    tokenizer, ids = _tokenizer_for(local_folder(llm if delta is None else delta), pieces)
    text_config = _text_config(llm_folder, pieces)
    text_config._name_or_path = short_name(llm)
    if projector is None and f"{PROJECTOR}linear_1.weight" not in pieces:
        raise ValueError(
            f"{llm} holds no projector (model.mm_projector.weight); give mm_projector.bin with --projector"
        )
    _grow_lm_head(pieces, report)

    say("loading the vision encoder")
    vision_part = load_vision(vision, dtype=target)
    vision_config = vision_part.model.config
    _check_widths(pieces, text_config.hidden_size, vision_config.hidden_size, projector or delta or llm, vision)
    vision_config._name_or_path = vision_part.name
    for name, tensor in vision_part.model.state_dict().items():
        pieces[VISION + name] = _held_piece(tensor)

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
    config.dtype = target or pieces[LM_HEAD].info.dtype
    processor = LongVLMProcessor(
        video_processor=video_processor,
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
        frames_per_segment=config.frames_per_segment,
        tokens_per_segment=config.tokens_per_segment,
        num_global_tokens=config.num_global_tokens,
        patches_per_frame=config.patches_per_frame,
    )
    plan = {name: TensorInfo(p.info.shape, target or p.info.dtype) for name, p in pieces.items()}
    refuse_differences(compare(plan, expected_tensors(config)), "what the sources hold")

    with output_folder(out, overwrite=overwrite) as folder:
        say("writing")
        report.num_bytes = sum(info.num_bytes for info in plan.values())
        with (
            TensorWriter(folder, plan, max_shard_bytes=max_shard_bytes) as writer,
            tqdm(total=report.num_bytes, unit="B", unit_scale=True, disable=progress is None) as bar,
        ):
            for name, info in plan.items():
                writer.write(name, pieces[name].read().to(info.dtype))
                bar.update(info.num_bytes)
        _save_rest(folder, config, llm_folder, processor)
        pieces.clear()  # with them goes the vision encoder
        del vision_part
        say("checking")
        _check_tokens(folder, processor)
        report.written = check_tensors(folder, config)
        if forward_check:
            say("running it on a generated clip")
            check_forward(folder)
            report.forward_checked = True
    return report


# --- the language model ---


def _llm_pieces(llm: Path, delta: Path | None, report: ConversionReport) -> dict[str, _Piece]:
    reader = TensorReader(llm)
    if _is_delta(reader):
        remedy = "swap --llm and --delta" if delta is not None else "give it as --delta, and the base LLaMA as --llm"
        raise ValueError(f"--llm {llm} is a delta, not a whole model; {remedy}")
    if delta is None:
        sources = {name: _read_piece(reader, name) for name in reader}
    else:
        changes = TensorReader(delta)
        if not _is_delta(changes):
            raise ValueError(f"--delta {delta} is no delta, but a whole model; give it as --llm, without --delta")
        left = [name for name in reader if name not in changes and "rotary_emb" not in name]
        if left:
            raise ValueError(
                f"--delta {delta} lacks {some(left)}, which the base {llm} has; is it made for this base?"
            )
        sources = {
            name: _sum_piece(reader, changes, name) if name in reader else _read_piece(changes, name)
            for name in changes
        }
    pieces: dict[str, _Piece] = {}
    for name, piece in sources.items():
        new = _mapped(name, ORIGINAL, llm if delta is None else delta)
        if new is None:
            report.left_out.append(name)
        else:
            pieces[new] = piece
    for name in (EMBEDDINGS, LM_HEAD):
        if name not in pieces:
            raise ValueError(f"{llm} holds no {name.removeprefix(LLM)}; a whole LLaMA is wanted")
    return pieces


def _is_delta(reader: TensorReader) -> bool:
    """Of differences the rotary frequencies are 0, and so are, nearly, the norms' weights, which start from 1."""
    rotary = next((name for name in reader if name.endswith("rotary_emb.inv_freq")), None)
    if rotary is not None:
        return not reader.get(rotary).any()
    return "model.norm.weight" in reader and reader.get("model.norm.weight").float().abs().mean().item() < 0.2


def _read_piece(reader: TensorReader, name: str) -> _Piece:
    return _Piece(reader.infos[name], lambda: reader.get(name))


def _held_piece(tensor: Tensor) -> _Piece:
    return _Piece(TensorInfo(tuple(tensor.shape), tensor.dtype), lambda: tensor)


def _sum_piece(base: TensorReader, delta: TensorReader, name: str) -> _Piece:
    """Base + delta in the delta's dtype; of the vocabulary's tables, rows beyond the base's are the delta's own."""
    before, after = base.infos[name].shape, delta.infos[name].shape
    if "rotary_emb" not in name and before != after:
        grows = len(before) == len(after) and before[1:] == after[1:] and before[0] < after[0]
        if not (grows and name in ("model.embed_tokens.weight", "lm_head.weight")):
            raise ValueError(f"{name} is {before} in the base, but {after} in the delta; they are not of one model")

    def read() -> Tensor:
        total = delta.get(name)
        total[: before[0]] += base.get(name).to(total.dtype)
        return total

    return _Piece(delta.infos[name], read)


def _mapped(name: str, table: KeyMap, source: Path) -> str | None:
    try:
        return map_key(name, table)
    except KeyError:
        raise ValueError(
            f"{source} holds {name}, which a LongVLM has no place for; is it another kind of model?"
        ) from None


def _replace_by_projector(pieces: dict[str, _Piece], file: Path, report: ConversionReport) -> None:
    if not file.is_file():
        raise ValueError(f"--projector {file} does not exist; it is the file mm_projector.bin of a training")
    reader = TensorReader(file)
    new = {_mapped(name, MM_PROJECTOR, file): name for name in reader}
    if f"{PROJECTOR}linear_1.weight" not in new or f"{PROJECTOR}linear_1.bias" not in new:
        raise ValueError(f"{file} holds no model.mm_projector.weight and .bias, but {some(reader)}")
    if EMBEDDINGS in new:
        (rows, width), (own_rows, own_width) = reader.infos[new[EMBEDDINGS]].shape, pieces[EMBEDDINGS].info.shape
        if width != own_width:
            raise ValueError(f"{file} has embeddings of width {width}, the language model {own_width}")
        if rows != own_rows:
            report.reshaped.append(f"model.embed_tokens.weight ({own_rows}, {width}) -> ({rows}, {width})")
    for name, key in new.items():
        assert name is not None
        if name in pieces:
            report.replaced.append(key)
        pieces[name] = _read_piece(reader, key)


def _grow_lm_head(pieces: dict[str, _Piece], report: ConversionReport) -> None:
    """The original saves no output rows of the video tokens: they are the mean of the others."""
    before, rows = pieces[LM_HEAD], pieces[EMBEDDINGS].info.shape[0]
    own, width = before.info.shape
    if own == rows:
        return
    report.reshaped.append(f"lm_head.weight ({own}, {width}) -> ({rows}, {width})")

    def read() -> Tensor:
        table = before.read()
        mean = table.mean(dim=0, keepdim=True, dtype=torch.float32).to(table.dtype)
        return torch.cat([table, mean.expand(rows - own, -1)])

    pieces[LM_HEAD] = _Piece(TensorInfo((rows, width), before.info.dtype), read)


# --- what fits what ---


def _choose_layout(layout: str | None, feature_file: str | Path | None) -> str:
    if layout is not None and layout not in LAYOUTS:
        raise ValueError(f'layout "{layout}" is not known; choose one of {", ".join(LAYOUTS)}')
    if feature_file is None:
        return layout or "paper"
    fitting = layout_of_file(feature_file)
    if layout not in (None, fitting):
        raise ValueError(f"{feature_file} has the layout {fitting}, not {layout}; leave --layout out")
    return fitting


def _tokenizer_for(folder: Path, pieces: dict[str, _Piece]):
    """The tokenizer with the three video tokens, and their ids: the last rows of the embedding table."""
    tokenizer = load_original_tokenizer(folder)
    before = len(tokenizer)
    ids = add_tokens(tokenizer, VIDEO_TOKENS)
    rows, outputs = pieces[EMBEDDINGS].info.shape[0], pieces[LM_HEAD].info.shape[0]
    added = len(tokenizer) - before
    if rows < len(tokenizer) or (added and rows > len(tokenizer)):
        hint = ""
        if rows == len(tokenizer) - added:
            hint = "; the video tokens' rows lack: give mm_projector.bin with --projector"
        elif rows > len(tokenizer):
            hint = "; is this the base alone? give LLaVA's delta with --delta, or its tokenizer's files with it"
        raise ValueError(
            f"the embedding table has {rows} rows, but the tokenizer of {folder} {before} tokens and {added} video "
            f"tokens{hint}"
        )
    if outputs not in (rows, rows - added):
        raise ValueError(f"lm_head.weight has {outputs} rows; {rows}, or {added} less, fit the embedding table")
    return tokenizer, ids


def _text_config(folder: Path, pieces: dict[str, _Piece]) -> LlamaConfig:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} lacks config.json")
    values = read_json_object(file)
    kind = values.get("model_type")
    if "text_config" in values:
        raise ValueError(f"{folder} is a {kind} in transformers' own layout; see `longvlm convert llava`")
    if kind in CONFIG_MAPPING and kind not in ("llama", "llava"):
        raise ValueError(f"{folder} is a {kind} model; the original's language model is a LLaMA")
    lacking = [name for name in LLAMA_FIELDS[:4] if name not in values]
    if lacking:
        raise ValueError(f"{file} does not say {some(lacking)}")
    fields = {name: values[name] for name in LLAMA_FIELDS if values.get(name) is not None}
    return LlamaConfig(**fields, vocab_size=pieces[EMBEDDINGS].info.shape[0], tie_word_embeddings=False)


def _check_widths(pieces: dict[str, _Piece], width: int, vision_width: int, source, vision) -> None:
    outputs, inputs = pieces[f"{PROJECTOR}linear_1.weight"].info.shape
    if inputs != vision_width:
        raise ValueError(
            f"the projector of {source} takes features of width {inputs}, but {vision} gives {vision_width}; give the "
            "CLIP model that it was trained with"
        )
    if outputs != width:
        raise ValueError(f"the projector of {source} gives {outputs} channels, but the language model has {width}")


def _video_processor(image_options: dict[str, Any]) -> LongVLMVideoProcessor:
    """The original's: 100 frames, squashed with nearest interpolation; size, mean and deviation are the encoder's."""
    kept = {
        name: image_options[name] for name in ("image_mean", "image_std", "rescale_factor") if name in image_options
    }
    size = dict(LongVLMVideoProcessor(**image_options).size)
    return LongVLMVideoProcessor(preset="original", num_frames=NUM_FRAMES, size=size, **kept)


# --- files beside the weights ---


def _save_rest(folder: Path, config: LongVLMConfig, llm: Path, processor: LongVLMProcessor) -> None:
    """Configuration, code, and processor, as `save_pretrained` of a loaded model would write them."""
    with torch.device("meta"):
        model = LongVLMForConditionalGeneration(config)
    config.architectures = [type(model).__name__]
    config.auto_map, config.custom_pipelines = dict(AUTO_MAP), CUSTOM_PIPELINES
    custom_object_save(model, folder)
    config.save_pretrained(folder)
    if (llm / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(llm)
    else:
        generation = GenerationConfig.from_model_config(config.text_config)
    generation.do_sample, generation.temperature, generation.top_p = False, None, None
    generation.save_pretrained(folder)
    processor.save_pretrained(folder)


def _check_tokens(folder: Path, processor: LongVLMProcessor) -> None:
    """What is loaded from the folder must make the ids that the tokenizer made before it was saved."""
    text = f"A: <video>\nWhat? B: Well.{processor.tokenizer.eos_token}A: {VIDEO_TOKENS[1]} so"
    before, after = (
        p(text=text, num_video_tokens=2)["input_ids"] for p in (processor, LongVLMProcessor.from_pretrained(folder))
    )
    if before != after:
        raise ValueError(f"the tokenizer changes when it is saved: {before} become {after}; update transformers")
