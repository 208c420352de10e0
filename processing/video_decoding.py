"""From a video to the requested frames, exactly and without decoding the rest.

1. `video_index` gives the order and the time of all frames. Frame i is the i-th that is shown.
2. The caller's rule chooses frames from the metadata.
3. A reader (`video_reader`) goes forward through the sorted targets. It seeks only where the target's keyframe lies
   past the last decoded frame, and checks that the frames behind it are those of the index.
4. Each frame is converted to RGB, shown as a player would (`frame_display`) and passed straight to `transform`
   (resize), so that each reader holds one frame at full size. Two readers share the targets.

`decode_video` returns all frames together, `iter_video` yields them in pieces, so that any number of frames fits.
"""

import copy
import dataclasses
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
from .frame_display import display_size, pixel_aspect
from .pictures import list_frame_files, picture_size, read_picture
from .video_index import FrameIndex, index_frames, open_container
from .video_reader import (
    IndexIsWrong,
    PyAVReader,
    TorchcodecFailed,
    TorchcodecReader,
    index_by_decoding,
    torchcodec_shows_it_right,
)
from .video_sources import VideoDecodeError as VideoDecodeError  # part of this module's interface
from .video_sources import VideoDecodeWarning, VideoSource, open_source

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]

logger = logging.get_logger(__name__)

BACKEND_VARIABLE = "LONGVLM_VIDEO_BACKEND"
MAX_WORKERS = 2  # a third reader gains less than 10 %, and each holds one frame at full size


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


def decode_video(
    video,
    sample_indices_fn=None,
    *,
    transform=None,
    backend=None,
    num_workers=None,
    progress=None,
    video_stream=None,
):
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
        progress: called as `progress("decode", done, total)` after each frame, by one thread at a time; for a URL or a
            pipe, before that, as `progress("download", done, total)`, in bytes (see `open_source`).
        video_stream: number of the video stream in its file. Default: the one that the file marks as default, or else
            the first; cover pictures and thumbnails are not video.
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
        video_stream=video_stream,
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
    video_stream=None,
) -> Iterator[DecodedVideo]:
    """`decode_video` piece by piece: at most `frames_per_piece` frames at a time, in the requested order.

    The video is opened and indexed once. `metadata.frames_indices` are those of the piece; `progress` counts over all
    pieces. Arguments and errors are those of `decode_video`; there is at least one piece.
    """
    backend = backend or os.environ.get(BACKEND_VARIABLE) or "auto"
    if backend not in ("auto", "pyav", "torchcodec"):
        raise ValueError(f'video backend "{backend}" is not known; choose "auto", "pyav" or "torchcodec"')
    num_workers = num_workers or min(MAX_WORKERS, os.cpu_count() or 1)
    job = _Job(sample_indices_fn, transform, backend, num_workers, progress, frames_per_piece, video_stream)
    with open_source(video, progress=progress) as source, open_animation(source) as animation:
        if animation is not None:
            yield from _read_animation(animation, job)
        elif source.is_directory or source.is_picture:
            yield from _read_pictures(source, job)
        else:
            _check_pyav()
            yield from _decode_file(source, job)


def probe_video(video, *, video_stream=None) -> FrameMetadata:
    """What is known about a video without decoding its frames.

    Args:
        video, video_stream: as in `decode_video`.
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
        return _open_index(source, video_stream, allow_header=True)[1]


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
    video_stream: int | None
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
    height, width = picture_size(files[0], None if source.is_directory else source.name)
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
    times, shortfall = animation.timestamps()
    if shortfall:
        message = f"{animation.source.name}: the animation is cut or damaged: {shortfall}"
        warnings.warn(message, VideoDecodeWarning, stacklevel=2)
    height, width = animation.size
    total, duration = len(times) - 1, float(times[-1])
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
    index, metadata = _open_index(source, job.video_stream, allow_header=True)
    chosen = job.choose(metadata)
    pieces, position, asked, read = job.pieces(chosen), 0, 0, 0
    while position < len(pieces):
        done = job.done
        try:
            if index.from_header and len(pieces) > 1:
                raise IndexIsWrong  # it may be, and pieces cannot be taken back once they were yielded
            if index.is_counted and not index.is_decoded and index.packets.keys and len(pieces) > 2:
                raise IndexIsWrong  # each piece would count from the start: decoding all once, then seeking, is faster
            frames = _read_frames(source, index, pieces[position], metadata, job)
            if index.from_header and len(frames) < len(set(chosen)):
                raise IndexIsWrong
        except IndexIsWrong:
            better, metadata = _better_index(source, index)
            job.done = done
            if position == 0:  # choose again, among the frames that exist
                index = better
                chosen = job.choose(metadata)
                pieces = job.pieces(chosen)
            else:  # keep the frames' numbers; where they do not exist, they are lost
                same = better.num_frames == index.num_frames
                index = better if same else dataclasses.replace(index, is_decoded=True)
            continue
        piece = pieces[position]
        asked, read = asked + len(set(piece)), read + len(frames)
        if frames or not piece:
            yield _piece(frames, piece, metadata)
        position += 1
    if chosen and not read:
        raise VideoDecodeError(f"{source.name}: none of the {len(set(chosen))} requested frames can be decoded")
    _warn_of_losses(source, index, asked, read)


def _open_index(source: VideoSource, video_stream: int | None, allow_header: bool) -> tuple[FrameIndex, FrameMetadata]:
    container, stream = open_container(source, video_stream)
    with container:
        index = index_frames(source, container, stream, allow_header=allow_header)
        return index, _describe(index, stream)


def _better_index(source: VideoSource, index: FrameIndex) -> tuple[FrameIndex, FrameMetadata]:
    if index.from_header:
        return _open_index(source, index.stream, allow_header=False)
    logger.info(f"{source.name}: packets do not tell which frames there are; the whole video is decoded once")
    index = index_by_decoding(source, index)
    if not index.num_frames:
        raise VideoDecodeError(f"{source.name}: none of its frames can be decoded")
    container, stream = open_container(source, index.stream)
    with container:
        return index, _describe(index, stream)


def _describe(index: FrameIndex, stream) -> FrameMetadata:
    fps, seconds = float(stream.average_rate) if stream.average_rate else None, index.seconds
    if seconds is not None and len(seconds) > 1:
        measured = (len(seconds) - 1) / (seconds[-1] - seconds[0])
        # If the header's rate is right, it is more precise than a mean of times.
        fps = fps if fps and abs(measured / fps - 1) < 0.02 else measured
    if seconds is None and fps:
        seconds = np.arange(index.num_frames) / fps
    size = stream.codec_context.width, stream.codec_context.height
    width, height = display_size(*size, pixel_aspect(stream.sample_aspect_ratio))
    metadata = FrameMetadata(
        total_num_frames=index.num_frames,
        fps=float(fps) if fps else None,
        width=width,
        height=height,
        duration=None,
        video_backend="pyav",
    )
    metadata.source_timestamps = seconds
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
    if job.backend != "pyav" and whole and is_torchcodec_usable() and torchcodec_shows_it_right(source, index):
        done = job.done
        try:
            frames = _read_with(TorchcodecReader, source, index, chosen, metadata, job)
            metadata.video_backend = "torchcodec"
            return frames
        except TorchcodecFailed as error:
            job.done = done  # frames that it did decode are decoded again
            logger.info(f"{source.name}: torchcodec failed ({error}); PyAV decodes this video")
    elif job.backend == "torchcodec" and not is_torchcodec_usable():
        logger.warning_once("torchcodec cannot be used here (not installed, or no FFmpeg found); PyAV decodes instead")
    return _read_with(PyAVReader, source, index, chosen, metadata, job)


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
    if parts < 2 or len(index.keyframes) < 2 or len(targets) < 2:
        return [targets] if targets else []
    cuts = [0]
    for part in range(1, parts):
        cut = max(len(targets) * part // parts, cuts[-1] + 1)
        while cut < len(targets) and index.keyframe_before(targets[cut]) == index.keyframe_before(targets[cut - 1]):
            cut += 1
        if cut < len(targets):
            cuts.append(cut)
    return [targets[a:b] for a, b in zip(cuts, [*cuts[1:], len(targets)], strict=True)]
