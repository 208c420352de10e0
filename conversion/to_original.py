"""The way back: files that the released code's own tools read, from a checkpoint and from feature shards.

`mm_projector.bin` is the torch state dict that a training with the released code saves; features are pickles of plain
numpy arrays. What was converted from such files comes out as it went in.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from longvlm.conversion.hub import local_folder
from longvlm.conversion.key_maps import TO_MM_PROJECTOR
from longvlm.conversion.original_features import dump_float_array
from longvlm.conversion.shards import TensorReader
from longvlm.features.store import FeatureReader
from longvlm.files import check_free, output_folder, read_json_object

# What the original cannot do otherwise: option of `LongVLMConfig` -> the only value that it has.
ONLY = {
    "projector_type": "linear",
    "merge_similarity": "mean_head",
    "merge_order": "matching",
    "global_placement": "prefix",
    "frames_per_segment": 10,
    "num_global_layers": 5,
    "vision_feature_layer": -2,
}


def convert_to_original(
    checkpoint: str | Path,
    out: str | Path,
    *,
    features: str | Path | None = None,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Writes `mm_projector.bin` and, given feature shards, `local/<video>.pkl` and `memory/<video>.pkl`.

    Args:
        checkpoint: folder or Hub id of a LongVLM checkpoint; its projector and embedding table are read, nothing else.
        out: folder to write.
        features: folder of feature shards. Pickles are float16, as the original's; bfloat16 and float32 are rounded.
        overwrite: replace a folder that is not empty.
        progress: called with one line per step; without it there is no progress bar either.

    Raises:
        ValueError: the checkpoint is none of LongVLM, or does what the original cannot.
    """
    out = check_free(out, overwrite=overwrite)
    say = progress or (lambda step: None)
    folder = local_folder(checkpoint)
    _check_config(folder)
    reader = TensorReader(folder)
    lacking = [name for name in TO_MM_PROJECTOR if name not in reader]
    if lacking:
        raise ValueError(f"{folder} lacks {lacking[0]}; a LongVLM with a LLaMA and a linear projector is wanted")
    stored = None if features is None else FeatureReader(features)
    with output_folder(out, overwrite=overwrite) as partial:
        say("writing mm_projector.bin")
        # A table row a token of the tokenizer, in the order in which the original saves them.
        torch.save({old: reader.get(name) for name, old in TO_MM_PROJECTOR.items()}, partial / "mm_projector.bin")
        for video in tqdm(stored or (), unit="video", disable=progress is None or stored is None):
            assert stored is not None
            found = stored[video]
            for kind, tensor in (("local", found.local_features), ("memory", found.all_global_features)):
                file = partial / kind / f"{video}.pkl"
                if not file.resolve().is_relative_to((partial / kind).resolve()):
                    raise ValueError(f'the video "{video}" would be written outside of {out}')
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(dump_float_array(_as_float16(tensor, video)))
    return out


def _check_config(folder: Path) -> None:
    file = folder / "config.json"
    try:
        config = read_json_object(file)
    except (OSError, ValueError):
        raise ValueError(f"{folder} is no checkpoint: config.json lacks or cannot be read") from None
    if config.get("model_type") != "longvlm":
        raise ValueError(f"{folder} is a {config.get('model_type')} model, not a LongVLM")
    text_config = config.get("text_config")
    kind = text_config.get("model_type") if isinstance(text_config, dict) else None
    if kind != "llama":
        raise ValueError(f"{folder} has a {kind} as its language model; the original knows LLaMA only")
    for name, value in ONLY.items():
        if config.get(name, value) != value:  # what is not written is the default, which is the original's
            raise ValueError(f"{folder} has {name}={config[name]!r}; the original knows {value!r} only")


def _as_float16(tensor: torch.Tensor, video: str) -> np.ndarray:
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(f'the features of "{video}" hold values beyond float16, which the original stores')
    return half.numpy()
