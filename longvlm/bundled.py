"""`longvlm-tiny`, the small trained checkpoint that comes with the package.

Commands that ask a model use it where none is named. It needs no download, and knows the synthetic videos of Storyline
only. Nothing here imports torch: the command says which model it takes before that is loaded.
"""

from pathlib import Path

TINY = "longvlm-tiny"
_FOLDER = Path(__file__).resolve().parent / TINY

NOTE = (
    f"longvlm: warning: no --model is given, so this is {TINY}, which knows only the synthetic Storyline videos; "
    "what it says of any other video means nothing"
)


def tiny_checkpoint() -> Path:
    """
    The folder of `longvlm-tiny`, the small trained checkpoint that comes with the package; works offline.

    It answers questions about Storyline, a synthetic world, and knows nothing of other videos; its model card lies
    beside it, with the accuracy that was measured.

    Returns:
        `Path` of a checkpoint folder, for `from_pretrained` and `pipeline`.

    Raises:
        FileNotFoundError: the installation lacks it.
    """
    if not ((_FOLDER / "config.json").is_file() and any(_FOLDER.glob("*.safetensors"))):
        raise FileNotFoundError(
            f"{TINY}, the checkpoint that comes with the package, is not in {_FOLDER}; install longvlm again "
            f"(in a checkout: git checkout longvlm/{TINY}, or make tiny), or name another model"
        )
    return _FOLDER


__all__ = ["NOTE", "TINY", "tiny_checkpoint"]
