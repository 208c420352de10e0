"""Keeps the features of recent videos, so that further questions need no decoding and no encoding.

A video of the default 100 frames is 305 tokens: 1.2 MB for ViT-L in float32. The least recently used videos go first.
Threads may share a cache. If several ask about the same new video at once, one encodes it and the others wait (without
this, six threads encoded it six times).
"""

import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path

import torch

from .plain_numbers import whole_number


class VideoFeatureCache:
    """An LRU cache of `LongVLMVideoFeatures`, one entry per video, bounded in bytes. Safe for threads.

    Args:
        max_bytes (`int`): limit on the size of all features together; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = whole_number("max_bytes", max_bytes, 0)
        self._entries: OrderedDict[bytes, object] = OrderedDict()
        self._num_bytes = 0
        self._making: dict[bytes, Future] = {}
        self._generation = 0  # counts how often it was cleared
        self._lock = threading.Lock()

    def get(self, key: bytes | None):
        """The features, or `None` if they are not here; they never are for the key `None`."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key]

    def put(self, key: bytes | None, features, generation: int | None = None) -> None:
        """Keeps `features`, unless they alone are larger than the cache, or it was cleared since `generation`."""
        size = _num_bytes(features)
        if key is None or size > self.max_bytes:
            return
        with self._lock:
            if generation is not None and generation != self._generation:
                return
            self._forget(key)
            self._entries[key] = features
            self._num_bytes += size
            while self._num_bytes > self.max_bytes:
                self._forget(next(iter(self._entries)))

    def get_or_make(self, key: bytes | None, make: Callable, check: Callable[[], None] | None = None):
        """The features; `make()` makes them if they are not here. For each key, one thread at a time does so.

        Threads that wait get the same features, even if those are too large to be kept. If `make` fails, the thread
        that called it gets the error, and the others try for themselves.

        Args:
            check: called every 0.1 seconds while waiting for another thread; may raise to stop waiting.
        """
        if key is None:
            return make()
        while True:
            with self._lock:
                if key in self._entries:
                    self._entries.move_to_end(key)
                    return self._entries[key]
                being_made = self._making.get(key)
                if being_made is None:
                    made = self._making[key] = Future()
                    generation = self._generation
                    break
            features = _wait(being_made, check)
            if features is not None:
                return features
        features = None
        try:
            features = make()
            self.put(key, features, generation)
            return features
        finally:
            with self._lock:
                del self._making[key]
            made.set_result(features)

    def _forget(self, key: bytes) -> None:
        if key in self._entries:
            self._num_bytes -= _num_bytes(self._entries.pop(key))

    @property
    def num_bytes(self) -> int:
        """Size of all features that are kept."""
        return self._num_bytes

    def __len__(self) -> int:
        return len(self._entries)

    def clear(self) -> None:
        """Drops everything. Call it when the vision tower's weights have changed."""
        with self._lock:
            self._entries.clear()
            self._num_bytes = 0
            self._generation += 1  # what is being encoded now has the old weights

    def __reduce__(self):
        # A copy in another process starts empty: locks cannot be pickled, and features can be made again.
        return type(self), (self.max_bytes,)


def _wait(being_made: Future, check: Callable[[], None] | None):
    while True:
        try:
            return being_made.result(None if check is None else 0.1)
        except TimeoutError:
            check()


def describe_options(value) -> str:
    """Options as text that is equal if and only if they are; arrays are described by their content."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key!r}: {describe_options(value[key])}' for key in sorted(value))}}}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(describe_options, value))}]"
    if hasattr(value, "tobytes") or isinstance(value, torch.Tensor):
        digest = hashlib.blake2b(digest_size=32)
        _digest(value, digest)
        return digest.hexdigest()
    return repr(value)


def video_key(video, *settings: str) -> bytes | None:
    """A digest that identifies a video and the settings it is encoded with.

    Files are identified by path, size and time of change; anything else by its content.

    Returns:
        `None` for what cannot be identified without using it up, such as a pipe or an open file, and for files that
        cannot be read: the decoder will say why.
    """
    digest = hashlib.blake2b(digest_size=32)
    for setting in settings:
        digest.update(f"{len(setting)} {setting}".encode())
    return digest.digest() if _digest(video, digest) else None


def _digest(video, digest) -> bool:
    if isinstance(video, (bytes, bytearray, memoryview)):
        digest.update(f"{memoryview(video).nbytes} bytes".encode())
        digest.update(video)
    elif isinstance(video, (str, os.PathLike)):
        return _digest_path(os.fspath(video), digest)
    elif isinstance(video, (list, tuple)):
        digest.update(f"{len(video)} of".encode())
        return all(_digest(frame, digest) for frame in video)
    elif isinstance(video, torch.Tensor):
        digest.update(f"{tuple(video.shape)} {video.dtype}".encode())  # NumPy has no bfloat16: as bytes
        return _digest(video.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), digest)
    elif hasattr(video, "tobytes"):  # NumPy arrays and Pillow images
        kind = (getattr(video, "shape", None) or video.size, str(getattr(video, "dtype", getattr(video, "mode", ""))))
        digest.update(repr(kind).encode())
        if getattr(video, "mode", None) in ("P", "PA"):  # the bytes are only indices into the palette
            digest.update(repr((video.getpalette("RGBA"), video.info.get("transparency"))).encode())
        digest.update(video.tobytes())
    else:
        return False
    return True


def _digest_path(path, digest) -> bool:
    if isinstance(path, str) and path.startswith("data:"):
        digest.update(path.encode())  # a URL that contains its video
        return True
    try:
        folder = Path(os.fsdecode(path))
        files = [folder, *sorted(folder.iterdir())] if folder.is_dir() else [folder]
        for file in files:
            status = file.stat()
            regular = stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)
            if not (regular and os.access(file, os.R_OK)):
                return False
            digest.update(repr((str(file.resolve()), status.st_mtime_ns, status.st_size)).encode())
    except (OSError, ValueError):  # no such file, or not a path, such as one with a NUL in it
        return False
    return True


def _num_bytes(features) -> int:
    tensors = [*features.local_features, features.global_features]
    return sum(t.numel() * t.element_size() for t in tensors)
