"""Animated GIF, WebP and PNG, read with Pillow.

FFmpeg takes GIFs without delays for a single frame, and every animated WebP or PNG for a still picture.
"""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image

from .pictures import picture_to_rgb, reduced_to_rgb, reduction, reported
from .video_sources import VideoSource

FORMATS = ("GIF", "WEBP", "PNG")
_MAGIC = (b"GIF87a", b"GIF89a", b"RIFF", b"\x89PNG")
# What viewers use if the file gives no duration.
_DEFAULT_SECONDS = 0.1


class AnimatedPicture:
    """Frames of an animation in order; going back starts over."""

    def __init__(self, source: VideoSource, image: Image.Image):
        self.source, self.image = source, image

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.height, self.image.width

    def timestamps(self) -> tuple[np.ndarray, str]:
        """
        Returns:
            When each frame is shown, in seconds from the start, followed by the end of the last one; and, in words,
            what is missing of a cut or damaged file, or an empty string.
        """
        seconds, shortfall = [0.0], ""
        try:
            for number in itertools.count():
                self.image.seek(number)
                self.image.load()  # WebP gives the duration of the frame it has read
                milliseconds = self.image.info.get("duration") or 1000 * _DEFAULT_SECONDS
                seconds.append(seconds[-1] + float(milliseconds) / 1000)
        except Exception as error:
            if len(seconds) == 1:
                with reported(self.source.name):
                    raise
            promised, left = self._promised(), len(seconds) - 1
            if promised is not None and left < promised:
                shortfall = f"{left} of {promised} frames are left"
            elif not isinstance(error, EOFError):  # which is what Pillow raises after the last frame
                shortfall = f"only the first {left} frames can be read"
        return np.array(seconds), shortfall

    def _promised(self) -> int | None:
        try:
            return self.image.n_frames
        except Exception:  # GIFs are counted by reading them
            return None

    def rgb_at(self, number: int) -> np.ndarray:
        """RGB uint8 `(H, W, 3)`; alpha is dropped. One of more than `pictures.MAX_PIXELS` is read smaller."""
        with reported(f"{self.source.name}: frame {number} cannot be read"):
            self.image.seek(number)
            return picture_to_rgb(self.image) if reduction(self.image) == 1 else reduced_to_rgb(self.image)


@contextmanager
def open_animation(source: VideoSource) -> Iterator[AnimatedPicture | None]:
    """The animation, or `None` if the source is anything else, such as a still picture."""
    if source.is_directory or not source.head(6).startswith(_MAGIC):
        yield None
        return
    try:
        image = Image.open(source.open(), formats=FORMATS)
        animated = getattr(image, "is_animated", False)
    except Image.DecompressionBombError:
        with reported(source.name):
            raise
    except Exception:
        yield None  # the next reader reports what is wrong
        return
    with image:
        yield AnimatedPicture(source, image) if animated else None
