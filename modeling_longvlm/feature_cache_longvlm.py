"""Remembers the features of the videos asked about last, so that the next question costs no decoding and encoding.

A video of the default 100 frames is 305 tokens: 1.2 MB for ViT-L in float32. Least recently used videos go first.
"""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Hashable
from pathlib import Path

import torch


class VideoFeatureCache:
    """An LRU of `video_features`, one video an entry, sized in bytes.

    Args:
        max_bytes (`int`): features that take more than this together are forgotten, the least recently used first;
            0 remembers nothing.
    """

    def __init__(self, max_bytes: int):
        if max_bytes < 0:
            raise ValueError(f"max_bytes must be at least 0, got {max_bytes}.")
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, object] = OrderedDict()

    def get(self, key: Hashable | None):
        """The features, or `None`; `None` as a key is never found."""
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: Hashable | None, features) -> None:
        if key is None or _num_bytes(features) > self.max_bytes:
            return
        self._entries[key] = features
        self._entries.move_to_end(key)
        while self.num_bytes > self.max_bytes:
            self._entries.popitem(last=False)

    @property
    def num_bytes(self) -> int:
        return sum(map(_num_bytes, self._entries.values()))

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """To be called after the vision tower's weights have changed."""
        self._entries.clear()


def video_key(video) -> Hashable | None:
    """What tells one video from another: of a file its path, size and time of change, of frames their content.

    `None` for what cannot be told apart without using it up, such as an open file.
    """
    if isinstance(video, (str, os.PathLike)):
        path = Path(video)
        try:
            files = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
            return tuple((str(f.resolve()), (s := f.stat()).st_mtime_ns, s.st_size) for f in files)
        except OSError:
            return str(video)  # a URL, or a file that is not there: the decoder will say so
    digest = hashlib.blake2b()
    return digest.digest() if _digest(video, digest) else None


def _digest(video, digest) -> bool:
    if isinstance(video, (bytes, bytearray, memoryview)):
        digest.update(video)
    elif isinstance(video, (str, os.PathLike)):
        digest.update(repr(video_key(video)).encode())
    elif isinstance(video, (list, tuple)):
        digest.update(f"{len(video)} of".encode())
        return all(_digest(frame, digest) for frame in video)
    elif isinstance(video, torch.Tensor):
        digest.update(f"{tuple(video.shape)} {video.dtype}".encode())  # NumPy has no bfloat16: as bytes
        return _digest(video.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), digest)
    elif hasattr(video, "tobytes"):  # NumPy arrays and Pillow images
        kind = (getattr(video, "shape", None) or video.size, str(getattr(video, "dtype", getattr(video, "mode", ""))))
        digest.update(repr(kind).encode())
        digest.update(video.tobytes())
    else:
        return False
    return True


def _num_bytes(features) -> int:
    tensors = [*features.local_features, features.global_features]
    return sum(t.numel() * t.element_size() for t in tensors)
