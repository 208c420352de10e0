"""`longvlm-tiny`, the small trained checkpoint that comes with the package.

It is used where no model is named. It needs no download, and knows only the synthetic videos of Storyline.
"""

from pathlib import Path

TINY = "longvlm-tiny"
_FOLDER = Path(__file__).resolve().parent / TINY


def tiny_checkpoint() -> Path:
    """
    The folder of `longvlm-tiny`, the small trained checkpoint that comes with the package; works offline.

    It answers questions about Storyline, a synthetic world, and knows nothing about other videos. Its model card, with
    the measured accuracy, is in the same folder.

    Returns:
        `Path` of a checkpoint folder, for `from_pretrained` and `pipeline`.

    Raises:
        FileNotFoundError: it is missing from the installation.
    """
    if not ((_FOLDER / "config.json").is_file() and any(_FOLDER.glob("*.safetensors"))):
        raise FileNotFoundError(
            f"{TINY}, the checkpoint that comes with the package, is not in {_FOLDER}; install longvlm again "
            f"(in a checkout: git checkout longvlm/{TINY}, or make tiny), or name another model"
        )
    return _FOLDER


__all__ = ["TINY", "tiny_checkpoint"]
