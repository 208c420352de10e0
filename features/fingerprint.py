"""What the features of a video depend on, and whether stored features fit a model.

The encoder's weights, the preprocessing and the merging decide the features; the LLM and the projector do not.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

MERGING = (
    "frames_per_segment",
    "tokens_per_segment",
    "vision_feature_layer",
    "merge_schedule",
    "merge_similarity",
    "merge_num_heads",
    "merge_order",
)
# Which frames the encoder sees, and their pixels. Part of the format: a new name makes every older folder unfit.
PREPROCESSING = (
    "num_frames",
    "fps",
    "max_frames",
    "short_video",
    "shortest_edge",
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


def fingerprint(metadata: Mapping[str, Any]) -> str:
    """A hash of what features depend on; the order of the keys does not matter."""
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()[:16]


def feature_metadata(model, video_processor, video_options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """
    What the features of a video depend on: encoder, preprocessing, merging.

    The encoder's weights are hashed as bfloat16, so that a checkpoint and its bfloat16 copy count as the same.

    Args:
        model: a LongVLM, with or without its LLM.
        video_processor: a `LongVLMVideoProcessor`.
        video_options: options that override the video processor's own (`num_frames`, `fps`, `max_frames`...).

    Returns:
        JSON values by name.
    """
    config = model.config
    digest = hashlib.sha256()
    tower = model.base_model.vision_tower if hasattr(model.base_model, "vision_tower") else model.vision_tower
    for name, value in sorted(tower.state_dict().items()):
        for tensor in _tensors_in(value):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            tensor = tensor.to("cpu", torch.bfloat16).contiguous().flatten()
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
    options = dict(video_options or {})
    if options.get("num_frames") is not None or options.get("fps") is not None:
        options = {"num_frames": None, "fps": None, **options}
    values = {name: options.get(name, getattr(video_processor, name, None)) for name in PREPROCESSING}
    if values["fps"] is not None:
        values["num_frames"] = None
    if options.get("video_stream") is not None:  # only then: older folders are of the default stream
        values["video_stream"] = options["video_stream"]
    metadata = {
        "encoder": config.vision_config.model_type,
        "encoder_weights": digest.hexdigest()[:16],
        "frame_size": list(config.frame_size),
        **{name: getattr(config, name) for name in MERGING},
        **values,
    }
    return json.loads(json.dumps(metadata, default=_as_json))


def _tensors_in(value: Any) -> Iterator[Tensor]:
    """What a state dict holds under one name, as ordinary tensors: quantisers also put tuples and types there."""
    if isinstance(value, Tensor):
        of_torchao = type(value).__module__.startswith("torchao.")
        yield value.dequantize() if value.is_quantized or of_torchao else value.detach()
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


def _as_json(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    if is_dataclass(value):  # transformers' sizes; which fields they have differs between versions
        return {
            item.name: getattr(value, item.name) for item in fields(value) if getattr(value, item.name) is not None
        }
    return dict(value) if isinstance(value, Mapping) else int(value)


def check_features(reader, metadata: Mapping[str, Any], num_global_layers: int) -> None:
    """
    Refuses features that were made in another way.

    Args:
        reader: the `FeatureReader` of the features.
        metadata: of `feature_metadata`: what they should depend on.
        num_global_layers: how many global features the model uses. More may be stored: the last ones are used.

    Raises:
        ValueError: the features do not fit.
    """
    expected, made = dict(metadata), dict(reader.metadata)
    if reader.num_global_layers < num_global_layers:
        expected, made = (
            {**expected, "num_global_layers": num_global_layers},
            {**made, "num_global_layers": reader.num_global_layers},
        )
    names = [name for name in sorted({*expected, *made}) if expected.get(name) != made.get(name)]
    if not names:
        return
    differences = ", ".join(f"{name} is {made.get(name)!r} and not {expected.get(name)!r}" for name in names[:4])
    raise ValueError(
        f"the features in {reader.folder} do not fit the model: {differences}; extract them again with this model, "
        "give the num_frames, fps, max_frames or video_stream that they were extracted with, or set check_features: "
        "false if you know that they fit"
    )


__all__ = ["check_features", "feature_metadata", "fingerprint"]
