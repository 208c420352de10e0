"""Features of many videos in a folder: written once, in shards, then read in any order.

    with FeatureWriter("features", num_global_layers=5, metadata={"source": "..."}) as writer:
        writer.add("video_1", local_features, global_features)
    reader = FeatureReader("features")
    reader["video_1"].local_features  # (L, d)

A shard is a `.safetensors` file (see `shards.py`); `index.json` says which shard holds which video. A shard appears
under its name only when it is complete, and the index is made from the shards. So a writer that is killed loses at
most the videos that it had not written yet, and the next one continues from there.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from transformers.utils import logging

from longvlm.features.fingerprint import fingerprint
from longvlm.features.shards import FORMAT, VERSION, Shard, seal, write_shard
from longvlm.files import atomic_write, read_json_object
from longvlm.modeling_longvlm.modeling_longvlm import LongVLMVideoFeatures

logger = logging.get_logger(__name__)

Window = tuple[float | None, float | None]  # start and end in seconds; `None`: of the video

INDEX, SHARD, SHARDS = "index.json", "features-{:05}.safetensors", "features-*.safetensors"
FACTS = {"num_frames": int, "duration": float, "frames_per_segment": int}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class StoredFeatures:
    """The features of one video, before the projector, and what is known of the video.

    Attributes:
        local_features: `(L, d)`: the merged tokens of all segments, in order.
        global_features: `(E, d)`: the [CLS] tokens of the last E hidden states, averaged over the frames.
        all_global_features: `(E', d)`, E' >= E: those of all hidden states that were stored.
        num_frames: number of frames that were encoded.
        duration: length of the whole video in seconds.
        frames_per_segment: K.
        segment_seconds: `(S, 2)` float64: times, in seconds, of the first and the last frame of each segment.
        window: start and end, in seconds, of the part that was encoded, as it was asked for; `None`: the whole video.

    The last five are `None` where they are not known, as in features that an older version stored or that
    were converted from the original's.
    """

    local_features: Tensor
    global_features: Tensor
    all_global_features: Tensor
    num_frames: int | None = None
    duration: float | None = None
    frames_per_segment: int | None = None
    segment_seconds: Tensor | None = None
    window: Window | None = None

    def as_video_features(self) -> LongVLMVideoFeatures:
        """This one video, for `video_features=` of the model and of the processor."""
        known: dict[str, Any] = {name: getattr(self, name) for name in (*FACTS, "segment_seconds")}
        facts: dict[str, Any] = {name: (value,) for name, value in known.items() if value is not None}
        return LongVLMVideoFeatures(
            local_features=(self.local_features,), global_features=self.global_features[None], **facts
        )


class FeatureWriter:
    """Adds videos to a folder of features, new or existing. A context manager; one writer at a time.

    Args:
        folder: is created if it does not exist.
        num_global_layers: E: every video has at least that many global features. 0 if the model uses none.
        metadata: what the features depend on (encoder, frames, merging...), JSON values. To be the same each time a
            folder is added to.
        shard_bytes: a shard is written as soon as that many bytes are waiting.

    Raises:
        ValueError: the folder holds something else or features made in another way, or is being written to.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        num_global_layers: int = 5,
        metadata: Mapping[str, Any] | None = None,
        shard_bytes: int = 2**28,
    ):
        self.folder = Path(folder)
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{folder} is a file; give a folder for the features")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.shard_bytes = shard_bytes
        self._lock = FileLock(self.folder / ".lock")
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"{self.folder} is being written to by another process") from None
        try:
            self._index = self._begin(num_global_layers, dict(metadata or {}))
        except BaseException:
            self._lock.release()
            raise
        self._waiting: dict[str, dict[str, Tensor]] = {}
        self._waiting_entries: dict[str, dict] = {}

    def _begin(self, num_global_layers: int, metadata: dict[str, Any]) -> dict:
        index: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "width": None,
            "num_global_layers": num_global_layers,
            "metadata": metadata,
            "fingerprint": fingerprint({**metadata, "num_global_layers": num_global_layers}),
            "videos": {},
        }
        others = [f for f in self.folder.glob("*.safetensors") if not re.fullmatch(r"features-\d+", f.stem)]
        shards = [Shard(file) for file in sorted(self.folder.glob(SHARDS)) if file not in others]
        if (self.folder / INDEX).exists():
            before = _read_index(self.folder)
            if before["fingerprint"] != index["fingerprint"]:
                raise ValueError(
                    f"{self.folder} holds features that were made in another way ({before['metadata']}, "
                    f"{before['num_global_layers']} global layers); write these to another folder"
                )
        elif others or any(shard.fingerprint is None for shard in shards):
            raise ValueError(f"{self.folder} holds other .safetensors files; give a folder of its own")
        for pattern in ("*.partial", f".{SHARDS}.partial-*", f".{INDEX}.partial-*"):  # the first: of older versions
            for left in self.folder.glob(pattern):
                left.unlink()
        # From the shards, not from the old index: the last shard may be newer.
        for shard in shards:
            if shard.fingerprint not in (None, index["fingerprint"]):  # of no shard of version 1
                raise ValueError(
                    f"{shard.file} holds features that were made in another way than {self.folder}; move it away"
                )
            index["videos"] |= {video: {**entry, "shard": shard.file.name} for video, entry in shard.entries.items()}
            index["width"] = shard.width
        self._write_index(index)
        return index

    @property
    def width(self) -> int | None:
        """d, as soon as there is a video."""
        return self._index["width"]

    def __contains__(self, video: object) -> bool:
        return video in self._index["videos"] or video in self._waiting_entries

    def __len__(self) -> int:
        return len(self._index["videos"]) + len(self._waiting_entries)

    def add(
        self,
        video: str,
        local_features: Tensor,
        global_features: Tensor,
        *,
        segment_seconds: Tensor | None = None,
        window: Window | None = None,
        **facts: float | None,
    ) -> None:
        """Adds a video.

        Args:
            video: its name; that of a window is `window_name`.
            local_features: `(L, d)`, of a floating dtype.
            global_features: `(E or more, d)`, of a floating dtype.
            segment_seconds, window, facts: what is known of the video. `facts` are `num_frames`, `duration` and
                `frames_per_segment`; see `StoredFeatures`.

        Raises:
            ValueError: see `check`.
        """
        self.check(video, local_features, global_features, segment_seconds=segment_seconds, **facts)
        self._index["width"] = local_features.shape[1]
        tensors = {"local": local_features, "memory": global_features}
        if segment_seconds is not None:
            tensors["seconds"] = segment_seconds.double()
        # Copies: tensors that share memory could not be written into one file.
        copies = {kind: tensor.clone(memory_format=torch.contiguous_format) for kind, tensor in tensors.items()}
        known = {name: FACTS[name](value) for name, value in facts.items() if value is not None}
        if window is not None:
            known["window"] = [None if side is None else float(side) for side in window]
        self._waiting[video], self._waiting_entries[video] = copies, seal(video, copies, known)
        if sum(t.nbytes for kinds in self._waiting.values() for t in kinds.values()) >= self.shard_bytes:
            self.flush()

    def check(
        self,
        video: str,
        local_features: Tensor,
        global_features: Tensor,
        *,
        segment_seconds: Tensor | None = None,
        **facts: float | None,
    ) -> None:
        """Whether a video can be added. The arguments are those of `add`.

        Raises:
            ValueError: a wrong shape, dtype or value, or the video is there already.
        """
        if video in self:
            raise ValueError(f'the video "{video}" is there already')
        if not video or "\n" in video or not _is_unicode(video):
            raise ValueError(f"{video!r} cannot be the name of a video")
        for name, tensor in (("local", local_features), ("global", global_features)):
            if tensor.ndim != 2 or tensor.dtype not in DTYPES:
                raise ValueError(f"{name} features must be a float matrix, not {tuple(tensor.shape)} {tensor.dtype}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} features hold values that are not finite")
        width = self.width or local_features.shape[1]
        if local_features.shape[1] != width or global_features.shape[1] != width:
            raise ValueError(
                f"width {local_features.shape[1]} (local) and {global_features.shape[1]} (global), expected {width}"
            )
        least = self._index["num_global_layers"]
        if len(local_features) == 0 or len(global_features) < least:
            raise ValueError(
                f"{len(local_features)} local and {len(global_features)} global features; at least 1 and {least} "
                "are expected"
            )
        for name, value in facts.items():
            if name not in FACTS:
                raise TypeError(f"{name} is not one of {', '.join(FACTS)}")
            if value is not None and not (math.isfinite(value) and value >= (0 if name == "duration" else 1)):
                raise ValueError(f"{name}={value} cannot be that of a video")
        if segment_seconds is not None:
            if segment_seconds.ndim != 2 or segment_seconds.shape[1] != 2 or not segment_seconds.isfinite().all():
                raise ValueError(f"segment_seconds must be finite numbers (S, 2), not {tuple(segment_seconds.shape)}")
            frames, length = facts.get("num_frames"), facts.get("frames_per_segment")
            if frames is not None and length is not None and len(segment_seconds) != -(-frames // length):
                raise ValueError(
                    f"segment_seconds has {len(segment_seconds)} rows; {frames} frames make {-(-frames // length)} "
                    f"segments of {length}"
                )

    def flush(self) -> None:
        """Writes the waiting videos as a shard, then the index."""
        if not self._waiting:
            return
        used = {entry["shard"] for entry in self._index["videos"].values()}
        number = 1 + max((int(name.rsplit("-", 1)[1].split(".")[0]) for name in used), default=0)
        name = SHARD.format(number)
        with atomic_write(self.folder / name) as partial:
            write_shard(partial, self._waiting, self._waiting_entries, self._index["fingerprint"])
        for video, entry in self._waiting_entries.items():
            self._index["videos"][video] = {**entry, "shard": name}
        self._waiting, self._waiting_entries = {}, {}
        self._write_index(self._index)

    def _write_index(self, index: dict) -> None:
        with atomic_write(self.folder / INDEX) as partial:
            partial.write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")

    def close(self) -> None:
        """Writes the waiting videos and lets other writers in."""
        try:
            self.flush()
        finally:
            self._lock.release()

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()


def _is_unicode(name: str) -> bool:
    """Whether a name can be written as UTF-8; names of files can be any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


class FeatureReader(Mapping[str, StoredFeatures]):
    """The features in a folder by the name of the video, in any order; only requested videos are read.

    A video is compared with its checksum when it is first read. Folders of older versions have none, and a line in the
    log says so.

    May be copied to other processes (the workers of a `DataLoader`): each opens the shards itself.

    Args:
        folder: written by `FeatureWriter`.
        num_global_layers: how many global features of each video to give, the last ones; `config.num_global_tokens`
            of a model. Default: as many as the folder was made with.

    Raises:
        ValueError: the folder contains no features, or fewer global ones; when a video is read: it is damaged.
    """

    def __init__(self, folder: str | Path, *, num_global_layers: int | None = None):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        stored: int = index["num_global_layers"]
        if num_global_layers is not None and num_global_layers > stored:
            raise ValueError(
                f"the features in {self.folder} have {stored} global layers, the model {num_global_layers}; extract "
                "them again with this model"
            )
        self.width: int | None = index["width"]
        self.num_global_layers = stored if num_global_layers is None else num_global_layers
        self.metadata: dict[str, Any] = index["metadata"]
        self.fingerprint: str = index["fingerprint"]
        self._videos: dict[str, dict] = index["videos"]
        self._open: dict[str, Shard] = {}
        old = sum("checksum" not in entry for entry in self._videos.values())
        if old:
            logger.warning_once(
                f"{self.folder}: {old:,} of {len(self._videos):,} videos were stored by an older version, without "
                "checksums and times: damage to them goes unnoticed; extract into a new folder to have both"
            )

    def __getitem__(self, video: str) -> StoredFeatures:
        entry = dict(self._videos[video])
        shard = entry.pop("shard")
        if shard not in self._open:
            self._open[shard] = Shard(self.folder / shard)
        tensors = self._open[shard].read(video, entry)
        every = tensors["memory"]
        return StoredFeatures(
            local_features=tensors["local"],
            global_features=every[len(every) - self.num_global_layers :],
            all_global_features=every,
            segment_seconds=tensors.get("seconds"),
            window=self.window(video),
            **{name: entry.get(name) for name in FACTS},
        )

    def num_local_tokens(self, video: str) -> int:
        """L, without reading the features."""
        return self._videos[video]["local"]

    def window(self, video: str) -> Window | None:
        """See `StoredFeatures`; without reading the features."""
        window = self._videos[video].get("window")
        return None if window is None else tuple(window)

    def __iter__(self) -> Iterator[str]:
        return iter(self._videos)

    def __len__(self) -> int:
        return len(self._videos)

    def __contains__(self, video: object) -> bool:
        return video in self._videos

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}


def _read_index(folder: Path) -> dict:
    file = folder / INDEX
    if not file.is_file():
        raise ValueError(f"{folder} contains no features: {INDEX} is missing")
    try:
        index = read_json_object(file)
        if index["format"] != FORMAT:
            raise KeyError
        version = int(index["version"])
        if version <= VERSION:
            _check_index(index)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{file} is not an index of LongVLM features; if it is a damaged one, remove it and run what made the "
            "folder again: the index is made from the shards"
        ) from None
    if version > VERSION:
        raise ValueError(f"{file} has version {version}; this longvlm reads up to {VERSION}; update it")
    return index


def _check_index(index: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError, KeyError, TypeError, AttributeError: it is not an index.
    """
    if not isinstance(index["metadata"], dict) or index["num_global_layers"] < 0 or not index["fingerprint"]:
        raise ValueError
    for entry in index["videos"].values():
        # The name of a file in this folder, and no path that leads elsewhere.
        if not re.fullmatch(r"features-\d+\.safetensors", entry["shard"]) or entry["local"] < 1:
            raise ValueError


__all__ = ["FeatureReader", "FeatureWriter", "StoredFeatures", "fingerprint"]
