"""Videos made at test time. Each frame shows its own number as a grid of 4 x 4 black and white blocks,
which survives compression, scaling and turning into grey: `read_number` reads it back."""

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


def write_sound(path, codec="pcm_s16le"):
    """A file with a quarter of a second of sound and no video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2000), dtype=np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


B_FRAMES = {"bf": "3", "x264-params": "b-adapt=0:scenecut=0:open-gop=0"}
OPEN_GOP = {"bf": "3", "x264-params": "b-adapt=0:scenecut=0:open-gop=1"}


def uneven_times(count: int) -> list[int]:
    """Milliseconds with steps between 20 and 170: a variable frame rate."""
    return np.cumsum([0] + [20 + 50 * ((i * 7) % 4) for i in range(count - 1)]).tolist()


CONTAINERS = {
    "mp4": {"suffix": "mp4", "options": {"bf": "0"}},
    "mp4 with B-frames": {"suffix": "mp4", "options": B_FRAMES},
    "mp4 with open GOP": {"suffix": "mp4", "options": OPEN_GOP},
    "mp4 of 10-bit HEVC": {
        "suffix": "mp4",
        "codec": "libx265",
        "pix_fmt": "yuv420p10le",
        "options": {"x265-params": "log-level=none:pools=none:frame-threads=1:keyint=12:bframes=3"},
    },
    "fragmented mp4": {
        "suffix": "mp4",
        "options": B_FRAMES,
        "container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"},
    },
    "mp4 with variable frame rate": {"suffix": "mp4", "options": B_FRAMES, "times": uneven_times},
    "mp4 with variable frame rate, no B-frames": {"suffix": "mp4", "options": {"bf": "0"}, "times": uneven_times},
    "mkv": {"suffix": "mkv", "options": OPEN_GOP},
    "mkv with variable frame rate": {"suffix": "mkv", "options": B_FRAMES, "times": uneven_times},
    "mkv without durations": {"suffix": "mkv", "options": B_FRAMES, "container_options": {"live": "1"}},
    "webm of VP9": {"suffix": "webm", "codec": "libvpx-vp9", "options": {"deadline": "realtime", "cpu-used": "8"}},
    "webm of VP8": {"suffix": "webm", "codec": "libvpx", "options": {"deadline": "realtime", "b": "500k"}},
    "ts": {"suffix": "ts", "options": OPEN_GOP},
    "ts of MPEG-2": {"suffix": "ts", "codec": "mpeg2video", "options": {"bf": "2", "b": "2M"}},
    "avi of MPEG-4": {"suffix": "avi", "codec": "mpeg4", "options": {"b": "1M"}},
    "avi with B-frames": {"suffix": "avi", "codec": "mpeg4", "options": {"b": "1M", "bf": "2"}},
    "avi of H.264 with B-frames": {"suffix": "avi", "options": B_FRAMES},
    "gif": {"suffix": "gif", "codec": "gif", "pix_fmt": "rgb8"},
    "raw h264": {"suffix": "h264", "options": B_FRAMES},
}


def write_container(path_stem, kind: str, count: int = 150) -> str:
    """Write one of `CONTAINERS`."""
    recipe = dict(CONTAINERS[kind])
    suffix, times = recipe.pop("suffix"), recipe.pop("times", None)
    return write_video(f"{path_stem}.{suffix}", count, times=times(count) if times else None, **recipe)
