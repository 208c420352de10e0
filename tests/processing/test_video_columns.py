"""Videos as `datasets` hands them over: rows of a Video column, decoded or not, and decoders of torchcodec."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longvlm.processing.video_decoding import decode_video, is_torchcodec_usable, probe_video
from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor
from longvlm.processing.video_sources import VideoDecodeError
from tests.helpers.video_files import read_number, uneven_times, write_video
from tests.processing.test_processing import make_processor

datasets = pytest.importorskip("datasets")

PLAIN = {"size": {"height": 32, "width": 48}, "do_center_crop": False, "do_rescale": False, "do_normalize": False}


class StandIn:
    """Torchcodec's `VideoDecoder`, as far as one may use it: `decode_video` reads the file instead."""

    def __init__(self, path, dimension_order="NCHW"):
        self.frames, told = decode_video(str(path))
        self.order, self.times = dimension_order, told.source_timestamps
        self.metadata = SimpleNamespace(
            average_fps=told.fps, width=told.width, height=told.height, duration_seconds=told.duration
        )

    def __len__(self):
        return len(self.frames)

    def get_frames_at(self, indices):
        data = torch.stack([torch.from_numpy(self.frames[i]) for i in indices])
        data = data.permute(0, 3, 1, 2) if self.order == "NCHW" else data
        times = torch.tensor([float(self.times[i]) for i in indices], dtype=torch.float64)
        return SimpleNamespace(data=data, pts_seconds=times)


def make_decoder(path, **options):
    if is_torchcodec_usable():
        from torchcodec.decoders import VideoDecoder

        return VideoDecoder(str(path), **options)
    return StandIn(path, **options)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", 150)


def taken(video, **options):
    """For each video: source indices, timestamps, and the numbers that the frames show."""
    features = LongVLMVideoProcessor(**PLAIN)(video, return_metadata=True, **options)
    result = []
    for told, frames in zip(features["video_metadata"], features["pixel_values_videos"], strict=True):
        indices = list(told.frames_indices)
        result.append((indices, told.timestamps, [read_number(frame) for frame in frames[: len(indices)]]))
    return result


def test_a_row_of_a_video_column_is_its_file(file):
    content = Path(file).read_bytes()
    rows = [
        {"bytes": None, "path": file},
        {"bytes": content, "path": None},
        {"bytes": content, "path": "gone/before.mp4"},
    ]
    decoded = make_decoder(file)
    decoded._hf_encoded = {"bytes": content, "path": None}  # what `datasets` keeps with a decoder
    rows.append(decoded)
    for options in ({"num_frames": 5}, {"fps": 2, "video_start": 2}):
        (expected,) = taken(file, **options)
        assert [taken(row, **options)[0] for row in rows] == [expected] * len(rows)
        assert taken(rows, **options) == [expected] * len(rows)  # a list of them: one video each
    assert probe_video(rows[2]).total_num_frames == 150


def test_a_column_is_a_list_of_videos(file):
    table = datasets.Dataset.from_dict({"video": [file, file]}).cast_column("video", datasets.Video(decode=False))
    expected = taken(file, num_frames=3)
    assert taken(table["video"], num_frames=3) == expected * 2
    assert taken(table[0]["video"], num_frames=3) == expected
    processor = make_processor()
    out = processor(["<video> a", "<video> b"], table["video"], num_frames=3)
    assert out["num_frames"].tolist() == [3, 3]
    chat = [{"role": "user", "content": [{"type": "video", "video": table[0]["video"], "video_start": 5.9}]}]
    out = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_metadata=True)
    assert set(out["video_metadata"][0].frames_indices) <= {148, 149}


def test_rows_that_hold_no_video_are_named(tmp_path):
    cases = {
        "neither bytes nor a path": {"bytes": None, "path": None},
        "gone.mp4: no such file": {"bytes": None, "path": "gone.mp4"},
        "clip.mp4: not a video file": {"bytes": b"no video at all", "path": "clip.mp4"},
        "clip.mp4: the file is empty": {"bytes": b"", "path": "clip.mp4"},
        "not dict": {"film": "clip.mp4"},
    }
    for message, row in cases.items():
        with pytest.raises(VideoDecodeError, match=message):
            taken(row)


@pytest.mark.parametrize("order", ["NCHW", "NHWC"])
def test_a_decoder_without_its_file_is_read_itself(tmp_path, file, order):
    for options in ({"num_frames": 5}, {"fps": 2}, {"fps": 2, "video_start": 2, "video_end": 4}):
        assert taken(make_decoder(file, dimension_order=order), **options) == taken(file, **options)
    decoder = make_decoder(file, dimension_order=order)
    decoder._hf_encoded = {"bytes": None, "path": "hf://datasets/someone/videos/clip.mp4"}
    told = []
    pieces = LongVLMVideoProcessor(**PLAIN).iter_pieces(
        decoder, num_frames=7, frames_per_piece=3, progress=lambda *step: told.append(step)
    )
    assert [read_number(frame) for piece in pieces for frame in piece.pixel_values] == taken(file, num_frames=7)[0][2]
    assert told == [("decode", done, 7) for done in range(1, 8)]
    assert LongVLMVideoProcessor().count_frames(make_decoder(file), fps=2) == 12


def test_frames_of_a_decoder_have_the_times_that_it_tells(tmp_path):
    path = write_video(tmp_path / "uneven.mkv", 60, times=uneven_times(60))
    (indices, timestamps, shown), *_ = taken(make_decoder(path), num_frames=5)
    assert indices == shown
    np.testing.assert_allclose(timestamps, np.array(uneven_times(60))[indices] / 1000, atol=1.1e-3)
