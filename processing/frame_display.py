"""From a decoded frame to the picture that a player shows: pixel shape, then rotation and mirroring."""

import struct
from fractions import Fraction

import numpy as np

_TURNS = ((1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0))  # counter-clockwise, by quarters
MAX_PIXEL_ASPECT = 10  # wider or narrower pixels are a mistake in the file: no format has them


def pixel_aspect(ratio: Fraction | None) -> Fraction:
    """Width of a pixel over its height; 1 where the file says nothing, or nothing sensible."""
    if not ratio or not Fraction(1, MAX_PIXEL_ASPECT) <= ratio <= MAX_PIXEL_ASPECT:
        return Fraction(1)
    return Fraction(ratio)


def display_size(width: int, height: int, aspect: Fraction) -> tuple[int, int]:
    """Width and height with square pixels. The short side grows, so that no detail is lost."""
    if aspect >= 1:
        return max(round(width * aspect), 1), height
    return width, max(round(height / aspect), 1)


def to_display(frame, aspect: Fraction) -> np.ndarray:
    """
    Args:
        frame: `av.VideoFrame`.
        aspect: see `pixel_aspect`.
    Returns:
        RGB uint8 `(H, W, 3)`, contiguous, as a player shows it.
    """
    # RGB at full size first, then the rest: scaling in YUV would blur colours.
    if aspect != 1:
        width, height = display_size(frame.width, frame.height, aspect)
        frame = frame.reformat(format="rgb24").reformat(width=width, height=height, interpolation="BICUBIC")
    rgb = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(_apply_matrix(rgb, display_matrix(frame)))


def display_matrix(frame) -> tuple[int, int, int, int]:
    """
    How the frame is turned: (a, b, c, d), where the pixel at (x, y) is shown at (a x + c y, b x + d y), with y
    downwards and up to a shift. Its four numbers are -1, 0 or 1; turns that are no multiple of 90 degrees are rounded.
    """
    try:
        side_data = frame.side_data.get("DISPLAYMATRIX")
        matrix = b"" if side_data is None else bytes(side_data)
    except ValueError:  # PyAV lists side data only if it knows every kind; the angle it gives, mirrored or not
        return _TURNS[round(getattr(frame, "rotation", 0) / 90) % 4]
    if len(matrix) < 36:
        return _TURNS[0]
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return (-1 if a < 0 else 1, 0, 0, -1 if d < 0 else 1)
    return (0, -1 if b < 0 else 1, -1 if c < 0 else 1, 0)


def _apply_matrix(rgb: np.ndarray, matrix: tuple[int, int, int, int]) -> np.ndarray:
    a, b, c, d = matrix
    if b:  # rows become columns
        rgb, (a, d) = rgb.swapaxes(0, 1), (c, b)
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
