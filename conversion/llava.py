"""Makes a LongVLM of a LLaVA-1.5, LLaVA-Lightning or Video-ChatGPT: with its projector and its language model.

    convert_llava("llava-hf/llava-1.5-7b-hf", "longvlm-llava-7b")

Nothing is trained. The projector was trained on the patches of single images, and a merged token is a mean of such
patches, so it can make something of the local tokens. It has never seen a [CLS] token, so there are no global tokens
by default. Weights are mapped from the files, not copied, unless their dtype changes or a base is added to a delta.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoTokenizer,
    GenerationConfig,
    LlamaTokenizer,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from longvlm.checkpoint_faults import check_size, naming_files
from longvlm.conversion.assemble import join
from longvlm.conversion.checks import check_projector, check_text, check_video, probe
from longvlm.conversion.delta import DeltaSum, is_delta
from longvlm.conversion.hub import local_folder, short_name
from longvlm.conversion.key_maps import (
    LLAVA_ORIGINAL,
    LLAVA_TRANSFORMERS,
    LLM,
    PROJECTOR,
    VISION,
    KeyMap,
    map_names,
)
from longvlm.conversion.original_tokenizer import load_original_tokenizer
from longvlm.conversion.parts import LanguagePart, VisionPart, as_dtype
from longvlm.conversion.progress import Progress, silent
from longvlm.conversion.vision_encoder import image_options, load_vision
from longvlm.conversion.weights import Weights
from longvlm.files import check_free, output_folder, read_json_object

# `model_type` in the original repositories -> the language model that it is built on.
ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "VideoChatGPT": "llama", "llava_mistral": "mistral"}
EMBEDDINGS = LLM + "embed_tokens.weight"


@dataclass
class _Checkpoint:
    """What a LLaVA folder says about itself, in either layout."""

    folder: Path
    name: str
    text_config: PreTrainedConfig
    vision_config: PreTrainedConfig | None  # None: the encoder is elsewhere, in `vision_source`
    vision_source: str | None
    feature_layer: int
    table: KeyMap
    is_original: bool


def convert_llava(
    source: str | Path,
    out: str | Path,
    *,
    vision: str | Path | None = None,
    base: str | Path | None = None,
    projector: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    video_options: dict[str, Any] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **method,
) -> Path:
    """
    Writes model and processor to `out`, loadable with `from_pretrained` and `pipeline`.

    Args:
        source: folder or Hub id, in transformers' layout (`LlavaForConditionalGeneration`) or that of the original
            repositories (`LlavaLlamaForCausalLM`, `VideoChatGPTLlamaForCausalLM`); `.bin` or safetensors, whole or in
            shards.
        out: folder to write; it appears only once everything has been checked.
        vision: vision encoder instead of the one that the checkpoint holds or names: folder, Hub id, or
            `open_clip:MODEL/TAG_OR_FILE`. It has to be the one that the projector was trained with.
        base: if `source` is a delta (LLaVA-Lightning), the LLaMA that it is added to.
        projector: a projector saved alone, instead of the one in `source`: `mm_projector.bin` of LLaVA, or
            `video_chatgpt-7B.bin`, which also holds the embeddings of the three video tokens.
        dtype: of all weights; `None` or "auto": the language model's own.
        video_options: options of `LongVLMVideoProcessor` that replace the encoder's, for example `num_frames`.
        overwrite: replace a folder that is not empty.
        progress: called as `progress(stage)` at each step.
        method: fields of `LongVLMConfig`. By default `global_placement` is "none", and `vision_feature_layer` is the
            checkpoint's.

    Returns:
        `out` as a path.

    Raises:
        ValueError: it is another kind of checkpoint, or the parts do not fit each other.
        OSError: a part cannot be loaded, or the folder cannot be written.
    """
    progress = progress or silent
    out = check_free(out, overwrite=overwrite)
    target = as_dtype(dtype)
    checkpoint = _describe(local_folder(source), short_name(source))
    progress("reading the weights")
    stored = Weights(checkpoint.folder)
    if (checkpoint.is_original and is_delta(stored)) != (base is not None):
        raise ValueError(
            f"{source} is a whole model, not a delta; leave `base` out"
            if base is not None
            else f"{source} is a delta, not a whole model; give the LLaMA that it was made for as `base` "
            "(for a checkpoint of the original LongVLM use `longvlm convert original`)"
        )
    whole = stored if base is None else DeltaSum(Weights(local_folder(base)), stored)
    weights = _renamed(whole, checkpoint.table, checkpoint.name)
    video_rows = None
    if projector is not None:
        new = _renamed(Weights(projector), LLAVA_ORIGINAL, Path(projector).name)
        video_rows = new.pop(EMBEDDINGS, None)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(PROJECTOR)} | new

    progress("loading the language model")
    language_part = _language_part(checkpoint, weights, target)
    progress("loading the vision encoder")
    vision_part = _vision_part(checkpoint, weights, vision, target)

    progress("putting them together")
    state = _part_of(weights, PROJECTOR)
    _complete_projector(state, checkpoint.name)
    check_projector(
        state["linear_1.weight"].shape,
        source=checkpoint.name if projector is None else Path(projector).name,
        vision=vision_part.name,
        vision_width=vision_part.model.config.hidden_size,
        text_width=language_part.model.config.hidden_size,
    )
    questions = probe(language_part)
    method.setdefault("global_placement", "none")
    if method["global_placement"] == "none":
        method.setdefault("num_global_layers", 0)
    method.setdefault("vision_feature_layer", checkpoint.feature_layer)
    method["projector_type"] = "mlp2x_gelu" if "linear_2.weight" in state else "linear"
    model, processor = join(vision_part, language_part, video_options=video_options, **method)
    model.model.multi_modal_projector.load_state_dict(state)
    model.config.untrained_parts = []
    if video_rows is not None:
        _put_video_rows(model, video_rows, Path(str(projector)).name)

    progress("checking")
    check_text(model, type(language_part.model).__name__, *questions)
    check_video(model, processor)
    progress("writing")
    with output_folder(out, overwrite=overwrite) as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
    return Path(out)


# --- what the folder holds ---


def _describe(folder: Path, name: str) -> _Checkpoint:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{name} has no config.json; give the folder of a complete LLaVA checkpoint")
    values = read_json_object(file)
    kind = values.get("model_type")
    if kind == "llava" and "vision_config" in values:
        with naming_files(folder, "config.json"):
            config = LlavaConfig.from_pretrained(folder)
        check_size(config, name)
        return _describe_transformers(folder, name, config)
    if kind in ORIGINAL_TYPES and "mm_vision_tower" in values:
        return _describe_original(folder, name, values)
    if kind in ORIGINAL_TYPES and kind != "llava":
        raise ValueError(f'{name} names no vision encoder ("mm_vision_tower" in its config.json); is it a LLaVA?')
    raise ValueError(
        f"{name} is a {kind} model; expected a LLaVA-1.5, LLaVA-Lightning or Video-ChatGPT checkpoint (model_type "
        f"{', '.join(ORIGINAL_TYPES)})"
    )


def _describe_transformers(folder: Path, name: str, config: LlavaConfig) -> _Checkpoint:
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(f"{name} joins the features of layers {layer}; a LongVLM uses those of one layer")
    if config.projector_hidden_act != "gelu":
        raise ValueError(f"{name} has a projector with {config.projector_hidden_act}; only GELU is supported")
    return _Checkpoint(
        folder, name, config.text_config, config.vision_config, None, layer, LLAVA_TRANSFORMERS, is_original=False
    )


def _describe_original(folder: Path, name: str, values: dict[str, Any]) -> _Checkpoint:
    projector = values.get("mm_projector_type", "linear")
    if projector not in ("linear", "mlp2x_gelu"):
        raise ValueError(f'{name} has a projector of type "{projector}"; only linear and mlp2x_gelu are supported')
    config_class = CONFIG_MAPPING[ORIGINAL_TYPES[values["model_type"]]]
    known = config_class().to_dict().keys() | {"rope_theta", "rope_scaling"}
    # The rest is LLaVA's own, or about how it was trained and saved.
    left_out = {"model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype"}
    with naming_files(folder, "config.json"):
        text_config = config_class(**{key: value for key, value in values.items() if key in known - left_out})
    check_size(text_config, name)
    layer = values.get("mm_vision_select_layer", -2)
    source = values["mm_vision_tower"]
    return _Checkpoint(folder, name, text_config, None, source, layer, LLAVA_ORIGINAL, is_original=True)


# --- the parts ---


def _renamed(weights: Mapping[str, torch.Tensor], table: KeyMap, source: str) -> dict[str, torch.Tensor]:
    """The tensors under their names in a LongVLM; they stay mapped from their files."""
    return {new: weights[old] for old, new in map_names(weights, table, source).items() if new is not None}


def _part_of(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _language_part(checkpoint: _Checkpoint, weights: Mapping[str, torch.Tensor], dtype) -> LanguagePart:
    config, name = checkpoint.text_config, checkpoint.name
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    state = {f"{model_class.base_model_prefix}.{key}": tensor for key, tensor in _part_of(weights, LLM).items()}
    state |= {key: tensor for key, tensor in weights.items() if key.startswith("lm_head.")}
    if EMBEDDINGS not in weights:
        raise ValueError(
            f"{name} contains no language model ({EMBEDDINGS.removeprefix(LLM)} is missing); is it only a projector?"
        )
    config.vocab_size = len(weights[EMBEDDINGS])
    model, info = _load(model_class, config, state, dtype or weights[EMBEDDINGS].dtype)
    _refuse_gaps(info, name, model_class.__name__)
    if (checkpoint.folder / "generation_config.json").is_file():
        with naming_files(checkpoint.folder, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
        # Vicuna's sets temperature and top_p without sampling, which transformers refuses to save.
        if not model.generation_config.do_sample:
            model.generation_config.temperature = model.generation_config.top_p = None
    return LanguagePart(model.eval(), _tokenizer(checkpoint), name)


def _tokenizer(checkpoint: _Checkpoint) -> PreTrainedTokenizerBase:
    folder = checkpoint.folder
    with naming_files(folder, "tokenizer"):
        if not checkpoint.is_original:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        else:
            file = folder / "tokenizer_config.json"
            legacy = read_json_object(file).get("legacy", True) if file.is_file() else True
            # LLaMA's tokenizer of 2023 put a space mark in front of all text between special tokens; with "legacy":
            # false (Vicuna 1.5, and so LLaVA-1.5) only at the beginning, as today's does.
            tokenizer = load_original_tokenizer(folder) if legacy else LlamaTokenizer.from_pretrained(folder)
    # LLaVA's own template writes marks for images. All of these models were trained with Vicuna's prompt, which is the
    # processor's default.
    tokenizer.chat_template = None
    return tokenizer


def _vision_part(checkpoint: _Checkpoint, weights: Mapping[str, torch.Tensor], vision, dtype) -> VisionPart:
    state = _part_of(weights, VISION)
    if vision is not None:
        return load_vision(vision, dtype=dtype)
    if checkpoint.vision_config is not None:
        config = checkpoint.vision_config
        part = VisionPart(_tower(config, state, dtype, checkpoint.name), checkpoint.name)
        part.image_options = image_options(checkpoint.folder, config)
        return part
    try:
        part = load_vision(checkpoint.vision_source or "", dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{checkpoint.name} names {checkpoint.vision_source} as its vision encoder, which cannot be loaded "
            f"({str(error).splitlines()[0][:200]}); give it as `vision`"
        ) from error
    if state:  # it was trained along with the rest
        part.model = _tower(part.model.config, state, dtype, checkpoint.name)
    return part


def _tower(config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype, name: str):
    model_class = MODEL_MAPPING[type(config)]
    if not state:
        raise ValueError(f"{name} contains no vision encoder; give it as `vision`")
    tower, info = _load(model_class, config, state, dtype or next(iter(state.values())).dtype)
    _refuse_gaps(info, name, model_class.__name__)
    return tower.eval()


def _load(model_class, config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype):
    """The model around these tensors, which are not copied, and the names that did not fit."""
    return model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # `_refuse_gaps` names them
    )


def _refuse_gaps(info: dict[str, Any], name: str, kind: str) -> None:
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"{name} is missing {len(missing)} weights of {kind}, for example {missing[0]}")
    if info["unexpected_keys"]:
        unexpected = sorted(info["unexpected_keys"])
        raise ValueError(
            f"{name} holds {len(unexpected)} weights that {kind} has no place for, for example {unexpected[0]}"
        )
    if info["mismatched_keys"]:
        reshaped = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
        raise ValueError(f"{name}: {reshaped[0]} of {kind} does not have the shape that its config.json says")


def _complete_projector(state: dict[str, torch.Tensor], name: str) -> None:
    if "linear_1.weight" not in state:
        raise ValueError(f"{name} contains no projector; give mm_projector.bin as `projector`")
    for layer in ("linear_1", "linear_2"):
        weight = state.get(f"{layer}.weight")
        if weight is not None:  # multimodal_projector_bias: false
            state.setdefault(f"{layer}.bias", weight.new_zeros(len(weight)))


@torch.no_grad()
def _put_video_rows(model, rows: torch.Tensor, name: str) -> None:
    """Puts in the embeddings of the three video tokens that were trained along with a projector (Video-ChatGPT)."""
    config, table = model.config, model.get_input_embeddings().weight
    ids = [config.video_token_id, config.video_start_token_id, config.video_end_token_id]
    if rows.shape[1] != table.shape[1]:
        raise ValueError(
            f"{name} has embeddings of width {rows.shape[1]}, but the language model has {table.shape[1]}"
        )
    if len(rows) <= max(ids):
        return  # a vocabulary without them
    table[ids] = rows[ids].to(table.dtype)
