"""Time windows: which frames a part of a video has, and that nothing else is decoded; options of single videos."""

import inspect

import av
import numpy as np
import pytest
import torch
from PIL import Image

from longvlm.processing import video_decoding
from longvlm.processing.video_decoding import decode_video, probe_video
from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor
from tests.helpers.video_files import numbered_frame, read_number, uneven_times, write_container, write_video
from tests.processing.test_processing import make_processor

PLAIN = {"size": {"height": 32, "width": 48}, "do_center_crop": False, "do_rescale": False, "do_normalize": False}
KINDS = ("mp4 with B-frames", "mkv with variable frame rate", "ts", "webm of VP9", "avi of MPEG-4", "gif")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """6 seconds at 25 frames a second; a keyframe each second."""
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", 150, gop=25)


def taken(video, **options):
    """Source indices, timestamps, and the numbers that the frames show."""
    features = LongVLMVideoProcessor(**PLAIN)(video, return_metadata=True, **options)
    (metadata,) = features["video_metadata"]
    shown = [read_number(frame) for frame in features["pixel_values_videos"][0]]
    return list(metadata.frames_indices), metadata.timestamps, shown


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_has_the_frames_from_its_start_to_before_its_end(tmp_path, kind):
    path = write_container(tmp_path / "video", kind)
    times = probe_video(path).source_timestamps
    seconds = times - times[0]
    expected = np.flatnonzero((seconds >= 1.5 - 1e-6) & (seconds < 2.5 - 1e-6)).tolist()
    indices, timestamps, shown = taken(path, do_sample_frames=False, video_start=1.5, video_end=2.5)
    assert indices == shown == expected and 0 < len(expected) < 50
    np.testing.assert_allclose(timestamps, times[expected])


@pytest.mark.parametrize(
    "rule", [{"num_frames": 7}, {"fps": 4}, {"fps": 10, "max_frames": 6}, {"num_frames": 90}], ids=str
)
@pytest.mark.parametrize("window", [(2, 4), (0.5, None), (None, 3.3), (1.96, 600), (3, 3.04)], ids=str)
def test_the_rule_works_in_a_window_as_in_a_video_of_these_frames(file, rule, window):
    options = {"video_start": window[0], "video_end": window[1]}
    whole, _, _ = taken(file, do_sample_frames=False, **options)
    alone = LongVLMVideoProcessor().sample_frames({"total_num_frames": len(whole), "fps": 25.0}, **rule)
    indices, timestamps, shown = taken(file, **rule, **options)
    assert indices == shown == [whole[0] + i for i in alone]
    assert timestamps == pytest.approx([i / 25 for i in indices])
    pieces = list(LongVLMVideoProcessor(**PLAIN).iter_pieces(file, frames_per_piece=3, **rule, **options))
    assert [read_number(frame) for piece in pieces for frame in piece.pixel_values] == shown
    assert [time for piece in pieces for time in piece.timestamps] == timestamps
    assert pieces[0].duration == pytest.approx(6)  # of the whole video


def test_windows_go_by_real_times_where_the_frame_rate_varies(tmp_path):
    path = write_video(tmp_path / "uneven.mkv", 150, times=uneven_times(150))
    times = np.array(uneven_times(150)) / 1000
    inside = np.flatnonzero((times >= 3) & (times < 7))
    indices, _, shown = taken(path, fps=2, video_start=3, video_end=7)
    wanted = times[inside[0]] + 0.25 + 0.5 * np.arange(8)
    assert indices == shown == [int(np.searchsorted(times, moment + 1e-3, side="right")) - 1 for moment in wanted]
    assert set(indices) <= set(inside.tolist())


class Watched:
    """A container that notes which packets are read from it, and whether it was told to seek."""

    opened: list["Watched"] = []  # noqa: RUF012

    def __init__(self, container):
        self.container, self.sought, self.read = container, False, []
        self.opened.append(self)

    def __getattr__(self, name):
        return getattr(self.container, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.container.close()

    def seek(self, *args, **options):
        self.sought = True
        self.container.seek(*args, **options)

    def demux(self, *streams):
        for packet in self.container.demux(*streams):
            if packet.size:
                self.read.append(float(packet.pts * packet.time_base))
            yield packet


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
@pytest.mark.parametrize("b_frames", [0, 3])
def test_nothing_outside_a_window_is_decoded(tmp_path, monkeypatch, suffix, b_frames):
    options = {"bf": str(b_frames), "x264-params": "scenecut=0:b-adapt=0"}
    path = write_video(tmp_path / f"video.{suffix}", 150, gop=25, options=options)
    start, open_file = probe_video(path).source_timestamps[0], av.open
    monkeypatch.setattr(Watched, "opened", [])
    monkeypatch.setattr(av, "open", lambda *args, **options: Watched(open_file(*args, **options)))
    _, _, shown = taken(path, do_sample_frames=False, decoding_backend="pyav", video_start=2, video_end=4)
    assert shown == list(range(50, 100))
    read: set[int] = set()
    for container in Watched.opened:
        numbers = {round((time - start) * 25) for time in container.read}
        if container.sought:
            read |= numbers
        else:  # the index: all packets are read, and none is decoded
            assert len(numbers) in (0, 150)
    # B-frames may need the keyframe before, and frames are stored out of order; a decoder is a few packets ahead.
    before = 25 if b_frames else 0
    assert set(range(50, 100)) <= read <= set(range(50 - before, 100 + 8))


def test_progress_counts_the_frames_of_a_window(file):
    told = []
    taken(file, fps=10, video_start=2, video_end=4, progress=lambda *step: told.append(step))
    assert sorted(told) == [("decode", done, 20) for done in range(1, 21)]


def test_windows_of_frames_go_by_the_metadata():
    frames = np.stack([numbered_frame(number) for number in range(10)])
    whole = {"fps": 2.0, "total_num_frames": 10}
    assert taken(frames, video_start=1, video_end=3, short_video="once", video_metadata=whole)[0] == [2, 3, 4, 5]
    sampled = {"fps": 25.0, "total_num_frames": 500, "frames_indices": [50, 150, 250, 450]}
    for options in ({"do_sample_frames": False}, {"short_video": "once"}):
        indices, timestamps, shown = taken(
            list(frames[:4]), video_start=5, video_end=12, video_metadata=sampled, **options
        )
        assert (indices, timestamps, shown) == ([150, 250], [6.0, 10.0], [1, 2])
    with pytest.raises(ValueError, match="frame rate of the video is unknown"):
        taken(frames, video_start=1)
    with pytest.raises(ValueError, match="frames_indices"):
        taken(frames, video_start=1, video_metadata={"fps": 25.0, "total_num_frames": 500})


def test_frames_decoded_before_keep_their_place_in_time(tmp_path):
    path = write_video(tmp_path / "uneven.mkv", 150, times=uneven_times(150))
    processor = LongVLMVideoProcessor(**PLAIN)
    frames, metadata = processor.fetch_videos(path, lambda metadata: range(20, 60))
    expected = taken(path, do_sample_frames=False, video_start=3, video_end=4)
    assert taken(frames, do_sample_frames=False, video_start=3, video_end=4, video_metadata=metadata) == expected


def test_a_folder_of_images_takes_its_frame_rate_from_the_metadata(tmp_path):
    for number in range(12):
        Image.fromarray(numbered_frame(number)).save(tmp_path / f"{number}.png")
    options = {"video_metadata": {"fps": 2.0, "total_num_frames": 12}}
    assert taken(tmp_path, video_start=2, video_end=4, short_video="once", **options)[0] == [4, 5, 6, 7]
    assert taken(tmp_path, fps=1, **options)[:2] == ([1, 3, 5, 7, 9, 11], [0.5, 1.5, 2.5, 3.5, 4.5, 5.5])
    with pytest.raises(ValueError, match=r"`video_start` .* frame rate of the video is unknown"):
        taken(tmp_path, video_start=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"video_start": 6}, "`video_start` 6 is past the end .* at 5.96 and ends at 6 seconds"),
        ({"video_start": 1680, "video_end": 2580}, "`video_start` 1680 is past the end"),
        ({"video_start": 4, "video_end": 4}, "`video_start` 4 must be before `video_end` 4"),
        ({"video_start": 1.001, "video_end": 1.03}, "no frame lies .* nearest are at 1 and 1.04 seconds"),
        ({"video_start": -1}, "`video_start` is -1"),
        ({"video_start": float("nan")}, "`video_start` is nan"),
        ({"video_end": float("inf")}, "`video_end` is inf"),
        ({"video_end": 0}, "`video_end` is 0"),
        ({"video_end": "0:30"}, "`video_end` is '0:30'"),
        ({"video_start": True}, "`video_start` is True"),
        ({"do_resize": "yes"}, "do_resize.* expected bool"),
        ({"nframes": 3}, "`nframes` is not an option of the video processor; did you mean num_frames?"),
        ({"max_frames": 3}, "`max_frames` 3 needs `fps`"),
        ({"num_frames": 4, "max_frames": 3}, "`max_frames` 3 needs `fps`"),
    ],
)
def test_windows_and_options_that_do_not_fit_are_refused_in_one_line(file, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        taken(file, **options)
    assert "\n" not in str(caught.value)


def test_frames_are_counted_without_decoding(file, monkeypatch):
    processor = LongVLMVideoProcessor()
    expected = processor(file, num_frames=9, video_start=5)["num_frames"].tolist()
    monkeypatch.setattr(video_decoding, "iter_video", None)
    assert [processor.count_frames(file, fps=2, video_options={"num_frames": 9, "video_start": 5})] == expected
    frames = np.zeros((30, 8, 8, 3), np.uint8)
    described = {"fps": 10, "total_num_frames": 30}
    assert processor.count_frames(frames, video_start=2, video_metadata=described, short_video="once") == 10


@pytest.mark.skipif("video_stream" not in inspect.signature(decode_video).parameters, reason="needs stream selection")
def test_a_video_stream_can_be_chosen(tmp_path):
    with av.open(str(tmp_path / "two.mkv"), "w") as container:
        streams = [container.add_stream("mpeg4", rate=10) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for position in range(20):
            for first, stream in zip((0, 300), streams, strict=True):
                frame = av.VideoFrame.from_ndarray(numbered_frame(first + position), format="rgb24")
                frame.pts = position
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode())
    path = str(tmp_path / "two.mkv")
    assert taken(path, do_sample_frames=False, video_stream=1)[2] == list(range(300, 320))
    assert taken(path, do_sample_frames=False, video_stream=0, video_start=1)[2] == list(range(10, 20))
    with pytest.raises(ValueError, match="`video_stream` 1 is for files"):
        taken(np.zeros((3, 8, 8, 3), np.uint8), video_stream=1)


# --- in the parts of a chat ---


def chat(*parts):
    return [{"role": "user", "content": [{"type": "video", **part} for part in parts]}]


def encode(*parts, **options):
    return make_processor().apply_chat_template(
        chat(*parts), tokenize=True, return_dict=True, return_tensors="pt", return_metadata=True, **options
    )


def test_every_option_of_a_part_counts(file):
    parts = [
        {"video": file, "nframes": 3},
        {"video": file, "fps": 2, "video_start": 1, "video_end": 3},
        {"path": file, "fps": 25, "max_frames": 5},
        {"type": "video_url", "video_url": {"url": file, "num_frames": 2}, "video_start": 5},
        {"video": file, "num_frames": 200, "short_video": "once", "video_start": 5.5},
        {"video": file, "video_end": 0.2},
    ]
    for shared in ({}, {"num_frames": 40, "video_start": None}, {"fps": 10, "max_frames": 50}):
        out = encode(*parts, **shared)
        found = [list(metadata.frames_indices) for metadata in out["video_metadata"]]
        last = [0, 0, 2, 2, 3] if "fps" not in shared else [1, 3]
        if "fps" in shared:
            last = found[5]  # by time
            assert set(last) <= set(range(5))
        assert found[1] == [31, 43, 56, 68]
        assert [len(one) for one in found] == [3, 4, 5, 2, 12, len(last)]
        assert found[3] == taken(file, num_frames=2, video_start=5)[0] and found[4] == list(range(138, 150))
        places = (out["input_ids"] == make_processor().video_token_id).sum().item()
        assert places == sum(make_processor().num_video_tokens(len(one)) for one in found)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"min_pixels": 3136}, '"min_pixels", which is not an option'),
        ({"total_pixels": 1, "num_frames": 3}, '"total_pixels", which is not an option'),
        ({"num_frame": 3}, '"num_frame", which is not an option'),
        ({"return_tensors": "np"}, '"return_tensors", which is not an option'),
        ({"nframes": 3, "num_frames": 3}, '"nframes" and "num_frames", which mean the same'),
        ({"nframes": 3, "fps": 1}, "exclude each other"),
        ({"max_frames": 3}, "`max_frames` 3 needs `fps`"),
        ({"video_start": 7}, "`video_start` 7 is past the end"),
    ],
)
def test_options_of_a_part_that_do_not_fit_are_refused_by_name(file, options, message):
    with pytest.raises(ValueError, match=message):
        encode({"video": file, **options})
    nested = {"type": "video_url", "video_url": {"url": file, **options}}
    with pytest.raises(ValueError, match=message):
        encode(nested)


def test_options_of_videos_that_are_encoded_already_are_refused():
    with pytest.raises(ValueError, match="fps, video_start cannot be applied to encoded videos"):
        make_processor().apply_chat_template(
            chat({"video_start": 3, "fps": 1}, {}), tokenize=True, num_video_tokens=[5, 5]
        )
    with pytest.raises(ValueError, match="num_frames, video_end cannot be applied to encoded videos"):
        make_processor()(text="<video>", video_token_counts=5, num_frames=3, video_end=2)
    features = {"local_features": [torch.zeros(3, 8)]}
    with pytest.raises(ValueError, match="fps cannot be applied to encoded videos"):
        make_processor()(text="<video>", video_features=features, videos_kwargs={"fps": 1})
    with pytest.raises(ValueError, match=r"features; leave it empty, .* as video_features="):
        make_processor().apply_chat_template(chat({"video": features}), tokenize=True)
    assert make_processor()(text="no video", num_frames=3)["input_ids"]


def test_one_video_can_be_shown_part_by_part(file):
    parts = [{"video": file, "num_frames": 4, "video_start": start, "video_end": start + 2} for start in (0, 2, 4)]
    out = encode(*parts)
    alone = [
        make_processor().video_processor(
            file, num_frames=4, video_start=start, video_end=start + 2, return_tensors="pt"
        )
        for start in (0, 2, 4)
    ]
    assert torch.equal(out["pixel_values_videos"], torch.cat([one["pixel_values_videos"] for one in alone]))
