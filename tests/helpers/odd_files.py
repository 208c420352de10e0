"""Legal video files that few programs read right, made at test time: edit lists, fields, matrices, copied packets."""

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.bitstream import BitStreamFilterContext

from .video_files import HEIGHT, WIDTH, numbered_frame, read_number, write_video


def decode_all(path, stream: int = 0) -> list[int]:
    """The numbers of all frames, as FFmpeg decodes the file from its start to its end: the truth."""
    numbers = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=stream):
            try:
                numbers += [read_number(frame.to_ndarray(format="rgb24")) for frame in packet.decode()]
            except av.FFmpegError:
                pass  # only this packet cannot be decoded
    return numbers


def remux(source, path, *, change=None, annexb=False, format=None, options=None) -> str:
    """
    Copies the packets of a video into another container.

    Args:
        change: `change(number, packet)`, which may alter a packet, or return False to leave it out.
        annexb: H.264 from an MP4 file, for a container that wants start codes.
    """
    with av.open(str(source)) as given, av.open(str(path), "w", format=format, options=options or {}) as made:
        stream = given.streams.video[0]
        copy = made.add_stream_from_template(stream)
        packets = (p for p in given.demux(stream) if p.size)
        if annexb:
            packets = _with_start_codes(packets, stream)
        for number, packet in enumerate(packets):
            if change is not None and change(number, packet) is False:
                continue
            packet.stream = copy
            made.mux(packet)
    return str(path)


def _with_start_codes(packets, stream):
    convert = BitStreamFilterContext("h264_mp4toannexb", stream)
    for packet in packets:
        is_key = packet.is_keyframe  # the filter empties the packet
        (changed,) = convert.filter(packet)
        changed.is_keyframe = is_key
        yield changed


# --- boxes of MP4 files ---


def _boxes(data: bytes, start: int, end: int):
    while start + 8 <= end:
        size = struct.unpack(">I", data[start : start + 4])[0]
        yield data[start + 4 : start + 8], start, start + size
        start += size


def _find(data: bytes, *path: bytes) -> tuple[int, int]:
    """Where the first box of this path begins and ends."""
    start, end = 0, len(data)
    for depth, name in enumerate(path):
        start, end = next((s, e) for kind, s, e in _boxes(data, start + (8 if depth else 0), end) if kind == name)
    return start, end


def set_edit_list(path, edits) -> str:
    """
    Replaces the edit list of a video whose index is at its end, as FFmpeg writes it.

    Args:
        edits: (first frame, number of frames) of a constant rate; first frame `None`: nothing is shown for so long.
    """
    data = bytearray(Path(path).read_bytes())
    movie = _find(data, b"moov", b"mvhd")[0]
    track = _find(data, b"moov", b"trak", b"mdia", b"mdhd")[0]
    movie_scale = struct.unpack(">I", data[movie + 20 : movie + 24])[0]
    track_scale = struct.unpack(">I", data[track + 20 : track + 24])[0]
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate
        # FFmpeg's own edit list starts at the first frame: B-frames delay it.
        old = _find(data, b"moov", b"trak", b"edts", b"elst")[0]
        delay = struct.unpack(">i", data[old + 20 : old + 24])[0]
    entries = b""
    for first, count in edits:
        start = -1 if first is None else delay + round(first / rate * track_scale)
        entries += struct.pack(">IiI", round(count / rate * movie_scale), start, 1 << 16)
    elst = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    edts = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    start, end = _find(data, b"moov", b"trak", b"edts")
    grown = len(edts) - (end - start)
    data[start:end] = edts
    for name in ((b"moov",), (b"moov", b"trak")):
        at = _find(data, *name[:1])[0]
        if len(name) > 1:
            at = next(s for kind, s, _ in _boxes(data, at + 8, len(data)) if kind == b"trak")
        data[at : at + 4] = struct.pack(">I", struct.unpack(">I", data[at : at + 4])[0] + grown)
    Path(path).write_bytes(data)
    return str(path)


def set_matrix(path, a: int, b: int, c: int, d: int) -> str:
    """Sets how an MP4 file turns or mirrors its picture."""
    data = bytearray(Path(path).read_bytes())
    at = _find(data, b"moov", b"trak", b"tkhd")[0] + 8 + 4 + 20 + 16
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    Path(path).write_bytes(data)
    return str(path)


# --- H.264 in fields ---


class _Bits:
    def __init__(self):
        self.bits: list[str] = []

    def put(self, value: int, count: int) -> "_Bits":
        self.bits.append(f"{value:0{count}b}")
        return self

    def golomb(self, *values: int) -> "_Bits":
        for value in values:
            code = f"{value + 1:b}"
            self.bits.append("0" * (len(code) - 1) + code)
        return self

    def signed(self, value: int) -> "_Bits":
        return self.golomb(2 * value - 1 if value > 0 else -2 * value)

    def aligned(self) -> bytes:
        text = "".join(self.bits)
        text += "0" * (-len(text) % 8)
        return int(text, 2).to_bytes(len(text) // 8, "big")

    def closed(self) -> bytes:
        return self.put(1, 1).aligned()


def _unit(kind: int, payload: bytes) -> bytes:
    escaped = bytearray()
    for byte in payload:
        if byte <= 3 and escaped[-2:] == b"\0\0":
            escaped.append(3)
        escaped.append(byte)
    return b"\0\0\0\1" + bytes([0x60 | kind]) + bytes(escaped)


def _parameter_sets(width: int, height: int) -> bytes:
    sps = _Bits().put(77, 8).put(0, 8).put(30, 8)  # Main, level 3
    sps.golomb(0, 0, 2, 1).put(0, 1)  # number; 4 bits of frame_num; shown as decoded; one reference frame
    sps.golomb(width // 16 - 1, height // 32 - 1).put(0, 1).put(0, 1)  # fields are possible, no MBAFF
    sps.put(1, 1).put(0, 1).put(0, 1)
    pps = _Bits().golomb(0, 0).put(0, 1).put(0, 1).golomb(0, 0, 0).put(0, 3)
    pps.signed(0).signed(0).signed(0).put(0, 3)
    return _unit(7, sps.closed()) + _unit(8, pps.closed())


def _picture(rgb: np.ndarray, frame_num: int, *, is_key: bool, field: int | None) -> bytes:
    """A slice of raw samples (I_PCM). `field`: 0 top, 1 bottom, `None`: a frame."""
    planes = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(format="yuv420p")
    yuv = planes.to_ndarray()
    height, width = rgb.shape[:2]
    y = yuv[:height]
    u, v = (plane.reshape(height // 2, width // 2) for plane in np.split(yuv[height:].reshape(-1), 2))
    header = _Bits().golomb(0, 7, 0).put(frame_num % 16, 4)
    header.put(field is not None, 1)
    if field is not None:
        header.put(field, 1)
        y, u, v = y[field::2], u[field::2], v[field::2]
    if is_key:
        header.golomb(0).put(0, 2)
    else:
        header.put(0, 1)
    header.signed(0)
    data = b""
    for row in range(y.shape[0] // 16):
        for column in range(width // 16):
            data += header.golomb(25).aligned()
            header = _Bits()
            for plane, size in ((y, 16), (u, 8), (v, 8)):
                block = plane[row * size : (row + 1) * size, column * size : (column + 1) * size]
                data += np.clip(block, 16, 235).tobytes()
    return _unit(5 if is_key else 1, data + b"\x80")


def field_video(count: int, *, gop: int = 6, pairs=lambda number: True) -> list[list[bytes]]:
    """
    H.264 in which pictures are stored as two fields each, or as a frame where `pairs(number)` is false (PAFF).

    Returns:
        The access units of each frame: two, or one.
    """
    frames = []
    for number in range(count):
        is_key, rgb = number % gop == 0, numbered_frame(number)
        head = _parameter_sets(WIDTH, HEIGHT) if is_key else b""
        if pairs(number):
            top = head + _picture(rgb, number % gop, is_key=is_key, field=0)
            frames.append([top, _picture(rgb, number % gop, is_key=False, field=1)])
        else:
            frames.append([head + _picture(rgb, number % gop, is_key=is_key, field=None)])
    return frames


def write_fields(path, frames, *, together=False, header_of_frames=False, rate=25) -> str:
    """
    Writes `field_video` to a container, or as it is to a file that ends in .h264.

    Args:
        together: both fields in one packet; otherwise each has its own.
        header_of_frames: the container's header describes a stream of frames; only the packets tell of fields.
    """
    raw = b"".join(unit for frame in frames for unit in frame)
    if str(path).endswith(".h264"):
        Path(path).write_bytes(raw)
        return str(path)
    with av.open(io.BytesIO(raw), format="h264") as given, av.open(str(path), "w") as container:
        if header_of_frames:
            stream = container.add_stream("libx264", rate=rate)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        else:
            stream = container.add_stream_from_template(given.streams.video[0])
        for number, units in enumerate(frames):
            parts = [b"".join(units)] if together else units
            for half, content in enumerate(parts):
                packet = av.Packet(content)
                packet.pts = packet.dts = 2 * number + half
                packet.duration = 2 // len(parts)
                packet.time_base = Fraction(1, 2 * rate)
                packet.is_keyframe = half == 0 and content[4] & 31 == 7
                packet.stream = stream
                container.mux(packet)
    return str(path)


__all__ = ["decode_all", "field_video", "remux", "set_edit_list", "set_matrix", "write_fields", "write_video"]
