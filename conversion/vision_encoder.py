"""Loads the vision encoder of a LongVLM with its preprocessing.

A folder or Hub id of transformers, a model of open_clip, or a bare configuration: then the encoder is untrained.
"""

from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoImageProcessor, AutoModel
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from longvlm.checkpoint_faults import check_size, naming_files
from longvlm.conversion.hub import short_name
from longvlm.conversion.openclip_vision import PREFIX, load_open_clip_by_name
from longvlm.conversion.parts import VisionPart
from longvlm.files import read_json_object
from longvlm.processing.video_processing_longvlm import IMAGE_OPTIONS


def load_vision(source: str | Path, *, dtype: torch.dtype | None = None) -> VisionPart:
    """
    Loads the encoder in `source`: any encoder of `AutoModel`, or the vision tower of a model that has one (CLIP).

    Args:
        source: folder or Hub id, or `open_clip:MODEL/TAG_OR_FILE` (see `openclip_vision.py`).
        dtype: of the weights; `None`: as saved.

    Raises:
        ValueError: it is not a vision encoder, or some of its weights are missing.
        OSError: nothing can be loaded from there.
    """
    if str(source).startswith(PREFIX):
        return load_open_clip_by_name(str(source), dtype=dtype)
    # Without trust_remote_code, transformers would ask for permission to run code.
    with naming_files(source, "config.json"):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    check_size(config, str(source))
    tower = _tower_config(config, str(source))
    with naming_files(source, "weights"), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Not AutoModel.from_pretrained: it would build the whole CLIP, text tower included.
        model, info = MODEL_MAPPING[type(tower)].from_pretrained(
            source, config=tower, dtype=dtype or "auto", output_loading_info=True
        )
    # The pooler is not used here, and classifiers (ViT) are saved without one.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(
            f"{source} is missing {len(missing)} weights of {type(model).__name__}, for example {missing[0]}; "
            "give the folder or Hub id of a complete vision encoder"
        )
    return VisionPart(model.eval(), short_name(source), image_options(source, tower))


def _tower_config(config, name: str):
    """The configuration of the encoder itself; refuses anything that does not turn an image into a token per patch."""
    tower = getattr(config, "vision_config", None) or config
    if type(tower) not in MODEL_MAPPING or not hasattr(tower, "patch_size") or not hasattr(tower, "image_size"):
        raise ValueError(
            f"{name} is a {config.model_type} model, not a vision encoder that cuts images into patches; "
            "give, for example, a CLIP, SigLIP, DINOv2 or ViT model"
        )
    return tower


def untrained_vision(config: str | Path | dict, *, dtype: torch.dtype | None = None, seed: int = 0) -> VisionPart:
    """
    Builds an encoder with random weights.

    Args:
        config: its configuration: a dict, a JSON file, or a folder with a `config.json`.
        dtype: of the weights; `None`: float32.
        seed: of the random weights.

    Raises:
        ValueError: it is not the configuration of a vision encoder.
        OSError: the file cannot be read.
    """
    if isinstance(config, dict):
        values, name = dict(config), "an untrained vision encoder"
    else:
        path = Path(config)
        path = path / "config.json" if path.is_dir() else path
        values, name = read_json_object(path), path.stem
    model_type = values.pop("model_type", None)
    if model_type is None:
        raise ValueError('`vision_config` has no "model_type"; add one, for example "clip_vision_model"')
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f'`vision_config` has the model_type "{model_type!s:.60}", unknown to transformers')
    with naming_files(f"`vision_config` ({name})", "settings"):
        vision_config = AutoConfig.for_model(model_type, **values)
    check_size(vision_config, f"`vision_config` ({name})")
    vision_config = _tower_config(vision_config, name)
    dtype = dtype or torch.float32
    with naming_files(f"`vision_config` ({name})", "settings"), torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            size = sum(weight.numel() for weight in AutoModel.from_config(vision_config).parameters()) * dtype.itemsize
        if size > (free := psutil.virtual_memory().available):
            raise ValueError(f"the encoder has {size:,} bytes of weights; there is memory for {free:,}")
        torch.manual_seed(seed)
        model = AutoModel.from_config(vision_config, dtype=dtype)
    return VisionPart(model.eval(), name, _default_image_options(vision_config), trained=False)


def image_options(source: str | Path, config) -> dict[str, Any]:
    """How images are prepared for the encoder in `source`: by its image processor, else as its family does it."""
    try:
        values = AutoImageProcessor.from_pretrained(source, trust_remote_code=False).to_dict()
    except (OSError, ValueError, KeyError):  # the encoder comes without one
        return _default_image_options(config)
    options = {key: values[key] for key in IMAGE_OPTIONS if values.get(key) is not None}
    options.setdefault("do_center_crop", False)
    if not options["do_center_crop"]:
        options.pop("crop_size", None)
    options["size"] = {key: value for key, value in dict(options["size"]).items() if value is not None}
    return options


def _default_image_options(config) -> dict[str, Any]:
    """The preprocessing that encoders of this family are trained with, at the encoder's own size."""
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
