"""Features of many videos in a folder: written once, in shards, then read in any order.

    with FeatureWriter("features", num_global_layers=5, metadata={"source": "..."}) as writer:
        writer.add("video_1", local, memory)
    reader = FeatureReader("features")
    reader["video_1"].local_features  # (L, d)

A shard is a `.safetensors` file with the tensors `<video>/local` and `<video>/memory`; `index.json` says which video
lies in which. A shard appears under its name only when it is whole, and the index is made from the shards, so a writer
that was killed loses at most the videos that it still held in memory, and the next one goes on after the others.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvlm.files import share_as_other_files

FORMAT, VERSION = "longvlm-features", 1
INDEX, SHARD, TEMPORARY = "index.json", "features-{:05}.safetensors", ".partial"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class StoredFeatures:
    """One video, as `LongVLMModel.get_video_features` gives it, before the projector.

    Args:
        local_features: `(L, d)`: merged tokens of the segments, in a row.
        global_features: `(E, d)`: frame-mean [CLS] of the last E hidden states.
        memory: `(rows, d)`, rows >= E: the same of all hidden states that were stored.
    """

    local_features: Tensor
    global_features: Tensor
    memory: Tensor

    def as_video_features(self) -> dict[str, Any]:
        """For `video_features=` of the model: this one video."""
        return {"local_features": (self.local_features,), "global_features": self.global_features[None]}


def fingerprint(metadata: Mapping[str, Any]) -> str:
    """Tells features that were made alike from others: a hash of what made them, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode()).hexdigest()[:16]


class FeatureWriter:
    """Adds videos to a folder of features, new or begun before.

    Args:
        folder: made if it lacks.
        num_global_layers: E; the memory of every video has at least so many rows.
        metadata: what made the features (encoder, frames, merging...), JSON values. Their fingerprint must be the same
            whenever a folder is gone on with.
        shard_bytes: a shard is written as soon as so much waits in memory.

    Raises:
        ValueError: the folder holds something else, features made in another way, or is being written to.
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
        self._waiting: dict[str, Tensor] = {}
        self._waiting_videos: dict[str, dict] = {}

    def _begin(self, num_global_layers: int, metadata: dict[str, Any]) -> dict:
        index = {
            "format": FORMAT,
            "version": VERSION,
            "width": None,
            "num_global_layers": num_global_layers,
            "metadata": metadata,
            "fingerprint": fingerprint({**metadata, "num_global_layers": num_global_layers}),
            "videos": {},
        }
        if (self.folder / INDEX).exists():
            before = _read_index(self.folder)
            if before["fingerprint"] != index["fingerprint"]:
                raise ValueError(
                    f"{self.folder} holds features that were made in another way ({before['metadata']}, "
                    f"{before['num_global_layers']} global layers); write these to another folder"
                )
        elif any(f.suffix == ".safetensors" for f in self.folder.iterdir()):
            raise ValueError(f"{self.folder} holds other .safetensors files; give a folder of its own")
        for rest in self.folder.glob(f"*{TEMPORARY}"):
            rest.unlink()
        # From the shards, not from the index before: the last shard may have come after it.
        for shard in sorted(self.folder.glob(SHARD.replace("{:05}", "*"))):
            described = _describe_shard(shard)
            index["videos"] |= described["videos"]
            index["width"] = described["width"]
        self._write_index(index)
        return index

    @property
    def width(self) -> int | None:
        """d, as soon as there is a video."""
        return self._index["width"]

    def __contains__(self, video: object) -> bool:
        return video in self._index["videos"] or video in self._waiting_videos

    def __len__(self) -> int:
        return len(self._index["videos"]) + len(self._waiting_videos)

    def add(self, video: str, local: Tensor, memory: Tensor) -> None:
        """Adds a video: local `(L, d)` and memory `(rows, d)`, both of one floating dtype.

        Raises:
            ValueError: see `check`.
        """
        self.check(video, local, memory)
        self._index["width"] = local.shape[1]
        # Copies: parts of one tensor, as of a video's pieces, could not be written into one file.
        self._waiting[f"{video}/local"] = local.clone(memory_format=torch.contiguous_format)
        self._waiting[f"{video}/memory"] = memory.clone(memory_format=torch.contiguous_format)
        self._waiting_videos[video] = {"local": len(local), "memory": len(memory)}
        if sum(t.nbytes for t in self._waiting.values()) >= self.shard_bytes:
            self.flush()

    def check(self, video: str, local: Tensor, memory: Tensor) -> None:
        """Whether a video can be added.

        Raises:
            ValueError: shapes or values that cannot be, or a video that is there.
        """
        if video in self:
            raise ValueError(f'the video "{video}" is there already')
        if not video or "\n" in video:
            raise ValueError(f"{video!r} cannot be the name of a video")
        for name, tensor in (("local", local), ("memory", memory)):
            if tensor.ndim != 2 or tensor.dtype not in DTYPES:
                raise ValueError(f"{name} features must be a float matrix, not {tuple(tensor.shape)} {tensor.dtype}")
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} features hold values that are not finite")
        width = self.width or local.shape[1]
        if local.shape[1] != width or memory.shape[1] != width:
            raise ValueError(f"width {local.shape[1]} (local) and {memory.shape[1]} (memory), but {width} is wanted")
        rows = self._index["num_global_layers"]
        if len(local) == 0 or len(memory) < rows:
            raise ValueError(
                f"{len(local)} local rows and {len(memory)} memory rows; at least 1 and {rows} are wanted"
            )

    def flush(self) -> None:
        """Writes what waits as a shard, then the index."""
        if not self._waiting_videos:
            return
        used = {entry["shard"] for entry in self._index["videos"].values()}
        number = 1 + max((int(name.rsplit("-", 1)[1].split(".")[0]) for name in used), default=0)
        name = SHARD.format(number)
        described = {"width": self.width, "videos": self._waiting_videos}
        temporary = self.folder / f"{name}{TEMPORARY}"
        save_file(self._waiting, temporary, metadata={"format": "pt", FORMAT: json.dumps(described)})
        share_as_other_files(temporary)
        _settle(temporary, self.folder / name)
        for video, entry in self._waiting_videos.items():
            self._index["videos"][video] = {**entry, "shard": name}
        self._waiting, self._waiting_videos = {}, {}
        self._write_index(self._index)

    def _write_index(self, index: dict) -> None:
        temporary = self.folder / f"{INDEX}{TEMPORARY}"
        temporary.write_text(json.dumps(index, indent=1, ensure_ascii=False), encoding="utf-8")
        _settle(temporary, self.folder / INDEX)

    def close(self) -> None:
        """Writes what waits; the folder may then be written to by others."""
        try:
            self.flush()
        finally:
            self._lock.release()

    def __enter__(self) -> "FeatureWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()


class FeatureReader(Mapping[str, StoredFeatures]):
    """Features of a folder, by the name of the video, in any order; only what is asked for is read.

    May be copied to other processes (the workers of a `DataLoader`): each opens the shards for itself.

    Raises:
        ValueError: the folder holds no features.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        index = _read_index(self.folder)
        self.width: int = index["width"]
        self.num_global_layers: int = index["num_global_layers"]
        self.metadata: dict[str, Any] = index["metadata"]
        self.fingerprint: str = index["fingerprint"]
        self._videos: dict[str, dict] = index["videos"]
        self._open: dict[str, Any] = {}

    def __getitem__(self, video: str) -> StoredFeatures:
        shard = self._videos[video]["shard"]
        if shard not in self._open:
            try:
                self._open[shard] = safe_open(self.folder / shard, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.folder / shard} cannot be read: {error}") from None
        # Copies: else a shard that is on loan to some tensor could never be let go of.
        local, memory = (self._open[shard].get_tensor(f"{video}/{kind}").clone() for kind in ("local", "memory"))
        return StoredFeatures(local, memory[len(memory) - self.num_global_layers :], memory)

    def num_local_tokens(self, video: str) -> int:
        """L, without reading the features."""
        return self._videos[video]["local"]

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
        raise ValueError(f"{folder} holds no features: {INDEX} lacks")
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise KeyError
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{file} is no index of LongVLM features") from None
    if index["version"] > VERSION:
        raise ValueError(f"{file} has version {index['version']}; this longvlm reads up to {VERSION}, update it")
    return index


def _describe_shard(shard: Path) -> dict:
    """Width and videos of a shard, as the shard itself tells them."""
    try:
        with safe_open(shard, framework="pt") as opened:
            described = json.loads(opened.metadata()[FORMAT])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{shard} is damaged or no shard of features ({error}); remove it to go on") from None
    videos = {video: {**entry, "shard": shard.name} for video, entry in described["videos"].items()}
    return {"width": described["width"], "videos": videos}


def _settle(temporary: Path, final: Path) -> None:
    """Gives a finished file its name: also after a power cut it is whole or not there."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
