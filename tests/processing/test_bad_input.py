"""Every bad video ends in one line that names the file and the reason; what can be read of a damaged one is read."""

import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longvlm.processing.video_decoding import VideoDecodeError, VideoDecodeWarning, decode_video
from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor
from tests.helpers.video_files import numbered_frame, read_number, write_sound, write_video

FASTSTART = {"movflags": "faststart"}


def sharp(number, width, height):
    """A numbered frame with noise, so that the file has some length."""
    noise = np.random.default_rng(number).integers(-30, 31, (height, width, 3))
    return np.clip(numbered_frame(number, width, height).astype(int) + noise, 0, 255).astype(np.uint8)


def one_line_error(video, name: str, reason: str) -> None:
    """The processor, as every caller above it, raises one line with the video's name and the reason."""
    with pytest.raises(VideoDecodeError) as caught:
        LongVLMVideoProcessor(num_frames=4)(video)
    message = str(caught.value)
    assert "\n" not in message
    assert name in message
    assert reason in message
    assert isinstance(caught.value, ValueError)


def test_a_missing_file(tmp_path):
    one_line_error(str(tmp_path / "missing.mp4"), "missing.mp4", "no such file")
    one_line_error(tmp_path / "missing.mp4", "missing.mp4", "no such file")
    one_line_error((tmp_path / "missing.mp4").as_uri(), "missing.mp4", "no such file")


@pytest.mark.parametrize("name", ["a\0b.mp4", "a\x1b[31mb.mp4", "a\nb.mp4", "a\udc80b.mp4", "x" * 300, "a" * 5000])
def test_a_name_that_a_terminal_or_a_file_system_cannot_take(tmp_path, name):
    with pytest.raises(VideoDecodeError) as caught:
        decode_video(str(tmp_path / name))
    message = str(caught.value)
    assert message.isprintable() and len(message) < 300 and message.encode()
    path = tmp_path / name
    try:
        path.write_text("no video")
    except (OSError, ValueError):
        return
    with pytest.raises(VideoDecodeError, match="not a video file") as caught:
        decode_video(path)
    assert str(caught.value).isprintable()


def test_a_chain_of_links_without_an_end(tmp_path):
    (tmp_path / "a.mp4").symlink_to(tmp_path / "b.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "a.mp4")
    one_line_error(tmp_path / "a.mp4", "a.mp4", "Too many levels of symbolic links")


def test_a_directory_without_frames(tmp_path):
    (tmp_path / "readme.txt").write_text("hello")
    one_line_error(str(tmp_path), str(tmp_path), "contains no images")


def test_a_directory_with_a_damaged_frame(tmp_path):
    Image.fromarray(numbered_frame(1)).save(tmp_path / "1.png")
    (tmp_path / "2.png").write_text("not a picture")
    with pytest.raises(VideoDecodeError, match=r"2\.png: not an image file$"):
        decode_video(tmp_path)


def test_an_audio_file(tmp_path):
    one_line_error(write_sound(tmp_path / "sound.wav"), "sound.wav", "no video stream (found: audio)")


def test_an_audio_file_with_a_cover_picture(tmp_path):
    """The cover is a video stream to FFmpeg, but no video."""
    import av

    with av.open(str(tmp_path / "song.mp3"), "w") as container:
        sound = container.add_stream("mp3", rate=44100)
        cover = container.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "rgb24"
        cover.disposition = 1 << 10
        picture = av.VideoFrame.from_ndarray(numbered_frame(1, 64, 64), format="rgb24")
        packets = [*cover.encode(picture), *cover.encode()]
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.int16), format="s16p", layout="mono")
        frame.sample_rate = 44100
        packets += [*sound.encode(frame), *sound.encode()]
        container.mux(packets)
    one_line_error(str(tmp_path / "song.mp3"), "song.mp3", "no video stream")


@pytest.mark.parametrize("name", ["text.mp4", "text.txt", "text.mkv", "text.md"])
def test_a_text_file(tmp_path, name):
    (tmp_path / name).write_text("This is not a video. " * 50)
    one_line_error(str(tmp_path / name), name, "not a video file")


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.mp4").touch()
    one_line_error(str(tmp_path / "empty.mp4"), "empty.mp4", "the file is empty")
    one_line_error(b"", "<0 bytes>", "the file is empty")


def test_a_file_of_zeros(tmp_path):
    (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
    one_line_error(str(tmp_path / "zeros.mp4"), "zeros.mp4", "not a video file")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_video_without_frames(tmp_path, suffix):
    import av

    path = str(tmp_path / f"none.{suffix}")
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.start_encoding()
    with pytest.raises(VideoDecodeError, match=rf"none\.{suffix}: .*(no frames|no video stream|not a video)"):
        decode_video(path)


def test_an_unreachable_url():
    with socket.socket() as taken:  # bound, but not listening: a closed port
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/video.mp4"
        one_line_error(url, url, "cannot be downloaded")


def test_a_url_of_another_kind():
    one_line_error("ftp://example.org/video.mp4", "ftp://example.org/video.mp4", 'scheme "ftp" are not supported')
    one_line_error("http://[::1/video.mp4", "http://[::1/video.mp4", "not a valid URL (Invalid IPv6 URL)")


@pytest.mark.parametrize("video", [3, None, {"path": "a.mp4"}, object()])
def test_a_thing_that_is_no_video(video):
    one_line_error(video, "", f"not {type(video).__name__}")


def test_a_text_mode_file(tmp_path):
    path = write_video(tmp_path / "good.mp4", 5)
    with open(path, encoding="latin-1") as file:
        one_line_error(file, "good.mp4", 'mode "rb"')


def test_a_file_without_permission(tmp_path):
    path = write_video(tmp_path / "secret.mp4", 5)
    os.chmod(path, 0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read everything")
    one_line_error(path, "secret.mp4", "permission denied")


def test_a_cut_video_whose_index_stood_at_the_end(tmp_path):
    """Without its index an MP4 file cannot be read at all."""
    path = Path(write_video(tmp_path / "cut.mp4", 100, draw=sharp))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    one_line_error(str(path), "cut.mp4", "not a video file, or cut or damaged beyond reading")


@pytest.mark.parametrize("suffix, options", [("mp4", FASTSTART), ("mkv", None), ("avi", None), ("ts", None)])
def test_a_cut_video_gives_the_frames_that_are_left(tmp_path, suffix, options):
    recipe = {"codec": "mpeg4", "options": {"b": "3M"}} if suffix == "avi" else {}
    path = Path(write_video(tmp_path / f"cut.{suffix}", 250, draw=sharp, container_options=options, **recipe))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    processor, caught, results = LongVLMVideoProcessor(num_frames=16), [], []
    for read in (
        lambda: decode_video(path),
        lambda: processor(path, return_metadata=True),
        lambda: list(processor.iter_pixel_values(path, frames_per_piece=5)),
    ):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            results.append(read())
        caught.append(told)
    whole, few, pieces = results
    assert sum(map(len, pieces)) == 16
    shown = [read_number(frame) for frame in whole.frames]
    assert 90 < len(shown) < 160
    assert shown[:-4] == whole.metadata.frames_indices[:-4]  # near the cut, B-frames are missing
    assert sorted(set(shown)) == shown  # nothing repeated
    assert few["num_frames"].tolist() == [16]
    taken = few["video_metadata"][0].frames_indices
    assert len(set(taken)) == 16 and max(taken) < 160  # spread over what is left
    if suffix != "ts":  # a transport stream has no header that could promise more
        for told in caught:  # each way of reading says it, once
            messages = [str(entry.message) for entry in told if issubclass(entry.category, VideoDecodeWarning)]
            assert len(messages) == 1 and "cut." in messages[0] and " left" in messages[0]


def test_a_damaged_middle_costs_only_its_frames(tmp_path):
    """Frames in the unreadable part are left out and counted in the warning; no frame stands in for another."""
    path = Path(write_video(tmp_path / "hole.mp4", 250, draw=sharp, container_options=FASTSTART, gop=25))
    content = bytearray(path.read_bytes())
    middle, hole = len(content) // 2, len(content) // 10
    content[middle : middle + hole] = bytes(hole)
    path.write_bytes(content)
    with pytest.warns(VideoDecodeWarning, match=r"hole\.mp4: .*of the 250 requested frames cannot be decoded"):
        decoded = decode_video(path)
    assert 150 < len(decoded.frames) < 250
    indices = decoded.metadata.frames_indices
    assert len(indices) == len(decoded.frames) and len(set(indices)) == len(indices)
    assert indices[:100] == list(range(100)) and indices[-50:] == list(range(200, 250))
    for frame, index in zip(decoded.frames, indices, strict=True):
        if index < 100 or index >= 200:  # in between, what FFmpeg conceals may look like anything
            assert read_number(frame) == index


def test_a_video_none_of_whose_frames_can_be_decoded(tmp_path):
    path = Path(write_video(tmp_path / "hollow.mp4", 20, draw=sharp))
    content = path.read_bytes()
    start, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    path.write_bytes(content[:start] + bytes(end - start) + content[end:])
    one_line_error(path, "hollow.mp4", "none of the 4 requested frames can be decoded")
