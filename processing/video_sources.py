"""Where a video comes from: a path, a URL, bytes, an open file or a folder of images.

Each becomes a `VideoSource`, which names the video in errors and can be opened repeatedly, so that several readers
can work on one video. Nothing here decodes. If a video cannot be opened, a `VideoDecodeError` says which one and why,
in one line.
"""

import hashlib
import io
import os
import re
import stat
from collections.abc import Mapping
from functools import cached_property
from urllib.parse import urlsplit
from urllib.request import url2pathname, urlopen

from .arriving_data import BLOCK, Limits, Spool, read_file_object, read_pipe
from .downloads import download
from .playlists import is_playlist, read_playlist
from .video_errors import VideoDecodeError as VideoDecodeError  # part of this module's interface
from .video_errors import VideoDecodeWarning as VideoDecodeWarning
from .video_errors import one_line, printable, short

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


class VideoSource:
    """A video that can be opened any number of times.

    Args:
        name: what to call the video in messages (a path, a URL, "<1234 bytes>").
        path: a file or a folder on disk, or
        data: the whole file as bytes, or
        file: a seekable binary file object; since it has one position, it serves one reader at a time, or
        spool: what arrived from an address or a pipe.
        owned: close `spool` on `close()`.
    """

    def __init__(self, name, *, path=None, data=None, file=None, spool: Spool | None = None, owned=True):
        self.name = printable(name)
        self.path, self.data, self.file, self.spool, self.owned = path, data, file, spool, owned

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
        if self.spool is not None:
            return self.spool.size
        return len(self.data) if self.data is not None else self.file.seek(0, io.SEEK_END)

    def digest(self) -> bytes:
        """Identifies the video by its content; not for a folder."""
        if self.data is not None:
            return hashlib.blake2b(self.data).digest()
        if self.spool is not None:
            return self.spool.digest
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
        if self.spool is not None:
            return self.spool.open()
        self.file.seek(0)
        return _Borrowed(self.file)

    def head(self, size: int) -> bytes:
        """The first bytes; none if they cannot be read."""
        try:
            opened = self.open()
            file = open(opened, "rb") if isinstance(opened, str) else opened
            try:
                return file.read(size) or b""
            finally:
                if isinstance(file, io.IOBase):
                    file.close()
        except (OSError, ValueError):
            return b""

    def close(self) -> None:
        if self.spool is not None and self.owned:
            self.spool.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


class _Borrowed:
    """The caller's file object without `close`: decoders close what they are given."""

    def __init__(self, file):
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


def open_source(
    video, *, allow=frozenset({"file"}), max_download_bytes=None, max_download_seconds=None, progress=None
) -> VideoSource:
    """Finds a video.

    Args:
        video: a path (`str`, `os.PathLike`) of a file, a pipe or a folder of images; a URL (http, https, file,
            data); the bytes of a file; a binary file object; a row of a `datasets` Video column; or a
            `VideoSource`, which whoever opened it closes.
        allow: what a name may lead to besides http, https and data URLs. `"file"`: local files. `"playlist"`: the
            pieces that an HLS playlist names, on the web if it is there itself, else in its own folder. Nothing else
            that a video names is ever opened.
        max_download_bytes: limit of what arrives from a URL, a pipe or a file object that cannot seek. Default:
            the environment variable LONGVLM_MAX_DOWNLOAD_BYTES, or 8 GiB.
        max_download_seconds: limit of the time that it takes. Default: the environment variable
            LONGVLM_MAX_DOWNLOAD_SECONDS, or 1800.
        progress: called as `progress("download", done, total)`, in bytes; the total is 0 if it is unknown.
    Raises:
        VideoDecodeError: no such file, empty, unreachable, past a limit, not allowed, or not one of these types.
        ValueError: a limit that is no number above 0.
    """
    if isinstance(video, VideoSource):
        return VideoSource(
            video.name, path=video.path, data=video.data, file=video.file, spool=video.spool, owned=False
        )
    video = encoded_video(video)
    limits = Limits.choose(max_download_bytes, max_download_seconds)
    if isinstance(video, VideoSource):
        source = video
    elif isinstance(video, (bytes, bytearray, memoryview)):
        source = VideoSource(f"<{memoryview(video).nbytes} bytes>", data=bytes(video))
    elif hasattr(video, "read"):
        source = _from_file_object(video, limits, progress)
    elif isinstance(video, (str, os.PathLike)):
        source = _from_name(os.fspath(video), allow, limits, progress)
    else:
        raise VideoDecodeError(
            f"{short(repr(video))}: a video is a path, a URL, bytes, a binary file object or a list of frames, "
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
        source = VideoSource(short(path) if path else f"<{len(data)} bytes>", data=bytes(data))
        if not data:
            raise VideoDecodeError(f"{source.name}: the file is empty")
        return source
    if row is not video and not (isinstance(path, str) and os.path.exists(path)):
        return video
    if path is None:
        raise VideoDecodeError("a row of a Video column has neither bytes nor a path")
    return path


def _from_name(name, allow, limits: Limits, progress) -> VideoSource:
    """A path or a URL."""
    if isinstance(name, str) and ("://" in name[:16] or name.startswith("data:")):
        try:
            parts = urlsplit(name)
        except ValueError as error:
            raise VideoDecodeError(f"{short(name)}: not a valid URL ({one_line(error)})") from None
        if parts.scheme == "data":
            return _from_data_url(name)
        if parts.scheme in ("http", "https"):
            shown, suffix = short(re.sub("//[^/]*@", "//", name)), os.path.splitext(parts.path)[1]  # no passwords
            spool, address = download(name, shown, suffix, limits, progress)
            return _as_allowed(VideoSource(shown, spool=spool), address, allow, limits, progress)
        if parts.scheme != "file":
            raise VideoDecodeError(
                f'{short(name)}: URLs of scheme "{parts.scheme}" are not supported; use http, https or file'
            )
        if parts.netloc not in ("", "localhost"):
            raise VideoDecodeError(f"{short(name)}: a file URL has three slashes, or names another machine")
        name = url2pathname(parts.path)
    path = os.fsdecode(name)
    if "file" not in allow:
        raise VideoDecodeError(f"{short(path)}: local files are not allowed here")
    source = _from_path(path, limits, progress)
    return _as_allowed(source, source.path, allow, limits, progress)


def _as_allowed(source: VideoSource, address: str | None, allow, limits: Limits, progress) -> VideoSource:
    """The source, or the video whose pieces it names."""
    if "playlist" not in allow or address is None or source.is_directory or not is_playlist(source.head(64)):
        return source
    opened = source.open()
    with source, open(opened, "rb") if isinstance(opened, str) else opened as file:
        content = iter(lambda: file.read(BLOCK), b"")
        return VideoSource(source.name, spool=read_playlist(content, address, source.name, limits, progress))


def _from_path(path: str, limits: Limits, progress) -> VideoSource:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError, ValueError))
        reason = "no such file or directory" if missing else (getattr(error, "strerror", None) or one_line(error))
        raise VideoDecodeError(f"{short(path)}: {reason}") from None
    if not os.access(path, os.R_OK):
        raise VideoDecodeError(f"{short(path)}: permission denied")
    if stat.S_ISFIFO(mode):
        return VideoSource(path, spool=read_pipe(path, path, limits, progress))
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise VideoDecodeError(f"{short(path)}: neither a file nor a folder nor a pipe, but a device or a socket")
    # Absolute, so that FFmpeg does not take a colon in the name for a protocol.
    return VideoSource(path, path=os.path.abspath(path))


def _from_file_object(file, limits: Limits, progress) -> VideoSource:
    name = short(str(getattr(file, "name", f"<{type(file).__name__}>")))
    try:
        seekable = file.seekable() if hasattr(file, "seekable") else hasattr(file, "seek")
        if not seekable:
            return VideoSource(name, spool=read_file_object(file, name, limits, progress))
        file.seek(0)
        data = file.read(0)
    except VideoDecodeError:
        raise
    except (OSError, ValueError, TypeError) as error:
        raise VideoDecodeError(f"{name}: the file object cannot be read ({error})") from None
    if not isinstance(data, bytes):
        raise VideoDecodeError(f'{name}: the file object returns text; open the file with mode "rb"')
    return VideoSource(name, file=file)


def _from_data_url(url: str) -> VideoSource:
    name = short(url)
    try:
        with urlopen(url) as response:
            return VideoSource(name, data=response.read())
    except (ValueError, OSError) as error:
        raise VideoDecodeError(f"{name}: not a valid data URL ({one_line(error)})") from None
