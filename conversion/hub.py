"""A folder with the files of a model: a local one, or a download from the Hub.

Only what a converter reads is downloaded: configuration, tokenizer, and the weights in one format.
"""

from pathlib import Path

from huggingface_hub import list_repo_files, snapshot_download
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import OfflineModeIsEnabled

FILES = ["*.json", "*.model", "*.safetensors", "*.bin"]


def local_folder(source: str | Path) -> Path:
    """
    The local folder for `source`, a folder or a Hub id.

    Raises:
        ValueError: it is neither a folder nor a possible Hub id.
        OSError: the Hub has no such model, or cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(f"{path} is a file; give the folder that it is in")
    try:
        try:
            names = list_repo_files(str(source))
        except OfflineModeIsEnabled:
            names = []
        unused = ["*.bin"] if any(name.endswith(".safetensors") for name in names) else []
        return Path(snapshot_download(str(source), allow_patterns=FILES, ignore_patterns=unused))
    except HFValidationError:
        raise ValueError(f"{source} is not a folder, and cannot be a Hub id") from None


def short_name(source: str | Path) -> str:
    """A Hub id as it is; for a local folder its name alone, so that no path of this machine is published."""
    path = Path(source)
    return path.resolve().name if path.exists() else str(source)
