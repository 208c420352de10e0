"""Files that name other files or addresses: a video is read, and nothing that it names."""

import base64
import io
import os
import stat
import struct
import sys
import types
from pathlib import Path

import av
import numpy as np
import pytest

from longvlm.processing import video_decoding
from longvlm.processing.video_decoding import VideoDecodeError, decode_video, probe_video
from longvlm.processing.video_sources import open_source
from tests.helpers.video_files import write_video
from tests.helpers.web_server import serve

HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:0.4,\n{name}\n#EXT-X-ENDLIST\n"
DASH = (
    '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT1S" '
    'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet mimeType="video/mp4">'
    '<Representation id="1" bandwidth="1"><BaseURL>{name}</BaseURL></Representation></AdaptationSet></Period></MPD>\n'
)
SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
LISTS = {
    "ffconcat": ("ffconcat version 1.0\nfile '{name}'\n", "ffconcat"),
    "hls": (HLS, "HLS"),
    "dash": (DASH, "DASH"),
    "sdp": (SDP, "SDP"),
}


@pytest.fixture
def secret(tmp_path):
    """The name of a video in `tmp_path` that is not the asker's."""
    write_video(tmp_path / "secret.ts", 10)
    return "secret.ts"


def as_path(content, folder, suffix):
    path = folder / f"upload{suffix}"
    path.write_bytes(content)
    return path


FORMS = {
    "a video's name": lambda content, folder: as_path(content, folder, ".mp4"),
    "its own name": lambda content, folder: as_path(content, folder, ".m3u8"),
    "no suffix": lambda content, folder: as_path(content, folder, ""),
    "file URL": lambda content, folder: as_path(content, folder, ".m3u8").as_uri(),
    "bytes": lambda content, folder: content,
    "file object": lambda content, folder: io.BytesIO(content),
    "open file": lambda content, folder: open(as_path(content, folder, ".m3u8"), "rb"),
    "data URL": lambda content, folder: "data:video/mp4;base64," + base64.b64encode(content).decode(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LISTS)
def test_a_list_of_other_files_is_refused_by_name(tmp_path, monkeypatch, secret, kind, form):
    monkeypatch.chdir(tmp_path)  # relative names are looked for here, too
    text, called = LISTS[kind]
    video = FORMS[form](text.format(name=secret).encode(), tmp_path)
    for read in (decode_video, probe_video):
        with pytest.raises(VideoDecodeError, match=f"not a video file but .*{called}.*not opened") as caught:
            read(video)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["ffconcat", "hls"])
def test_a_download_leads_to_no_other_address_and_no_file(tmp_path, monkeypatch, secret, kind):
    monkeypatch.chdir(tmp_path)
    with serve(
        {"/video.mp4": lambda answer: answer.send(content), "/list.m3u8": lambda answer: answer.send(content)}
    ) as server:
        for name in (secret, f"{server.url}/next.ts", (tmp_path / secret).as_uri()):
            content = LISTS[kind][0].format(name=name).encode()
            for path in ("/video.mp4", "/list.m3u8"):
                with pytest.raises(VideoDecodeError, match="not a video file but"):
                    decode_video(server.url + path)
        assert set(server.asked) == {"/video.mp4", "/list.m3u8"}


@pytest.mark.parametrize("suffix", ["jp2", "tga", "dpx"])
def test_a_name_with_a_number_pattern_is_only_a_name(tmp_path, suffix):
    """FFmpeg would read frame001, frame002... beside it."""
    for number in (1, 2):
        write_picture(tmp_path / f"frame{number:03d}.{suffix}")
    pattern = tmp_path / f"frame%03d.{suffix}"
    pattern.write_bytes(b"nothing")
    with pytest.raises(VideoDecodeError, match=r"frame%03d\.\w+: not a video file"):
        decode_video(pattern)


def write_picture(path):
    codec = {"jp2": "jpeg2000", "tga": "targa", "dpx": "dpx"}[path.suffix[1:]]
    with av.open(str(path), "w", format="image2", options={"update": "1"}) as container:
        stream = container.add_stream(codec, rate=1)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "bgr24" if codec == "targa" else "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())


def test_torchcodec_gets_bytes_and_no_name(tmp_path, monkeypatch):
    """Its FFmpeg may be another one, with other formats. With a name it would find the files that a list names."""
    given = []

    class VideoDecoder:
        def __init__(self, source, **options):
            given.append(source.read(12))
            raise RuntimeError("not here")

    path = Path(write_video(tmp_path / "film.mp4", 5))
    decoders = types.ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = VideoDecoder
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    monkeypatch.setattr(video_decoding, "is_torchcodec_usable", lambda: True)
    for video in (path, path.read_bytes()):
        assert len(decode_video(video, backend="torchcodec", num_workers=1).frames) == 5
    assert given == [path.read_bytes()[:12]] * 2


def test_a_movie_whose_samples_are_in_another_file_reads_only_itself(tmp_path):
    """QuickTime's data references: FFmpeg follows them on request only."""
    secret = Path(write_video(tmp_path / "secret.mov", 10))
    borrowed = tmp_path / "borrowed.mov"
    borrowed.write_bytes(with_data_reference(secret.read_bytes(), str(secret)))
    with av.open(str(borrowed), options={"enable_drefs": "1", "use_absolute_path": "1"}) as container:
        assert sum(1 for _ in container.decode(video=0)) == 10  # the reference does work
    with pytest.raises(VideoDecodeError, match=r"borrowed\.mov: "):
        decode_video(borrowed)
    with pytest.raises(VideoDecodeError, match="bytes>: "):
        decode_video(borrowed.read_bytes())


def with_data_reference(movie: bytes, path: str) -> bytes:
    """The movie's index without its samples, which are said to be in the file at `path`."""
    text = b"disk" + path.replace("/", ":").encode()
    text += b"\0" * (len(text) % 2)
    alias = bytes(4) + struct.pack(">H", 158 + len(text)) + struct.pack(">HH", 2, 0)
    alias += bytes([4]) + b"disk".ljust(27, b"\0") + bytes(12) + bytes([10]) + b"secret.mov".ljust(63, b"\0")
    alias += bytes(16) + struct.pack(">hh", 1, 1) + bytes(16)
    alias += struct.pack(">HH", 2, len(text)) + text + struct.pack(">HH", 0xFFFF, 0)
    entry = struct.pack(">I", 12 + len(alias)) + b"alis" + bytes(4) + alias
    old = b"\0\0\0\x0curl \0\0\0\x01"
    assert movie.count(old) == 1
    moov = movie[movie.index(b"moov") - 4 :]
    for parent in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        place = moov.index(parent) - 4
        size = struct.unpack(">I", moov[place : place + 4])[0] + len(entry) - len(old)
        moov = moov[:place] + struct.pack(">I", size) + moov[place + 4 :]
    return movie[: struct.unpack(">I", movie[:4])[0]] + moov.replace(old, entry)


def test_a_picture_runs_no_other_program(tmp_path, monkeypatch):
    """Pillow would give PostScript, whatever it is called, to Ghostscript."""
    ran = tmp_path / "ran"
    ghostscript = tmp_path / "bin" / "gs"
    ghostscript.parent.mkdir()
    ghostscript.write_text(f"#!/bin/sh\ntouch {ran}\nexit 1\n")
    ghostscript.chmod(ghostscript.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # not looked for yet
    frames = tmp_path / "frames"
    frames.mkdir()
    for name in ("1.png", "2.jpg"):
        (frames / name).write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    for video in (frames, frames / "1.png", (frames / "1.png").read_bytes()):
        with pytest.raises(VideoDecodeError, match=r"not an image file|not a video file"):
            decode_video(video)
    assert not ran.exists()


def test_local_files_can_be_turned_off(tmp_path):
    path = Path(write_video(tmp_path / "film.mp4", 5))
    for name in (path, str(path), path.as_uri()):
        with pytest.raises(VideoDecodeError, match="local files are not allowed here"):
            open_source(name, allow=frozenset())
    with open_source(path.read_bytes(), allow=frozenset()) as source:
        assert len(decode_video(source).frames) == 5
