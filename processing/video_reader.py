"""Reads the frames of an indexed video, forwards, and makes sure that each is the one asked for.

Each packet gets its number in the file as its time before it is decoded, so that each frame says which packet it
comes from, whatever clock the file has. A seek counts only if it lands on a keyframe that the index knows, by its
place in the file, at or before the one wanted. From there on, frames must come in the order of the index. If they do
not, the seek is taken back; if they do not even from the start of the file, the index is wrong (`IndexIsWrong`).
"""

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np

from .frame_display import display_matrix, pixel_aspect, to_display
from .video_index import FrameIndex, index_from_decoding, open_container
from .video_sources import VideoSource

try:
    import av
except ImportError:
    av = None  # type: ignore[assignment]

REOPEN = object()
STORES_EACH_TIME = {"mov", "matroska"}
MAX_BAD_SEEKS = 2  # after them, the video is only read forwards


class IndexIsWrong(Exception):
    """The decoder's frames are not those of the index."""


class _BadSeek(Exception):
    """The frames behind a seek are not those of the index."""


class _DamagedKeyframe(_BadSeek):
    """FFmpeg fills its gaps, and those of what follows, from what was decoded before: behind a seek, from nothing."""


class PyAVReader:
    """An open container whose frames are read forwards."""

    def __init__(self, source: VideoSource, index: FrameIndex):
        self.source, self.index = source, index
        self.container: Any = None
        self.frame: Any = None  # the last one
        self.bad_seeks = 0
        self.damaged: set[int] = set()  # numbers of keyframes
        self.can_seek = len(index.keyframes) > 1
        self._key_positions = {key.number: key.position for key in index.keyframes}
        self._start_over()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.container.close()
        # The generator of frames refers to this reader. Left as a cycle, the two would wait for the garbage collector,
        # and a forked process (a DataLoader worker) that collects them hangs in FFmpeg.
        self.frames = self.frame = self.stream = self.container = None

    def rgb_at(self, position: int) -> np.ndarray | None:
        """The frame as RGB uint8 `(H, W, 3)`, upright; `None` if it cannot be decoded. Positions must ascend."""
        frame = self._go_to(position)
        if frame is None or frame.is_corrupt:  # FFmpeg fills a damaged frame with the one before
            return None
        return to_display(frame, self.aspect)

    # --- moving ---

    def _go_to(self, position: int):
        """The frame at `position`, or `None`."""
        if self.can_seek:
            key = self.index.keyframe_before(position)
            if key > 0 and self.index.keyframes[key].number > self._number:
                return self._seek(key, position)
        try:
            return self._read_to(position)
        except _BadSeek:
            self._count_bad_seek()
            self._start_over()
            return self._read_to(position)

    def _seek(self, key: int, position: int):
        before = self._number
        keyframes = self.index.keyframes
        for time in (*keyframes[key].seeks, *keyframes[key - 1].seeks, REOPEN):
            if time is None:
                continue
            try:
                if time is REOPEN:
                    self._start_over()
                elif not self._land(time, keyframes[key].number, position):
                    continue
                elif self._first == 0 < before:  # a container that cannot seek (GIF): only read forwards from now on
                    self.can_seek = False
                return self._read_to(position)
            except _DamagedKeyframe:
                self.damaged.add(self._first)
            except _BadSeek:
                self._count_bad_seek()
        return None

    def _count_bad_seek(self) -> None:
        self.bad_seeks += 1
        self.can_seek = self.bad_seeks < MAX_BAD_SEEKS

    def _start_over(self) -> None:
        if self.container is not None:
            self.container.close()
        self.container, self.stream = open_container(self.source, self.index.stream)
        self.aspect: Fraction = pixel_aspect(self.stream.sample_aspect_ratio)
        self._start(self.container.demux(self.stream), None, 0, position=-1)

    def _land(self, time: int, latest: int, position: int) -> bool:
        """Seeks to `time`. True if a known keyframe comes first, whose packet has at most the number `latest`."""
        try:
            self.container.seek(time, stream=self.stream)
            packets = self.container.demux(self.stream)
            for packet in packets:
                number = self.index.packets.keys.get((packet.pos, packet.size))
                if number is not None:
                    break
            else:
                return False
        except av.FFmpegError:
            return False
        before = self._place_of_keyframe(number, packet) - 1
        if number > latest or before >= position or number in self.damaged:
            return False  # landed late: the picture may be wrong, or past the target
        self._start(packets, packet, number, before)
        return True

    def _place_of_keyframe(self, number: int, packet) -> int:
        """Position of the first frame that decoding from this keyframe yields."""
        if self.index.from_header:
            return self.index.place(number, packet.pts)
        return self._key_positions.get(number, self.index.num_frames)

    def _start(self, packets, packet, number: int, position: int) -> None:
        self.frame = None
        self.position = position  # of the last frame
        self.has_errors = self._in_order = False
        self._first = self._number = number  # of the first and the next packet
        self._times: dict[int, int | None] = {}
        self.frames = self._decode(packets, packet)

    # --- decoding ---

    def _read_to(self, position: int):
        while self.position < position and self._next() is not None:
            pass
        return self.frame if self.position == position else None

    def _next(self):
        """Decodes one more frame; `None` at the end."""
        first = self.position + 1
        for frame in self.frames:
            if frame.is_corrupt and frame.pts == self._first > 0:
                raise _DamagedKeyframe
            place = self._place(frame, first)
            if place < first:  # hidden, or shown before the keyframe behind a seek
                if place >= 0 and self._in_order:
                    self._out_of_order()
                continue
            if place > first:
                self._out_of_order()
            self._in_order = True
            self.frame, self.position = frame, place
            return frame
        if first < self.index.num_frames:
            self._out_of_order()
        self.frame, self.position = None, self.index.num_frames
        return None

    def _place(self, frame, expected: int) -> int:
        index, number = self.index, frame.pts
        if index.is_counted:
            if self.has_errors:
                self._out_of_order()
            return expected
        if number is None:
            raise IndexIsWrong
        if index.is_decoded and expected < index.num_frames and index.order[expected] == number:
            return expected
        return index.place(number, self._times.pop(number, None))

    def _out_of_order(self) -> None:
        index = self.index
        if self.has_errors and not index.is_counted:
            return  # frames are lost
        if self._first > 0:
            raise _BadSeek
        if not index.is_decoded:
            raise IndexIsWrong

    def _decode(self, packets, first) -> Iterator:
        """All frames from here on; only a packet that cannot be decoded is skipped, not the rest of the video."""
        stored = self.index.packets
        for packet in self._readable(packets, first):
            if self._number >= len(stored) or packet.size != stored.size[self._number]:
                self._out_of_order()  # the file has changed, or its table is wrong
                return
            if self.index.from_header:
                self._times[self._number] = packet.pts
            packet.pts = number = self._number
            self._number += 1
            try:
                frames = packet.decode()
            except av.FFmpegError:
                if number == self._first > 0:
                    raise _DamagedKeyframe from None
                self.has_errors |= self.index.from_header or bool(stored.is_shown[number])
                continue
            yield from frames
        try:
            frames = self.stream.codec_context.decode(None)
        except av.FFmpegError:
            return
        yield from frames

    def _readable(self, packets, first) -> Iterator:
        if first is not None:
            yield first
        try:
            for packet in packets:
                if packet.size:
                    yield packet
        except av.FFmpegError:
            self.has_errors = True


def index_by_decoding(source: VideoSource, index: FrameIndex) -> FrameIndex:
    """The index that decoding the whole video gives. `index`: made from packets."""
    with PyAVReader(source, index) as reader:
        outputs = [frame.pts for frame in reader.frames]
        return index_from_decoding(index, reader.container, reader.stream, outputs, reader.has_errors)


class TorchcodecFailed(Exception):
    """torchcodec raised, or returned another frame than the index names."""


class TorchcodecReader:
    """torchcodec's decoder, checked against the index."""

    def __init__(self, source: VideoSource, index: FrameIndex):
        self.index = index
        opened = source.open()
        # A file object instead of a path: FFmpeg then has nothing to find other files by (`container_formats`).
        self.file = open(opened, "rb") if isinstance(opened, str) else opened
        try:
            from torchcodec.decoders import VideoDecoder

            # "approximate" would return other frames if the frame rate varies
            options = {"dimension_order": "NHWC", "num_ffmpeg_threads": 1, "seek_mode": "exact"}
            self.decoder = VideoDecoder(self.file, stream_index=index.stream, **options)
        except Exception as error:
            self.__exit__()
            raise TorchcodecFailed(error) from None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.decoder = None
        if isinstance(self.file, io.IOBase):
            self.file.close()

    def rgb_at(self, position: int) -> np.ndarray:
        try:
            frame = self.decoder.get_frame_at(position)
        except Exception as error:
            raise TorchcodecFailed(str(error).split("\n")[0]) from None
        expected = float(self.index.pts[position] * self.index.time_base)
        if abs(frame.pts_seconds - expected) > 1e-4:
            raise TorchcodecFailed(f"frame {position} has time {frame.pts_seconds}, the index says {expected}")
        return frame.data.numpy()


def torchcodec_shows_it_right(source: VideoSource, index: FrameIndex) -> bool:
    """
    Whether torchcodec can be trusted with a video. It finds frames by time only, which is not safe unless the
    file stores the time of each frame; it turns frames, but neither mirrors them nor makes their pixels square.
    """
    with PyAVReader(source, index) as reader:
        if not STORES_EACH_TIME.intersection(reader.container.format.name.split(",")):
            return False
        frame = next(reader.frames, None)
        if frame is None:
            return False
        a, b, c, d = display_matrix(frame)
        return reader.aspect == 1 and a * d - b * c == 1
