"""Videos whose frames show their own number, for tests and benchmarks of decoding.

The number is a grid of 4 x 4 black and white blocks, which survives compression, scaling and conversion to grey.
"""

from fractions import Fraction

import av
import numpy as np

WIDTH, HEIGHT = 96, 64


def numbered_frame(number: int, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """RGB uint8 `(height, width, 3)`; 16 bits, the lowest at the top left."""
    bits = (number >> np.arange(16)).reshape(4, 4) & 1
    rows, columns = np.arange(height) * 4 // height, np.arange(width) * 4 // width
    grey = (32 + 192 * bits[rows][:, columns]).astype(np.uint8)
    return np.repeat(grey[:, :, None], 3, axis=2)


def read_number(frame) -> int:
    """The number of a frame `(H, W, 3)` or `(3, H, W)`."""
    frame = np.asarray(frame)
    if frame.shape[0] == 3:
        frame = frame.transpose(1, 2, 0)
    height, width = frame.shape[:2]
    number = 0
    for bit in range(16):
        y, x = (2 * (bit // 4) + 1) * height // 8, (2 * (bit % 4) + 1) * width // 8
        number |= int(frame[y, x].mean() > 128) << bit
    return number


def write_video(
    path,
    numbers=60,
    *,
    codec="libx264",
    pix_fmt="yuv420p",
    size=(WIDTH, HEIGHT),
    rate=25,
    times=None,
    gop=12,
    options=None,
    container_options=None,
    rotation=None,
    draw=numbered_frame,
    format=None,
):
    """Write a video.

    Args:
        numbers: how many frames, or the list of numbers to show.
        times: when each frame is shown, in milliseconds; default: a constant frame rate.
        draw: `draw(number, width, height)` -> RGB uint8 frame.
    Returns:
        `path` as a string.
    """
    numbers = range(numbers) if isinstance(numbers, int) else numbers
    with av.open(str(path), "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"g": str(gop), **(options or {})})
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], pix_fmt
        stream.codec_context.thread_count = 1
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for position, number in enumerate(numbers):
            frame = av.VideoFrame.from_ndarray(draw(number, *size), format="rgb24")
            frame.pts = position if times is None else times[position]
            frame.time_base = Fraction(1, 1000) if times is not None else Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)
