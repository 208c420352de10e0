"""Animated GIF, WebP and PNG, read with Pillow.

FFmpeg takes GIFs without delays for a single frame, and every animated WebP or PNG for a still picture.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from .video_sources import VideoDecodeError, VideoSource, picture_to_rgb

_MAGIC = (b"GIF87a", b"GIF89a", b"RIFF", b"\x89PNG")
# What viewers use if the file gives no duration.
_DEFAULT_SECONDS = 0.1


class AnimatedPicture:
    """Frames of an animation in order; going back starts over."""

    def __init__(self, source: VideoSource, image: Image.Image):
        self.source, self.image = source, image

    @property
    def num_frames(self) -> int:
        return self.image.n_frames

    def timestamps(self) -> np.ndarray:
        """When each frame is shown, in seconds from the start, followed by the end of the last one."""
        seconds = [0.0]
        for number in range(self.num_frames):
            self.rgb_at(number)  # WebP gives the duration of the frame it has read
            milliseconds = self.image.info.get("duration") or 1000 * _DEFAULT_SECONDS
            seconds.append(seconds[-1] + float(milliseconds) / 1000)
        return np.array(seconds)

    def rgb_at(self, number: int) -> np.ndarray:
        """RGB uint8 `(H, W, 3)`; alpha is dropped."""
        self._seek(number)
        try:
            return picture_to_rgb(self.image)
        except (OSError, SyntaxError, ValueError) as error:
            raise VideoDecodeError(f"{self.source.name}: frame {number} cannot be read: {error}") from None

    def _seek(self, number: int) -> None:
        try:
            self.image.seek(number)
        except (EOFError, OSError, SyntaxError, ValueError) as error:
            raise VideoDecodeError(f"{self.source.name}: frame {number} cannot be read: {error}") from None


@contextmanager
def open_animation(source: VideoSource) -> Iterator[AnimatedPicture | None]:
    """The animation, or `None` if the source is anything else, such as a still picture."""
    if source.is_directory or not _may_be_animated(source):
        yield None
        return
    try:
        image = Image.open(source.open())
        animated = getattr(image, "is_animated", False)
    except (OSError, SyntaxError, ValueError):
        yield None  # the next reader reports what is wrong
        return
    with image:
        yield AnimatedPicture(source, image) if animated else None


def _may_be_animated(source: VideoSource) -> bool:
    opened = source.open()
    if isinstance(opened, str):
        try:
            with open(opened, "rb") as file:
                head = file.read(6)
        except OSError:
            return False
    else:
        head = opened.read(6)
    return head.startswith(_MAGIC)
