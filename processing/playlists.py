"""HLS playlists: the pieces of a video, put together here, so that FFmpeg opens only the result.

Off unless asked for (`allow`), since its author chooses what is read. A playlist on the web leads only to
the web, within the limits of a download; one on disk only to files in its own folder.
"""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import unquote, urljoin

from .arriving_data import BLOCK, Arrival, Limits, Spool
from .downloads import WebArrival, take
from .video_errors import VideoDecodeError, one_line, short

MAX_TEXT = 16 << 20  # bytes of a playlist


class Piece(NamedTuple):
    """A file, or `length` bytes of it from `start` on."""

    name: str
    start: int = 0
    length: int | None = None


def is_playlist(head: bytes) -> bool:
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"#EXTM3U")


def parse_playlist(text: str, video: str) -> tuple[list[tuple[int, str]], list[Piece]]:
    """
    Args:
        text: of the playlist.
        video: what to call it in messages.
    Returns:
        Of a master playlist, the playlists that it names, each with its bits per second; otherwise the pieces.
    Raises:
        VideoDecodeError: encrypted, without an end, or nothing in it.
    """
    variants: list[tuple[int, str]] = []
    pieces: list[Piece] = []
    heads: list[Piece] = []
    rate, part, ended = None, "", False
    for line in map(str.strip, text.splitlines()):
        tag, _, value = line.partition(":")
        if tag == "#EXT-X-STREAM-INF":
            rate = _number(_attributes(value).get("BANDWIDTH", "0"), video)
        elif tag in ("#EXT-X-KEY", "#EXT-X-SESSION-KEY") and _attributes(value).get("METHOD") != "NONE":
            raise VideoDecodeError(f"{video}: the pieces of this playlist are encrypted, which is not supported")
        elif tag == "#EXT-X-MAP":
            named = _attributes(value)
            heads.append(_piece(named.get("URI", ""), named.get("BYTERANGE", ""), [], video))
        elif tag == "#EXT-X-BYTERANGE":
            part = value
        elif tag == "#EXT-X-ENDLIST" or line == "#EXT-X-PLAYLIST-TYPE:VOD":
            ended = True
        elif line and not line.startswith("#"):
            if rate is not None:
                variants.append((rate, line))
            else:
                pieces.append(_piece(line, part, pieces, video))
            rate, part = None, ""
    if variants:
        return variants, []
    if not pieces:
        raise VideoDecodeError(f"{video}: a playlist without pieces")
    if not ended:
        raise VideoDecodeError(f"{video}: a playlist without an end (#EXT-X-ENDLIST), such as a live stream's")
    if len(set(heads)) > 1:
        raise VideoDecodeError(f"{video}: a playlist of several videos, with a header each, is not supported")
    return [], heads[:1] + pieces


def _attributes(text: str) -> dict[str, str]:
    return {name: value.strip('"') for name, value in re.findall(r'([A-Z0-9-]+)=("[^"]*"|[^,]*)', text)}


def _number(text: str, video: str) -> int:
    if not re.fullmatch("[0-9]{1,15}", text):
        raise VideoDecodeError(f"{video}: {short(text)!r} in the playlist is not a number")
    return int(text)


def _piece(name: str, part: str, before: list[Piece], video: str) -> Piece:
    """`part`: "length@start", or "length", which goes on where the piece before ended."""
    if not part:
        return Piece(name)
    length, _, start = part.partition("@")
    if start:
        return Piece(name, _number(start, video), _number(length, video))
    last = before[-1] if before and before[-1].name == name else Piece(name, 0, 0)
    return Piece(name, last.start + (last.length or 0), _number(length, video))


class _PlaylistArrival(Arrival):
    """The pieces of a playlist, one after the other."""

    text: str
    base: str

    def find(self, name: str) -> str:
        """The address of what the playlist at `base` names."""
        raise NotImplementedError

    def read(self, address: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        raise NotImplementedError

    def blocks(self) -> Iterator[bytes]:
        variants, pieces = parse_playlist(self.text, self.video)
        if variants:  # the best one, as FFmpeg chooses
            address = self.find(max(variants, key=lambda variant: variant[0])[1])
            text = _text(self.read(address), self.video)
            self.base = self.moved_to(address)
            variants, pieces = parse_playlist(text, self.video)
            if variants:
                raise VideoDecodeError(f"{self.video}: a playlist of playlists of playlists is not supported")
        for piece in pieces:
            yield from self.read(self.find(piece.name), piece.start, piece.length)

    def moved_to(self, address: str) -> str:
        return address


class _WebPlaylist(_PlaylistArrival, WebArrival):
    def find(self, name: str) -> str:
        return urljoin(self.base, name)

    def read(self, address: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        return self.get(address, start, length)

    def moved_to(self, address: str) -> str:
        return self.found


class _LocalPlaylist(_PlaylistArrival):
    folder: str

    def find(self, name: str) -> str:
        for spelling in (name, unquote(name)):
            path = os.path.realpath(os.path.join(os.path.dirname(self.base), spelling))
            if os.path.isfile(path) and os.path.commonpath([self.folder, path]) == self.folder:
                return path
        raise VideoDecodeError(f"{self.video}: the playlist names {short(name)}, which is no file in its folder")

    def read(self, address: str, start: int = 0, length: int | None = None) -> Iterator[bytes]:
        try:
            with open(address, "rb") as file:
                file.seek(start)
                blocks = iter(lambda: file.read(BLOCK), b"")
                yield from blocks if length is None else take(blocks, 0, length)
        except OSError as error:
            raise VideoDecodeError(f"{self.video}: {one_line(error)}") from None


def _text(blocks: Iterator[bytes], video: str) -> str:
    content = bytearray()
    for block in blocks:
        content += block
        if len(content) > MAX_TEXT:
            raise VideoDecodeError(f"{video}: a playlist of more than {MAX_TEXT:,} bytes is not supported")
    return content.decode("utf-8-sig", "replace")


def read_playlist(content: Iterator[bytes], base: str, name: str, limits: Limits, progress=None) -> Spool:
    """
    Args:
        content: of the playlist.
        base: the path or the URL where it was found.
        name: what to call the video in messages.
        limits: of all pieces together.
        progress: called as `progress("download", done, 0)`, in bytes.
    Returns:
        The video.
    Raises:
        VideoDecodeError: not the playlist of one whole, unencrypted video; led to what it may not read; past a limit.
    """
    arrival: _PlaylistArrival
    if "://" in base:
        arrival = _WebPlaylist(base, name, Spool(), limits)
    else:
        arrival = _LocalPlaylist(name, Spool(), limits)
        arrival.folder = os.path.realpath(os.path.dirname(base))
    arrival.base, arrival.text = base, _text(content, name)
    arrival.wait(progress)
    return arrival.spool
