"""Which files are videos, and what each is called in a folder of features."""

from collections.abc import Iterable
from pathlib import Path

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".gif")


def _lines(file: Path) -> list[str]:
    """The lines of a text file that are not blank."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not UTF-8 text; a list of videos has one path a line") from None
    return [line.strip() for line in lines if line.strip()]


def find_videos(sources: Iterable[str | Path]) -> dict[str, Path]:
    """
    Finds videos and names them.

    Args:
        sources: video files, folders of videos (subfolders included), or `.txt` files with one path per line.

    Returns:
        Name -> path, sorted by name. A file in a folder is named by its path within that folder, without the suffix
        (`cooking/v_0`); any other file by its own name without the suffix.

    Raises:
        ValueError: a source does not exist, there are no videos, or two videos have the same name.
    """
    sources = list(sources)
    found: dict[str, Path] = {}

    def add(name: str, file: Path) -> None:
        if found.setdefault(name, file) != file:
            raise ValueError(f'{found[name]} and {file} would both be called "{name}"; rename one of them')

    for source in map(Path, sources):
        if source.is_dir():
            for file in sorted(source.rglob("*")):
                if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file():
                    add(file.relative_to(source).with_suffix("").as_posix(), file)
        elif not source.is_file():
            raise ValueError(f"{source}: no such file or folder")
        elif source.suffix == ".txt":
            for line in _lines(source):
                add(Path(line).stem, Path(line))
        else:
            add(source.stem, source)
    if not found:
        raise ValueError(f"no videos in {', '.join(map(str, sources))}; they end in {', '.join(VIDEO_SUFFIXES)}")
    return dict(sorted(found.items()))


def window_name(name: str, video_start: float | None = None, video_end: float | None = None) -> str:
    """The name of a video, or of a part of it (`name@start-end`, in seconds), in a folder of features."""
    if video_start is None and video_end is None:
        return name
    start, end = ("" if seconds is None else f"{seconds:.12g}" for seconds in (video_start or 0, video_end))
    return f"{name}@{start}-{end}"


__all__ = ["VIDEO_SUFFIXES", "find_videos", "window_name"]
