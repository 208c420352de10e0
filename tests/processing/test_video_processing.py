"""LongVLMVideoProcessor: which frames are taken, how they become pixel values, and every form a video may have."""

import io
import json
import pathlib

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoVideoProcessor, CLIPImageProcessor
from transformers.image_utils import SizeDict
from transformers.video_utils import VideoMetadata

from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor
from tests.helpers.paths import FIXTURES
from tests.helpers.video_files import numbered_frame, read_number, uneven_times, write_video

FRAMES = json.loads((FIXTURES / "frames.json").read_text())
PREPROCESS = json.loads((FIXTURES / "preprocess.json").read_text())

# Frames as they are: what comes out can be read by `read_number`.
PLAIN = {"do_center_crop": False, "do_rescale": False, "do_normalize": False}


@pytest.fixture(scope="module")
def golden():
    return load_file(FIXTURES / "preprocess.safetensors")


@pytest.fixture(scope="module")
def video_file(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "video.mp4", 150)


@pytest.fixture(scope="module")
def uneven_file(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "uneven.mkv", 150, times=uneven_times(150))


def numbers(features, row=0):
    count = int(features["num_frames"][row])
    return [read_number(frame) for frame in features["pixel_values_videos"][row, :count]]


def stack(*shown):
    return np.stack([numbered_frame(number) for number in shown])


# --- which frames ---


def test_the_released_frame_rule_is_met_exactly():
    processor = LongVLMVideoProcessor()
    for case in FRAMES["cases"]:
        indices = processor.sample_frames(VideoMetadata(case["n"]), num_frames=case["num_frames"])
        assert list(indices) == case["indices"], case
        assert list(processor.sample_frames({"total_num_frames": case["n"]}, case["num_frames"])) == case["indices"]
    assert list(processor.sample_frames(VideoMetadata(1000))) == list(
        processor.sample_frames(VideoMetadata(1000), num_frames=100)
    )


def test_short_videos_are_stretched_as_the_original_meant_to():
    processor = LongVLMVideoProcessor(short_video="stretch")
    for case in FRAMES["short_videos"]["as_meant"]:
        indices = processor.sample_frames(VideoMetadata(case["n"]), num_frames=case["num_frames"])
        assert list(indices) == case["frame_index"], case


@pytest.mark.parametrize("total", [1, 3, 99])
@pytest.mark.parametrize("rule, count", [("keep", None), ("once", None), ("stretch", 100)])
def test_short_videos_by_each_rule(total, rule, count):
    """More frames than there are can be asked for; only "stretch" makes frames up, and it is asked for by name."""
    video = stack(*range(total))
    features = LongVLMVideoProcessor(**PLAIN)(video, short_video=rule, return_metadata=True)
    assert features["num_frames"].tolist() == [count or total]
    taken = features["video_metadata"][0].frames_indices
    assert numbers(features) == taken
    if rule == "once":
        assert taken == list(range(total))


def test_fps_takes_the_frames_in_the_middle_of_each_interval():
    processor = LongVLMVideoProcessor()
    metadata = VideoMetadata(250, fps=25.0)  # 10 seconds
    assert list(processor.sample_frames(metadata, fps=1)) == [12, 37, 62, 87, 112, 137, 162, 187, 212, 237]
    assert len(processor.sample_frames(metadata, fps=0.01)) == 1
    assert list(processor.sample_frames(metadata, fps=100)) == list(range(250))  # what there is, nothing twice
    limited = processor.sample_frames(metadata, fps=25, max_frames=10)
    assert list(limited) == [12, 37, 62, 87, 112, 137, 162, 187, 212, 237]


def test_fps_goes_by_real_times_where_the_frame_rate_varies(uneven_file):
    features = LongVLMVideoProcessor(**PLAIN)(uneven_file, fps=2.0, return_metadata=True)
    times = np.array(uneven_times(150)) / 1000
    moments = np.arange(int(features["num_frames"][0])) * 0.5 + 0.25
    expected = [int(np.searchsorted(times, moment + 1e-3, side="right")) - 1 for moment in moments]
    assert numbers(features) == expected == features["video_metadata"][0].frames_indices
    np.testing.assert_allclose(features["video_metadata"][0].timestamps, times[expected], atol=1.1e-3)


def test_fps_of_the_processor_comes_before_its_num_frames(video_file):
    assert LongVLMVideoProcessor(fps=1.0)(video_file)["num_frames"].tolist() == [6]
    assert LongVLMVideoProcessor(fps=1.0)(video_file, num_frames=8)["num_frames"].tolist() == [8]
    assert LongVLMVideoProcessor()(video_file, fps=1.0)["num_frames"].tolist() == [6]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_frames": 3, "fps": 1.0}, "exclude each other"),
        ({"fps": 1.0}, "frame rate of the video is unknown"),
        ({"short_video": "loop"}, '"loop" is not known'),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LongVLMVideoProcessor()(stack(1, 2, 3), **options)


def test_unknown_options_are_refused(video_file):
    with pytest.raises((TypeError, ValueError)):
        LongVLMVideoProcessor()(video_file, frames=3)
    with pytest.raises(ValueError, match='"best" is not known'):
        LongVLMVideoProcessor(preset="best")


# --- how a frame becomes pixel values ---


@pytest.mark.parametrize("case", [case["name"] for case in PREPROCESS["cases"]])
@pytest.mark.parametrize("preset, way", [("original", "squash"), ("clip", "plain_torchvision")])
def test_presets_give_the_released_pixel_values(golden, case, preset, way):
    if f"{case}.input" in golden:
        video = golden[f"{case}.input"]
    else:  # by the formula in the fixture
        t, y, x, c = np.ogrid[:1, :224, :224, :3]
        video = ((x * (3 + c) + y * (5 - c) + 31 * t + 40 * c + 5) % 256 + 90 * ((x // 7 + y // 5 + t) % 3 == 0)) % 256
        video = video.astype(np.uint8)
    features = LongVLMVideoProcessor(preset=preset)(video, do_sample_frames=False)
    pixels, stride = features["pixel_values_videos"][0], PREPROCESS["stride"]
    assert pixels.dtype == torch.float32 and pixels.shape[1:] == (3, 224, 224)
    expected = golden[f"{case}.{way}.pixel_values"]
    assert (pixels[:, :, ::stride, ::stride] - expected).abs().max() <= 2e-6
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    torch.testing.assert_close(mean, golden[f"{case}.{way}.mean"].to(mean), atol=1e-5, rtol=0)
    torch.testing.assert_close(std, golden[f"{case}.{way}.std"].to(std), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(50, 80), (81, 33), (224, 224), (224, 300), (1, 9)])
@pytest.mark.parametrize(
    "settings",
    {
        "CLIP": {"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}},
        "DINOv2": {
            "size": {"shortest_edge": 256},
            "crop_size": {"height": 224, "width": 224},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        },
        "SigLIP": {
            "size": {"height": 224, "width": 224},
            "do_center_crop": False,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
        },
    }.values(),
)
def test_other_encoders_are_set_up_as_in_their_own_files(settings, shape):
    """The same settings, as these encoders' preprocessor files hold them, give an image processor's pixels."""
    frame = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    processor = LongVLMVideoProcessor(**settings)
    assert dict(processor.size) == {"height": 224, "width": 224}  # servers read it
    ours = processor([Image.fromarray(frame)])["pixel_values_videos"][0, 0]
    theirs = CLIPImageProcessor(resample=3, **settings)(frame, return_tensors="pt", input_data_format="channels_last")
    torch.testing.assert_close(ours, theirs["pixel_values"][0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("shape", [(40, 400), (400, 40), (2, 480), (333, 2500), (37, 1009), (3001, 480), (1, 200)])
@pytest.mark.parametrize(
    "settings", [{}, {"resample": 2}, {"size": {"shortest_edge": 256}, "crop_size": 224}], ids=str
)
def test_extreme_shapes_are_cropped_as_if_they_had_been_scaled_whole(shape, settings):
    coarse = np.random.default_rng(0).integers(0, 256, (max(shape[0] // 3, 1), max(shape[1] // 3, 1), 3), np.uint8)
    picture = Image.fromarray(coarse).resize(shape[::-1], Image.Resampling.BILINEAR)
    processor = LongVLMVideoProcessor(**settings, do_normalize=False, do_rescale=False)
    edge = processor.shortest_edge or 224
    covering = [side * edge // min(shape) for side in shape]
    whole = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    whole = processor.resize(whole, SizeDict(height=covering[0], width=covering[1]), processor.resample)
    expected = processor.center_crop(whole, SizeDict(height=224, width=224))
    difference = (processor([picture])["pixel_values_videos"][0, 0] - expected).abs()
    assert difference.max() <= 2 and difference.mean() < 0.2


def test_the_memory_for_a_frame_follows_the_crop_and_not_the_shape():
    """1920 x 2 pixels that cover 224 x 224 would be 215,040 x 224."""
    made = []

    class Watched(LongVLMVideoProcessor):
        def resize(self, *args, **kwargs):
            made.append(super().resize(*args, **kwargs))
            return made[-1]

    for shape in ((2, 1920), (1920, 2), (1, 100_000), (3000, 250), (560, 125), (125, 560)):
        pixels = Watched()(np.zeros((2, *shape, 3), np.uint8), short_video="once")["pixel_values_videos"]
        assert pixels.shape == (1, 2, 3, 224, 224)
        assert max(frame.numel() for frame in made) <= 9 * 3 * 224 * 224, shape
    # What is kept of a frame holds nothing else alive.
    processor = LongVLMVideoProcessor()
    for do_resize in (True, False):
        options = processor._options({"do_resize": do_resize})
        (kept,) = processor._load(np.zeros((1, 2000, 2000, 3), np.uint8), None, options, None)
        assert kept.frames[0].untyped_storage().nbytes() == 3 * 224 * 224


SAVED = {
    "CLIP's": {"size": {"shortest_edge": 40}, "crop_size": {"height": 36, "width": 36}},
    "ours": LongVLMVideoProcessor(size={"height": 36, "width": 36}).to_dict(),
}


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.parametrize(
    ("given", "size", "shortest_edge"),
    [
        ({"size": 42, "crop_size": 84}, (84, 84), 42),
        ({"size": {"shortest_edge": 42}, "crop_size": {"height": 20, "width": 30}}, (20, 30), 42),
        ({"size": 42, "crop_size": 42}, (42, 42), None),
        ({"size": {"height": 42, "width": 50}}, (42, 50), None),
    ],
)
def test_sizes_given_to_from_dict_replace_the_saved_ones(saved, given, size, shortest_edge):
    processor = LongVLMVideoProcessor.from_dict(SAVED[saved], **given)
    assert (processor.size.height, processor.size.width) == size
    if "crop_size" in given:
        assert processor.shortest_edge == shortest_edge
        frame = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
        clip = CLIPImageProcessor(**given)(frame, return_tensors="pt", input_data_format="channels_last")
        ours = processor([Image.fromarray(frame)])["pixel_values_videos"][0]
        torch.testing.assert_close(ours, clip["pixel_values"], atol=1e-6, rtol=0)


def test_a_crop_size_alone_replaces_the_saved_output_size():
    for saved, edge in (("CLIP's", 40), ("ours", None)):
        processor = LongVLMVideoProcessor.from_dict(SAVED[saved], crop_size=20)
        assert (processor.size.height, processor.shortest_edge) == (20, edge)


def test_any_output_size_covers_or_squashes():
    video, size = stack(5), {"height": 56, "width": 112}
    assert LongVLMVideoProcessor(size=size)(video)["pixel_values_videos"].shape[3:] == (56, 112)
    features = LongVLMVideoProcessor(size=size, **PLAIN)(video)
    assert features["pixel_values_videos"].shape[3:] == (56, 112)
    assert numbers(features) == [5]
    with pytest.raises(ValueError, match="different shapes"):
        LongVLMVideoProcessor(size={"shortest_edge": 56, "longest_edge": 100})


def test_float_frames_within_0_and_1_are_already_rescaled():
    video = stack(3, 9)
    expected = LongVLMVideoProcessor(preset="original")(video)["pixel_values_videos"]
    given = LongVLMVideoProcessor(preset="original")(video.astype(np.float32) / 255)["pixel_values_videos"]
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    large = LongVLMVideoProcessor(preset="original")(video.astype(np.float64))["pixel_values_videos"]
    torch.testing.assert_close(large, expected, atol=1e-5, rtol=0)


# --- the forms of a video ---


def test_every_form_of_a_file_gives_the_same(video_file):
    processor = LongVLMVideoProcessor(**PLAIN, num_frames=4)
    content = pathlib.Path(video_file).read_bytes()
    expected = [18, 55, 93, 130]
    with open(video_file, "rb") as file:
        for form in (video_file, pathlib.Path(video_file), content, io.BytesIO(content), file, [video_file]):
            features = processor(form)
            assert features["pixel_values_videos"].shape == (1, 4, 3, 224, 224)
            assert numbers(features) == expected


def test_every_form_of_frames_gives_the_same():
    processor = LongVLMVideoProcessor(**PLAIN, short_video="once")
    video = stack(7, 300, 4000)
    rgba = np.concatenate([video, np.full_like(video[..., :1], 7)], axis=-1)
    pictures = [Image.fromarray(frame) for frame in video]
    forms = {
        "THWC": video,
        "TCHW": video.transpose(0, 3, 1, 2),
        "torch THWC": torch.from_numpy(video),
        "torch TCHW": torch.from_numpy(video).permute(0, 3, 1, 2),
        "5D": video[None],
        "grey THW1": video[..., :1],
        "RGBA": rgba,
        "list of arrays": list(video),
        "list of grey arrays": list(video[..., 0]),
        "list of tensors": list(torch.from_numpy(video)),
        "pictures": pictures,
        "tuple of pictures": tuple(pictures),
        "grey pictures": [picture.convert("L") for picture in pictures],
        "RGBA pictures": [picture.convert("RGBA") for picture in pictures],
        "palette pictures": [picture.convert("P") for picture in pictures],
        "pictures of mixed sizes": [picture.resize((40 + 9 * i, 64)) for i, picture in enumerate(pictures)],
        "nested": [[pictures]],
        "uint16": video.astype(np.uint16) << 8,
        "int64": video.astype(np.int64),
    }
    for name, form in forms.items():
        features = processor(form)
        assert features["pixel_values_videos"].shape == (1, 3, 3, 224, 224), name
        assert numbers(features) == [7, 300, 4000], name


def test_grey_videos_and_single_pictures():
    processor = LongVLMVideoProcessor(**PLAIN, short_video="once")
    grey = stack(*range(5))[..., 0]
    assert numbers(processor(grey)) == list(range(5))
    assert numbers(processor(Image.fromarray(numbered_frame(77)))) == [77]
    assert numbers(processor(numbered_frame(77))) == [77]


def test_directories_of_frames(tmp_path):
    for number in range(12):
        Image.fromarray(numbered_frame(number)).save(tmp_path / f"{number}.jpg", quality=95)
    features = LongVLMVideoProcessor(**PLAIN, num_frames=3)(tmp_path, return_metadata=True)
    assert numbers(features) == features["video_metadata"][0].frames_indices == [2, 5, 9]
    paths = [str(tmp_path / "3.jpg"), str(tmp_path / "11.jpg")]
    features = LongVLMVideoProcessor(**PLAIN)([[paths]], do_sample_frames=False)  # as chat templates give frames
    assert numbers(features) == [3, 11]


def test_videos_of_different_length_are_filled_with_zeros(video_file):
    processor = LongVLMVideoProcessor(short_video="once", num_frames=6)
    features = processor([stack(1, 2), video_file, [Image.fromarray(numbered_frame(3))]])
    pixels, counts = features["pixel_values_videos"], features["num_frames"]
    assert pixels.shape == (3, 6, 3, 224, 224) and pixels.dtype == torch.float32
    assert counts.tolist() == [2, 6, 1] and counts.dtype == torch.int64
    assert not pixels[0, 2:].any() and not pixels[2, 1:].any()
    for row, video in enumerate([stack(1, 2), video_file, stack(3)]):  # as if alone
        alone = processor(video)["pixel_values_videos"][0]
        torch.testing.assert_close(pixels[row, : len(alone)], alone, atol=0, rtol=0)


@pytest.mark.parametrize("kind, expected", [(None, torch.Tensor), ("pt", torch.Tensor), ("np", np.ndarray)])
def test_return_tensors(kind, expected):
    features = LongVLMVideoProcessor()(stack(1, 2), return_tensors=kind)
    assert list(features) == LongVLMVideoProcessor.model_input_names
    assert all(isinstance(value, expected) for value in features.values())


@pytest.mark.parametrize("shape", [(0, 8, 8, 3), (2, 8, 8, 7), (5,), None])
def test_arrays_that_are_no_video_are_refused(shape):
    with pytest.raises(ValueError) as caught:
        LongVLMVideoProcessor()(np.zeros(shape, np.uint8) if shape else [])
    assert "\n" not in str(caught.value)


# --- metadata ---


def test_metadata_names_source_frames_and_real_times(uneven_file):
    features = LongVLMVideoProcessor(**PLAIN, num_frames=10)(uneven_file, return_metadata=True)
    (metadata,) = features["video_metadata"]
    assert metadata.total_num_frames == 150
    assert metadata.frames_indices == numbers(features)
    assert metadata.fps == pytest.approx(149_000 / uneven_times(150)[-1], rel=1e-3)
    np.testing.assert_allclose(
        metadata.timestamps, np.array(uneven_times(150))[metadata.frames_indices] / 1000, atol=1.1e-3
    )


def test_frames_sampled_before_keep_their_source_indices():
    """As servers pass them: frames with metadata, not to be sampled again."""
    given = {"total_num_frames": 500, "fps": 25.0, "frames_indices": [50, 150, 250, 450]}
    processor = LongVLMVideoProcessor(**PLAIN)
    features = processor(stack(1, 2, 3, 4), video_metadata=given, do_sample_frames=False, return_metadata=True)
    (metadata,) = features["video_metadata"]
    assert metadata.frames_indices == [50, 150, 250, 450]
    assert (metadata.fps, metadata.total_num_frames) == (25.0, 500)
    assert metadata.timestamps == [2.0, 6.0, 10.0, 18.0]

    options = {"video_metadata": [VideoMetadata(**given)], "return_metadata": True}
    features = processor([stack(1, 2, 3, 4)], num_frames=2, **options)
    (metadata,) = features["video_metadata"]
    assert numbers(features) == [2, 3]
    assert metadata.frames_indices == [150, 250]
    assert metadata.fps == 25.0


def test_frames_decoded_before_keep_their_real_times(uneven_file):
    processor = LongVLMVideoProcessor(**PLAIN)
    frames, metadata = processor.fetch_videos(uneven_file, lambda metadata: [3, 40, 120])
    assert frames.dtype == torch.uint8 and frames.shape[:2] == (3, 3)
    features = processor(frames, video_metadata=metadata, do_sample_frames=False, return_metadata=True)
    assert numbers(features) == [3, 40, 120]
    expected = np.array(uneven_times(150))[[3, 40, 120]] / 1000
    np.testing.assert_allclose(features["video_metadata"][0].timestamps, expected, atol=1.1e-3)


def test_metadata_of_another_number_of_videos_is_refused():
    with pytest.raises(ValueError, match="1 videos but 2 entries"):
        LongVLMVideoProcessor()(stack(1, 2), video_metadata=[VideoMetadata(2), VideoMetadata(2)])


def test_a_file_can_be_taken_whole_but_not_by_accident(video_file):
    assert LongVLMVideoProcessor()(video_file, do_sample_frames=False)["num_frames"].tolist() == [150]
    with pytest.raises(ValueError, match="150 frames, more than 100"):
        LongVLMVideoProcessor()(video_file, do_sample_frames=False, max_frames=100)


def test_fetch_videos_follows_the_base_class(video_file):
    """transformers' own code calls it with one path or a list of them."""
    processor = LongVLMVideoProcessor()
    frames, metadata = processor.fetch_videos(video_file)
    assert frames.shape[:2] == (150, 3) and metadata.total_num_frames == 150
    videos, metadata = processor.fetch_videos([video_file, video_file], processor.sample_frames)
    assert [len(video) for video in videos] == [100, 100]
    assert [read_number(frame) for frame in videos[1]] == metadata[1].frames_indices


def test_sound_is_ignored(video_file):
    """Servers ask every processor to load the sound; a silent video must not fail."""
    assert LongVLMVideoProcessor(num_frames=2)(video_file, load_audio_from_video=True)["num_frames"].tolist() == [2]


def test_progress_counts_decoded_frames(video_file):
    seen = []
    LongVLMVideoProcessor(num_frames=5)(video_file, progress=lambda stage, done, total: seen.append((done, total)))
    assert sorted(seen) == [(i, 5) for i in range(1, 6)]


# --- saving ---


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"preset": "original", "num_frames": 16, "short_video": "stretch"},
        {"fps": 2.0, "max_frames": 64, "image_mean": [0.5] * 3, "size": {"height": 56, "width": 56}},
        {"size": {"shortest_edge": 256}, "crop_size": 224},
    ],
)
def test_saving_and_loading_keeps_everything(tmp_path, video_file, settings):
    processor = LongVLMVideoProcessor(**settings)
    processor.save_pretrained(tmp_path)
    loaded = LongVLMVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    torch.testing.assert_close(
        loaded(video_file)["pixel_values_videos"], processor(video_file)["pixel_values_videos"], atol=0, rtol=0
    )


def test_a_preset_can_be_changed_when_loading(tmp_path):
    LongVLMVideoProcessor(num_frames=7).save_pretrained(tmp_path)
    loaded = LongVLMVideoProcessor.from_pretrained(tmp_path, preset="original")
    assert (loaded.do_center_crop, loaded.resample, loaded.num_frames) == (False, 0, 7)


def test_the_saved_folder_loads_as_remote_code(tmp_path, video_file):
    LongVLMVideoProcessor(num_frames=3, **PLAIN).save_pretrained(tmp_path)
    code = {path.name for path in tmp_path.glob("*.py")}
    assert {"video_processing_longvlm.py", "video_decoding.py", "video_index.py", "video_reader.py"} <= code
    assert not {"processing_longvlm.py", "modeling_longvlm.py"} & code
    loaded = AutoVideoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert numbers(loaded(video_file)) == [25, 74, 124]


# --- piece by piece ---


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_the_pieces_of_a_video_are_the_video(video_file, size):
    processor = LongVLMVideoProcessor(num_frames=40)
    whole = processor(video_file, return_tensors="pt")["pixel_values_videos"][0]
    pieces = list(processor.iter_pixel_values(video_file, frames_per_piece=size))
    assert [len(piece) for piece in pieces[:-1]] == [size] * (len(pieces) - 1) and len(pieces[-1]) <= size
    assert torch.equal(torch.cat(pieces), whole)


@pytest.mark.parametrize(
    "options", [{"fps": 10}, {"num_frames": 200, "short_video": "stretch"}, {"num_frames": 7}], ids=str
)
def test_pieces_follow_the_options_and_tell_progress(video_file, uneven_file, options):
    processor = LongVLMVideoProcessor()
    for video in (video_file, uneven_file, stack(*range(20))):
        if "fps" in options and not isinstance(video, str):
            continue  # frames without times
        told = []
        whole = processor(video, return_tensors="pt", **options)["pixel_values_videos"][0]
        report = {"progress": lambda *step: told.append(step)}  # noqa: B023
        pieces = list(processor.iter_pixel_values(video, frames_per_piece=6, **report, **options))
        assert torch.equal(torch.cat(pieces), whole)
        assert told[-1] == ("decode", len(whole), len(whole)) and told == sorted(told)


def test_a_video_may_be_left_after_a_piece(video_file):
    with open(video_file, "rb") as file:
        pieces = LongVLMVideoProcessor(num_frames=30).iter_pixel_values(file, frames_per_piece=10)
        assert len(next(pieces)) == 10
        pieces.close()
        assert not file.closed  # it is the caller's
    with pytest.raises(ValueError, match="frames_per_piece"):
        next(LongVLMVideoProcessor().iter_pixel_values(video_file, frames_per_piece=0))


@pytest.mark.parametrize(
    "options", [{"fps": 2, "max_frames": 0}, {"fps": 2, "max_frames": -1}, {"fps": float("nan")}, {"fps": 0}], ids=str
)
def test_impossible_sampling_is_named(video_file, options):
    name, value = list(options.items())[-1]
    with pytest.raises(ValueError, match=f"`{name}` is {value};"):
        LongVLMVideoProcessor()(video_file, **options)


def test_sampling_takes_any_mapping_of_metadata():
    metadata = {"total_num_frames": 50, "fps": 25.0, "something_else": 1}
    assert len(LongVLMVideoProcessor().sample_frames(metadata, num_frames=5)) == 5
