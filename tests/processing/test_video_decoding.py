"""The frame that is asked for is the frame that comes back, in every container; and only a few are ever in memory.

The videos are made here; each frame shows its own number (see video_files.py)."""

import base64
import gc
import http.server
import io
import os
import tempfile
import threading
import weakref
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from longvlm.processing import video_decoding
from longvlm.processing.frame_display import pixel_aspect, to_display
from longvlm.processing.video_decoding import decode_video, is_torchcodec_usable, probe_video
from tests.helpers import real_data, video_files
from tests.helpers.video_files import (
    CONTAINERS,
    count_decoded,
    numbered_frame,
    read_number,
    write_container,
    write_video,
)

COUNT = 150


@pytest.fixture(scope="module")
def container_file(tmp_path_factory):
    """kind -> path, each written once."""
    folder, written = tmp_path_factory.mktemp("containers"), {}

    def write(kind):
        if kind not in written:
            written[kind] = write_container(folder / f"video{len(written)}", kind, COUNT)
        return written[kind]

    return write


def numbers(decoded):
    return [read_number(frame) for frame in decoded.frames]


def take(*indices):
    return lambda metadata: indices


@pytest.mark.parametrize("kind", CONTAINERS)
def test_the_frame_asked_for_is_the_frame_got(container_file, kind):
    path = container_file(kind)
    everything = decode_video(path)
    assert everything.metadata.total_num_frames == COUNT
    assert numbers(everything) == list(range(COUNT))

    random = np.random.default_rng(0)
    for _ in range(12):
        asked = np.sort(random.choice(COUNT, random.integers(1, 9), replace=False)).tolist()
        decoded = decode_video(path, take(*asked), backend="pyav")
        assert numbers(decoded) == asked
        assert decoded.metadata.frames_indices == asked
        for frame, index in zip(decoded.frames, asked, strict=True):  # bit for bit what whole decoding gives
            np.testing.assert_array_equal(frame, everything.frames[index])


@pytest.mark.parametrize("kind", CONTAINERS)
def test_bytes_and_file_objects_give_the_same_frames_as_the_path(container_file, kind):
    path = container_file(kind)
    asked = [3, 50, 51, 140]
    with open(path, "rb") as file:
        content = file.read()
        for video in (content, file, io.BytesIO(content)):
            assert numbers(decode_video(video, take(*asked))) == asked
        assert not file.closed


@pytest.mark.skipif(not is_torchcodec_usable(), reason="torchcodec with FFmpeg is not here")
@pytest.mark.parametrize("kind", CONTAINERS)
def test_torchcodec_and_pyav_give_the_same_frames(container_file, kind):
    asked = list(range(1, COUNT, 7))
    decoded = decode_video(container_file(kind), take(*asked), backend="torchcodec")
    assert numbers(decoded) == asked


def test_where_torchcodec_names_another_frame_pyav_decodes(container_file, monkeypatch):
    """torchcodec's frames are compared with the index by time: a wrong one is never passed on."""

    class WrongDecoder:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def rgb_at(self, position):
            if position == 7:
                return numbered_frame(7)
            raise video_decoding.TorchcodecFailed("frame 77 has another time")

    monkeypatch.setattr(video_decoding, "is_torchcodec_usable", lambda: True)
    monkeypatch.setattr(video_decoding, "TorchcodecReader", WrongDecoder)
    steps = []
    decoded = decode_video(
        container_file("mp4"), take(7, 77), num_workers=1, progress=lambda stage, done, total: steps.append(done)
    )
    assert numbers(decoded) == [7, 77]
    assert decoded.metadata.video_backend == "pyav"
    assert steps == [1, 1, 2]  # the first frame was decoded twice, and counts once


def test_the_backend_can_be_chosen_by_environment_variable(container_file, monkeypatch):
    monkeypatch.setenv("LONGVLM_VIDEO_BACKEND", "pyav")
    assert decode_video(container_file("mp4"), take(0)).metadata.video_backend == "pyav"
    monkeypatch.setenv("LONGVLM_VIDEO_BACKEND", "decord")
    with pytest.raises(ValueError, match='"decord" is not known'):
        decode_video(container_file("mp4"), take(0))


def test_frames_come_in_the_order_asked_also_repeated(container_file):
    decoded = decode_video(container_file("mp4 with B-frames"), take(90, 3, 3, 149))
    assert numbers(decoded) == [90, 3, 3, 149]


def test_hidden_frames_of_vp8_are_not_counted(tmp_path):
    source = write_video(tmp_path / "a.webm", 60, codec="libvpx", options={"deadline": "realtime", "b": "500k"})
    with av.open(source) as given, av.open(str(tmp_path / "b.webm"), "w") as changed:
        stream = given.streams.video[0]
        copy = changed.add_stream_from_template(stream)
        position = 0
        for packet in given.demux(stream):
            if not packet.size:
                continue
            content = bytearray(bytes(packet))
            if position % 12 == 5:
                content[0] &= ~0x10  # the bit that says "show this frame"
            written = av.Packet(bytes(content))
            for attribute in ("pts", "dts", "time_base", "is_keyframe"):
                setattr(written, attribute, getattr(packet, attribute))
            written.stream = copy
            changed.mux(written)
            position += 1
    shown = [number for number in range(60) if number % 12 != 5]
    assert numbers(decode_video(tmp_path / "b.webm")) == shown


@pytest.mark.parametrize("kind", ["mp4 with variable frame rate", "mkv with variable frame rate"])
def test_timestamps_are_the_times_at_which_frames_are_shown(container_file, kind):
    decoded = decode_video(container_file(kind), take(0, 1, 2, 3, 80, 149))
    times = np.array(video_files.uneven_times(COUNT))[[0, 1, 2, 3, 80, 149]] / 1000
    np.testing.assert_allclose(decoded.metadata.timestamps, times, atol=1.1e-3)


def test_seconds_of_a_transport_stream_count_from_its_start(container_file):
    with av.open(container_file("ts")) as container:
        assert container.start_time > 0
    timestamps = decode_video(container_file("ts"), take(0, 25)).metadata.timestamps
    np.testing.assert_allclose(timestamps, [0.0, 1.0], atol=1e-6)


def test_metadata_describes_the_source(container_file):
    metadata = decode_video(container_file("mkv"), take(10, 20)).metadata
    assert (metadata.total_num_frames, metadata.fps, metadata.duration) == (COUNT, 25.0, 6.0)
    assert (metadata.width, metadata.height) == (video_files.WIDTH, video_files.HEIGHT)
    assert metadata["timestamps"] == [0.4, 0.8]


@pytest.mark.parametrize("kind", ["mp4", "mkv", "mp4 with variable frame rate", "ts"])
def test_a_probe_tells_what_decoding_tells(container_file, kind, monkeypatch):
    path = container_file(kind)
    decoded = decode_video(path, take(3)).metadata
    monkeypatch.setattr(video_decoding, "_read_frames", lambda *args: pytest.fail("no frame is decoded"))
    for video in (path, Path(path).read_bytes()):
        probed = probe_video(video)
        assert probed.frames_indices is None and probed.timestamps is None
        for name in ("total_num_frames", "fps", "width", "height", "duration"):
            assert probed[name] == decoded[name], name
        np.testing.assert_array_equal(probed.source_timestamps, decoded.source_timestamps)


def test_a_probe_of_pictures_and_of_what_is_no_video(tmp_path):
    frames = [Image.fromarray(numbered_frame(number)) for number in range(3)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=[40, 60, 100])
    probed = probe_video(tmp_path / "a.gif")
    assert (probed.total_num_frames, probed.duration) == (3, 0.2)
    (tmp_path / "pictures").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "pictures" / f"{number}.png")
    for video, count in ((tmp_path / "pictures", 3), (tmp_path / "pictures" / "1.png", 1)):
        probed = probe_video(video)
        assert (probed.total_num_frames, probed.width, probed.height) == (count, *frames[0].size)
        assert probed.fps is probed.duration is None
    (tmp_path / "text.mp4").write_text("not a video")
    for missing in ("text.mp4", "missing.mp4"):
        with pytest.raises(video_decoding.VideoDecodeError, match=missing):
            probe_video(tmp_path / missing)


def test_seeking_decodes_few_frames(tmp_path, monkeypatch):
    """Targets far apart: about half a group of pictures is decoded for each, not the video."""
    path = write_video(tmp_path / "long.mp4", 1000, gop=20, options={"bf": "0"})
    decoded = count_decoded(monkeypatch)
    assert numbers(decode_video(path, take(*range(50, 1000, 100)), backend="pyav")) == list(range(50, 1000, 100))
    assert len(decoded) <= 10 * 20


def test_dense_targets_are_decoded_once(tmp_path, monkeypatch):
    """More targets than keyframes: no seek back to a keyframe that was passed already."""
    path = write_video(tmp_path / "dense.mp4", 300, gop=100, options=video_files.B_FRAMES)
    decoded = count_decoded(monkeypatch)
    decode_video(path, take(*range(0, 300, 3)), backend="pyav", num_workers=1)
    assert len(decoded) <= 330


def test_full_size_frames_never_pile_up(tmp_path):
    """A 4K video: at most one full-size frame per reader is alive at a time."""

    def shade(number, width, height):
        return np.full((height, width, 3), number * 3, np.uint8)

    path = write_video(tmp_path / "4k.mp4", 40, size=(3840, 2160), gop=5, draw=shade, options={"preset": "ultrafast"})
    alive, most, lock = set(), 0, threading.Lock()

    def shrink(frame):
        nonlocal most
        assert frame.shape == (2160, 3840, 3)
        with lock:
            key = id(frame)
            alive.add(key)
            weakref.finalize(frame, alive.discard, key)
            most = max(most, len(alive))
        return frame[::100, ::100].copy()

    decoded = decode_video(path, transform=shrink, num_workers=2, backend="pyav")
    assert len(decoded.frames) == 40
    assert most <= 2 * 2  # a reader's last frame may still be held while the next one is made


@pytest.mark.skipif(not hasattr(av.VideoStream, "set_display_rotation"), reason="this PyAV cannot write rotation")
@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_rotation_is_applied(tmp_path, degrees):
    def corner(number, width, height):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[: height // 4, : width // 4] = 255
        return frame

    path = write_video(tmp_path / "turned.mp4", 30, rotation=degrees, draw=corner)
    decoded = decode_video(path, take(0, 25))
    for frame in decoded.frames:
        upright = np.rot90(corner(0, video_files.WIDTH, video_files.HEIGHT), degrees // 90 % 4)
        assert frame.shape == upright.shape
        assert np.abs(frame.astype(int) - upright).mean() < 3
    assert (decoded.metadata.height, decoded.metadata.width) == decoded.frames[0].shape[:2]


@pytest.mark.parametrize(
    "suffix, recipe",
    {
        "odd size": ("mkv", {"codec": "ffv1", "pix_fmt": "yuv444p", "size": (97, 63)}),
        "10 bit": ("mkv", {"codec": "ffv1", "pix_fmt": "yuv420p10le"}),
        "grey": ("mkv", {"codec": "ffv1", "pix_fmt": "gray"}),
        "alpha": ("mkv", {"codec": "ffv1", "pix_fmt": "bgra"}),
        "one frame": ("mp4", {"numbers": [7]}),
        "two frames": ("mp4", {"numbers": [7, 8]}),
        "animated gif": ("gif", {"codec": "gif", "pix_fmt": "rgb8"}),
    }.values(),
)
def test_unusual_pictures_are_read(tmp_path, suffix, recipe):
    recipe = dict(recipe)
    shown = recipe.pop("numbers", list(range(20)))
    decoded = decode_video(write_video(tmp_path / f"video.{suffix}", shown, **recipe))
    assert numbers(decoded) == list(shown)
    assert all(frame.dtype == np.uint8 and frame.shape[2] == 3 for frame in decoded.frames)


def test_colours_are_right(tmp_path):
    """Red, green and blue stay where they are."""

    def colour(number, width, height):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[:, :, number] = 255
        return frame

    for number, frame in enumerate(decode_video(write_video(tmp_path / "rgb.mp4", 3, draw=colour)).frames):
        assert frame[..., number].mean() > 245 and np.delete(frame, number, 2).mean() < 10


def test_a_wrong_frame_count_in_the_header_is_not_believed(tmp_path):
    path = write_video(tmp_path / "liar.avi", 50, codec="mpeg4")
    content = bytearray(open(path, "rb").read())
    place = content.index(b"avih") + 8 + 16  # dwTotalFrames
    content[place : place + 4] = (9999).to_bytes(4, "little")
    place = content.index(b"strh") + 8 + 32  # dwLength
    content[place : place + 4] = (9999).to_bytes(4, "little")
    with pytest.warns(video_decoding.VideoDecodeWarning, match="50 of 9999 frames are left"):
        assert numbers(decode_video(bytes(content))) == list(range(50))


def test_pictures_and_directories_are_videos(tmp_path):
    for number in (1, 2, 10):
        Image.fromarray(numbered_frame(number)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    assert numbers(decode_video(tmp_path)) == [1, 2, 10]  # in the order of numbers, not of letters
    assert numbers(decode_video(str(tmp_path), take(2))) == [10]
    picture = decode_video(tmp_path / "frame_10.png")
    assert numbers(picture) == [10] and picture.metadata.total_num_frames == 1
    assert numbers(decode_video((tmp_path / "frame_2.png").read_bytes())) == [2]


def test_file_urls_and_data_urls_are_read(container_file):
    path = Path(container_file("mp4"))
    assert numbers(decode_video(path.as_uri(), take(7))) == [7]
    data = base64.b64encode(path.read_bytes()).decode()
    assert numbers(decode_video(f"data:video/mp4;base64,{data}", take(7))) == [7]


def test_http_urls_are_downloaded_and_cleaned_up(container_file, tmp_path, monkeypatch):
    folder, name = os.path.split(container_file("mp4"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=folder)

        def log_message(self, *args):
            pass

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{name}"
        assert numbers(decode_video(url, take(7, 140))) == [7, 140]
        with pytest.raises(video_decoding.VideoDecodeError, match="the server answered 404"):
            decode_video(url + "x")
        server.shutdown()
    assert os.listdir(tmp_path) == []


def test_progress_is_reported(container_file):
    seen = []
    decode_video(
        container_file("mp4"), take(1, 50, 100), progress=lambda stage, done, total: seen.append((done, total))
    )
    assert sorted(seen) == [(1, 3), (2, 3), (3, 3)]


def test_the_rate_of_a_variable_frame_rate_is_its_mean(container_file):
    metadata = decode_video(container_file("mkv with variable frame rate"), take(0)).metadata
    times = video_files.uneven_times(COUNT)
    assert metadata.fps == pytest.approx((COUNT - 1) * 1000 / times[-1], rel=1e-3)


@pytest.mark.slow
def test_real_videos_give_the_frames_of_whole_decoding():
    for path in real_data.or_skip(real_data.real_videos).values():
        with av.open(str(path)) as container:
            aspect = pixel_aspect(container.streams.video[0].sample_aspect_ratio)  # 12:11 in one of them
            whole = [to_display(frame, aspect) for frame in container.decode(video=0)]
        asked = sorted({0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1})
        decoded = decode_video(path, take(*asked), backend="pyav")
        assert decoded.metadata.total_num_frames == len(whole)
        for frame, index in zip(decoded.frames, asked, strict=True):
            np.testing.assert_array_equal(frame, whole[index])


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
@pytest.mark.parametrize("options", [{}, {"duration": [40, 80] * 4}], ids=["no delays", "delays"])
def test_animated_pictures(tmp_path, suffix, options):
    """Also those without delays, which FFmpeg takes for one frame."""
    frames = [Image.fromarray(numbered_frame(number)) for number in range(40, 48)]
    extra = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"animation.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options, **extra)
    for video in (path, path.read_bytes()):
        decoded = decode_video(video, take(6, 1, 1))
        assert numbers(decoded) == [46, 41, 41]
        assert decoded.metadata.total_num_frames == 8
    expected = np.cumsum([0, *options.get("duration", [100] * 8)][:-1]) / 1000
    np.testing.assert_allclose(decode_video(path).metadata.timestamps, expected)


def test_readers_leave_nothing_to_the_garbage_collector(container_file):
    """A forked DataLoader worker that collected an open reader hung in FFmpeg."""
    path = container_file("mp4")
    gc.collect()
    gc.disable()
    try:
        decode_video(path, take(*range(0, 150, 10)), backend="pyav", num_workers=2)
        left = [thing for thing in gc.get_objects() if type(thing).__name__ == "PyAVReader"]
    finally:
        gc.enable()
    assert not left
