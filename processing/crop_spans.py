"""Which part of an edge of a frame is seen when the frame is resized and its middle is cropped.

A frame of 1920 x 2 pixels that has to cover 224 x 224 becomes 215,040 x 224, of which 224 x 224 are kept. If it is
cropped first, it never gets large.
"""

import math
from typing import NamedTuple

SUPPORT = 3  # pixels that a resampling filter looks at on either side: 2 for bicubic, 3 for Lanczos


class Span(NamedTuple):
    """
    A part of an edge.

    Args:
        start, stop (`int`): the pixels of the edge that are needed.
        length (`int`): how many pixels they are resized to.
        offset (`int`): where the crop begins in these.
    """

    start: int
    stop: int
    length: int
    offset: int


def middle_span(edge: int, resized: int, crop: int) -> Span:
    """
    The part of `edge` pixels that is needed for the middle `crop` of them after a resize to `resized` pixels.

    The part begins and ends where a pixel of the resized edge does, or nearly: so it gets the same pixels when it is
    resized by itself.
    """
    if resized <= crop:
        return Span(0, edge, resized, 0)
    scale, first = resized / edge, (resized - crop) // 2  # `center_crop` rounds down as well
    reach = SUPPORT * max(1 / scale, 1)
    start = math.floor((first + 0.5) / scale - reach + 0.5)
    stop = math.floor((first + crop - 0.5) / scale + reach + 0.5)
    slack = max(int(crop / scale), 1)  # at most one more crop on either side
    start = min(range(start - slack, start + 1), key=lambda pixel: _misfit(pixel, edge, scale))
    stop = min(range(stop + slack, stop - 1, -1), key=lambda pixel: _misfit(pixel, edge, scale))
    start, stop = max(start, 0), min(stop, edge)
    begin = round(start * scale)
    return Span(start, stop, round(stop * scale) - begin, first - begin)


def _misfit(pixel: int, edge: int, scale: float) -> float:
    """How far a pixel's border is from that of a resized pixel. The edge's own ends fit."""
    if not 0 < pixel < edge:
        return 0.0
    return abs(pixel * scale - round(pixel * scale))
