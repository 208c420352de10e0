"""Pictures, read with Pillow in bounded memory: a large one is read smaller.

Pillow also has formats that run other programs (EPS: Ghostscript), and recognises them by their content, whatever the
name. Only those of `FORMATS` are on.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .video_sources import IMAGE_SUFFIXES, VideoDecodeError, VideoSource, one_line

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF")
# A larger picture is read at 1/2, 1/3... of its size; a frame of 8K is just below.
MAX_PIXELS = 1 << 25
_BAND = 1 << 22  # pixels converted at a time
_ORIENTATION = 0x0112  # EXIF; from 5 on, height and width are exchanged


def list_frame_files(source: VideoSource) -> list[str]:
    """The images of a folder in natural order (frame_2 before frame_10)."""
    names = [name for name in os.listdir(source.path) if name.lower().endswith(IMAGE_SUFFIXES) and name[0] != "."]
    if not names:
        raise VideoDecodeError(
            f"{source.name}: the folder contains no images (files such as {', '.join(IMAGE_SUFFIXES[:3])})"
        )
    # Split at numbers: every second part is a number.
    names.sort(key=lambda name: [int(p) if i % 2 else p for i, p in enumerate(re.split("([0-9]+)", name))])
    return [os.path.join(source.path, name) for name in names]


def picture_size(path: str, name: str | None = None) -> tuple[int, int]:
    """Height and width of an image file as it is shown, without decoding it."""
    with _open_picture(path, name or path) as image, reported(name or path):
        width, height = image.size
        if image.format == "TIFF":  # some versions of Pillow have exchanged them on opening
            width, height = image.tag_v2[256], image.tag_v2[257]
        return (width, height) if image.getexif().get(_ORIENTATION, 1) >= 5 else (height, width)


def read_picture(path: str, name: str | None = None) -> np.ndarray:
    """An image file as RGB uint8 `(H, W, 3)`, rotated upright by its EXIF tag; alpha is dropped. See `MAX_PIXELS`."""
    with _open_picture(path, name or path) as image, reported(name or path):
        if reduction(image) == 1:
            return picture_to_rgb(ImageOps.exif_transpose(image))
        small = Image.fromarray(reduced_to_rgb(image))
        small.getexif()[_ORIENTATION] = image.getexif().get(_ORIENTATION, 1)
        return np.array(ImageOps.exif_transpose(small))


def _open_picture(path: str, name: str) -> Image.Image:
    with reported(name):
        if os.path.exists(path) and not os.path.isfile(path):  # a pipe would be waited for
            raise VideoDecodeError(f"{name}: not a file")
        return Image.open(path, formats=FORMATS)


def picture_to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as RGB uint8 `(H, W, 3)`; alpha is dropped, as video decoders do."""
    if image.mode.startswith("I;16"):  # convert("RGB") would clip 16-bit grey at 255
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def reduction(image: Image.Image) -> int:
    """1 for a picture of at most `MAX_PIXELS`, otherwise the number that its sides are divided by."""
    return math.ceil(math.sqrt(image.width * image.height / MAX_PIXELS))


def reduced_to_rgb(image: Image.Image) -> np.ndarray:
    """`picture_to_rgb` for any size: each pixel of the result is the mean of `reduction(image)` squared."""
    factor = reduction(image)
    image.draft("RGB", (image.width // factor or 1, image.height // factor or 1))  # a JPEG is decoded smaller
    image.load()  # which turns a TIFF upright
    factor = reduction(image)
    if factor == 1:
        return picture_to_rgb(image)
    width, height = image.size
    rows = factor * max(_BAND // (width * factor), 1)
    bands = (image.crop((0, top, width, min(top + rows, height))) for top in range(0, height, rows))
    return np.concatenate([np.asarray(Image.fromarray(picture_to_rgb(band)).reduce(factor)) for band in bands])


@contextmanager
def reported(name: str) -> Iterator[None]:
    """Whatever Pillow raises on a broken file becomes a `VideoDecodeError`."""
    try:
        yield
    except VideoDecodeError:
        raise
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise VideoDecodeError(
            f"{name}: the picture has more than {limit:,} pixels, Pillow's limit; scale it down, or raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    except UnidentifiedImageError:
        raise VideoDecodeError(f"{name}: not an image file") from None
    except Exception as error:  # OSError, SyntaxError, struct.error, EOFError, IndexError...
        raise VideoDecodeError(f"{name}: {one_line(error)}") from None
