"""When each frame of a video is shown, and where decoding can start: without decoding anything.

A packet of a file usually holds one frame. But it may be hidden (edit lists cut videos without encoding them again),
be half a frame (a field), or carry no time, a wrong one, or that of another recording. So packets are told apart by
where they lie in the file; times only sort them.

The index comes from the container's own table where that is known to be exact (MP4, MOV: read on opening), otherwise
from the packets, all of which are then read once. Both are claims: the reader checks that frames come in this order.
Where they do not, `index_from_decoding` takes the order in which FFmpeg decodes the whole video.
"""

import bisect
import itertools
import operator
from array import array
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from .container_formats import check_decodable, open_alone
from .field_pictures import PictureStarts
from .video_sources import VideoDecodeError, VideoSource
from .video_times import interpolate_missing, seconds_in_order

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]


LEADING_FRAMES = 16  # maximum number of B-frames shown before, but stored after, their keyframe (x264)
STORES_BOTH_CLOCKS = {"mov", "mpegts", "mpeg", "flv", "nut", "mxf"}  # when to decode and when to show
SMALL_PACKET = 64  # bytes: it may hold no picture
PARAMETER_SETS = 512  # bytes at the start of a keyframe among which they are, if anywhere
ARBITRARY_CLOCK = {"mpegts", "mpeg"}  # second 0 is somewhere before the recording

# FFmpeg's AV_DISPOSITION_...
DEFAULT, ATTACHED_PICTURE, TIMED_THUMBNAILS = 1 << 0, 1 << 10, 1 << 11
_NO_VIDEO = ATTACHED_PICTURE | TIMED_THUMBNAILS
PICTURE_CODECS = {"mjpeg", "png", "bmp", "gif", "webp", "tiff"}


@dataclass
class Packets:
    """
    The packets of a video stream in storage order.

    Attributes:
        pos, size: where each lies in the file, in bytes; `pos` is -1 where that is unknown.
        pts, dts: when to show and when to decode it, in the container's units; `None` where missing.
        is_key, is_shown: flags; it is a keyframe; it begins a frame that is shown.
    """

    pos: array = field(default_factory=lambda: array("q"))
    size: array = field(default_factory=lambda: array("q"))
    pts: list[int | None] = field(default_factory=list)
    dts: list[int | None] = field(default_factory=list)
    is_key: bytearray = field(default_factory=bytearray)
    is_shown: bytearray = field(default_factory=bytearray)

    def __len__(self) -> int:
        return len(self.size)

    @cached_property
    def keys(self) -> dict[tuple, int]:
        """(position in the file, size) -> number of the keyframe there, if there is only one."""
        numbers: dict[tuple, int] = {}
        for number in itertools.compress(range(len(self)), self.is_key):
            place = (self.pos[number], self.size[number])
            numbers[place] = -1 if place in numbers or place[0] < 0 else number
        return {place: number for place, number in numbers.items() if number >= 0}


@dataclass(frozen=True)
class Keyframe:
    """Where decoding can start.

    Attributes:
        position: first frame, in presentation order, that is right if decoding starts here.
        number: of its packet in storage order.
        seeks: times to seek to, the best one first.
    """

    position: int
    number: int
    seeks: tuple = ()


@dataclass(frozen=True)
class FrameIndex:
    """The frames of a video.

    Attributes:
        num_frames: number of frames.
        stream: number of the video stream in its container.
        packets: what is stored.
        order: for each frame, in presentation order, the number of the packet that it comes from. `None`: unknown,
            since packets carry no usable times; frames are counted as they are decoded.
        keyframes: ascending.
        seconds: when each frame is shown; `None` if unknown.
        pts: the same in the container's units where they ascend, for other decoders and for an index from a header;
            else empty.
        time_base: seconds per unit.
        from_header: taken from the container's own table, not from packets; `order` is that of `pts`.
        is_decoded: `order` is that in which FFmpeg decodes the frames, or all that can be had.
        shortfall: in words, what the header promises but the file does not contain; empty if nothing is missing.
    """

    num_frames: int
    stream: int
    packets: Packets
    order: np.ndarray | None = None
    keyframes: list[Keyframe] = field(default_factory=list)
    seconds: np.ndarray | None = None
    pts: list[int] = field(default_factory=list)
    time_base: Fraction = Fraction(1)
    from_header: bool = False
    is_decoded: bool = False
    shortfall: str = ""

    @property
    def is_counted(self) -> bool:
        """Whether the place of a frame is only known by counting from the start."""
        return self.order is None and not self.from_header

    @cached_property
    def _places(self) -> np.ndarray:
        places = np.full(len(self.packets), -1, dtype=np.int64)
        places[self.order[::-1]] = np.arange(self.num_frames)[::-1]  # of two frames in a packet, the first
        return places

    def place(self, number: int, pts: int | None) -> int:
        """Position of the frame whose packet has this number and time; -1 if it is not shown."""
        if not self.from_header:
            return int(self._places[number])
        position = bisect.bisect_left(self.pts, pts) if pts is not None else len(self.pts)
        return position if position < len(self.pts) and self.pts[position] == pts else -1

    def keyframe_before(self, position: int) -> int:
        """Index in `keyframes` of the last one from which the frame at `position` can be decoded."""
        return max(bisect.bisect_right(self._key_positions, position) - 1, 0)

    @cached_property
    def _key_positions(self) -> list[int]:
        return [key.position for key in self.keyframes]


def open_container(source: VideoSource, video_stream: int | None = None):
    """
    Args:
        video_stream: number of the video stream in the container. Default: the one that the file marks as default, or
            else the first. Cover pictures and thumbnails are not video.
    Returns:
        The container and the stream.
    """
    container = open_alone(source)
    try:
        stream = _choose_stream(source, container, video_stream)
        check_decodable(source, stream)
    except BaseException:
        container.close()
        raise
    stream.thread_type = "NONE"  # frame threads would be refilled after each seek
    return container, stream


def _choose_stream(source: VideoSource, container, wanted: int | None):
    # Without a decoder there is no codec context.
    known = [stream for stream in container.streams.video if stream.codec_context is not None]
    streams = [stream for stream in known if not _disposition(stream) & _NO_VIDEO]
    if wanted is not None:
        for stream in known:
            if stream.index == wanted:
                return stream
        there = ", ".join(str(stream.index) for stream in streams) or "none"
        raise VideoDecodeError(f"{source.name}: `video_stream`={wanted} is no video stream; the file has: {there}")
    if streams:
        # A stream of pictures next to a film is a preview; among the rest, `max` takes the first of several.
        return max(
            streams,
            key=lambda s: (not _is_still(s), s.codec_context.name not in PICTURE_CODECS, _disposition(s) & DEFAULT),
        )
    kinds = sorted({stream.type for stream in container.streams})
    if len(known) < len(container.streams.video):
        raise VideoDecodeError(f"{source.name}: FFmpeg has no decoder for its video stream, or cannot tell its codec")
    if not kinds:
        raise VideoDecodeError(f"{source.name}: the file has no video stream: it is empty, cut or damaged")
    raise VideoDecodeError(f"{source.name}: the file has no video stream (found: {', '.join(kinds)})")


def _is_still(stream) -> bool:
    """Whether it is one picture without a duration, as an animated AVIF has for viewers that show only one."""
    return stream.frames == 1 and stream.duration is None


def _disposition(stream) -> int:
    disposition = getattr(stream, "disposition", 0)  # a number or a flag, by PyAV's version
    return getattr(disposition, "value", disposition)


def index_frames(source: VideoSource, container, stream, allow_header: bool) -> FrameIndex:
    index = _index_from_header(source, container, stream) if allow_header else None
    return index or _index_from_packets(source, container, stream)


# --- from the container's table ---


def _index_from_header(source: VideoSource, container, stream) -> FrameIndex | None:
    """The index of MP4 and MOV files, if it is complete and gives presentation times.

    It contains decoding times. Without B-frames they are also the presentation times; at a constant frame rate the
    presentation times are the same grid, shifted to where the first frame is shown. In any other case: `None`.
    """
    entries = getattr(stream, "index_entries", ())  # PyAV 18
    if "mov" not in _formats(container) or len(entries) < 2 or len(entries) != stream.frames:
        return None  # fragmented files promise 0 frames and may show only a part of their index
    starts = _picture_starts(stream)
    if starts is not None and (starts.possible or stream.codec_context.codec_tag == "avc3"):
        return None  # two packets may hold one frame; "avc3": only the packets tell
    packets, dts = Packets(), []
    for entry in entries:
        if entry.is_discard:
            return None  # an edit list
        packets.pos.append(entry.pos)
        packets.size.append(entry.size)
        packets.is_key.append(entry.is_keyframe)
        dts.append(entry.timestamp)
    end = max(map(operator.add, packets.pos, packets.size))
    keys = [number for number, is_key in enumerate(packets.is_key) if is_key]
    steps = {b - a for a, b in itertools.pairwise(dts)}
    start = stream.start_time
    if end > source.size or not keys or keys[0] != 0 or min(steps) <= 0 or start is None:
        return None  # cut, or unusual
    reordered = bool(stream.codec_context.has_b_frames)
    # Equal clocks where B-frames are announced: there are none, or these are no presentation times.
    if (reordered and (len(steps) > 1 or start == dts[0])) or (not reordered and start != dts[0]):
        return None
    pts = [time - dts[0] + start for time in dts]
    margin = LEADING_FRAMES if reordered else 0
    return FrameIndex(
        num_frames=len(pts),
        stream=stream.index,
        packets=packets,
        keyframes=[Keyframe(min(k + margin, len(pts) - 1) if k else 0, k, (pts[k], dts[k])) for k in keys],
        seconds=np.array(pts, dtype=np.int64) * float(stream.time_base),
        pts=pts,
        time_base=stream.time_base,
        from_header=True,
    )


# --- from packets ---


def _index_from_packets(source: VideoSource, container, stream) -> FrameIndex:
    """Reads all packets once and decodes none."""
    packets = _read_packets(container, stream)
    if not any(packets.is_shown):
        raise VideoDecodeError(f"{source.name}: the file contains no frames")
    shortfall = _shortfall(container, stream, packets)
    order = None if _times_are_useless(packets, container, stream) else _presentation_order(packets)
    if order is not None:
        _hide_undecodable(source, packets, order, stream)
        return make_index(packets, order, container, stream, shortfall=shortfall)
    return FrameIndex(
        num_frames=sum(packets.is_shown),
        stream=stream.index,
        packets=packets,
        seconds=_seconds_of_counted(packets, container, stream),
        time_base=stream.time_base,
        shortfall=shortfall,
    )


def _read_packets(container, stream) -> Packets:
    packets = Packets()
    starts, is_vp8 = _picture_starts(stream), stream.codec_context.name == "vp8"
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            is_shown = not getattr(packet, "is_discard", False)
            if starts is not None:
                if packet.is_keyframe:
                    starts.read_parameter_sets(memoryview(packet)[:PARAMETER_SETS])
                if starts.possible or packet.size < SMALL_PACKET:
                    is_shown &= starts.begins_picture(packet)
            elif is_vp8:  # has packets that are never shown (alternate references); a bit in their first byte says so
                is_shown &= bool(memoryview(packet)[0] & 0x10)
            packets.pos.append(-1 if packet.pos is None else packet.pos)
            packets.size.append(packet.size)
            packets.pts.append(packet.pts)
            packets.dts.append(packet.dts)
            packets.is_key.append(packet.is_keyframe)
            packets.is_shown.append(is_shown)
    except av.FFmpegError:
        pass  # the end of what is readable; the caller reports what is missing
    if "avi" in _formats(container) and not stream.codec_context.has_b_frames:
        packets.pts = packets.dts  # AVI has no other clock; FFmpeg's guesses miss empty packets
    return packets


def _picture_starts(stream) -> PictureStarts | None:
    if stream.codec_context.name != "h264":
        return None
    return PictureStarts(stream.codec_context.extradata)


def _formats(container) -> set[str]:
    return set(container.format.name.split(","))


def _times_are_useless(packets: Packets, container, stream) -> bool:
    """Whether the packets' times do not tell in which order frames are shown."""
    times = list(itertools.compress(packets.pts, packets.is_shown))
    if None in times or (len(times) > 1 and len(set(times)) <= len(times) // 2):
        return True
    if not stream.codec_context.has_b_frames or any(b <= a for a, b in itertools.pairwise(times)):
        return False
    # B-frames are shown before what is stored before them. Times that ascend in storage order are those of decoding,
    # unless both clocks are stored and differ: then the encoder was allowed B-frames, but used none.
    clocks = zip(packets.pts, packets.dts, strict=True)
    return not (STORES_BOTH_CLOCKS & _formats(container) and all(d is not None and p > d for p, d in clocks))


def _presentation_order(packets: Packets) -> np.ndarray:
    """Numbers of all packets, hidden ones included, in the order in which frames are shown.

    Times sort packets only within a stretch on one clock. A new stretch (another recording, or the next edit of an
    edit list, which starts with hidden packets) begins at a time before the end of the previous group of pictures: no
    frame of the same stretch is stored that late.
    """
    stretch, stretches = 0, []
    floor = highest = float("-inf")
    for pts, is_key in zip(packets.pts, packets.is_key, strict=True):
        if pts is None:  # of a hidden packet
            stretches.append(stretch)
            continue
        if pts < (highest if is_key else floor):
            stretch += 1
            floor = highest = float("-inf")
        if is_key:
            floor = highest
        highest = max(highest, pts)
        stretches.append(stretch)
    times = [0 if pts is None else pts for pts in packets.pts]
    return np.lexsort((np.array(times, dtype=np.int64), np.array(stretches)))


def _hide_undecodable(source: VideoSource, packets: Packets, order: np.ndarray, stream) -> None:
    """A recording may start mid-stream: of the frames shown before the first keyframe, only some can be decoded.

    None of those stored before it. Those stored after it may need what was before the recording, or not: few videos
    have any, and FFmpeg tells.
    """
    first_key = next(itertools.compress(range(len(packets)), packets.is_key), int(order[0]))
    before = order[: int(np.nonzero(order == first_key)[0][0])].tolist()
    leading = {number for number in before if number > first_key and packets.is_shown[number]}
    come = _decode_leading(source, stream.index, leading) if leading else set()
    for number in before:
        packets.is_shown[number] = number in come


def _decode_leading(source: VideoSource, stream_index: int, leading: set[int]) -> set[int]:
    """Those of the packets `leading` that yield a frame."""
    come: set[int | None] = set()
    container, stream = open_container(source, stream_index)
    with container:
        number = 0
        try:
            for packet in container.demux(stream):
                if not packet.size:
                    break
                packet.pts, number = number, number + 1
                try:
                    frames = packet.decode()
                except av.FFmpegError:
                    continue
                come.update(frame.pts for frame in frames if not frame.is_corrupt)
                if come and (None in come or max(come) > max(leading) or not come <= leading):
                    break  # frames come in presentation order: the leading ones are over
        except av.FFmpegError:
            pass
    return leading.intersection(come)


def make_index(
    packets: Packets, order: np.ndarray, container, stream, *, is_decoded=False, shortfall=""
) -> FrameIndex:
    """
    Args:
        order: numbers of packets in presentation order. Hidden ones may be among them, and tell where in that order
            their keyframe lies.
    """
    shown = np.array(packets.is_shown, dtype=bool)
    positions = np.cumsum(shown[order]) - shown[order]  # how many shown frames are before each
    frames = order[shown[order]]
    pts = [packets.pts[number] for number in frames]
    ascends = None not in pts and all(a < b for a, b in itertools.pairwise(pts))
    return FrameIndex(
        num_frames=len(frames),
        stream=stream.index,
        packets=packets,
        order=frames,
        keyframes=_keyframes(packets, order, positions, len(frames)),
        seconds=seconds_in_order(pts, stream.time_base, from_zero=bool(ARBITRARY_CLOCK & _formats(container))),
        pts=pts if ascends else [],
        time_base=stream.time_base,
        is_decoded=is_decoded,
        shortfall=shortfall,
    )


def _keyframes(packets: Packets, order: np.ndarray, positions: np.ndarray, num_frames: int) -> list[Keyframe]:
    # What is stored before a keyframe but shown after it cannot be decoded from it.
    earliest = np.minimum.accumulate(order[::-1])[::-1]  # number of a packet that is shown no earlier
    usable = np.array(packets.is_key, dtype=bool)[order] & (earliest == order) & (positions < num_frames)
    return [
        Keyframe(int(position), int(number), (packets.pts[number], packets.dts[number]))
        for position, number in zip(positions[usable], order[usable], strict=True)
    ]


# --- from decoding ---


def index_from_decoding(
    index: FrameIndex, container, stream, outputs: list[int | None], is_damaged: bool
) -> FrameIndex:
    """
    The index of a video that was decoded whole.

    Args:
        index: made from packets.
        outputs: number of the packet of each frame, as they were decoded.
        is_damaged: a packet could not be decoded. Frames that did not come are then lost, otherwise they do not exist.
    """
    packets = index.packets
    if None in outputs:  # a decoder that drops labels: only counting is left
        seconds = index.seconds if index.num_frames == len(outputs) else None
        return replace(
            index, num_frames=len(outputs), order=None, keyframes=[], seconds=seconds, pts=[], is_decoded=True
        )
    order: list[int] = outputs  # type: ignore[assignment]
    if is_damaged:
        there, anchor = set(outputs), -1
        after: dict[int, list[int]] = {}  # what is lost, by the last packet before it that was decoded
        for number, is_shown in enumerate(packets.is_shown):
            if number in there:
                anchor = number
            elif is_shown:
                after.setdefault(anchor, []).append(number)
        order = after.pop(-1, [])
        for output in outputs:
            order += [output, *after.pop(output, [])]
    for number in order:
        packets.is_shown[number] = True
    made = make_index(packets, np.array(order, dtype=np.int64), container, stream, is_decoded=True)
    known = [packets.pts[number] for number in order if packets.pts[number] is not None]
    seconds = made.seconds
    if index.is_counted and any(b < a for a, b in itertools.pairwise(known)):  # times of decoding
        seconds = _seconds_of_counted(packets, container, stream, numbers=order)
    return replace(made, seconds=seconds, shortfall=index.shortfall)


def _seconds_of_counted(packets: Packets, container, stream, numbers=None) -> np.ndarray | None:
    """Times of frames whose order is unknown: those of their packets, sorted."""
    if numbers is None:
        numbers = list(itertools.compress(range(len(packets)), packets.is_shown))
    clock = packets.pts
    if "avi" in _formats(container) or sum(packets.pts[n] is None for n in numbers) > len(numbers) // 2:
        clock = packets.dts  # AVI stores no other
    times = [clock[number] for number in numbers]
    if sum(time is None for time in times) > len(times) // 2:
        return None
    filled = interpolate_missing(times)
    if len(set(filled)) <= len(filled) // 2:
        return None
    return seconds_in_order(sorted(filled), stream.time_base, from_zero=True)


# --- what is missing ---


def _shortfall(container, stream, packets: Packets) -> str:
    """How much is missing compared to the header: the sign of a truncated file. Small differences are common."""
    found, promised, formats = len(packets), stream.frames, _formats(container)
    times = [time for time in packets.pts if time is not None]
    end = float(max(times, default=0) * stream.time_base)
    seconds = container.duration / av.time_base if container.duration is not None else None
    if "avi" in formats:  # counts empty packets, which repeat a frame, the last one too; each takes one unit of time
        clock = [time for time in packets.dts if time is not None] or [-1]
        last_step = max(map(operator.sub, clock[-1:], clock[-2:-1]), default=1)
        found = max(clock) + max(last_step, 1)
    elif "mov" in formats and promised:
        entries = getattr(stream, "index_entries", None)  # PyAV 18
        if entries:
            promised = len(entries)  # without what an edit list cuts off
        elif seconds is not None and end >= 0.9 * seconds - 1:
            return ""
    if promised:
        return f"{found} of {promised} frames are left" if found < promised - max(2, promised // 20) else ""
    if seconds is None or len(times) < len(packets) or ARBITRARY_CLOCK & formats:
        return ""  # no promise, or one that FFmpeg guessed from the end of the file
    if len(container.streams) > 1:
        return ""  # the duration may be that of the sound
    return f"{end:.1f} of {seconds:.1f} seconds are left" if end < 0.9 * seconds - 1 else ""
