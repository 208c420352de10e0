"""Training data: files of rows, checked before training starts, become one dataset of chats.

    dataset, report = build_dataset(["train.json"], processor, video_folders=["videos"], max_length=2048)
    print(report)          # 9,968 rows kept, 32 dropped: 30 missing video, 2 too long
    report.save("data_report.json")

Every row that is dropped is named in the report, with the reason. One dataset class serves raw videos and features
made by `longvlm extract`, whatever the form of the rows.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from longvlm.features.failures import read_failed
from longvlm.features.store import FeatureReader
from longvlm.features.videos import VIDEO_SUFFIXES, window_name
from longvlm.files import atomic_write, read_json
from longvlm.modeling_longvlm.pipeline_inputs_longvlm import without_decoding
from longvlm.modeling_longvlm.plain_numbers import real_number
from longvlm.processing.video_sources import VideoSource, encoded_video
from longvlm.training.chat_encoding import encode_chat
from longvlm.training.formats import BadRow, as_messages, videos_in, without_videos

# The released code's data files name feature files where others name videos.
FEATURE_SUFFIXES = (".pkl",)
MAX_WEIGHT = 1000  # of a source; its rows are listed so many times
WINDOW = ("video_start", "video_end")


@dataclass(frozen=True)
class DroppedRow:
    """A row that is not trained on: its place in the source, the kind of reason, and the reason."""

    where: str
    kind: str
    reason: str


@dataclass
class DataReport:
    """What became of the rows. `kept` counts them before `weights` repeat or thin out the sources."""

    kept: int = 0
    dropped: list[DroppedRow] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = Counter(row.kind for row in self.dropped).most_common()
        named = f": {', '.join(f'{count:,} {kind}' for kind, count in kinds)}" if kinds else ""
        return f"{self.kept:,} rows kept, {len(self.dropped):,} dropped{named}"

    def save(self, file: str | Path) -> None:
        """Writes the report as JSON, with every dropped row."""
        content = {"kept": self.kept, "dropped": [asdict(row) for row in self.dropped]}
        with atomic_write(file) as partial:
            partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Chat:
    """A row that is trained on.

    Attributes:
        where: its place in the source.
        messages: of `as_messages`.
        features: `(number of the reader, name of the video)` for each of its videos; empty without features.
        length: tokens, including those of its videos.
    """

    where: str
    messages: list[dict]
    features: tuple[tuple[int, str], ...]
    length: int


@dataclass(frozen=True)
class VideoInRow:
    """A video whose bytes stay in the table that its row comes from, until they are needed.

    Attributes:
        table: a `datasets.Dataset`.
        row: number of the row.
        place: which of the row's videos it is.
    """

    table: Any
    row: int
    place: int

    def read(self) -> Any:
        return videos_in(as_messages(self.table[self.row], self.row))[self.place]


class VideoChatDataset(Dataset):
    """
    Chats for `LongVLMDataCollator`. Items have `messages` and `where`; with features also `video_features`, a list of
    one `LongVLMVideoFeatures` per video.

    Args:
        chats: the rows.
        readers: the folders of features; a chat refers to a reader by its number.
    """

    def __init__(self, chats: Sequence[Chat], readers: Sequence[FeatureReader] = ()):
        self.chats = list(chats)
        self.readers = list(readers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each chat, including those of its videos."""
        return [chat.length for chat in self.chats]

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chat = self.chats[index]
        item: dict[str, Any] = {"messages": _with_videos(chat.messages), "where": chat.where}
        if chat.features:
            item["video_features"] = [self.readers[reader][name].as_video_features() for reader, name in chat.features]
        return item


def build_dataset(
    sources: Sequence[Any],
    processor,
    *,
    weights: Sequence[float] | None = None,
    video_folders: Sequence[str | Path] = (),
    features: Sequence[str | Path | FeatureReader] = (),
    max_length: int | None = None,
    truncation: bool = False,
    chat_template: str | None = None,
    video_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[VideoChatDataset, DataReport]:
    """
    Reads, checks and encodes all rows.

    Args:
        sources: each a file (`.json`, `.jsonl`, `.parquet`), a folder saved by `datasets`, a Hub id, or rows (a list,
            a `datasets.Dataset`). For the forms of rows see `longvlm.training.formats`.
        processor: a `LongVLMProcessor`.
        weights: how often the rows of each source occur in an epoch. With 0.5, half of the rows are used: always the
            same half, chosen by `seed`.
        video_folders: where the videos are; the first folder that has a video counts. Rows may omit the suffix.
        features: folders made by `longvlm extract`. No video is opened then, and all must be in these folders.
        max_length, truncation, chat_template: as in `encode_chat`.
        video_options: options of the video processor, if the collator gets any.
        seed: for the choice by weights.
        progress: called as `progress("check rows", done, total)` after each row of a source whose length is known.

    Returns:
        The dataset, with the rows in the order of their sources, and the report of what was dropped.

    Raises:
        ValueError: a source cannot be read at all, or no row is left.
    """
    weights = [1.0] * len(sources) if weights is None else [real_number("weights", weight, 0) for weight in weights]
    if len(weights) != len(sources) or max(weights, default=0) > MAX_WEIGHT:
        raise ValueError(
            f"{len(weights)} weights for {len(sources)} sources ({weights}); each needs one, from 0 to {MAX_WEIGHT}"
        )
    readers = [
        one if isinstance(one, FeatureReader) else FeatureReader(one, num_global_layers=processor.num_global_tokens)
        for one in features
    ]
    # Options that no video can have are an error now, not the fault of every row.
    processor.video_processor.check_options(**(video_options or {}))
    if readers:
        finder: _Features | _Videos = _Features(readers, processor, video_options)
    else:
        finder = _Videos(video_folders, processor, video_options)
    report, chosen = DataReport(), []
    rng = random.Random(seed)
    for source, weight in zip(sources, weights, strict=True):
        chats = []
        rows, total, table = _open_source(source)
        for number, (where, row) in enumerate(rows):
            if progress is not None and number and total:
                progress("check rows", number, total)
            try:
                if isinstance(row, BadRow):
                    raise row
                messages = as_messages(row, number)
                messages, names, counts = finder.find(messages)
                if table is not None:
                    messages = _leave_in_rows(messages, table, number)
                chat = encode_chat(
                    processor,
                    messages,
                    counts,
                    chat_template=chat_template,
                    max_length=max_length,
                    truncation=truncation,
                )
            except BadRow as error:
                report.dropped.append(DroppedRow(where, error.kind, str(error)))
                continue
            chats.append(Chat(where, messages, names, len(chat)))
        if progress is not None and total:
            progress("check rows", total, total)
        report.kept += len(chats)
        times, share = divmod(weight, 1)
        chosen += chats * int(times)
        sampled = set(rng.sample(range(len(chats)), round(share * len(chats))))
        chosen += [chat for number, chat in enumerate(chats) if number in sampled]
    if not chosen:
        first = f"; the first is {report.dropped[0].where}: {report.dropped[0].reason}" if report.dropped else ""
        raise ValueError(f"no row is left to train on ({report}{first})")
    return VideoChatDataset(chosen, readers), report


# --- reading ---


def read_rows(source: Any) -> Iterator[tuple[str, Any]]:
    """The rows of a source in order, each with its place in the source; a `BadRow` for a line that is not JSON.

    Raises:
        ValueError: the source cannot be read at all.
    """
    yield from _open_source(source)[0]


def _open_source(source: Any) -> tuple[Iterator[tuple[str, Any]], int, Any]:
    """-> rows as in `read_rows`; how many there are, 0: not known; the `datasets.Dataset`, if they are in one."""
    if not isinstance(source, (str, Path)):
        source = without_decoding(source)
        total = len(source) if isinstance(source, Sized) else 0
        return _named("rows", source), total, source if total and hasattr(source, "features") else None
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".parquet") and not path.is_file():
        raise ValueError(f"{path}: no such file")
    if suffix == ".jsonl":
        with open(path, "rb") as lines:
            total = sum(bool(line.strip()) for line in lines)
        return _read_lines(path), total, None
    if suffix == ".json":
        try:
            rows = read_json(path)
        except ValueError as error:
            raise ValueError(f"{error}; a file of one object per line must be .jsonl") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a list of rows, not {type(rows).__name__}")
        return _named(path.name, rows), len(rows), None
    table = without_decoding(_load_with_datasets(source, path))
    return _named(path.name, table), len(table), table


def _named(name: str, rows: Iterable) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield f"{path.name}, line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path.name}, line {number}", BadRow("bad line", f"it is not JSON: {error}")


def _load_with_datasets(source: Any, path: Path) -> Any:
    try:
        import datasets
    except ImportError:
        raise ImportError(f"reading {source} needs the package datasets: pip install datasets") from None
    if path.suffix.lower() == ".parquet":
        try:
            return datasets.Dataset.from_parquet(str(path), keep_in_memory=True)
        except Exception as error:
            raise ValueError(f"{path} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from None
    loaded = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.load_dataset(str(source), split="train")
    if isinstance(loaded, dict):
        if "train" not in loaded:
            raise ValueError(f"{source} has the splits {', '.join(loaded)} but no split train")
        loaded = loaded["train"]
    return loaded


# --- videos that are in the rows ---


def _leave_in_rows(messages: list[dict], table: Any, row: int) -> list[dict]:
    """The chat without the bytes of its videos: those of a whole data set would not fit in memory."""
    places = iter(range(len(videos_in(messages))))

    def leave(part: dict) -> dict:
        place = next(places)
        # A path stays, and so does the empty place of a video whose features are there.
        is_here = not isinstance(part.get("video", ""), str)
        return {**part, "video": VideoInRow(table, row, place)} if is_here else part

    return _map_videos(messages, leave)


def _with_videos(messages: list[dict]) -> list[dict]:
    def read(part: dict) -> dict:
        video = part.get("video")
        return {**part, "video": video.read()} if isinstance(video, VideoInRow) else part

    return _map_videos(messages, read)


def _map_videos(messages: list[dict], change: Callable[[dict], dict]) -> list[dict]:
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [change(p) if p["type"] == "video" else p for p in message["content"]]}
        for message in messages
    ]


# --- finding videos ---


class _Videos:
    """Finds the file that a row names, and counts the frames that will be taken from it."""

    def __init__(self, folders: Sequence[str | Path], processor, options: Mapping[str, Any] | None):
        self.folders = [Path(folder) for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise ValueError(f"the video folder {folder} does not exist")
        self.processor = processor
        self.options = dict(options or {})
        self._known: dict[tuple[str, str], tuple[str, int] | BadRow] = {}

    def find(self, messages: list[dict]) -> tuple[list[dict], tuple, list[int]]:
        """-> the chat with the paths of the files, no names of features, and the tokens of each video."""
        found = [self._find(part.video, part.options) for part in _video_parts(self.processor, messages)]
        videos = iter(video for video, _ in found)
        counts = [self.processor.num_video_tokens(frames) for _, frames in found]
        for message in messages:
            if not isinstance(message["content"], str):
                for part in message["content"]:
                    if part["type"] == "video":
                        part["video"] = next(videos)
        return messages, (), counts

    def _find(self, video: Any, options: Mapping[str, Any]) -> tuple[Any, int]:
        video = _file_of(video)
        if not isinstance(video, (str, Path, int)):
            return video, self._count(video, options)
        name = str(video)  # some data sets have numbers for names
        key = name, repr(sorted(options.items()))
        if key not in self._known:
            try:
                path = name if "://" in name[:16] or name.startswith("data:") else self._locate(name)
                self._known[key] = path, self._count(path, options)
            except BadRow as error:
                self._known[key] = error
        known = self._known[key]
        if isinstance(known, BadRow):
            raise BadRow(known.kind, str(known))
        return known

    def _locate(self, name: str) -> str:
        folders = self.folders or [Path()]
        stem = next((name.removesuffix(s) for s in FEATURE_SUFFIXES if name.endswith(s)), name)
        for folder in folders:
            for suffix in ("", *VIDEO_SUFFIXES):
                if os.path.exists(folder / f"{stem}{suffix}"):  # False also for a name that is too long
                    return str(folder / f"{stem}{suffix}")
        where = " or ".join(map(str, self.folders)) or "the working directory"
        raise BadRow("missing video", f'the video "{name}" is not in {where}')

    def _count(self, video: Any, options: Mapping[str, Any]) -> int:
        try:
            return self.processor.video_processor.count_frames(video, video_options=options, **self.options)
        except (ValueError, OSError) as error:
            raise BadRow("broken video", " ".join(str(error).split())) from None


def _file_of(video: Any) -> Any:
    try:
        return encoded_video(video)
    except ValueError as error:
        raise BadRow("missing video", str(error)) from None


def _video_parts(processor, messages: list[dict]) -> list:
    """The videos of a chat, each with its options."""
    try:
        return processor.take_videos(messages)[1]
    except ValueError as error:
        raise BadRow("unknown option", str(error)) from None


class _Features:
    """Finds the features of a video that a row names."""

    def __init__(self, readers: Sequence[FeatureReader], processor, options: Mapping[str, Any] | None):
        self.readers = readers
        self.processor = processor
        self.window = {name: (options or {}).get(name) for name in WINDOW}
        self.failed = {name: reason for reader in readers for name, reason in read_failed(reader.folder).items()}
        self.folders = {Path(name).parent.as_posix() for reader in readers for name in reader}

    def find(self, messages: list[dict]) -> tuple[list[dict], tuple, list[int]]:
        """-> the chat with empty places for its videos, the names of their features, and the tokens of each."""
        names = tuple(self._find(part.video, part.options) for part in _video_parts(self.processor, messages))
        counts = [self.processor.total_video_tokens(self.readers[i].num_local_tokens(name)) for i, name in names]
        return without_videos(messages), names, counts

    def _find(self, video: Any, options: Mapping[str, Any]) -> tuple[int, str]:
        others = [option for option in options if option not in WINDOW]
        if others:
            raise BadRow("unknown option", f"{', '.join(others)} of a video cannot be applied to extracted features")
        window = {**self.window, **options}
        video = _file_of(video)
        if isinstance(video, VideoSource):
            video = video.name
        if not isinstance(video, (str, Path, int)):
            raise BadRow("missing video", f"features are found by name, but the row has a {type(video).__name__}")
        name = Path(str(video))
        # Features are named by the path below the folder that was extracted; the row may name folders above it, too.
        for start in range(len(name.parts)):
            rest = Path(*name.parts[start:])
            for below in (rest.as_posix(), (rest.with_suffix("") if rest.suffix else rest).as_posix()):
                stored = window_name(below, **window)
                for number, reader in enumerate(self.readers):
                    if stored in reader:
                        return number, stored
                if stored in self.failed:
                    raise BadRow("missing video", f'the video "{name}" could not be extracted: {self.failed[stored]}')
            if rest.parent.as_posix() in self.folders:
                break  # else `more/v` would be taken for `v`
        folders = " or ".join(str(reader.folder) for reader in self.readers)
        raise BadRow(
            "missing video", f'there are no features of the video "{window_name(str(name), **window)}" in {folders}'
        )


__all__ = ["Chat", "DataReport", "DroppedRow", "VideoChatDataset", "build_dataset", "read_rows"]
