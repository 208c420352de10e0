"""Legal files that few programs read right: FFmpeg's decoding from start to end says which frames there are.

Each frame shows its own number. For each file, all frames, frames asked for one by one (which needs seeks) and frames
read in pieces must be those of `decode_all`, without a warning."""

import warnings
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from longvlm.processing import LongVLMVideoProcessor, video_decoding
from longvlm.processing.video_decoding import VideoDecodeError, decode_video, iter_video, probe_video
from tests.helpers.odd_files import decode_all, field_video, remux, set_edit_list, set_matrix, write_fields
from tests.helpers.video_files import (
    B_FRAMES,
    HEIGHT,
    OPEN_GOP,
    WIDTH,
    count_decoded,
    numbered_frame,
    read_number,
    uneven_times,
    write_video,
)

OLD_MXF = pytest.mark.skipif(int(av.__version__.split(".")[0]) < 18, reason="this PyAV writes no H.264 to MXF")
FIXED_GOP = "scenecut=0:b-adapt=0"


def numbers(decoded):
    return [read_number(frame) for frame in decoded.frames]


def check(path, expected, rate=25.0, duration=None):
    """The frames of a file are the expected ones, however they are asked for; returns the metadata."""
    expected = list(expected)
    assert decode_all(path) == expected, "the file is not what this test wants"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = decode_video(path)
        assert numbers(whole) == expected
        random = np.random.default_rng(0)
        asked = [[len(expected) - 1], [len(expected) // 2], *random.integers(0, len(expected), (6, 4)).tolist()]
        for indices in asked:
            decoded = decode_video(path, lambda metadata, indices=indices: indices)
            assert numbers(decoded) == [expected[i] for i in indices]
            assert decoded.metadata.frames_indices == indices
        pieces = iter_video(path, frames_per_piece=7, num_workers=1)
        assert [number for piece in pieces for number in numbers(piece)] == expected
    metadata = whole.metadata
    probed = probe_video(path)
    assert probed.total_num_frames == metadata.total_num_frames == len(expected)
    if rate:
        assert metadata.fps == pytest.approx(rate, rel=1e-3)
        assert metadata.duration == pytest.approx(len(expected) / rate, abs=0.02)
    assert np.all(np.diff(metadata.source_timestamps) >= 0)
    return metadata


# --- edit lists ---

EDITS = {
    "from 2 s, between keyframes": ([(50, 450)], range(50, 500)),
    "a stretch in the middle": ([(55, 100)], range(55, 155)),
    "trimmed at the end": ([(0, 310)], range(310)),
    "two": ([(55, 40), (205, 60)], [*range(55, 95), *range(205, 265)]),
    "three, not in order": (
        [(205, 50), (33, 40), (333, 45)],
        [*range(205, 255), *range(33, 73), *range(333, 378)],
    ),
    "one twice": ([(55, 40), (55, 40)], [*range(55, 95)] * 2),
    "after a pause": ([(None, 25), (55, 100)], range(55, 155)),
}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """(B-frames, frames between keyframes) -> 500 numbered frames, written once."""
    folder, written = tmp_path_factory.mktemp("films"), {}

    def write(b_frames, gop=50):
        key = b_frames, gop
        if key not in written:
            path, options = folder / f"{b_frames}-{gop}.mp4", {"bf": b_frames, "x264-params": FIXED_GOP}
            written[key] = Path(write_video(path, 500, gop=gop, options=options)).read_bytes()
        return written[key]

    return write


@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize("kind", EDITS)
def test_an_edit_list_shows_what_it_lists(tmp_path, film, kind, b_frames):
    edits, expected = EDITS[kind]
    path = tmp_path / ("a.mov" if kind == "two" else "a.mp4")
    path.write_bytes(film(b_frames))
    metadata = check(set_edit_list(path, edits), expected)
    assert metadata.timestamps[0] == pytest.approx(1.0 if edits[0][0] is None else 0.0)


def test_an_edit_list_in_a_video_with_one_keyframe_in_ten_seconds(tmp_path, film):
    path = tmp_path / "a.mp4"
    path.write_bytes(film("3", gop=250))
    check(set_edit_list(path, [(50, 450)]), range(50, 500))


def test_frames_behind_an_edit_are_found_by_seeking(tmp_path, film, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(film("3"))
    set_edit_list(path, [(55, 100), (255, 200)])
    decoded = count_decoded(monkeypatch)
    assert numbers(decode_video(path, lambda metadata: [260])) == [415]
    assert len(decoded) <= 50


# --- turned and mirrored ---


@pytest.mark.parametrize("suffix", ["mp4", "mov"])
@pytest.mark.parametrize(
    "matrix",
    [
        (1, 0, 0, 1),
        (-1, 0, 0, 1),
        (1, 0, 0, -1),
        (-1, 0, 0, -1),
        (0, 1, 1, 0),
        (0, -1, -1, 0),
        (0, 1, -1, 0),
        (0, -1, 1, 0),
    ],
)
def test_the_display_matrix_moves_each_pixel(tmp_path, matrix, suffix):
    path = write_video(tmp_path / f"a.{suffix}", [0b1010_0110_0001_1101], rate=25)
    with av.open(path) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    a, b, c, d = matrix
    y, x = np.mgrid[: stored.shape[0], : stored.shape[1]]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    shown_x, shown_y = shown_x - shown_x.min(), shown_y - shown_y.min()
    expected = np.zeros((shown_y.max() + 1, shown_x.max() + 1, 3), np.uint8)
    expected[shown_y, shown_x] = stored
    decoded = decode_video(set_matrix(path, *matrix))
    np.testing.assert_array_equal(decoded.frames[0], expected)
    assert (decoded.metadata.height, decoded.metadata.width) == expected.shape[:2]


# --- pixels that are not square ---


def write_with_aspect(path, aspect, size):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for number in range(5):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, *size), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(
    ("aspect", "size", "shown"),
    [
        (Fraction(2), (320, 64), (640, 64)),
        (Fraction(16, 11), (352, 288), (512, 288)),
        (Fraction(1, 2), (320, 64), (320, 128)),
        (Fraction(1000), (320, 64), (320, 64)),  # no such pixels: a mistake in the file
    ],
)
def test_frames_have_the_shape_that_players_show(tmp_path, suffix, aspect, size, shown):
    path = write_with_aspect(tmp_path / f"a.{suffix}", aspect, size)
    decoded = decode_video(path)
    assert numbers(decoded) == list(range(5))
    assert decoded.frames[0].shape == (shown[1], shown[0], 3)
    assert (decoded.metadata.width, decoded.metadata.height) == shown
    assert (probe_video(path).width, probe_video(path).height) == shown


def test_wide_pixels_are_widened_before_the_picture_is_turned(tmp_path):
    path = write_with_aspect(tmp_path / "a.mp4", Fraction(2), (320, 64))
    assert decode_video(set_matrix(path, 0, -1, 1, 0)).frames[0].shape == (640, 64, 3)


def test_the_crop_is_that_of_the_shown_shape(tmp_path):
    """Of 640 x 64 pixels shown, the middle tenth remains: white, where a crop of 320 x 64 would show grey sides."""

    def stripe(number, width, height):
        frame = np.zeros((height, width, 3), np.uint8)
        frame[:, width * 9 // 20 : width * 11 // 20] = 255
        return frame

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 320, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(stripe(0, 320, 64), format="rgb24")))
        container.mux(stream.encode())
    processor = LongVLMVideoProcessor(do_normalize=False, size={"height": 64, "width": 64})
    pixels = processor(str(path), return_tensors="pt")["pixel_values_videos"][0, 0]
    assert pixels[:, :, 4:-4].min() > 0.9


# --- decoding times in place of presentation times ---


@pytest.mark.parametrize("gop", ["closed", "open"])
@pytest.mark.parametrize(
    "suffix", ["asf", "wmv", "avi", "mkv", "flv", "nut", "m2ts", pytest.param("mxf", marks=OLD_MXF)]
)
def test_h264_with_b_frames_copied_to_another_container(tmp_path, suffix, gop):
    source = write_video(tmp_path / "a.mp4", 60, options=B_FRAMES if gop == "closed" else OPEN_GOP)
    check(remux(source, tmp_path / f"b.{suffix}", annexb=suffix == "avi"), range(60))


@pytest.mark.parametrize("options", [B_FRAMES, OPEN_GOP], ids=["closed", "open"])
@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts", "flv"])
def test_decoding_times_are_not_taken_for_presentation_times(tmp_path, suffix, options):
    def forget(number, packet):
        packet.pts = packet.dts = number * 512

    source = write_video(tmp_path / "a.mp4", 60, options=options)
    check(remux(source, tmp_path / f"b.{suffix}", change=forget), range(60))


# --- fields ---


@pytest.mark.parametrize("suffix", ["ts", "mkv", "mp4", "h264"])
@pytest.mark.parametrize("mixed", [False, True], ids=["fields", "fields and frames"])
@pytest.mark.parametrize("together", [False, True], ids=["a packet each", "in one packet"])
def test_two_fields_are_one_frame(tmp_path, suffix, mixed, together):
    frames = field_video(60, pairs=(lambda number: number % 5 < 3) if mixed else lambda number: True)
    path = write_fields(tmp_path / f"a.{suffix}", frames, together=together)
    check(path, range(60), rate=25.0)


@pytest.mark.parametrize("suffix", ["ts", "mkv"])
def test_fields_are_found_where_only_packets_tell_of_them(tmp_path, suffix):
    check(write_fields(tmp_path / f"a.{suffix}", field_video(60), header_of_frames=True), range(60))


def test_a_field_without_its_other_half_is_a_frame(tmp_path):
    frames = field_video(30)
    frames[7] = frames[7][:1]
    path = write_fields(tmp_path / "a.ts", frames)
    decoded = decode_video(path, lambda metadata: [6, 8, 20, 29])
    assert decoded.metadata.total_num_frames == 30
    assert numbers(decoded) == [6, 8, 20, 29]


# --- clocks ---


@pytest.mark.parametrize("codec", ["mpeg2video", "mpeg1video"])
@pytest.mark.parametrize("suffix", ["mpg", "vob", "ts"])
@pytest.mark.parametrize("b_frames", ["0", "2"])
def test_program_and_transport_streams_of_mpeg_video(tmp_path, suffix, codec, b_frames):
    options = {"bf": b_frames, "b": "2M"}
    check(write_video(tmp_path / f"a.{suffix}", 100, codec=codec, options=options), range(100))


@pytest.mark.parametrize("kind", ["ts of H.264", "ts of MPEG-2", "mpg of MPEG-2"])
@pytest.mark.parametrize("starts", [(100, 99.3), (100, 10), (96_000, 5), (5, 50), (5, 95_000)], ids=str)
def test_two_recordings_joined_are_one_film(tmp_path, kind, starts):
    suffix, codec = kind.split()[0], "libx264" if "H.264" in kind else "mpeg2video"
    options = {"bf": "3", "x264-params": FIXED_GOP} if codec == "libx264" else {"bf": "2", "b": "2M"}
    joined = b""
    for part, start in enumerate(starts):
        path = tmp_path / f"{part}.{suffix}"
        shifted = {"output_ts_offset": str(start)}
        frames = range(60 * part, 60 * part + 60)
        joined += Path(write_video(path, frames, codec=codec, options=options, container_options=shifted)).read_bytes()
    (tmp_path / f"joined.{suffix}").write_bytes(joined)
    metadata = check(tmp_path / f"joined.{suffix}", range(120))
    np.testing.assert_allclose(metadata.source_timestamps, np.arange(120) / 25, atol=1e-4)


@pytest.mark.parametrize("b_frames", ["0", "3"])
def test_avi_keeps_the_times_of_copied_h264(tmp_path, b_frames):
    """At 25 frames a second in units of 1/600 s: 23 of 24 entries are empty packets, which repeat a frame."""
    source = write_video(tmp_path / "a.mp4", 200, options={"bf": b_frames, "x264-params": FIXED_GOP})
    path = remux(source, tmp_path / "b.avi", annexb=True)
    metadata = check(path, range(200))
    np.testing.assert_allclose(metadata.source_timestamps, np.arange(200) / 25, atol=1e-6)
    taken = LongVLMVideoProcessor()(str(path), fps=1, return_tensors="pt", return_metadata=True)
    assert taken["num_frames"].tolist() == [8]
    assert [i // 25 for i in taken["video_metadata"][0].frames_indices] == list(range(8))


def test_an_avi_of_few_frames_a_second_is_whole(tmp_path):
    """One frame a second in units of 1/600 s: 599 empty packets follow the last frame, too."""
    source = write_video(tmp_path / "a.mp4", 10, rate=1, options={"bf": "0"})
    path = remux(source, tmp_path / "b.avi", annexb=True)
    check(path, range(10), rate=1.0)


def test_avi_keeps_an_uneven_rate(tmp_path):
    source = write_video(tmp_path / "a.mp4", 60, options={"bf": "0"}, times=uneven_times(60))
    metadata = check(remux(source, tmp_path / "b.avi", annexb=True), range(60), rate=None)
    np.testing.assert_allclose(metadata.source_timestamps, np.array(uneven_times(60)) / 1000, atol=2e-3)


@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize("suffix", ["mkv", "flv"])
@pytest.mark.parametrize("doubled", [7, 30, 59])
def test_a_doubled_time_leaves_the_others(tmp_path, suffix, b_frames, doubled):
    times = uneven_times(60)
    options = {"bf": b_frames, "x264-params": FIXED_GOP}
    source = write_video(tmp_path / "a.mkv", 60, options=options, times=times)

    def double(number, packet):
        if packet.pts == times[doubled]:
            packet.pts = times[doubled - 1]
            if b_frames == "0":
                packet.dts = packet.pts

    metadata = check(remux(source, tmp_path / f"b.{suffix}", change=double), range(60), rate=None)
    expected = np.array([*times[:doubled], times[doubled - 1], *times[doubled + 1 :]]) / 1000
    start = metadata.source_timestamps[0]  # FLV has no negative decoding times: all is later by as much
    np.testing.assert_allclose(metadata.source_timestamps - start, expected, atol=2e-3)


@pytest.mark.parametrize("b_frames", ["0", "3"])
@pytest.mark.parametrize("missing", [7, 30])
def test_a_missing_time_leaves_the_others(tmp_path, b_frames, missing):
    options = {"bf": b_frames, "x264-params": FIXED_GOP}
    path = Path(write_video(tmp_path / "a.ts", 60, options=options, times=uneven_times(60)))
    content = bytearray(path.read_bytes())
    starts = [  # packets of 188 bytes that begin a frame of the video (PID 256)
        at for at in range(0, len(content), 188) if content[at + 1] & 0x40 and content[at + 1 : at + 3] == b"\x41\0"
    ]
    assert len(starts) == 60
    at = starts[missing]
    header = at + 4 + (1 + content[at + 4] if content[at + 3] & 0x20 else 0)
    assert content[header : header + 4] == b"\0\0\1\xe0"
    content[header + 7] &= 0x3F  # neither PTS nor DTS
    path.write_bytes(content)
    metadata = check(path, range(60), rate=None)
    difference = np.abs(metadata.source_timestamps - np.array(uneven_times(60)) / 1000)
    assert np.sum(difference > 2e-3) <= 4 and difference.max() < 0.4  # the missing one is put between its neighbours


# --- several streams ---


def write_streams(path, streams):
    """`streams`: (codec, disposition, first number) each."""
    with av.open(str(path), "w") as container:
        made = []
        for codec, disposition, _ in streams:
            stream = container.add_stream(codec, rate=25)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = disposition
            made.append(stream)
        for number in range(10):
            for stream, (_, disposition, first) in zip(made, streams, strict=True):
                if disposition == 1024 and number:
                    continue
                frame = av.VideoFrame.from_ndarray(numbered_frame(first + number), format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in made:
            container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov"])
def test_the_default_stream_is_taken_and_another_can_be_chosen(tmp_path, suffix):
    path = write_streams(tmp_path / f"a.{suffix}", [("libx264", 0, 0), ("libx264", 1, 100)])
    assert numbers(decode_video(path)) == list(range(100, 110))
    assert numbers(decode_video(path, video_stream=0)) == list(range(10))
    assert probe_video(path, video_stream=1).total_num_frames == 10
    with pytest.raises(VideoDecodeError, match=r"`video_stream`=5 is no video stream; the file has: 0, 1$"):
        decode_video(path, video_stream=5)


def test_the_first_of_equal_streams_is_taken(tmp_path):
    path = write_streams(tmp_path / "a.ts", [("libx264", 0, 0), ("libx264", 0, 100)])
    assert numbers(decode_video(path)) == list(range(10))


@pytest.mark.parametrize(
    ("suffix", "disposition"),
    [("mp4", 1024), ("mkv", 0), ("mkv", 1), ("mov", 1)],
    ids=["cover", "plain", "mkv", "mov"],
)
def test_pictures_next_to_a_film_are_not_the_film(tmp_path, suffix, disposition):
    path = write_streams(tmp_path / f"a.{suffix}", [("mjpeg", disposition, 200), ("libx264", 0, 0)])
    assert numbers(decode_video(path)) == list(range(10))


def test_an_animated_avif_is_more_than_its_still_picture(tmp_path):
    options = {"preset": "12", "crf": "20"}
    path = write_video(tmp_path / "a.avif", 20, codec="libsvtav1", options=options)
    with av.open(path) as container:
        assert [stream.frames for stream in container.streams.video] == [1, 20]
    assert numbers(decode_video(path)) == list(range(20))
    assert decode_video(path, lambda metadata: [13]).metadata.timestamps == pytest.approx([0.52])
    assert len(decode_video(path, video_stream=0).frames) == 1


# --- relatives ---


def test_a_stream_of_b_frames_that_never_come_is_read_by_seeking(tmp_path, monkeypatch):
    """Both clocks are stored and differ, so the times are real; only packets near the target are decoded."""

    def delay(number, packet):
        packet.pts = packet.dts + 1024

    source = write_video(tmp_path / "a.mp4", 300, options={"bf": "0"})
    path = remux(source, tmp_path / "b.ts", change=delay)
    check(path, range(300))


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_a_picture_that_is_refreshed_bit_by_bit_has_no_keyframe_to_seek_to(tmp_path, suffix):
    options = {"x264-params": "intra-refresh=1:keyint=30", "bf": "0"}
    check(write_video(tmp_path / f"a.{suffix}", 120, options=options), range(120))


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"bf": "8", "x264-params": "b-adapt=0:b-pyramid=normal:ref=4:open-gop=1:scenecut=0"}),
        ("libx265", {"x265-params": "log-level=none:pools=none:frame-threads=1:keyint=12:bframes=3:open-gop=1"}),
    ],
    ids=["H.264", "HEVC"],
)
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_deep_pyramids_of_b_frames_behind_open_keyframes(tmp_path, suffix, codec, options):
    check(write_video(tmp_path / f"a.{suffix}", 120, codec=codec, options=options), range(120))


HEVC = "log-level=none:pools=none:frame-threads=1:keyint=24:min-keyint=24:scenecut=0:bframes=3:b-adapt=0"


@pytest.mark.parametrize("suffix", ["mkv", "ts"])
@pytest.mark.parametrize(
    ("kind", "first"), [("radl=3", 45), ("open-gop=1", 48)], ids=["which can be decoded", "which cannot be decoded"]
)
def test_a_recording_may_start_with_a_keyframe_that_is_shown_after_others(tmp_path, suffix, kind, first):
    options = {"x265-params": f"{HEVC}:open-gop=0:{kind}"}
    source = write_video(tmp_path / "a.mkv", 96, codec="libx265", options=options)
    with av.open(source) as container:
        keys = [number for number, packet in enumerate(container.demux(video=0)) if packet.is_keyframe]
    path = remux(source, tmp_path / f"b.{suffix}", change=lambda number, packet: number >= keys[2])
    check(path, range(first, 96))


def test_a_recording_may_start_between_two_refreshes(tmp_path):
    """FFmpeg shows nothing until the picture is whole; behind a seek it does the same, and that is no loss."""
    options = {"x264-params": "intra-refresh=1:keyint=30", "bf": "0"}
    source = write_video(tmp_path / "a.ts", 120, options=options)
    path = remux(source, tmp_path / "b.ts", change=lambda number, packet: number >= 10)
    expected = decode_all(path)
    assert 60 < len(expected) < 110
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert numbers(decode_video(path)) == expected
        pieces = iter_video(path, frames_per_piece=7, num_workers=1)
        assert [number for piece in pieces for number in numbers(piece)] == expected


def test_an_h264_file_in_avi_whose_packets_fail_keeps_its_numbers(tmp_path):
    """Frames are counted there; a lost one must not shift those after it."""
    source = write_video(tmp_path / "a.mp4", 60, options=B_FRAMES)

    def break_one(number, packet):
        if number == 30:
            packet.update((b"\0\0\0\1\x41" + b"\xff" * packet.size)[: packet.size])

    path = remux(source, tmp_path / "b.avi", annexb=True, change=break_one)
    with pytest.warns(video_decoding.VideoDecodeWarning, match="cannot be decoded"):
        decoded = decode_video(path)
    assert decoded.metadata.total_num_frames == 60
    assert [n for n, i in zip(numbers(decoded), decoded.metadata.frames_indices, strict=True) if i >= 40] == list(
        range(40, 60)
    )


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_decoding_does_not_start_at_a_damaged_keyframe(tmp_path, suffix):
    """FFmpeg fills its gaps with what was decoded before; behind a seek, that would be grey."""

    def damage(number, packet):
        if number == 48:
            content = bytearray(bytes(packet))
            content[len(content) // 3 :] = bytes(range(256)) * 99
            packet.update(bytes(content[: packet.size]))

    source = write_video(tmp_path / "a.mp4", 96, gop=24, options={"bf": "0"}, draw=still_noise)
    path = remux(source, tmp_path / f"b.{suffix}", change=damage)
    with av.open(path) as container:
        container.streams.video[0].thread_type = "NONE"  # with slice threads FFmpeg fills gaps otherwise
        frames = list(container.decode(video=0))
    expected = [frame.to_ndarray(format="rgb24") for frame in frames]
    assert len(frames) == 96 and frames[48].is_corrupt
    for indices in ([50], [47, 60], [71, 72], list(range(96))):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", video_decoding.VideoDecodeWarning)
            decoded = decode_video(path, lambda metadata, indices=indices: indices)
        assert decoded.metadata.frames_indices == [i for i in indices if not frames[i].is_corrupt]
        for index, frame in zip(decoded.metadata.frames_indices, decoded.frames, strict=True):
            np.testing.assert_array_equal(frame, expected[index])


def still_noise(number, width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    noise[: height // 2] = numbered_frame(number, width, height)[: height // 2]
    return noise
