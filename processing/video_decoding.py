"""From a video to the requested frames, exactly and without decoding the rest.

1. `video_index` gives the presentation time of every frame. Frame i is the i-th of them.
2. The caller's rule chooses frames from the metadata.
3. A reader goes forward through the sorted targets. It seeks only where the target's keyframe lies past the last
   decoded frame, and checks where it landed: some containers land late, where the picture would be wrong.
4. Each frame is rotated upright, converted to RGB and passed straight to `transform` (resize), so that each reader
   holds one frame at full size. Two readers share the targets.

`decode_video` returns all frames together, `iter_video` yields them in pieces, so that any number of frames fits.
"""

import copy
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import is_torchcodec_available, logging
from transformers.video_utils import VideoMetadata

from .animated_pictures import AnimatedPicture, open_animation
from .video_index import FrameIndex, index_frames, open_container
from .video_sources import VideoDecodeError as VideoDecodeError  # part of this module's interface
from .video_sources import VideoDecodeWarning, VideoSource, list_frame_files, open_source, read_picture

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

BACKEND_VARIABLE = "LONGVLM_VIDEO_BACKEND"
MAX_WORKERS = 2  # a third reader gains less than 10 %, and each holds one frame at full size
REOPEN = object()


class DecodedVideo(NamedTuple):
    """`frames[j]` is source frame `metadata.frames_indices[j]` after `transform`."""

    frames: list[Any]
    metadata: "FrameMetadata"


class FrameMetadata(VideoMetadata):
    """transformers' `VideoMetadata`, with real times.

    `frames_indices` and `fps` always refer to the SOURCE. `timestamps` are the seconds at which the chosen frames are
    shown, which also holds for a variable frame rate; the base class computes index / fps. `source_timestamps` are
    those of all frames, or `None` if they are unknown (frames given as a list, without a frame rate). `start_time` is
    that of the source's first frame if the frames described here are only some of them.
    """

    source_timestamps: Any = None
    start_time: float | None = None

    @property
    def timestamps(self) -> list[float] | None:
        if self.frames_indices is None:
            return None
        if self.source_timestamps is not None:
            return [float(self.source_timestamps[i]) for i in self.frames_indices]
        return [i / self.fps for i in self.frames_indices] if self.fps else None


def is_torchcodec_usable() -> bool:
    """Whether torchcodec can decode video here: it is installed, its libraries load, and it found FFmpeg."""
    if not is_torchcodec_available():
        return False
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except Exception:  # whatever a broken native library raises
        return False
    return getattr(torchcodec, "ffmpeg_major_version", True) is not None


def decode_video(video, sample_indices_fn=None, *, transform=None, backend=None, num_workers=None, progress=None):
    """Decodes the frames that a rule chooses.

    Args:
        video: the path of a video, an image (a one-frame video) or a folder of images; a URL; bytes; or a
            binary file object.
        sample_indices_fn: called as `sample_indices_fn(metadata=FrameMetadata)`; returns source indices in any order,
            repeated ones included. `None`: all frames.
        transform: called with each frame, RGB uint8 `(H, W, 3)`, as soon as it is decoded, in any order and from
            several threads; its result replaces the frame. `None`: the frames themselves.
        backend: `"torchcodec"`, `"pyav"` or `"auto"` (torchcodec if usable). Default: the environment variable
            LONGVLM_VIDEO_BACKEND, or `"auto"`. Frame numbers and times come from PyAV's index for both; if torchcodec
            fails or returns another frame than the index says (MPEG-TS), PyAV decodes.
        num_workers: number of readers that work at the same time; default 2.
        progress: called as `progress("decode", done, total)` after each frame, by one thread at a time.
    Returns:
        `DecodedVideo(frames, metadata)`. If a part of the video cannot be read, the readable frames are returned, a
        `VideoDecodeWarning` says how many are missing, and `metadata.frames_indices` names the frames that are there;
        no frame is repeated to fill the gaps.
    Raises:
        VideoDecodeError: the video cannot be opened, or none of its frames can be read; one line.
    """
    pieces = iter_video(
        video,
        sample_indices_fn,
        transform=transform,
        backend=backend,
        num_workers=num_workers,
        progress=progress,
    )
    (decoded,) = pieces
    return decoded


def iter_video(
    video,
    sample_indices_fn=None,
    *,
    frames_per_piece=None,
    transform=None,
    backend=None,
    num_workers=None,
    progress=None,
) -> Iterator[DecodedVideo]:
    """`decode_video` piece by piece: at most `frames_per_piece` frames at a time, in the requested order.

    The video is opened and indexed once. `metadata.frames_indices` are those of the piece; `progress` counts over all
    pieces. Arguments and errors are those of `decode_video`; there is at least one piece.
    """
    backend = backend or os.environ.get(BACKEND_VARIABLE) or "auto"
    if backend not in ("auto", "pyav", "torchcodec"):
        raise ValueError(f'video backend "{backend}" is not known; choose "auto", "pyav" or "torchcodec"')
    num_workers = num_workers or min(MAX_WORKERS, os.cpu_count() or 1)
    job = _Job(sample_indices_fn, transform, backend, num_workers, progress, frames_per_piece)
    with open_source(video) as source, open_animation(source) as animation:
        if animation is not None:
            yield from _read_animation(animation, job)
        elif source.is_directory or source.is_picture:
            yield from _read_pictures(source, job)
        else:
            _check_pyav()
            yield from _decode_file(source, job)


def probe_video(video) -> FrameMetadata:
    """What is known about a video without decoding its frames.

    Args:
        video: as in `decode_video`.
    Returns:
        `FrameMetadata` without `frames_indices`: number of frames, frame rate, size and duration, and the time of each
        frame in `source_timestamps`. `LongVLMVideoProcessor.sample_frames` takes it.
    Raises:
        VideoDecodeError: the video cannot be opened, or has no frames.
    """
    with open_source(video) as source, open_animation(source) as animation:
        if animation is not None:
            return _describe_animation(animation)
        if source.is_directory or source.is_picture:
            return _describe_pictures(source, _picture_files(source))
        _check_pyav()
        return _open_index(source, allow_header=True)[1]


def _check_pyav() -> None:
    if av is None:
        raise ImportError("decoding video needs PyAV, which is not installed; run: pip install av")


@dataclass
class _Job:
    """The options of `iter_video`, passed along."""

    sample_indices_fn: Any
    transform: Any
    backend: str
    num_workers: int
    progress: Any
    frames_per_piece: int | None
    done: int = 0
    total: int = 0

    def choose(self, metadata: FrameMetadata) -> list[int]:
        total = metadata.total_num_frames
        if self.sample_indices_fn is None:
            chosen = list(range(total))
        else:
            chosen = [int(i) for i in self.sample_indices_fn(metadata=metadata)]
        if chosen and not 0 <= min(chosen) <= max(chosen) < total:
            raise ValueError(
                f"frame indices {min(chosen)} to {max(chosen)} are out of range for a video of {total} frames"
            )
        self.done, self.total = 0, len(chosen)
        return chosen

    def pieces(self, chosen: list[int]) -> list[list[int]]:
        size = self.frames_per_piece or max(len(chosen), 1)
        return [chosen[start : start + size] for start in range(0, max(len(chosen), 1), size)]

    def count(self, frames: int) -> None:
        self.done += frames
        if self.progress:
            self.progress("decode", self.done, self.total)


# --- pictures ---


def _picture_files(source: VideoSource) -> list[str]:
    return list_frame_files(source) if source.is_directory else [source.path]


def _describe_pictures(source: VideoSource, files: list[str]) -> FrameMetadata:
    height, width = read_picture(files[0], None if source.is_directory else source.name).shape[:2]
    return FrameMetadata(total_num_frames=len(files), width=width, height=height, video_backend="pillow")


def _read_pictures(source: VideoSource, job: _Job) -> Iterator[DecodedVideo]:
    files, name = _picture_files(source), None if source.is_directory else source.name
    metadata = _describe_pictures(source, files)
    for piece in job.pieces(job.choose(metadata)):
        frames = {}
        for target, times in sorted(Counter(piece).items()):
            frame = read_picture(files[target], name)
            frames[target] = job.transform(frame) if job.transform else frame
            job.count(times)
        yield _piece(frames, piece, metadata)


def _describe_animation(animation: AnimatedPicture) -> FrameMetadata:
    times = animation.timestamps()
    height, width = animation.rgb_at(0).shape[:2]
    total, duration = animation.num_frames, float(times[-1])
    metadata = FrameMetadata(
        total_num_frames=total,
        fps=total / duration,
        width=width,
        height=height,
        duration=duration,
        video_backend="pillow",
    )
    metadata.source_timestamps = times[:-1]
    return metadata


def _read_animation(animation: AnimatedPicture, job: _Job) -> Iterator[DecodedVideo]:
    metadata = _describe_animation(animation)
    for piece in job.pieces(job.choose(metadata)):
        frames = {}
        for target, count in sorted(Counter(piece).items()):
            frame = animation.rgb_at(target)
            frames[target] = job.transform(frame) if job.transform else frame
            job.count(count)
        yield _piece(frames, piece, metadata)


def _piece(frames: dict[int, Any], asked: list[int], metadata: FrameMetadata) -> DecodedVideo:
    metadata = copy.copy(metadata)
    metadata.frames_indices = [i for i in asked if i in frames]
    return DecodedVideo([frames[i] for i in metadata.frames_indices], metadata)


# --- decoding ---


def _decode_file(source: VideoSource, job: _Job) -> Iterator[DecodedVideo]:
    index, metadata = _open_index(source, allow_header=True)
    chosen = job.choose(metadata)
    pieces = job.pieces(chosen)
    frames = _read_frames(source, index, pieces[0], metadata, job) if len(pieces) == 1 else {}
    if len(frames) < len(set(chosen)) and index.from_header:
        # The header is wrong, or pieces cannot be taken back once they were yielded: count packets, and choose again
        # among the frames that exist.
        index, metadata = _open_index(source, allow_header=False)
        chosen = job.choose(metadata)
        pieces, frames = job.pieces(chosen), {}
    asked = read = 0
    for piece in pieces:
        frames = frames or _read_frames(source, index, piece, metadata, job)
        asked, read = asked + len(set(piece)), read + len(frames)
        if frames or not piece:
            yield _piece(frames, piece, metadata)
        frames = {}
    if chosen and not read:
        raise VideoDecodeError(f"{source.name}: none of the {len(set(chosen))} requested frames can be decoded")
    _warn_of_losses(source, index, asked, read)


def _open_index(source: VideoSource, allow_header: bool) -> tuple[FrameIndex, FrameMetadata]:
    container, stream = open_container(source)
    with container:
        index = index_frames(source, container, stream, allow_header=allow_header)
        return index, _describe(index, container, stream)


def _describe(index: FrameIndex, container, stream) -> FrameMetadata:
    average = float(stream.average_rate) if stream.average_rate else None
    fps = average
    if index.pts and len(index.pts) > 1:
        measured = (len(index.pts) - 1) / ((index.pts[-1] - index.pts[0]) * float(index.time_base))
        # If the header's rate is right, it is more precise than a mean of times.
        fps = average if average and abs(measured / average - 1) < 0.02 else measured
    metadata = FrameMetadata(
        total_num_frames=index.num_frames,
        fps=fps,
        width=stream.codec_context.width,
        height=stream.codec_context.height,
        duration=None,
        video_backend="pyav",
    )
    metadata.source_timestamps = seconds = index.seconds(fps)
    if seconds is not None and fps:
        metadata.duration = float(seconds[-1] - seconds[0] + 1 / fps)
    return metadata


def _warn_of_losses(source: VideoSource, index: FrameIndex, asked: int, read: int) -> None:
    losses = [index.shortfall] if index.shortfall else []
    if read < asked:
        losses.append(f"{asked - read} of the {asked} requested frames cannot be decoded and are left out")
    if losses:
        message = f"{source.name}: the video is cut or damaged: {'; '.join(losses)}"
        warnings.warn(message, VideoDecodeWarning, stacklevel=2)


def _read_frames(source: VideoSource, index: FrameIndex, chosen, metadata: FrameMetadata, job: _Job) -> dict[int, Any]:
    """Returns {source index: transformed frame}, without the frames that cannot be decoded."""
    whole = bool(index.pts) and not index.shortfall  # torchcodec passes half frames on
    if job.backend != "pyav" and whole and is_torchcodec_usable():
        done = job.done
        try:
            frames = _read_with(_TorchcodecReader, source, index, chosen, metadata, job)
            metadata.video_backend = "torchcodec"
            return frames
        except _TorchcodecFailed as error:
            job.done = done  # frames that it did decode are decoded again
            logger.info(f"{source.name}: torchcodec failed ({error}); PyAV decodes this video")
    elif job.backend == "torchcodec" and not is_torchcodec_usable():
        logger.warning_once("torchcodec cannot be used here (not installed, or no FFmpeg found); PyAV decodes instead")
    return _read_with(_PyAVReader, source, index, chosen, metadata, job)


def _read_with(reader_class, source: VideoSource, index: FrameIndex, chosen, metadata, job: _Job) -> dict[int, Any]:
    times = Counter(chosen)
    targets = sorted(times)
    frames: dict[int, Any] = {}
    lock = threading.Lock()

    def read(part: list[int]) -> None:
        with reader_class(source, index) as reader:
            for position in part:
                rgb = reader.rgb_at(position)
                if rgb is None:
                    continue
                metadata.height, metadata.width = rgb.shape[:2]  # after rotation
                frame = job.transform(rgb) if job.transform else rgb
                with lock:
                    frames[position] = frame
                    job.count(times[position])

    workers = job.num_workers if source.can_open_twice else 1
    parts = _split_at_keyframes(targets, index, workers)
    if len(parts) < 2:
        for part in parts:
            read(part)
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(read, parts))  # list() re-raises a reader's error
    return frames


def _split_at_keyframes(targets: list[int], index: FrameIndex, parts: int) -> list[list[int]]:
    """Parts of about equal size; no two need the same stretch of video, which would then be decoded twice."""
    if parts < 2 or not index.pts or len(targets) < 2:
        return [targets] if targets else []
    cuts = [0]
    for part in range(1, parts):
        cut = max(len(targets) * part // parts, cuts[-1] + 1)
        while cut < len(targets) and index.keyframe_before(targets[cut]) == index.keyframe_before(targets[cut - 1]):
            cut += 1
        if cut < len(targets):
            cuts.append(cut)
    return [targets[a:b] for a, b in zip(cuts, [*cuts[1:], len(targets)], strict=True)]


class _PyAVReader:
    """An open container whose frames are read forwards."""

    def __init__(self, source: VideoSource, index: FrameIndex):
        self.source, self.index = source, index
        self.container: Any = None
        self._open()
        self.frame: Any = None  # the last decoded one
        self.position = -1  # its number, where frames are counted
        self.last_pts: float = float("-inf")
        self.can_seek = len(index.key_pts) > 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.container.close()
        # The generator of frames refers to this reader. Left as a cycle, the two would wait for the garbage collector,
        # and a forked process (a DataLoader worker) that collects them hangs in FFmpeg.
        self.frames = self.frame = self.stream = self.container = None

    def rgb_at(self, position: int) -> np.ndarray | None:
        """The frame as RGB uint8 `(H, W, 3)`, upright; `None` if it cannot be decoded. Positions must ascend."""
        frame = self._count_to(position) if not self.index.pts else self._go_to(position)
        if frame is None or frame.is_corrupt:  # FFmpeg fills a damaged frame with the one before
            return None
        # RGB at full size first, then the transform: scaling in YUV would blur colours.
        rgb = frame.to_ndarray(format="rgb24")
        turns = getattr(frame, "rotation", 0) // 90 % 4
        return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb

    def _open(self) -> None:
        self.container, self.stream = open_container(self.source)
        self.frames = self._decode()

    def _decode(self):
        """All frames from here on; only a packet that cannot be decoded is skipped, not the rest of the video."""
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except av.FFmpegError:
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except av.FFmpegError:
                continue
            yield from frames

    def _next(self):
        self.frame = next(self.frames, None)
        if self.frame is not None and self.frame.pts is not None:
            self.last_pts = self.frame.pts
        return self.frame

    def _count_to(self, position: int):
        while self.position < position and self._next() is not None:
            self.position += 1
        return self.frame

    def _go_to(self, position: int):
        target, key = self.index.pts[position], self.index.keyframe_before(position)
        if self.can_seek and key > 0 and self.index.key_pts[key] > self.last_pts:
            self._seek(key, target)
        elif self.last_pts == float("-inf"):
            self._next()
        while self.frame is not None and (self.frame.pts is None or self.frame.pts < target):
            self._next()
        return self.frame if self.frame is not None and self.frame.pts == target else None

    def _seek(self, key: int, target: int) -> None:
        """Moves to a decoded frame at or before `target`."""
        before = self.last_pts
        seeks = (*self.index.key_seeks[key], *self.index.key_seeks[key - 1], REOPEN)
        for time in seeks:
            if time is None:
                continue
            if time is REOPEN:
                self.container.close()
                self._open()
            else:
                try:
                    self.container.seek(time, stream=self.stream)
                except av.FFmpegError:
                    continue
                self.frames = self._decode()
            frame = self._next()
            if frame is not None and frame.pts is not None and frame.pts <= target:
                break  # otherwise it landed late: the picture may be wrong, or past the target
        if self.frame is not None and before > self.last_pts <= self.index.pts[0]:
            self.can_seek = (
                False  # back at the start of a container that cannot seek (GIF): only read forwards from now on
            )


class _TorchcodecFailed(Exception):
    """torchcodec raised, or returned another frame than the index names."""


class _TorchcodecReader:
    """torchcodec's decoder, checked against the index."""

    def __init__(self, source: VideoSource, index: FrameIndex):
        self.index = index
        try:
            from torchcodec.decoders import VideoDecoder

            # "approximate" would return other frames if the frame rate varies
            options = {"dimension_order": "NHWC", "num_ffmpeg_threads": 1, "seek_mode": "exact"}
            self.decoder = VideoDecoder(source.open(), stream_index=index.stream, **options)
        except Exception as error:
            raise _TorchcodecFailed(error) from None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def rgb_at(self, position: int) -> np.ndarray:
        try:
            frame = self.decoder.get_frame_at(position)
        except Exception as error:
            raise _TorchcodecFailed(str(error).split("\n")[0]) from None
        expected = float(self.index.pts[position] * self.index.time_base)
        if abs(frame.pts_seconds - expected) > 1e-4:
            raise _TorchcodecFailed(f"frame {position} has time {frame.pts_seconds}, the index says {expected}")
        return frame.data.numpy()
