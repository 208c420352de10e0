"""When each frame of a video is shown, and where decoding can start: without decoding anything.

The times come from the container's own index if that is known to be exact (MP4, MOV: read on opening), otherwise from
the packets, all of which are then read once. Frame i of a video is the i-th presentation time in sorted order; frame
counts in headers are not trusted.
"""

import bisect
import itertools
from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from .container_formats import check_decodable, open_alone
from .video_sources import VideoDecodeError, VideoSource

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]


LEADING_FRAMES = 16  # maximum number of B-frames shown before, but stored after, their keyframe (x264)
ATTACHED_PICTURE = 1 << 10  # FFmpeg's AV_DISPOSITION_ATTACHED_PIC


@dataclass(frozen=True)
class FrameIndex:
    """When each frame is shown, and where decoding can start.

    Attributes:
        pts: times of all frames in units of `time_base`, ascending; empty if packets carry no usable times, in which
            case frames are counted from the start.
        num_frames: number of frames.
        key_pts: for each keyframe, ascending, the first time from which decoding that starts there is correct.
        key_seeks: for each keyframe, the times to seek to, the best one first.
        time_base: seconds per unit.
        stream: number of the video stream in its container.
        origin: time that counts as second 0.
        from_header: taken from the container's own index, not from packets.
        shortfall: in words, what the header promises but the file does not contain; empty if nothing is missing.
    """

    num_frames: int
    time_base: Fraction
    stream: int
    pts: list[int] = field(default_factory=list)
    key_pts: list[int] = field(default_factory=list)
    key_seeks: list[tuple] = field(default_factory=list)
    origin: int = 0
    from_header: bool = False
    shortfall: str = ""

    def seconds(self, fps: float | None) -> np.ndarray | None:
        if not self.pts:
            return np.arange(self.num_frames) / fps if fps else None
        return (np.array(self.pts, dtype=np.int64) - self.origin) * float(self.time_base)

    def keyframe_before(self, position: int) -> int:
        """Number of the last keyframe from which the frame at `position` can be decoded."""
        return max(bisect.bisect_right(self.key_pts, self.pts[position]) - 1, 0)


def open_container(source: VideoSource):
    """Returns the container and its first real video stream. A cover picture in an audio file is not video."""
    container = open_alone(source)
    for stream in container.streams.video:
        disposition = getattr(stream, "disposition", 0)  # a number or a flag, by PyAV's version
        if not getattr(disposition, "value", disposition) & ATTACHED_PICTURE:
            try:
                check_decodable(source, stream)
            except VideoDecodeError:
                container.close()
                raise
            stream.thread_type = "NONE"  # frame threads would be refilled after each seek
            return container, stream
    kinds = sorted({stream.type for stream in container.streams})
    container.close()
    if not kinds:
        raise VideoDecodeError(f"{source.name}: the file has no video stream: it is empty, cut or damaged")
    raise VideoDecodeError(f"{source.name}: the file has no video stream (found: {', '.join(kinds)})")


def index_frames(source: VideoSource, container, stream, allow_header: bool) -> FrameIndex:
    index = _index_from_header(source, container, stream) if allow_header else None
    return index or _index_from_packets(source, container, stream)


def _index_from_header(source: VideoSource, container, stream) -> FrameIndex | None:
    """The index of MP4 and MOV files, if it is complete and gives presentation times.

    It contains decoding times. Without B-frames they are also the presentation times; at a constant frame rate the
    presentation times are the same grid, shifted to where the first frame is shown. In any other case: `None`.
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
    """Reads all packets once and decodes none."""
    times, keys = [], []
    try:
        for packet in container.demux(stream):
            if not packet.size or getattr(packet, "is_discard", False) or _is_hidden(packet, stream):
                continue
            times.append(packet.pts)
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, packet.dts))
    except av.FFmpegError:
        pass  # the end of what is readable; the caller reports what is missing
    if not times:
        raise VideoDecodeError(f"{source.name}: the file contains no frames")
    shortfall = _shortfall(container, stream, times)
    untimed = None in times or len(set(times)) != len(times)
    if container.format.name == "avi" and stream.codec_context.has_b_frames:
        # AVI has no presentation times. If FFmpeg made them up, they ascend in storage order.
        untimed = untimed or times == sorted(times)
    if untimed:
        return FrameIndex(len(times), stream.time_base, stream.index, shortfall=shortfall)
    keys.sort(key=lambda key: key[0])
    keys = keys or [(min(times), None)]
    # Frames before the first keyframe (a recording that starts mid-stream) cannot be decoded.
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
    """VP8 has packets that are never shown (alternate references); a bit in their first byte says so."""
    return stream.codec_context.name == "vp8" and not memoryview(packet)[0] & 0x10


def _shortfall(container, stream, times: list) -> str:
    """How much is missing compared to the header: the sign of a truncated file. Small differences are common."""
    found, promised = len(times), stream.frames
    if promised:
        return f"{found} of {promised} frames are left" if found < promised - max(2, promised // 20) else ""
    if container.duration is None or None in times or container.format.name in ("mpegts", "mpeg"):
        return ""  # no promise, or one that FFmpeg guessed from the end of the file
    if len(container.streams) > 1:
        return ""  # the duration may be that of the sound
    seconds, end = container.duration / av.time_base, float(max(times) * stream.time_base)
    return f"{end:.1f} of {seconds:.1f} seconds are left" if end < 0.9 * seconds - 1 else ""
