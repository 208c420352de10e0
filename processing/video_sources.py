"""Where a video comes from: a path, a URL, bytes, an open file or a folder of images.

Each becomes a `VideoSource`, which names the video in errors and can be opened repeatedly, so that several readers
can work on one video. Nothing here decodes video; images in a folder are read with Pillow. If a video cannot be
opened, a `VideoDecodeError` says which one and why, in one line.
"""

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Mapping
from functools import cached_property
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 60.0  # seconds


class VideoDecodeError(ValueError):
    """A video cannot be read. The message is one line: the name of the video, then the reason."""


class VideoDecodeWarning(UserWarning):
    """Part of a video cannot be read; the message says how much."""


class VideoSource:
    """A video that can be opened any number of times.

    Args:
        name: what to call the video in messages (a path, a URL, "<1234 bytes>").
        path: a file or a folder on disk, or
        data: the whole file as bytes, or
        file: a seekable binary file object; since it has one position, it serves one reader at a time.
        temporary: delete the file at `path` on `close()`.
    """

    def __init__(self, name, *, path=None, data=None, file=None, temporary=False):
        self.name, self.path, self.data, self.file, self.temporary = name, path, data, file, temporary

    @property
    def is_directory(self) -> bool:
        return self.path is not None and os.path.isdir(self.path)

    @property
    def is_picture(self) -> bool:
        return self.path is not None and self.path.lower().endswith(IMAGE_SUFFIXES)

    @property
    def can_open_twice(self) -> bool:
        return self.file is None

    @cached_property
    def size(self) -> int:
        """Size in bytes; determined before a decoder moves through `file`."""
        if self.path is not None:
            return os.path.getsize(self.path)
        return len(self.data) if self.data is not None else self.file.seek(0, io.SEEK_END)

    def digest(self) -> bytes:
        """Identifies the video by its content; not for a folder."""
        if self.data is not None:
            return hashlib.blake2b(self.data).digest()
        if self.path is None:
            self.file.seek(0)
            return hashlib.file_digest(self.file, "blake2b").digest()
        with open(self.path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").digest()

    def open(self):
        """What a decoder takes: a path, or a binary file object at its start."""
        if self.path is not None:
            return self.path
        if self.data is not None:
            return io.BytesIO(self.data)
        self.file.seek(0)
        return _Borrowed(self.file)

    def close(self) -> None:
        if self.temporary:
            os.unlink(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class _Borrowed:
    """The caller's file object without `close`: decoders close what they are given."""

    def __init__(self, file):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def open_source(video) -> VideoSource:
    """Finds a video.

    Args:
        video: a path (`str`, `os.PathLike`) of a file or a folder of images; a URL (http, https, file,
            data); the bytes of a file; a binary file object; a row of a `datasets` Video column; or a `VideoSource`,
            which whoever opened it closes.
    Raises:
        VideoDecodeError: no such file, empty, unreachable, or not one of these types.
    """
    if isinstance(video, VideoSource):
        return VideoSource(video.name, path=video.path, data=video.data, file=video.file)
    video = encoded_video(video)
    if isinstance(video, VideoSource):
        source = video
    elif isinstance(video, (bytes, bytearray, memoryview)):
        source = VideoSource(f"<{len(video)} bytes>", data=bytes(video))
    elif hasattr(video, "read"):
        source = _from_file_object(video)
    elif isinstance(video, (str, os.PathLike)):
        path = os.fspath(video)
        source = _from_url(path) if isinstance(path, str) and "://" in path[:16] else _from_path(path)
    else:
        raise VideoDecodeError(
            f"{_short(repr(video))}: a video is a path, a URL, bytes, a binary file object or a list of frames, "
            f"not {type(video).__name__}"
        )
    if not source.is_directory and source.size == 0:
        source.close()
        raise VideoDecodeError(f"{source.name}: the file is empty")
    return source


def encoded_video(video):
    """
    The file of a row of a `datasets` Video column, which is `{"bytes", "path"}` or torchcodec's decoder for it.

    Returns:
        A path, or a `VideoSource` of the bytes; any other video unchanged, and a decoder without a file here.
    """
    row = video if isinstance(video, Mapping) else getattr(video, "_hf_encoded", None)
    if not isinstance(row, Mapping) or not {"bytes", "path"} <= row.keys():
        return video
    data, path = row.get("bytes"), row.get("path")
    if data is not None:
        source = VideoSource(_short(path) if path else f"<{len(data)} bytes>", data=bytes(data))
        if not data:
            raise VideoDecodeError(f"{source.name}: the file is empty")
        return source
    if row is not video and not (isinstance(path, str) and os.path.exists(path)):
        return video
    if path is None:
        raise VideoDecodeError("a row of a Video column has neither bytes nor a path")
    return path


def _from_path(path) -> VideoSource:
    path = os.fsdecode(path)
    if path.startswith("data:"):
        return _from_url(path)
    if not os.path.exists(path):
        raise VideoDecodeError(f"{_short(path)}: no such file or directory")
    if not os.access(path, os.R_OK):
        raise VideoDecodeError(f"{path}: permission denied")
    # Absolute, so that FFmpeg does not take a colon in the name for a protocol.
    return VideoSource(path, path=os.path.abspath(path))


def _from_file_object(file) -> VideoSource:
    name = _short(str(getattr(file, "name", f"<{type(file).__name__}>")))
    try:
        seekable = file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek")
        if seekable:
            file.seek(0)
        data = file.read(0) if seekable else file.read()
    except (OSError, ValueError, TypeError) as error:
        raise VideoDecodeError(f"{name}: the file object cannot be read ({error})") from None
    if not isinstance(data, bytes):
        raise VideoDecodeError(f'{name}: the file object returns text; open the file with mode "rb"')
    return VideoSource(name, file=file) if seekable else VideoSource(name, data=data)


def _from_url(url: str) -> VideoSource:
    name = _short(url)
    parts = urlsplit(url)
    if parts.scheme == "file":
        return _from_path(url2pathname(parts.path))
    if parts.scheme == "data":
        try:
            with urlopen(url) as response:
                return VideoSource(name, data=response.read())
        except (ValueError, OSError) as error:
            raise VideoDecodeError(f"{name}: not a valid data URL ({error})") from None
    if parts.scheme not in ("http", "https"):
        raise VideoDecodeError(f'{name}: URLs of scheme "{parts.scheme}" are not supported; use http, https or file')
    return _download(url, name, os.path.splitext(parts.path)[1])


def _download(url: str, name: str, suffix: str) -> VideoSource:
    """Downloads to a temporary file: seeking is cheap there, and a long video never has to fit in memory."""
    try:
        from huggingface_hub.utils import httpx  # the client that transformers itself uses
    except ImportError:
        import httpx  # type: ignore[no-redef]
    file = tempfile.NamedTemporaryFile(suffix=suffix[:8], delete=False)
    source = VideoSource(name, path=file.name, temporary=True)
    try:
        timeout = httpx.Timeout(READ_TIMEOUT, connect=CONNECT_TIMEOUT)
        with file, httpx.stream("GET", url, follow_redirects=True, timeout=timeout) as response:
            response.raise_for_status()
            for block in response.iter_bytes():
                file.write(block)
    except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
        source.close()
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = f"the server answered {status}" if status else _one_line(error)
        raise VideoDecodeError(f"{name}: cannot be downloaded ({reason})") from None
    except BaseException:
        source.close()
        raise
    return source


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


def read_picture(path: str, name: str | None = None) -> np.ndarray:
    """An image file as RGB uint8 `(H, W, 3)`, rotated upright by its EXIF tag; alpha is dropped."""
    try:
        with Image.open(path) as image:
            return picture_to_rgb(ImageOps.exif_transpose(image))
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
        reason = "not an image file" if isinstance(error, UnidentifiedImageError) else _one_line(error)
        raise VideoDecodeError(f"{name or path}: {reason}") from None


def picture_to_rgb(image: Image.Image) -> np.ndarray:
    """A Pillow image of any mode as RGB uint8 `(H, W, 3)`; alpha is dropped, as video decoders do."""
    if image.mode.startswith("I;16"):  # convert("RGB") would clip 16-bit grey at 255
        grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))


def _short(name: str, limit: int = 200) -> str:
    name = " ".join(name.split())
    return name if len(name) <= limit else name[: limit - 3] + "..."


def _one_line(error: BaseException) -> str:
    return _short(str(error) or type(error).__name__)
