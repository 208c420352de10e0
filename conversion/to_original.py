"""Export to the original format: files that the released code's own tools read.

`mm_projector.bin` is the torch state dict that a training with the released code saves; features are pickles of plain
numpy arrays. What was converted from such files is exported without a change.
"""

from pathlib import Path

import numpy as np
import torch

from longvlm.conversion.hub import local_folder
from longvlm.conversion.key_maps import TO_MM_PROJECTOR
from longvlm.conversion.original_features import dump_float_array
from longvlm.conversion.progress import Progress, silent
from longvlm.conversion.weights import Weights
from longvlm.features.store import FeatureReader
from longvlm.files import check_free, output_folder, read_json_object

# Options of `LongVLMConfig` that the original does not have -> the value that it always uses.
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
    progress: Progress | None = None,
) -> Path:
    """
    Writes `mm_projector.bin` and, given feature shards, `local/<video>.pkl` and `memory/<video>.pkl`.

    Args:
        checkpoint: folder or Hub id of a LongVLM checkpoint; only its projector and embedding table are read.
        out: folder to write; it appears only once it is complete.
        features: folder of feature shards. The pickles are float16, like the original's; bfloat16 and float32 are
            rounded.
        overwrite: replace a folder that is not empty.
        progress: called as `progress(stage)` at each step; for features as `progress(stage, videos, total)`.

    Returns:
        `out` as a path.

    Raises:
        ValueError: it is not a LongVLM checkpoint, or has options that the original does not know.
        OSError: the checkpoint cannot be loaded, or the folder cannot be written.
    """
    progress = progress or silent
    out = check_free(out, overwrite=overwrite)
    folder = local_folder(checkpoint)
    _check_config(folder)
    weights = Weights(folder)
    missing = [name for name in TO_MM_PROJECTOR if name not in weights]
    if missing:
        raise ValueError(f"{folder} is missing {missing[0]}; expected a LongVLM with a LLaMA and a linear projector")
    stored = None if features is None else FeatureReader(features)
    with output_folder(out, overwrite=overwrite) as partial:
        progress("writing mm_projector.bin")
        tensors = {old: weights[name].clone() for name, old in TO_MM_PROJECTOR.items()}  # in the original's order
        torch.save(tensors, partial / "mm_projector.bin")
        for done, video in enumerate(stored or (), start=1):
            assert stored is not None
            found = stored[video]
            for kind, tensor in (("local", found.local_features), ("memory", found.all_global_features)):
                file = partial / kind / f"{video}.pkl"
                if not file.resolve().is_relative_to((partial / kind).resolve()):
                    raise ValueError(f'the video "{video}" would be written outside of {out}')
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(dump_float_array(_as_float16(tensor, video)))
            progress("writing features", done, len(stored))
    return out


def _check_config(folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a checkpoint: config.json is missing")
    config = read_json_object(file)
    if config.get("model_type") != "longvlm":
        raise ValueError(f"{folder} is a {config.get('model_type')} model, not a LongVLM")
    text_config = config.get("text_config")
    kind = text_config.get("model_type") if isinstance(text_config, dict) else None
    if kind != "llama":
        raise ValueError(f"{folder} has a {kind} as its language model; the original knows only LLaMA")
    for name, value in ONLY.items():
        if config.get(name, value) != value:  # a field that is not there has the default, which is the original's
            raise ValueError(f"{folder} has {name}={config[name]!r}; the original knows only {value!r}")


def _as_float16(tensor: torch.Tensor, video: str) -> np.ndarray:
    half = tensor.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ValueError(f'the features of "{video}" hold values beyond the range of float16, the original\'s dtype')
    return half.numpy()
