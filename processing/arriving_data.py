"""Videos that arrive bit by bit: from a pipe or a file object that cannot seek, and, in `downloads`, from the web.

They are kept in a temporary file, since decoders seek and a long video does not fit in memory. That file has no name,
so it is gone once the process is, whatever ends it. How much may arrive, and for how long, is limited.
"""

import hashlib
import io
import os
import select
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import cached_property

from .video_errors import VideoDecodeError, one_line

MAX_BYTES_VARIABLE, MAX_SECONDS_VARIABLE = "LONGVLM_MAX_DOWNLOAD_BYTES", "LONGVLM_MAX_DOWNLOAD_SECONDS"
MAX_BYTES, MAX_SECONDS = 8 << 30, 1800.0
BLOCK = 1 << 20
REPORT_EVERY = 0.1  # seconds


class Spool:
    """A temporary file without a name. Any number of readers can read it at the same time.

    Args:
        suffix: of the name that the video had, such as ".mp4".
    """

    def __init__(self, suffix: str = ""):
        self.suffix, self.size = suffix, 0
        self._file = tempfile.TemporaryFile()
        self._lock = threading.Lock()

    def write(self, block: bytes) -> None:
        self._file.write(block)
        self.size += len(block)

    def read_at(self, position: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file.fileno(), size, position)
        with self._lock:  # Windows
            self._file.seek(position)
            return self._file.read(size)

    def open(self) -> "SpoolReader":
        self._file.flush()
        return SpoolReader(self)

    @cached_property
    def digest(self) -> bytes:
        return hashlib.file_digest(self.open(), "blake2b").digest()

    def close(self) -> None:
        self._file.close()


class SpoolReader(io.RawIOBase):
    """A file object with a position of its own."""

    def __init__(self, spool: Spool):
        self._spool, self._position = spool, 0
        self.name = f"video{spool.suffix}"  # some formats are known by their suffix alone

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        block = self._spool.read_at(self._position, len(buffer))
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._spool.size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def tell(self) -> int:
        return self._position


@dataclass(frozen=True)
class Limits:
    """How much may arrive, and for how long."""

    max_bytes: int
    max_seconds: float

    @classmethod
    def choose(cls, max_bytes: int | None = None, max_seconds: float | None = None) -> "Limits":
        """What is not given comes from the environment, else it is the default."""
        return cls(
            int(_above_zero("max_download_bytes", max_bytes, MAX_BYTES_VARIABLE, MAX_BYTES)),
            float(_above_zero("max_download_seconds", max_seconds, MAX_SECONDS_VARIABLE, MAX_SECONDS)),
        )

    def check_bytes(self, name: str, size: int) -> None:
        if size > self.max_bytes:
            raise VideoDecodeError(
                f"{name}: {size:,} bytes are more than the limit of {self.max_bytes:,}; raise `max_download_bytes` or "
                f"the environment variable {MAX_BYTES_VARIABLE}"
            )

    def check_seconds(self, name: str, start: float, size: int) -> None:
        if time.monotonic() - start > self.max_seconds:
            raise VideoDecodeError(
                f"{name}: not complete after {self.max_seconds:g} seconds ({size:,} bytes arrived); raise "
                f"`max_download_seconds` or the environment variable {MAX_SECONDS_VARIABLE}"
            )


def _above_zero(option: str, value, variable: str, default):
    name = f"`{option}`"
    if value is None:
        name, value = variable, os.environ.get(variable) or default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{name} {value!r:.80}: must be a number above 0")
    return number


class Arrival(threading.Thread):
    """Receives in a thread of its own: a server or a pipe that is silent must not keep the caller waiting.

    The thread writes to and, if it is not wanted any more, closes the spool; the caller only waits.
    """

    def __init__(self, name: str, spool: Spool, limits: Limits):
        super().__init__(name="longvlm-arrival", daemon=True)
        self.video, self.spool, self.limits = name, spool, limits
        self.expected = 0  # bytes, if the server says how many
        self.error: BaseException | None = None
        self.unwanted, self.ended = threading.Event(), threading.Event()

    def blocks(self):
        """Yields what arrives. Sets `expected`, if it is known."""
        raise NotImplementedError

    def run(self) -> None:
        try:
            for block in self.blocks():
                if self.unwanted.is_set():
                    break
                self.limits.check_bytes(self.video, self.spool.size + len(block))
                self.spool.write(block)
        except BaseException as error:
            self.error = error
        self.ended.set()
        if self.unwanted.is_set():
            self.spool.close()

    def wait(self, progress) -> None:
        """Until all has arrived."""
        start, reported = time.monotonic(), -1
        self.start()
        try:
            while not self.ended.wait(min(REPORT_EVERY, self.limits.max_seconds)):
                self.limits.check_seconds(self.video, start, self.spool.size)
                if progress is not None and self.spool.size != reported:
                    reported = self.spool.size
                    progress("download", reported, max(self.expected, reported) if self.expected else 0)
            if self.error is not None:
                raise self.error
            if progress is not None and self.expected:
                progress("download", self.spool.size, self.spool.size)
        except BaseException:
            self.unwanted.set()
            if self.ended.is_set():
                self.spool.close()
            raise


class _Reading(Arrival):
    """Of a binary file object that cannot seek."""

    def __init__(self, file, *arguments):
        super().__init__(*arguments)
        self.file = file

    def blocks(self):
        read = getattr(self.file, "read1", self.file.read)  # what is there, instead of waiting for a whole block
        while True:
            try:
                block = read(BLOCK)
            except (OSError, ValueError, TypeError) as error:
                raise VideoDecodeError(f"{self.video}: cannot be read ({one_line(error)})") from None
            if block is None:  # nothing yet
                time.sleep(REPORT_EVERY)
                continue
            if not isinstance(block, (bytes, bytearray)):
                raise VideoDecodeError(f'{self.video}: the file object returns text; open the file with mode "rb"')
            if not block:
                return
            yield block


class _Pipe(Arrival):
    def __init__(self, path: str, *arguments):
        super().__init__(*arguments)
        self.path = path

    def blocks(self):
        try:
            # Without O_NONBLOCK, opening would wait for a writer, and nothing could end it.
            pipe = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise VideoDecodeError(f"{self.video}: cannot be read ({one_line(error)})") from None
        try:
            while not self.unwanted.is_set():
                # Before a writer comes, a pipe is never ready; after the last one has gone, it always is.
                if not select.select([pipe], [], [], REPORT_EVERY)[0]:
                    continue
                block = os.read(pipe, BLOCK)
                if not block:
                    return
                yield block
        finally:
            os.close(pipe)


def read_pipe(path: str, name: str, limits: Limits, progress=None) -> Spool:
    """What comes out of a named pipe, or of one that the shell made.

    Args:
        path: of the pipe.
        name: what to call the video in messages.
        progress: called as `progress("download", done, 0)`, in bytes.
    Raises:
        VideoDecodeError: it cannot be read, or past a limit. Nothing is left behind.
    """
    spool = Spool()
    _Pipe(path, name, spool, limits).wait(progress)
    return spool


def read_file_object(file, name: str, limits: Limits, progress=None) -> Spool:
    """As `read_pipe`, from a binary file object that cannot seek."""
    spool = Spool()
    _Reading(file, name, spool, limits).wait(progress)
    return spool
