"""Loads the two parts of a LongVLM: a vision encoder and a causal language model.

Both come from a local folder or a Hub id; the encoder also from a bare configuration (then it is untrained), the
language model also from a GGUF file. Nothing here knows LongVLM: what comes back are plain transformers objects.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from longvlm.conversion.hub import short_name

# What a video processor takes over from an image processor.
IMAGE_OPTIONS = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


@dataclass
class VisionPart:
    """A vision encoder, how its pictures are prepared, and whether it is trained."""

    model: PreTrainedModel
    name: str
    image_options: dict[str, Any] = field(default_factory=dict)
    trained: bool = True


@dataclass
class LanguagePart:
    """A causal language model with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str


def load_vision(source: str | Path, *, dtype: torch.dtype | None = None) -> VisionPart:
    """Loads the encoder in `source`: any encoder of `AutoModel`, or the vision tower of a model that has one (CLIP).

    `open_clip:ViT-L-14/TAG_OR_FILE` is a model of open_clip: see `openclip_vision.py`.

    Raises:
        ValueError: what lies there has no vision encoder, or lacks some of its weights.
        OSError: nothing can be loaded from there.
    """
    if str(source).startswith("open_clip:"):
        from longvlm.conversion.openclip_vision import load_open_clip_by_name

        return load_open_clip_by_name(str(source), dtype=dtype)
    tower = _tower_config(AutoConfig.from_pretrained(source), str(source))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Not AutoModel.from_pretrained: it would build the whole CLIP, text tower included.
        model, info = MODEL_MAPPING[type(tower)].from_pretrained(
            source, config=tower, dtype=dtype or "auto", output_loading_info=True
        )
    # A pooler is never used here, and classifiers (ViT) are saved without.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"{source} lacks {len(missing)} weights of {type(model).__name__}, for example {missing[0]}; "
            "give a folder or Hub id of a whole vision encoder"
        )
    return VisionPart(model.eval(), short_name(source), image_options(source, tower))


def _tower_config(config, name: str):
    """The configuration of the encoder itself; refuses what does not turn a picture into one token a patch."""
    tower = getattr(config, "vision_config", None) or config
    if type(tower) not in MODEL_MAPPING or not hasattr(tower, "patch_size") or not hasattr(tower, "image_size"):
        raise ValueError(
            f"{name} is a {config.model_type} model, not a vision encoder that cuts pictures into patches; "
            "use for example a CLIP, SigLIP, DINOv2 or ViT model"
        )
    return tower


def untrained_vision(config: str | Path | dict, *, dtype: torch.dtype | None = None, seed: int = 0) -> VisionPart:
    """Builds an encoder with random weights from a configuration: a dict, or a JSON file or folder that holds one."""
    if isinstance(config, dict):
        values, name = dict(config), "an untrained vision encoder"
    else:
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        try:
            values, name = json.loads(path.read_text()), path.stem
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from None
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError('the vision config names no "model_type"; add one, for example "clip_vision_model"')
    try:
        vision_config = AutoConfig.for_model(model_type, **values)
    except KeyError as error:
        raise ValueError(f'the vision config\'s model_type "{model_type}" is unknown to transformers') from error
    vision_config = _tower_config(vision_config, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(vision_config, dtype=dtype or torch.float32)
    return VisionPart(model.eval(), name, _default_image_options(vision_config), trained=False)


def load_language(
    source: str | Path, *, gguf_file: str | None = None, dtype: torch.dtype | None = None
) -> LanguagePart:
    """Loads a causal language model and its tokenizer.

    Args:
        source: folder, Hub id, or the path of a GGUF file (its weights are taken out of their quantisation).
        gguf_file: name of the GGUF file within `source`, where `source` is a folder or Hub id.
        dtype: `None`: as saved (GGUF: float32).
    """
    path = Path(source)
    if gguf_file is None and path.suffix == ".gguf":
        if not path.is_file():
            raise ValueError(f"{path} does not exist")
        source, gguf_file = path.parent, path.name
    options: dict[str, Any] = {} if gguf_file is None else {"gguf_file": gguf_file}
    # Before the weights, which cost minutes and gigabytes.
    config = AutoConfig.from_pretrained(source, **options)
    if config.get_text_config() is not config:
        raise ValueError(
            f"{source} is a {config.model_type} model with parts of its own, not a plain language model; "
            "give the causal language model alone"
        )
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype or (torch.float32 if gguf_file else "auto"), **options
    ).eval()
    _forget_quantisation_of_gguf(model)
    return LanguagePart(model, tokenizer, short_name(gguf_file.removesuffix(".gguf") if gguf_file else source))


def _forget_quantisation_of_gguf(model: PreTrainedModel) -> None:
    """The weights are plain by now; a config that says otherwise could not be loaded again without the file."""
    quantisation = getattr(model.config, "quantization_config", None)
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation.quant_method
    if str(getattr(method, "value", method)) != "gguf":
        raise ValueError(
            f"the language model is quantised ({getattr(method, 'value', method)}); give its unquantised weights, "
            "and quantise the assembled model when loading it"
        )
    del model.config.quantization_config


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name; `None` for "auto"."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return None
    value = getattr(torch, dtype, None)
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        raise ValueError(f'dtype "{dtype}" is not known; use float32, bfloat16 or float16')
    return value


def image_options(source: str | Path, config) -> dict[str, Any]:
    """How pictures are prepared for the encoder in `source`: as its image processor says, or as its family does."""
    try:
        values = AutoImageProcessor.from_pretrained(source).to_dict()
    except (OSError, ValueError, KeyError):  # the encoder comes without one
        return _default_image_options(config)
    options = {key: values[key] for key in IMAGE_OPTIONS if values.get(key) is not None}
    options.setdefault("do_center_crop", False)
    if not options["do_center_crop"]:
        options.pop("crop_size", None)
    options["size"] = {key: value for key, value in dict(options["size"]).items() if value is not None}
    return options


def _default_image_options(config) -> dict[str, Any]:
    """What encoders of this family are trained with, at the encoder's own size."""
    side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    options: dict[str, Any] = {"size": {"height": side, "width": side}, "do_center_crop": False}
    if "clip" in config.model_type and "siglip" not in config.model_type:
        return options | {"do_center_crop": True, "image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD}
    if "dino" in config.model_type:
        return options | {
            "do_center_crop": True,
            "image_mean": IMAGENET_DEFAULT_MEAN,
            "image_std": IMAGENET_DEFAULT_STD,
        }
    return options | {"image_mean": IMAGENET_STANDARD_MEAN, "image_std": IMAGENET_STANDARD_STD}
