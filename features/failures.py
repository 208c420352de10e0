"""`failed.jsonl` in a folder of features: the videos that could not be read, one `{"video", "reason"}` a line."""

import json
from collections.abc import Mapping
from pathlib import Path

from longvlm.files import atomic_write

FAILED = "failed.jsonl"


def read_failed(folder: str | Path) -> dict[str, str]:
    """Name -> reason of the videos that failed; empty if the folder has no list of them.

    Raises:
        ValueError: the list is damaged.
    """
    file = Path(folder) / FAILED
    if not file.exists():
        return {}
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {line["video"]: line["reason"] for line in lines}
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(f"{file} is damaged; remove it and extract again") from None


def write_failed(folder: str | Path, failed: Mapping[str, str]) -> None:
    """Replaces the list by `failed` (name -> reason), whole or not at all; without failures there is no file."""
    file = Path(folder) / FAILED
    if not failed:
        file.unlink(missing_ok=True)
        return
    with atomic_write(file) as partial:
        partial.write_text("".join(_line(video, reason) for video, reason in failed.items()), encoding="utf-8")


class FailureLog:
    """Writes the list line by line, so that a killed process leaves what it found so far. A context manager.

    Args:
        folder: an existing folder; a list that it has is replaced.
    """

    def __init__(self, folder: str | Path):
        self.file = Path(folder) / FAILED
        self._opened = open(self.file, "w", encoding="utf-8")

    def add(self, video: str, error: BaseException | str) -> None:
        """Adds a video and the reason why it failed, on one line."""
        self._opened.write(_line(video, " ".join(str(error).split())))
        self._opened.flush()

    def __enter__(self) -> "FailureLog":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._opened.close()


def _line(video: str, reason: str) -> str:
    line = json.dumps({"video": video, "reason": reason}, ensure_ascii=False)
    if not line.isascii() and any("\ud800" <= character <= "\udfff" for character in line):
        line = json.dumps({"video": video, "reason": reason})  # a name that is not UTF-8
    return line + "\n"


__all__ = ["FAILED", "FailureLog", "read_failed", "write_failed"]
