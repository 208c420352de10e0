"""Which packets of an H.264 stream begin a picture.

In interlaced video a picture may be stored as two fields, one packet each (PAFF: chosen picture by picture), which
FFmpeg decodes to one frame; other packets hold no picture at all. Containers do not tell; the start of each slice does
(ITU-T H.264, 7.3.3).
"""

from collections.abc import Iterator
from typing import NamedTuple

_SLICE, _IDR_SLICE, _SPS, _PPS = 1, 5, 7, 8
_WITHOUT_PICTURE = set(range(6, 14))  # kinds of units: messages, parameter sets, marks, filling
_WITH_CHROMA = (100, 110, 122, 244, 44, 83, 86, 118, 128, 138, 139, 134, 135)  # profiles whose SPS says more
_SLICE_START = 32  # bytes: more than the fields that are read here can take
_MAX_ZEROS = 32  # of an Exp-Golomb code


class _Sequence(NamedTuple):
    """What a sequence parameter set says about fields."""

    frames_only: bool
    frame_num_bits: int
    separate_planes: bool


class _Slice(NamedTuple):
    is_field: bool
    is_bottom: bool
    frame_num: int


class PictureStarts:
    """
    Follows the packets of an H.264 stream.

    Args:
        extradata: of the stream: parameter sets, as start codes or as an `avcC` box.
    """

    def __init__(self, extradata: bytes | None):
        self._sequences: dict[int, _Sequence] = {}
        self._sequence_of: dict[int, int] = {}  # PPS -> SPS
        self._length_bytes = 0  # of the length before each unit; 0: start codes
        self._possible = False
        self._open: _Slice | None = None  # the first field of a picture, still without its second
        for unit in self._parameter_sets(bytes(extradata or b"")):
            self._read_parameters(unit)

    @property
    def possible(self) -> bool:
        """Whether pictures may be stored as fields; nearly all video says no."""
        return self._possible

    def read_parameter_sets(self, start) -> None:
        """From the start of a keyframe's packet (a buffer), where the stream itself repeats or changes them."""
        for unit in self._units(bytes(start)):
            if unit and unit[0] & 31 in (_SPS, _PPS):
                self._read_parameters(unit)

    def begins_picture(self, packet) -> bool:
        """
        Args:
            packet: a buffer; each one, in order, if fields are `possible`.
        Returns:
            False for the second field of a picture, and for a packet without any slice.
        """
        if not self.possible:
            return not self._is_without_picture(bytes(packet))
        slices, kinds = [], []
        for unit in self._units(bytes(packet)):
            kind = unit[0] & 31 if unit else 0
            kinds.append(kind)
            if kind in (_SPS, _PPS):
                self._read_parameters(unit)
            elif kind in (_SLICE, _IDR_SLICE):
                slices.append(self._read_slice(unit))
        if kinds and _WITHOUT_PICTURE.issuperset(kinds):
            return False
        if not slices or None in slices or not slices[0].is_field or len({s.is_bottom for s in slices}) == 2:
            self._open = None  # a frame, or both of its fields in one packet
            return True
        first, self._open = self._open, slices[0]
        if first and first.frame_num == slices[0].frame_num and first.is_bottom != slices[0].is_bottom:
            self._open = None
            return False
        return True

    def _is_without_picture(self, packet: bytes) -> bool:
        unit = b""
        for unit in self._units(packet):
            if not unit or unit[0] & 31 not in _WITHOUT_PICTURE:
                return False
        return bool(unit)

    def _parameter_sets(self, extradata: bytes) -> Iterator[bytes]:
        if extradata[:1] != b"\x01":
            yield from self._units(extradata)
            return
        self._length_bytes = (extradata[4] & 3) + 1 if len(extradata) > 6 else 4
        at = 5
        for mask in (31, 255):  # the number of SPS has five bits
            count = extradata[at] & mask if at < len(extradata) else 0
            at += 1
            for _ in range(count):
                size = int.from_bytes(extradata[at : at + 2], "big")
                yield extradata[at + 2 : at + 2 + size]
                at += 2 + size

    def _units(self, content: bytes) -> Iterator[bytes]:
        at = 0
        if self._length_bytes:
            while at + self._length_bytes < len(content):
                size = int.from_bytes(content[at : at + self._length_bytes], "big")
                at += self._length_bytes
                yield content[at : at + size] if at + size <= len(content) else b""  # cut or garbage
                at += size
            return
        at = content.find(b"\0\0\1")
        while at >= 0:
            end = content.find(b"\0\0\1", at + 3)
            yield content[at + 3 : end if end >= 0 else len(content)]
            at = end

    def _read_parameters(self, unit: bytes) -> None:
        try:
            bits = _Bits(unit[1:])
            if unit[0] & 31 == _PPS:
                number = bits.golomb()
                self._sequence_of[number] = bits.golomb()
            elif unit[0] & 31 == _SPS:
                number, sequence = _read_sequence(bits)
                self._sequences[number] = sequence
                self._possible |= not sequence.frames_only
        except (EOFError, IndexError):
            pass  # damaged; the decoder will say so

    def _read_slice(self, unit: bytes) -> _Slice | None:
        try:
            bits = _Bits(unit[1:_SLICE_START])
            bits.golomb()  # first_mb_in_slice
            bits.golomb()  # slice_type
            sequence = self._sequences[self._sequence_of[bits.golomb()]]
            if sequence.separate_planes:
                bits.take(2)
            frame_num = bits.take(sequence.frame_num_bits)
            is_field = not sequence.frames_only and bool(bits.take(1))
            return _Slice(is_field, is_field and bool(bits.take(1)), frame_num)
        except (EOFError, KeyError):
            return None


def _read_sequence(bits: "_Bits") -> tuple[int, _Sequence]:
    """A sequence parameter set up to `frame_mbs_only_flag` (7.3.2.1.1)."""
    profile = bits.take(8)
    bits.take(16)  # constraints, level
    number, separate_planes = bits.golomb(), False
    if profile in _WITH_CHROMA:
        chroma = bits.golomb()
        separate_planes = chroma == 3 and bool(bits.take(1))
        bits.golomb()  # bit depths
        bits.golomb()
        bits.take(1)
        if bits.take(1):  # scaling lists
            for position in range(12 if chroma == 3 else 8):
                if bits.take(1):
                    _skip_scaling_list(bits, 16 if position < 6 else 64)
    frame_num_bits = bits.golomb() + 4
    order_type = bits.golomb()
    if order_type == 0:
        bits.golomb()
    elif order_type == 1:
        bits.take(1)
        bits.golomb()
        bits.golomb()
        for _ in range(min(bits.golomb(), 255)):
            bits.golomb()
    bits.golomb()  # reference frames
    bits.take(1)
    bits.golomb()  # width
    bits.golomb()  # height
    return number, _Sequence(bool(bits.take(1)), frame_num_bits, separate_planes)


def _skip_scaling_list(bits: "_Bits", size: int) -> None:
    last = following = 8
    for _ in range(size):
        if following:
            code = bits.golomb()
            following = (last + ((code + 1) // 2 if code % 2 else -(code // 2))) % 256
        last = following or last


class _Bits:
    """Bits of a unit, from the first; `EOFError` at its end."""

    def __init__(self, content: bytes):
        content = content.replace(b"\0\0\3", b"\0\0")  # emulation prevention
        self._value, self._left = int.from_bytes(content, "big"), 8 * len(content)

    def take(self, count: int) -> int:
        if count > self._left:
            raise EOFError
        self._left -= count
        return (self._value >> self._left) & ((1 << count) - 1)

    def golomb(self) -> int:
        """An unsigned Exp-Golomb code (9.1)."""
        zeros = 0
        while not self.take(1):
            zeros += 1
            if zeros > _MAX_ZEROS:
                raise EOFError
        return (1 << zeros) - 1 + self.take(zeros)
