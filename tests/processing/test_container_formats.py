"""What FFmpeg may open: every format that reads its own bytes, within limits, whatever else is in the file."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from longvlm.processing import container_formats
from longvlm.processing.container_formats import FORMATS
from longvlm.processing.video_decoding import VideoDecodeError, decode_video, probe_video
from tests.helpers.video_files import HEIGHT, WIDTH, numbered_frame, read_number, write_video

# Containers and streams, as FFmpeg's writer is called, and a codec that they take.
WRITERS = {
    "flv": "flv1",
    "asf": "msmpeg4",
    "ogg": "libvpx",
    "nut": "mpeg4",
    "mxf": "mpeg2video",
    "vob": "mpeg2video",
    "mov": "mjpeg",
    "rm": "rv20",
    "ivf": "libvpx-vp9",
    "swf": "flv1",
    "h264": "libx264",
    "hevc": "libx265",
    "m4v": "mpeg4",
    "mjpeg": "mjpeg",
    "mpeg2video": "mpeg2video",
    "yuv4mpegpipe": "wrapped_avframe",
    "apng": "apng",
    "dnxhd": "dnxhd",
}


def readable_here(kind):
    try:
        av.codec.Codec(WRITERS[kind], "w")
        return av.format.ContainerFormat(kind, "w") is not None
    except (ValueError, av.FFmpegError):
        return False


@pytest.mark.parametrize("kind", WRITERS)
def test_a_format_that_reads_its_own_bytes_is_read(tmp_path, kind):
    if not readable_here(kind):
        pytest.skip(f"this FFmpeg cannot write {kind}")
    path = tmp_path / f"film.{kind}"
    write(path, kind)
    assert len(decode_video(path).frames) > 0
    assert len(decode_video(path.read_bytes()).frames) > 0


def write(path, kind):
    codec = WRITERS[kind]
    width, height = (1920, 1080) if codec == "dnxhd" else (352, 288)
    pix_fmt = {"apng": "rgb24", "mjpeg": "yuvj420p", "dnxhd": "yuv422p"}.get(codec, "yuv420p")
    with av.open(str(path), "w", format=kind) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if codec == "dnxhd":
            stream.bit_rate = 120_000_000
        for number in range(6):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, width, height), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_formats_that_open_others_are_off():
    open_others = {"concat", "hls", "dash", "webm_dash_manifest", "imf", "image2", "mlv", "vobsub", "dvdvideo"}
    open_others |= {"sdp", "rtp", "rtsp", "sap", "lavfi", "tty", "svg_pipe", "v4l2", "x11grab", "fbdev"}
    assert not open_others & set(FORMATS)
    for name in FORMATS:  # none is another name of these
        if name in av.formats_available:
            assert not open_others & set(av.format.ContainerFormat(name).name.split(","))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000"])
def test_the_bytes_of_a_picture_are_a_video_of_one_frame(format):
    content = io.BytesIO()
    options = {"lossless": True} if format == "WEBP" else {}
    Image.fromarray(numbered_frame(5)).save(content, format=format, **options)
    decoded = decode_video(content.getvalue())
    assert [read_number(frame) for frame in decoded.frames] == [5]


@pytest.mark.parametrize(
    "suffix, known, unknown", [("mp4", b"avc1", b"zzz1"), ("mkv", b"V_MPEG4/ISO/AVC", b"V_MPEG4/ISO/ABC")]
)
def test_a_codec_without_a_decoder_is_named_as_the_reason(tmp_path, suffix, known, unknown):
    path = tmp_path / f"film.{suffix}"
    write_video(path, 5)
    content = path.read_bytes()
    assert known in content
    path.write_bytes(content.replace(known, unknown))
    for read in (decode_video, probe_video):
        with pytest.raises(VideoDecodeError, match=rf"film\.{suffix}: FFmpeg has no decoder for its video stream"):
            read(path)


def test_frames_beyond_the_limit_are_refused_with_both_sizes(tmp_path, monkeypatch):
    path = write_video(tmp_path / "film.mp4", 3)
    monkeypatch.setattr(container_formats, "MAX_PIXELS", WIDTH * HEIGHT - 1)
    with pytest.raises(
        VideoDecodeError, match=rf"film\.mp4: its frames of {WIDTH} x {HEIGHT} pixels exceed the limit"
    ):
        decode_video(path)
    monkeypatch.setattr(container_formats, "MAX_PIXELS", WIDTH * HEIGHT)
    assert len(decode_video(path).frames) == 3


def test_a_title_in_an_unknown_encoding_does_not_matter(tmp_path):
    path = tmp_path / "film.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLETITLE"
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode())
    content = path.read_bytes()
    assert b"TITLETITLE" in content
    assert len(decode_video(content.replace(b"TITLETITLE", b"\xe9\xff\xfe\x80TITLE\xe9")).frames) == 1
