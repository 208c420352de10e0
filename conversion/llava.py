"""A LLaVA-1.5, LLaVA-Lightning or Video-ChatGPT checkpoint becomes a LongVLM: its projector, its language model.

    convert_llava("llava-hf/llava-1.5-7b-hf", "longvlm-llava-7b")

Nothing is trained. The projector has learned single frames' patches, and a merged token is a mean of such patches: so
the local tokens mean something to it. It has never seen a [CLS] token: so there are no global tokens by default.
Weights are mapped from the files, not copied, unless their dtype changes or a base is added to a delta.
"""

from collections.abc import Callable, Mapping
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

from longvlm.conversion.assemble import check_text, check_video, join, probe
from longvlm.conversion.hub import local_folder, short_name
from longvlm.conversion.key_maps import (
    LLAVA_ORIGINAL,
    LLAVA_TRANSFORMERS,
    LLM,
    MM_PROJECTOR,
    PROJECTOR,
    VISION,
    KeyMap,
    map_key,
)
from longvlm.conversion.original_tokenizer import load_original_tokenizer
from longvlm.conversion.parts import LanguagePart, VisionPart, as_dtype, image_options, load_vision
from longvlm.conversion.weight_files import WeightFiles
from longvlm.files import check_free, output_folder, read_json_object

# What config.json of the original repositories calls itself, and the language model it is built on.
ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "VideoChatGPT": "llama", "llava_mistral": "mistral"}
EMBEDDINGS = LLM + "embed_tokens.weight"


@dataclass
class _Checkpoint:
    """What a LLaVA folder says of itself, in either layout."""

    folder: Path
    name: str
    text_config: PreTrainedConfig
    vision_config: PreTrainedConfig | None  # None: the encoder lies elsewhere
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
    progress: Callable[[str], None] = lambda step: None,
    **method,
) -> Path:
    """Writes model and processor to `out`, loadable with `from_pretrained` and `pipeline`.

    Args:
        source: folder or Hub id, in transformers' layout (`LlavaForConditionalGeneration`) or that of the original
            repositories (`LlavaLlamaForCausalLM`, `VideoChatGPTLlamaForCausalLM`); `.bin` or safetensors, in shards or
            not.
        vision: vision encoder instead of the one that the checkpoint holds or names: folder, Hub id, or
            `open_clip:MODEL/TAG_OR_FILE`. It has to be the one that the projector was trained with.
        base: where `source` is a delta (LLaVA-Lightning), the LLaMA that it is added to.
        projector: a projector saved alone, in place of the one in `source`: `mm_projector.bin` of LLaVA, or
            `video_chatgpt-7B.bin`, which also holds the embeddings of the three video tokens.
        dtype: of all weights; `None`: the language model's own.
        video_options: options of `LongVLMVideoProcessor` that replace the encoder's, for example `num_frames`.
        overwrite: replace a folder that is not empty.
        progress: called with one line per step.
        method: fields of `LongVLMConfig`; `global_placement` is "none" and `vision_feature_layer` theirs by default.

    Returns:
        `out` as a path.

    Raises:
        ValueError: a checkpoint of another kind, or parts that do not fit, named in one line.
        OSError: a part cannot be loaded, or the folder not be written.
    """
    out = check_free(out, overwrite=overwrite)
    target = as_dtype(dtype)
    checkpoint = _describe(local_folder(source), short_name(source))
    progress("reading the weights")
    weights = _mapped(WeightFiles.of_folder(checkpoint.folder), checkpoint.table, checkpoint.name)
    if (checkpoint.is_original and _is_delta(weights)) != (base is not None):
        raise ValueError(
            f"{source} is a whole model, not a delta; leave --base out"
            if base is not None
            else f"{source} is a delta, not a whole model; give the LLaMA that it is made for with --base "
            "(for a checkpoint of the original LongVLM: longvlm convert original)"
        )
    if base is not None:
        base_weights = _mapped(WeightFiles.of_folder(local_folder(base)), LLAVA_ORIGINAL, short_name(base))
        weights = _sum(base_weights, weights, short_name(base))
    video_rows = None
    if projector is not None:
        new = _mapped(WeightFiles(projector), MM_PROJECTOR, Path(projector).name, also=LLAVA_ORIGINAL)
        video_rows = new.pop(EMBEDDINGS, None)
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(PROJECTOR)} | new

    progress("loading the language model")
    language_part = _language_part(checkpoint, weights, target)
    progress("loading the vision encoder")
    vision_part = _vision_part(checkpoint, weights, vision, target)

    progress("putting them together")
    state = _part_of(weights, PROJECTOR)
    _check_projector(state, checkpoint, vision_part, language_part)
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
        raise ValueError(f"{name} lacks config.json; give the folder of a whole LLaVA checkpoint")
    values = read_json_object(file)
    kind = values.get("model_type")
    if kind == "llava" and "vision_config" in values:
        return _describe_transformers(folder, name, LlavaConfig.from_pretrained(folder))
    if kind in ORIGINAL_TYPES and "mm_vision_tower" in values:
        return _describe_original(folder, name, values)
    if kind in ORIGINAL_TYPES and kind != "llava":
        raise ValueError(f'{name} names no vision encoder ("mm_vision_tower" in its config.json); is it a LLaVA?')
    raise ValueError(
        f"{name} is a {kind} model; a LLaVA-1.5, LLaVA-Lightning or Video-ChatGPT checkpoint is wanted (model_type "
        f"{', '.join(ORIGINAL_TYPES)})"
    )


def _describe_transformers(folder: Path, name: str, config: LlavaConfig) -> _Checkpoint:
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise ValueError(f"{name} joins the features of layers {layer}; a LongVLM takes those of one layer")
    if config.projector_hidden_act != "gelu":
        raise ValueError(f"{name} has a projector with {config.projector_hidden_act}; only GELU can be taken over")
    return _Checkpoint(
        folder, name, config.text_config, config.vision_config, None, layer, LLAVA_TRANSFORMERS, is_original=False
    )


def _describe_original(folder: Path, name: str, values: dict[str, Any]) -> _Checkpoint:
    projector = values.get("mm_projector_type", "linear")
    if projector not in ("linear", "mlp2x_gelu"):
        raise ValueError(f'{name} has a projector of type "{projector}"; only linear and mlp2x_gelu can be taken over')
    config_class = CONFIG_MAPPING[ORIGINAL_TYPES[values["model_type"]]]
    known = config_class().to_dict().keys() | {"rope_theta", "rope_scaling"}
    # The rest is LLaVA's own, or its writer's: how it was trained, which classes loaded it.
    left_out = {"model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype"}
    text_config = config_class(**{key: value for key, value in values.items() if key in known - left_out})
    layer = values.get("mm_vision_select_layer", -2)
    source = values["mm_vision_tower"]
    return _Checkpoint(folder, name, text_config, None, source, layer, LLAVA_ORIGINAL, is_original=True)


def _mapped(weights: WeightFiles, table: KeyMap, name: str, also: KeyMap = ()) -> dict[str, torch.Tensor]:
    """The tensors under their names in a LongVLM; they stay mapped from their files."""
    mapped, unknown = {}, []
    for key in weights:
        # `mm_projector.bin` of LLaVA-1.5 has them without the model's prefix too.
        full = f"model.{key}" if key.startswith("mm_projector.") else key
        try:
            target = map_key(full, (*table, *also))
        except KeyError:
            unknown.append(key)
            continue
        if target is not None:
            mapped[target] = weights[key]
    if unknown:
        raise ValueError(
            f"{name} holds {len(unknown)} tensors that a LongVLM has no place for, such as {min(unknown)}"
        )
    return mapped


def _is_delta(weights: Mapping[str, torch.Tensor]) -> bool:
    """The last norm's weights are around 1 in a LLaMA (1.7 in LLaMA-7B), and around 0 in a difference of two."""
    norm = weights.get(f"{LLM}norm.weight")
    return norm is not None and norm.float().abs().mean().item() < 0.2


def _sum(base: Mapping[str, torch.Tensor], delta: Mapping[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Base + delta, in the delta's dtype; rows of the vocabulary beyond the base's are the delta's own."""
    total = {}
    for key, change in delta.items():
        before = base.get(key)
        if before is None:
            if not key.startswith((PROJECTOR, VISION)):
                raise ValueError(f"the base {name} lacks {key}; it is not the LLaMA that the delta is made for")
            total[key] = change
            continue
        grows = key in (EMBEDDINGS, "lm_head.weight") and before.shape[1:] == change.shape[1:]
        if before.shape != change.shape and not (grows and len(before) < len(change)):
            raise ValueError(
                f"{key} is {tuple(before.shape)} in the base {name}, but {tuple(change.shape)} in the delta; it "
                "is not the LLaMA that the delta is made for"
            )
        total[key] = change.clone()
        total[key][: len(before)] += before.to(change.dtype)
    return total


# --- the parts ---


def _part_of(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _language_part(checkpoint: _Checkpoint, weights: Mapping[str, torch.Tensor], dtype) -> LanguagePart:
    config, name = checkpoint.text_config, checkpoint.name
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    state = {f"{model_class.base_model_prefix}.{key}": tensor for key, tensor in _part_of(weights, LLM).items()}
    state |= {key: tensor for key, tensor in weights.items() if key.startswith("lm_head.")}
    if EMBEDDINGS not in weights:
        raise ValueError(f"{name} holds no language model ({EMBEDDINGS.removeprefix(LLM)}); is it a projector alone?")
    config.vocab_size = len(weights[EMBEDDINGS])
    model, info = _load(model_class, config, state, dtype or weights[EMBEDDINGS].dtype)
    _refuse_gaps(info, name, model_class.__name__)
    if (checkpoint.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
        # Vicuna's say temperature and top_p without sampling, which transformers does not save.
        if not model.generation_config.do_sample:
            model.generation_config.temperature = model.generation_config.top_p = None
    return LanguagePart(model.eval(), _tokenizer(checkpoint), name)


def _tokenizer(checkpoint: _Checkpoint) -> PreTrainedTokenizerBase:
    folder = checkpoint.folder
    if not checkpoint.is_original:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        file = folder / "tokenizer_config.json"
        legacy = read_json_object(file).get("legacy", True) if file.is_file() else True
        # LLaMA's tokenizer of 2023 put a space mark in front of every piece between special tokens; "legacy": false
        # (Vicuna 1.5, so LLaVA-1.5) says that this one does so only at the beginning, as today's does.
        tokenizer = load_original_tokenizer(folder) if legacy else LlamaTokenizer.from_pretrained(folder)
    # LLaVA's own template writes marks for pictures. All of these models are trained with Vicuna's prompt, which is
    # the processor's default.
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
            f"({str(error).splitlines()[0][:200]}); give it with --vision"
        ) from error
    if state:  # trained along with the rest
        part.model = _tower(part.model.config, state, dtype, checkpoint.name)
    return part


def _tower(config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype, name: str):
    model_class = MODEL_MAPPING[type(config)]
    if not state:
        raise ValueError(f"{name} holds no vision encoder; give it with --vision")
    tower, info = _load(model_class, config, state, dtype or next(iter(state.values())).dtype)
    _refuse_gaps(info, name, model_class.__name__)
    return tower.eval()


def _load(model_class, config: PreTrainedConfig, state: dict[str, torch.Tensor], dtype):
    """The model around these tensors, which are not copied, and what did not fit."""
    return model_class.from_pretrained(
        None,
        config=config,
        state_dict=state,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused here, by name
    )


def _refuse_gaps(info: dict[str, Any], name: str, kind: str) -> None:
    missing = sorted(key for key in info["missing_keys"] if not key.startswith("pooler."))
    if missing:
        raise ValueError(f"{name} lacks {len(missing)} weights of {kind}, for example {missing[0]}")
    if info["unexpected_keys"]:
        unexpected = sorted(info["unexpected_keys"])
        raise ValueError(
            f"{name} holds {len(unexpected)} weights that {kind} has no place for, such as {unexpected[0]}"
        )
    if info["mismatched_keys"]:
        reshaped = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"])
        raise ValueError(f"{name}: {reshaped[0]} of {kind} does not have the shape that its config.json says")


def _check_projector(
    state: dict[str, torch.Tensor], checkpoint: _Checkpoint, vision: VisionPart, language: LanguagePart
) -> None:
    """Completes absent biases, and refuses a projector that does not fit its neighbours."""
    for layer in ("linear_1", "linear_2"):
        weight = state.get(f"{layer}.weight")
        if weight is not None:  # multimodal_projector_bias: false
            state.setdefault(f"{layer}.bias", weight.new_zeros(len(weight)))
    if "linear_1.weight" not in state:
        raise ValueError(f"{checkpoint.name} holds no projector; give it with --projector mm_projector.bin")
    outputs, inputs = state["linear_1.weight"].shape
    width, text_width = vision.model.config.hidden_size, language.model.config.hidden_size
    if inputs != width:
        raise ValueError(
            f"the projector of {checkpoint.name} takes features of width {inputs}, but {vision.name} gives {width}; "
            "give the encoder that it was trained with (--vision)"
        )
    if outputs != text_width:
        raise ValueError(f"the projector gives {outputs} channels, but the language model has {text_width}")


@torch.no_grad()
def _put_video_rows(model, rows: torch.Tensor, name: str) -> None:
    """The embeddings that were trained along with a projector (Video-ChatGPT): those of the three video tokens."""
    config, table = model.config, model.get_input_embeddings().weight
    ids = [config.video_token_id, config.video_start_token_id, config.video_end_token_id]
    if rows.shape[1] != table.shape[1]:
        raise ValueError(f"{name} has embeddings of width {rows.shape[1]}, the language model {table.shape[1]}")
    if len(rows) <= max(ids):
        return  # embeddings of a vocabulary without them
    table[ids] = rows[ids].to(table.dtype)
