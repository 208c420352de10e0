"""From a video to the frames that are asked for, exactly and without decoding the rest.

1. `FrameIndex`: the presentation time of every frame, from packets alone (nothing is decoded), or from the
   container's own index where that is known to be exact. Frame i is the i-th time in sorted order.
2. The caller's rule chooses frames from the metadata.
3. A reader goes forward through the sorted targets. It seeks only where the target's keyframe lies past the last
   decoded frame, and checks where it landed: some containers land late, where pictures would be wrong.
4. Each frame is turned upright, converted to RGB and given at once to `transform` (resize), so that one frame per
   reader stands in memory at full size. Two readers share the targets.
"""

import bisect
import itertools
import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from transformers.utils import is_torchcodec_available, logging
from transformers.video_utils import VideoMetadata

from .video_sources import VideoDecodeError as VideoDecodeError  # part of this module's public face
from .video_sources import VideoDecodeWarning, VideoSource, list_frame_files, open_source, read_picture

try:
    import av
except ImportError:
    av = None

logger = logging.get_logger(__name__)

BACKEND_VARIABLE = "LONGVLM_VIDEO_BACKEND"
MAX_WORKERS = 2  # a third reader gains less than a tenth, and each holds one frame at full size
LEADING_FRAMES = 16  # at most so many B-frames are shown before, but stored after, their keyframe (x264's limit)
ATTACHED_PICTURE = 1 << 10  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC
REOPEN = object()


class DecodedVideo(NamedTuple):
    """`frames[j]` is what `transform` made of source frame `metadata.frames_indices[j]`."""

    frames: list[Any]
    metadata: "FrameMetadata"


class FrameMetadata(VideoMetadata):
    """transformers' `VideoMetadata`, with real times.

    `frames_indices` and `fps` are always those of the SOURCE. `timestamps` are the seconds at which the taken frames
    are shown, also for a variable frame rate; the base class computes index / fps. `source_timestamps` are those of
    all frames, or `None` where they are unknown (frames given as a list, without a frame rate).
    """

    source_timestamps: Any = None

    @property
    def timestamps(self) -> list[float] | None:
        if self.frames_indices is None:
            return None
        if self.source_timestamps is not None:
            return [float(self.source_timestamps[i]) for i in self.frames_indices]
        return [i / self.fps for i in self.frames_indices] if self.fps else None


def is_torchcodec_usable() -> bool:
    """Whether torchcodec can decode video here: installed, its libraries load, and it found FFmpeg."""
    if not is_torchcodec_available():
        return False
    try:
        import torchcodec
        from torchcodec.decoders import VideoDecoder  # noqa: F401
    except Exception:  # whatever a broken native library raises
        return False
    return getattr(torchcodec, "ffmpeg_major_version", True) is not None


def decode_video(video, sample_indices_fn=None, *, transform=None, backend=None, num_workers=None, progress=None):
    """Decode the frames that a rule asks for.

    Args:
        video: a path of a video, of a picture (a one-frame video) or of a directory of pictures; a URL; bytes; or a
            binary file object.
        sample_indices_fn: called as `sample_indices_fn(metadata=FrameMetadata)`, returns source indices in any order,
            also repeated. `None`: all frames.
        transform: called with each frame, RGB uint8 `(H, W, 3)`, as soon as it is decoded, in any order and from
            several threads; its result takes the frame's place. `None`: the frames themselves.
        backend: `"torchcodec"`, `"pyav"` or `"auto"` (torchcodec where usable). Default: the environment variable
            LONGVLM_VIDEO_BACKEND, or `"auto"`. Frame numbers and times come from PyAV's index for both; where
            torchcodec gives another frame than the index says (MPEG-TS) or fails, PyAV decodes.
        num_workers: readers at work at a time; default 2.
        progress: called as `progress(done, total)` after each frame, by one thread at a time.
    Returns:
        `DecodedVideo(frames, metadata)`. Where a part of the video cannot be read, the frames that can be are
        returned, a `VideoDecodeWarning` says how many, and `metadata.frames_indices` names them: none is repeated.
    Raises:
        VideoDecodeError: the video cannot be opened, or none of its frames can be read. One line.
    """
    backend = backend or os.environ.get(BACKEND_VARIABLE) or "auto"
    if backend not in ("auto", "pyav", "torchcodec"):
        raise ValueError(f'video backend "{backend}" is not known; choose "auto", "pyav" or "torchcodec"')
    job = _Job(sample_indices_fn, transform, backend, num_workers or min(MAX_WORKERS, os.cpu_count() or 1), progress)
    with open_source(video) as source:
        if source.is_directory:
            return _read_pictures(source, list_frame_files(source), job)
        if source.is_picture:
            return _read_pictures(source, [source.path], job)
        if av is None:
            raise ImportError("decoding video needs PyAV, which is not installed; run: pip install av")
        return _decode_file(source, job)


@dataclass
class _Job:
    """The options of `decode_video`, passed along."""

    sample_indices_fn: Any
    transform: Any
    backend: str
    num_workers: int
    progress: Any

    def choose(self, metadata: FrameMetadata) -> list[int]:
        total = metadata.total_num_frames
        if self.sample_indices_fn is None:
            return list(range(total))
        chosen = [int(i) for i in self.sample_indices_fn(metadata=metadata)]
        if chosen and not 0 <= min(chosen) <= max(chosen) < total:
            raise ValueError(f"frame indices {min(chosen)} to {max(chosen)} were asked of a video of {total} frames")
        return chosen


# --- pictures ---


def _read_pictures(source: VideoSource, files: list[str], job: _Job) -> DecodedVideo:
    name = None if source.is_directory else source.name
    height, width = read_picture(files[0], name).shape[:2]
    metadata = FrameMetadata(total_num_frames=len(files), width=width, height=height, video_backend="pillow")
    chosen = job.choose(metadata)
    targets = sorted(set(chosen))
    frames = {}
    for target in targets:
        frame = read_picture(files[target], name)
        frames[target] = job.transform(frame) if job.transform else frame
        if job.progress:
            job.progress(len(frames), len(targets))
    metadata.frames_indices = chosen
    return DecodedVideo([frames[i] for i in chosen], metadata)


# --- the index ---


@dataclass(frozen=True)
class FrameIndex:
    """When each frame is shown, and where decoding can start.

    Attributes:
        pts: times of all frames in units of `time_base`, ascending; `None` if packets carry no usable times: frames
            are then counted from the start.
        num_frames: number of frames.
        key_pts: for each keyframe, ascending, the first time from which decoding that starts there is right.
        key_seeks: for each keyframe, the times to seek to, the best one first.
        time_base: seconds per unit.
        stream: number of the video stream in its container.
        origin: time of second 0.
        from_header: taken from the container's own index, not from packets.
        shortfall: what the header promises beyond what can be read, in words; empty if nothing is missing.
    """

    pts: list[int] | None
    num_frames: int
    key_pts: list[int]
    key_seeks: list[tuple]
    time_base: Fraction
    stream: int
    origin: int = 0
    from_header: bool = False
    shortfall: str = ""

    def seconds(self, fps: float | None) -> np.ndarray | None:
        if self.pts is None:
            return np.arange(self.num_frames) / fps if fps else None
        return (np.array(self.pts, dtype=np.int64) - self.origin) * float(self.time_base)

    def keyframe_before(self, position: int) -> int:
        """Number of the last keyframe from which the frame at `position` can be decoded."""
        return max(bisect.bisect_right(self.key_pts, self.pts[position]) - 1, 0)


def _open_container(source: VideoSource):
    """-> (container, its first real video stream). A cover picture in an audio file is not video."""
    try:
        container = av.open(source.open())
    except (av.FFmpegError, OSError, ValueError):
        # FFmpeg's text embeds the path and an error number; the reason is nearly always this one.
        raise VideoDecodeError(f"{source.name}: not a video file, or cut or damaged beyond reading") from None
    if container.format.name == "tty":  # FFmpeg would show the text, as on a terminal
        container.close()
        raise VideoDecodeError(f"{source.name}: not a video file but text")
    for stream in container.streams.video:
        disposition = getattr(stream, "disposition", 0)  # a number or a flag, by PyAV's version
        if not getattr(disposition, "value", disposition) & ATTACHED_PICTURE:
            stream.thread_type = "NONE"  # frame threads would be refilled after each seek
            return container, stream
    kinds = sorted({stream.type for stream in container.streams})
    container.close()
    raise VideoDecodeError(f"{source.name}: the file has no video stream (found: {', '.join(kinds) or 'nothing'})")


def _index_frames(source: VideoSource, container, stream, allow_header: bool) -> FrameIndex:
    index = _index_from_header(source, container, stream) if allow_header else None
    return index or _index_from_packets(source, container, stream)


def _index_from_header(source: VideoSource, container, stream) -> FrameIndex | None:
    """The index that MP4 and MOV files carry, if it is complete and tells presentation times.

    It holds decoding times. They are also the presentation times if there are no B-frames; at a constant frame rate
    the presentation times are the same grid, moved to where the first frame is shown. Anything else: `None`.
    """
    entries = getattr(stream, "index_entries", ())  # PyAV 18
    if "mov" not in container.format.name.split(",") or len(entries) < 2 or len(entries) != stream.frames:
        return None  # fragmented files promise 0 frames and may show only a part of their index
    dts, keys, end = [], [], 0
    for position, entry in enumerate(entries):
        if entry.is_discard:
            return None  # an edit list
        dts.append(entry.timestamp)
        end = max(end, entry.pos + entry.size)
        if entry.is_keyframe:
            keys.append(position)
    steps = {b - a for a, b in itertools.pairwise(dts)}
    start = stream.start_time
    if end > source.size or not keys or keys[0] != 0 or min(steps) <= 0 or start is None:
        return None  # cut, or unusual
    reordered = bool(stream.codec_context.has_b_frames)
    if (reordered and len(steps) > 1) or (not reordered and start != dts[0]):
        return None
    pts = [time - dts[0] + start for time in dts]
    margin = LEADING_FRAMES if reordered else 0
    return FrameIndex(
        pts=pts,
        num_frames=len(pts),
        key_pts=[pts[0], *(pts[min(k + margin, len(pts) - 1)] for k in keys[1:])],
        key_seeks=[(pts[k], dts[k]) for k in keys],
        time_base=stream.time_base,
        stream=stream.index,
        from_header=True,
    )


def _index_from_packets(source: VideoSource, container, stream) -> FrameIndex:
    """Read all packets once, decode none."""
    times, keys = [], []
    try:
        for packet in container.demux(stream):
            if not packet.size or getattr(packet, "is_discard", False) or _is_hidden(packet, stream):
                continue
            times.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, packet.dts))
    except av.FFmpegError:
        pass  # the end of what can be read; what is missing is reported by the caller
    if not times:
        raise VideoDecodeError(f"{source.name}: the file holds no frames")
    shortfall = _shortfall(container, stream, times)
    untimed = None in times or len(set(times)) != len(times)
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        # AVI has no presentation times. Where FFmpeg made them up, they ascend in the order of storage.
        untimed = untimed or times == sorted(times)
    if untimed:
        return FrameIndex(None, len(times), [], [], stream.time_base, stream.index, shortfall=shortfall)
    keys.sort(key=lambda key: key[0])
    keys = keys or [(min(times), None)]
    # Frames before the first keyframe (a recording that starts in mid-stream) cannot be decoded.
    pts = sorted(time for time in times if time >= keys[0][0])
    arbitrary_clock = container.format.name in ("mpegts", "mpeg")
    return FrameIndex(
        pts=pts,
        num_frames=len(pts),
        key_pts=[key[0] for key in keys],
        key_seeks=keys,
        time_base=stream.time_base,
        stream=stream.index,
        origin=pts[0] if arbitrary_clock else 0,
        shortfall=shortfall,
    )


def _is_hidden(packet, stream) -> bool:
    """VP8 has packets that are never shown (alternate references); a bit of their first byte says so."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def _shortfall(container, stream, times: list[int | None]) -> str:
    """How much less there is than the header says: the mark of a file that was cut. Small lies are usual."""
    found, promised = len(times), stream.frames
    if promised:
        return f"{found} of {promised} frames are left" if found < promised - max(2, promised // 20) else ""
    if container.duration is None or None in times or container.format.name in ("mpegts", "mpeg"):
        return ""  # no promise, or one that FFmpeg guessed from the end of the file
    if len(container.streams) > 1:
        return ""  # the duration may be that of the sound
    seconds, end = container.duration / av.time_base, float(max(times) * stream.time_base)
    return f"{end:.1f} of {seconds:.1f} seconds are left" if end < 0.9 * seconds - 1 else ""


# --- decoding ---


def _decode_file(source: VideoSource, job: _Job) -> DecodedVideo:
    container, stream = _open_container(source)
    with container:
        index = _index_frames(source, container, stream, allow_header=True)
        metadata = _describe(index, container, stream)
    chosen = job.choose(metadata)
    frames = _read_frames(source, index, chosen, metadata, job)
    if len(frames) < len(set(chosen)) and index.from_header:
        # The header does not tell the truth: count packets, and choose anew among the frames that exist.
        container, stream = _open_container(source)
        with container:
            index = _index_frames(source, container, stream, allow_header=False)
            metadata = _describe(index, container, stream)
        chosen = job.choose(metadata)
        frames = _read_frames(source, index, chosen, metadata, job)
    if chosen and not frames:
        raise VideoDecodeError(f"{source.name}: none of the {len(set(chosen))} frames asked for can be decoded")
    _warn_of_losses(source, index, len(set(chosen)), len(frames))
    metadata.frames_indices = [i for i in chosen if i in frames]
    return DecodedVideo([frames[i] for i in metadata.frames_indices], metadata)


def _describe(index: FrameIndex, container, stream) -> FrameMetadata:
    average = float(stream.average_rate) if stream.average_rate else None
    fps = average
    if index.pts and len(index.pts) > 1:
        measured = (len(index.pts) - 1) / ((index.pts[-1] - index.pts[0]) * float(index.time_base))
        # The header's rate is rounded less than a mean of times, where it is right.
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
        losses.append(f"{asked - read} of the {asked} frames asked for cannot be decoded and are left out")
    if losses:
        message = f"{source.name}: the video is cut or damaged: {'; '.join(losses)}"
        warnings.warn(message, VideoDecodeWarning, stacklevel=2)


def _read_frames(source: VideoSource, index: FrameIndex, chosen, metadata: FrameMetadata, job: _Job) -> dict[int, Any]:
    """-> {source index: frame after the transform}, without the frames that cannot be decoded."""
    whole = index.pts is not None and not index.shortfall  # torchcodec passes half frames on
    if job.backend != "pyav" and whole and is_torchcodec_usable():
        try:
            frames = _read_with(_TorchcodecReader, source, index, chosen, metadata, job)
            metadata.video_backend = "torchcodec"
            return frames
        except _TorchcodecFailed as error:
            logger.info(f"{source.name}: torchcodec failed ({error}); PyAV decodes this video")
    elif job.backend == "torchcodec" and not is_torchcodec_usable():
        logger.warning_once("torchcodec cannot be used here (not installed, or no FFmpeg found); PyAV decodes instead")
    return _read_with(_PyAVReader, source, index, chosen, metadata, job)


def _read_with(reader_class, source: VideoSource, index: FrameIndex, chosen, metadata, job: _Job) -> dict[int, Any]:
    targets = sorted(set(chosen))
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
                    if job.progress:
                        job.progress(len(frames), len(targets))

    workers = job.num_workers if source.can_open_twice else 1
    parts = _split_at_keyframes(targets, index, workers)
    if len(parts) < 2:
        for part in parts:
            read(part)
    else:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(read, parts))  # list() raises what a reader raised
    return frames


def _split_at_keyframes(targets: list[int], index: FrameIndex, parts: int) -> list[list[int]]:
    """Parts of about equal size; no two need the same stretch of video, which would be decoded twice."""
    if parts < 2 or index.pts is None or len(targets) < 2:
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
    """One open container that goes forward through its frames."""

    def __init__(self, source: VideoSource, index: FrameIndex):
        self.source, self.index = source, index
        self._open()
        self.frame = None  # the last decoded one
        self.position = -1  # its number, where frames are counted
        self.last_pts: float = float("-inf")
        self.can_seek = len(index.key_pts) > 1

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.container.close()

    def rgb_at(self, position: int) -> np.ndarray | None:
        """The frame as RGB uint8 `(H, W, 3)`, upright; `None` if it cannot be decoded. Positions must ascend."""
        frame = self._count_to(position) if self.index.pts is None else self._go_to(position)
        if frame is None or frame.is_corrupt:  # what FFmpeg makes of half a frame is a copy of the one before
            return None
        # First RGB at full size, then the transform: scaling in YUV would blur colours.
        rgb = frame.to_ndarray(format="rgb24")
        turns = getattr(frame, "rotation", 0) // 90 % 4
        return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb

    def _open(self) -> None:
        self.container, self.stream = _open_container(self.source)
        self.frames = self._decode()

    def _decode(self):
        """All frames from here on; a packet that cannot be decoded is skipped, not the rest of the video."""
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
        """Stand on a decoded frame at or before `target`."""
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
                break  # otherwise it landed late: a picture decoded from there may be wrong, or is already past
        if self.frame is not None and before > self.last_pts <= self.index.pts[0]:
            self.can_seek = False  # back at the start of a container that cannot seek (GIF): only forward from now on


class _TorchcodecFailed(Exception):
    """torchcodec raised, or gave another frame than the index names."""


class _TorchcodecReader:
    """torchcodec's decoder, checked against the index."""

    def __init__(self, source: VideoSource, index: FrameIndex):
        self.index = index
        try:
            from torchcodec.decoders import VideoDecoder

            # "approximate" would give other frames where the frame rate varies
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
