"""Training data: files of rows, checked before the training starts, as one dataset of chats.

    dataset, report = build_dataset(["train.json"], processor, video_folders=["videos"], max_length=2048)
    print(report)          # 9,968 rows kept, 32 dropped: 30 missing video, 2 too long
    report.save("data_report.json")

No row is left out without being named, with the reason, in the report. The same dataset class gives raw videos or
features that `longvlm extract` made, whatever the rows look like.
"""

import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from tqdm import tqdm

from longvlm.features.store import FeatureReader
from longvlm.processing.video_decoding import decode_video
from longvlm.training.chat_encoding import encode_chat
from longvlm.training.formats import BadRow, as_messages, videos_in, without_videos

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".gif")
# The released code's data files name the files of features that its tools made.
FEATURE_SUFFIXES = (".pkl",)
FAILED = "failed.jsonl"  # in a folder of features


@dataclass(frozen=True)
class DroppedRow:
    """A row that is not trained on: where it stands, the kind of reason, and the reason."""

    where: str
    kind: str
    reason: str


@dataclass
class DataReport:
    """What became of the rows: `kept` counts them before files are repeated by their weights."""

    kept: int = 0
    dropped: list[DroppedRow] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = Counter(row.kind for row in self.dropped).most_common()
        named = f": {', '.join(f'{count:,} {kind}' for kind, count in kinds)}" if kinds else ""
        return f"{self.kept:,} rows kept, {len(self.dropped):,} dropped{named}"

    def save(self, file: str | Path) -> None:
        """Writes it as JSON, with every dropped row."""
        content = {"kept": self.kept, "dropped": [asdict(row) for row in self.dropped]}
        Path(file).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Chat:
    """A row that passed: its messages, the names of its features (if any), and its length in tokens."""

    where: str
    messages: list[dict]
    features: tuple[tuple[int, str], ...]
    length: int


class VideoChatDataset(Dataset):
    """
    Chats for `LongVLMDataCollator`. Items have `messages` and `where`; with features also `video_features`.

    Args:
        chats: the rows.
        readers: where the features are; a chat names a reader by its number.
    """

    def __init__(self, chats: Sequence[Chat], readers: Sequence[FeatureReader] = ()):
        self.chats = list(chats)
        self.readers = list(readers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each chat, the videos' included."""
        return [chat.length for chat in self.chats]

    def __len__(self) -> int:
        return len(self.chats)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chat = self.chats[index]
        item: dict[str, Any] = {"messages": chat.messages, "where": chat.where}
        if chat.features:
            stored = [self.readers[reader][name] for reader, name in chat.features]
            item["video_features"] = [
                {"local_features": one.local_features, "global_features": one.global_features} for one in stored
            ]
        return item


def build_dataset(
    sources: Sequence[Any],
    processor,
    *,
    weights: Sequence[float] | None = None,
    video_folders: Sequence[str | Path] = (),
    features: Sequence[str | Path | FeatureReader] = (),
    max_length: int | None = None,
    too_long: str = "drop",
    chat_template: str | None = None,
    video_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[VideoChatDataset, DataReport]:
    """
    Args:
        sources: each a file (`.json`, `.jsonl`, `.parquet`), a folder that `datasets` saved, a Hub id, or rows
            (a list, a `datasets.Dataset`). For the forms of rows see `longvlm.training.formats`.
        processor: a `LongVLMProcessor`.
        weights: how often the rows of each source come in an epoch; of 0.5, half of them, chosen once by `seed`.
        video_folders: where the videos lie; the first that has one counts. A name may lack its suffix.
        features: folders that `longvlm extract` made; then no video is opened, and all must be in there.
        max_length, too_long, chat_template: as in `encode_chat`.
        video_options: of the video processor, in case the collator gets some.
        seed: of the choice by weights.
        progress: show a bar.

    Returns:
        The dataset, and the report of what was dropped. A row stays in its source's order.

    Raises:
        ValueError: a file cannot be read at all, or nothing is left.
    """
    weights = [1.0] * len(sources) if weights is None else list(weights)
    if len(weights) != len(sources) or any(weight < 0 for weight in weights):
        raise ValueError(
            f"{len(weights)} weights for {len(sources)} sources, {weights}; one of at least 0 is needed each"
        )
    readers = [one if isinstance(one, FeatureReader) else FeatureReader(one) for one in features]
    finder = _Features(readers, processor) if readers else _Videos(video_folders, processor, video_options)
    report, chosen = DataReport(), []
    rng = random.Random(seed)
    for source, weight in zip(sources, weights, strict=True):
        chats = []
        for number, (where, row) in enumerate(tqdm(read_rows(source), unit="row", disable=not progress)):
            try:
                if isinstance(row, BadRow):
                    raise row
                messages = as_messages(row, number)
                messages, names, counts = finder.find(messages)
                chat = encode_chat(
                    processor,
                    messages,
                    counts,
                    chat_template=chat_template,
                    max_length=max_length,
                    too_long=too_long,
                )
            except BadRow as error:
                report.dropped.append(DroppedRow(where, error.kind, str(error)))
                continue
            chats.append(Chat(where, messages, names, len(chat)))
        report.kept += len(chats)
        whole, part = divmod(weight, 1)
        chosen += chats * int(whole)
        some = set(rng.sample(range(len(chats)), round(part * len(chats))))
        chosen += [chat for number, chat in enumerate(chats) if number in some]
    if not chosen:
        first = f"; the first: {report.dropped[0].where}: {report.dropped[0].reason}" if report.dropped else ""
        raise ValueError(f"no row to train on is left ({report}{first})")
    return VideoChatDataset(chosen, readers), report


# --- reading ---


def read_rows(source: Any) -> Iterator[tuple[str, Any]]:
    """Rows of a source in order, each with the place where it stands; `BadRow` for a line that is no JSON.

    Raises:
        ValueError: the source cannot be read at all.
    """
    if not isinstance(source, (str, Path)):
        yield from _named("rows", source)
        return
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".json", ".jsonl", ".parquet") and not path.is_file():
        raise ValueError(f"{path}: no such file")
    if suffix == ".jsonl":
        yield from _read_lines(path)
    elif suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is no JSON: {error}; one object a line needs the name .jsonl") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a list of rows, not {type(rows).__name__}")
        yield from _named(path.name, rows)
    else:
        yield from _named(path.name, _load_with_datasets(source, path))


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
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield f"{path.name}, line {number}", BadRow("bad line", f"it is no JSON: {error}")


def _load_with_datasets(source: Any, path: Path) -> Iterable:
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
            raise ValueError(f"{source} has the splits {', '.join(loaded)} and none called train")
        loaded = loaded["train"]
    return loaded


# --- finding videos ---


class _Counted(Exception):
    """Carries the number of frames out of the decoder, before it decodes one."""

    def __init__(self, frames: int):
        self.frames = frames


class _Videos:
    """Finds the file that a row names, and counts the frames that will be taken of it."""

    def __init__(self, folders: Sequence[str | Path], processor, options: Mapping[str, Any] | None):
        self.folders = [Path(folder) for folder in folders]
        for folder in self.folders:
            if not folder.is_dir():
                raise ValueError(f"the folder of videos {folder} does not exist")
        self.processor = processor
        self.options = {
            k: v for k, v in dict(options or {}).items() if k in ("num_frames", "fps", "max_frames", "short_video")
        }
        self._known: dict[str, tuple[str, int] | BadRow] = {}

    def find(self, messages: list[dict]) -> tuple[list[dict], tuple, list[int]]:
        """-> the chat with the files' paths, nothing, and the tokens of each video."""
        found = [self._find(video) for video in videos_in(messages)]
        videos = iter(video for video, _ in found)
        counts = [self.processor.num_video_tokens(frames) for _, frames in found]
        for message in messages:
            if not isinstance(message["content"], str):
                for part in message["content"]:
                    if part["type"] == "video":
                        part["video"] = next(videos)
        return messages, (), counts

    def _find(self, video: Any) -> tuple[Any, int]:
        if not isinstance(video, (str, Path, int)):
            return video, self._count(video)
        name = str(video)  # names of some datasets are numbers
        if name not in self._known:
            try:
                path = name if "://" in name else self._locate(name)
                self._known[name] = path, self._count(path)
            except BadRow as error:
                self._known[name] = error
        known = self._known[name]
        if isinstance(known, BadRow):
            raise BadRow(known.kind, str(known))
        return known

    def _locate(self, name: str) -> str:
        folders = self.folders or [Path()]
        stem = next((name.removesuffix(s) for s in FEATURE_SUFFIXES if name.endswith(s)), name)
        for folder in folders:
            for suffix in ("", *VIDEO_SUFFIXES):
                if (folder / f"{stem}{suffix}").exists():
                    return str(folder / f"{stem}{suffix}")
        where = " or ".join(map(str, self.folders)) or "the working directory"
        raise BadRow("missing video", f'the video "{name}" is not in {where}')

    def _count(self, video: Any) -> int:
        def choose(metadata):
            raise _Counted(len(self.processor.video_processor.sample_frames(metadata, **self.options)))

        if not isinstance(video, (str, Path, bytes)) and not hasattr(video, "read"):
            shape = getattr(video, "shape", None)
            if shape is None and not isinstance(video, (list, tuple)):
                wanted = "a file, its bytes, an array or a list of frames"
                raise BadRow("broken video", f"a {type(video).__name__} is no video; give {wanted}")
            total = shape[0] if shape is not None else len(video)
            return len(self.processor.video_processor.sample_frames({"total_num_frames": total}, **self.options))
        try:
            decode_video(video, choose)
        except _Counted as counted:
            return counted.frames
        except (ValueError, OSError) as error:
            raise BadRow("broken video", " ".join(str(error).split())) from None
        raise BadRow("broken video", "it has no frames")


def read_failed(folder: str | Path) -> dict[str, str]:
    """Name -> reason of the videos in the folder's `failed.jsonl`, if it has one."""
    file = Path(folder) / FAILED
    if not file.exists():
        return {}
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return {one["video"]: one["reason"] for one in lines}


class _Features:
    """Finds the features of the video that a row names."""

    def __init__(self, readers: Sequence[FeatureReader], processor):
        self.readers = readers
        self.processor = processor
        self.failed = {name: reason for reader in readers for name, reason in read_failed(reader.folder).items()}
        self.folders = {Path(name).parent.as_posix() for reader in readers for name in reader}

    def find(self, messages: list[dict]) -> tuple[list[dict], tuple, list[int]]:
        """-> the chat with bare places, the names of its features, and the tokens of each video."""
        names = tuple(self._find(video) for video in videos_in(messages))
        counts = [self.readers[i].num_local_tokens(name) + self.processor.num_global_tokens for i, name in names]
        return without_videos(messages), names, counts

    def _find(self, video: Any) -> tuple[int, str]:
        if not isinstance(video, (str, Path, int)):
            raise BadRow("missing video", f"features are found by name, and the row has a {type(video).__name__}")
        name = Path(str(video))
        # Features have names from the folder of all videos on, which the row may name as well, with what is above it.
        for start in range(len(name.parts)):
            rest = Path(*name.parts[start:])
            for wanted in (rest.as_posix(), (rest.with_suffix("") if rest.suffix else rest).as_posix()):
                for number, reader in enumerate(self.readers):
                    if wanted in reader:
                        return number, wanted
                if wanted in self.failed:
                    raise BadRow("missing video", f'the video "{name}" could not be extracted: {self.failed[wanted]}')
            if rest.parent.as_posix() in self.folders:
                break  # else `more/v` would be taken for `v`
        folders = " or ".join(str(reader.folder) for reader in self.readers)
        raise BadRow("missing video", f'there are no features of the video "{name}" in {folders}')


__all__ = [
    "VIDEO_SUFFIXES",
    "DataReport",
    "DroppedRow",
    "VideoChatDataset",
    "build_dataset",
    "read_failed",
    "read_rows",
]
