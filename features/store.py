"""Features of many videos in a folder: written once, in shards, then read in any order.

    with FeatureWriter("features", num_global_layers=5, metadata={"source": "..."}) as writer:
        writer.add("video_1", local_features, global_features)
    reader = FeatureReader("features")
    reader["video_1"].local_features  # (L, d)

A shard is a `.safetensors` file with the tensors `<video>/local` and `<video>/memory` (the released code's name for
the global features); `index.json` says which shard holds which video. A shard appears under its name only when it is
complete, and the index is made from the shards. So a writer that is killed loses at most the videos that it had not
written yet, and the next one continues from there.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from longvlm.features.fingerprint import fingerprint
from longvlm.files import atomic_write, read_json_object
from longvlm.modeling_longvlm.modeling_longvlm import LongVLMVideoFeatures

FORMAT, VERSION = "longvlm-features", 1
INDEX, SHARD, SHARDS = "index.json", "features-{:05}.safetensors", "features-*.safetensors"
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class StoredFeatures:
    """The features of one video, before the projector.

    Attributes:
        local_features: `(L, d)`: the merged tokens of all segments, in order.
        global_features: `(E, d)`: the [CLS] tokens of the last E hidden states, averaged over the frames.
        all_global_features: `(E', d)`, E' >= E: those of all hidden states that were stored.
    """

    local_features: Tensor
    global_features: Tensor
    all_global_features: Tensor

    def as_video_features(self) -> LongVLMVideoFeatures:
        """This one video, for `video_features=` of the model and of the processor."""
        return LongVLMVideoFeatures(local_features=(self.local_features,), global_features=self.global_features[None])


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
        for pattern in ("*.partial", f".{SHARDS}.partial-*", f".{INDEX}.partial-*"):  # the first: of older versions
            for left in self.folder.glob(pattern):
                left.unlink()
        # From the shards, not from the old index: the last shard may be newer.
        for shard in sorted(self.folder.glob(SHARDS)):
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

    def add(self, video: str, local_features: Tensor, global_features: Tensor) -> None:
        """Adds a video: local features `(L, d)` and global features `(E or more, d)`, of a floating dtype.

        Raises:
            ValueError: see `check`.
        """
        self.check(video, local_features, global_features)
        self._index["width"] = local_features.shape[1]
        # Copies: tensors that share memory could not be written into one file.
        self._waiting[f"{video}/local"] = local_features.clone(memory_format=torch.contiguous_format)
        self._waiting[f"{video}/memory"] = global_features.clone(memory_format=torch.contiguous_format)
        self._waiting_videos[video] = {"local": len(local_features), "memory": len(global_features)}
        if sum(t.nbytes for t in self._waiting.values()) >= self.shard_bytes:
            self.flush()

    def check(self, video: str, local_features: Tensor, global_features: Tensor) -> None:
        """Whether a video can be added.

        Raises:
            ValueError: a wrong shape, dtype or value, or the video is there already.
        """
        if video in self:
            raise ValueError(f'the video "{video}" is there already')
        if not video or "\n" in video:
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

    def flush(self) -> None:
        """Writes the waiting videos as a shard, then the index."""
        if not self._waiting_videos:
            return
        used = {entry["shard"] for entry in self._index["videos"].values()}
        number = 1 + max((int(name.rsplit("-", 1)[1].split(".")[0]) for name in used), default=0)
        name = SHARD.format(number)
        described = {"width": self.width, "videos": self._waiting_videos}
        with atomic_write(self.folder / name) as partial:
            save_file(self._waiting, partial, metadata={"format": "pt", FORMAT: json.dumps(described)})
        for video, entry in self._waiting_videos.items():
            self._index["videos"][video] = {**entry, "shard": name}
        self._waiting, self._waiting_videos = {}, {}
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


class FeatureReader(Mapping[str, StoredFeatures]):
    """The features in a folder by the name of the video, in any order; only requested videos are read.

    May be copied to other processes (the workers of a `DataLoader`): each opens the shards itself.

    Args:
        folder: written by `FeatureWriter`.
        num_global_layers: how many global features of each video to give, the last ones; `config.num_global_tokens`
            of a model. Default: as many as the folder was made with.

    Raises:
        ValueError: the folder contains no features, or fewer global ones.
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
        self._open: dict[str, Any] = {}

    def __getitem__(self, video: str) -> StoredFeatures:
        shard = self._videos[video]["shard"]
        if shard not in self._open:
            try:
                self._open[shard] = safe_open(self.folder / shard, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{self.folder / shard} cannot be read: {error}") from None
        # Copies: a tensor that points into a shard would keep all of it open.
        local, every = (self._open[shard].get_tensor(f"{video}/{kind}").clone() for kind in ("local", "memory"))
        return StoredFeatures(local, every[len(every) - self.num_global_layers :], every)

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
        raise ValueError(f"{folder} contains no features: {INDEX} is missing")
    try:
        index = read_json_object(file)
        if index["format"] != FORMAT:
            raise KeyError
    except (ValueError, KeyError):
        raise ValueError(f"{file} is not an index of LongVLM features") from None
    if index["version"] > VERSION:
        raise ValueError(f"{file} has version {index['version']}; this longvlm reads up to {VERSION}; update it")
    return index


def _describe_shard(shard: Path) -> dict:
    """Width and videos of a shard, from the shard itself."""
    try:
        with safe_open(shard, framework="pt") as opened:
            described = json.loads(opened.metadata()[FORMAT])
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{shard} is damaged or not a shard of features ({error}); remove it to continue") from None
    videos = {video: {**entry, "shard": shard.name} for video, entry in described["videos"].items()}
    return {"width": described["width"], "videos": videos}


__all__ = ["FeatureReader", "FeatureWriter", "StoredFeatures", "fingerprint"]
