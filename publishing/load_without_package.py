"""Run as a script: loads a checkpoint folder where `longvlm` cannot be imported, and asks about a generated clip.

    python -P load_without_package.py FOLDER

Prints the answer. Errors end in one line on stderr and exit code 1. Nothing here may import `longvlm`.
"""

import os
import sys
import tempfile
from pathlib import Path


def write_clip(path: Path) -> None:
    """Two seconds of a moving bright square."""
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(16):
            picture = np.full((48, 64, 3), (30, 60, 90), np.uint8)
            picture[10:22, 2 * index : 2 * index + 12] = (220, 40, 40)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def check_loading(folder: str) -> None:
    """Every weight must be there and have the right shape: transformers fills missing ones with random values."""
    from transformers import AutoModelForImageTextToText

    _, info = AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype="auto", output_loading_info=True
    )
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(name) for name in info.get(f"{kind}_keys", ()))
        if names:
            raise ValueError(f"{kind} weights: {len(names)}, for example {names[0]}")


def ask(folder: str) -> str:
    import torch
    from transformers import LogitsProcessorList, pipeline

    def finite(input_ids, scores):
        if torch.isnan(scores).any() or not torch.isfinite(scores).any():
            raise ValueError("the model computes NaN")
        return scores

    pipe = pipeline("video-question-answering", model=folder, trust_remote_code=True, dtype="auto")
    for part in (pipe, pipe.model, pipe.processor):
        if not type(part).__module__.startswith("transformers_modules"):
            raise ValueError(f"{type(part).__name__} comes from {type(part).__module__}, not from the folder")
    with tempfile.TemporaryDirectory() as temporary:
        clip = Path(temporary) / "clip.mp4"
        write_clip(clip)
        return pipe(
            video=str(clip), question="What moves?", max_new_tokens=4, logits_processor=LogitsProcessorList([finite])
        )["answer"]


if __name__ == "__main__":
    sys.modules["longvlm"] = None  # type: ignore[assignment]  # from here on, importing it fails
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        check_loading(sys.argv[1])
        print(ask(sys.argv[1]))
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
