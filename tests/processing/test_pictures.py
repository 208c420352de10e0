"""Pictures from others: large ones in bounded memory, broken ones as one line."""

import io
import os
import random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from longvlm.processing import pictures
from longvlm.processing.video_decoding import VideoDecodeError, VideoDecodeWarning, decode_video, probe_video
from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor
from tests.helpers.memory import peak_below
from tests.helpers.video_files import numbered_frame

FORMATS = {"png": "PNG", "jpg": "JPEG", "bmp": "BMP", "webp": "WEBP", "tif": "TIFF", "ppm": "PPM"}
KINDS = (
    *("RGB png", "L png", "P png", "1 png", "RGBA png", "LA png", "I;16 png"),
    *("RGB jpg", "L jpg", "CMYK jpg", "RGB webp", "RGB bmp", "RGB tif"),
)
# A saved picture's orientation, and what brings it upright.
ORIENTATIONS = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 5: Image.Transpose.TRANSPOSE}


def smooth_picture(mode, width=96, height=64):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(noise).filter(ImageFilter.GaussianBlur(6))
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) << 8)
    return image.quantize(200) if mode == "P" else image.convert(mode)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_large_picture_is_read_smaller(tmp_path, monkeypatch, kind, orientation):
    """Whatever its mode and format: the same picture, upright, at a fraction of its size."""
    mode, suffix = kind.split()
    path = tmp_path / f"picture.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth_picture(mode).save(path, exif=exif)
    whole = decode_video(path).frames[0]
    monkeypatch.setattr(pictures, "MAX_PIXELS", 24 * 16)
    monkeypatch.setattr(pictures, "_BAND", 96 * 8)  # several bands
    decoded = decode_video(tmp_path)
    small = decoded.frames[0]
    assert small.shape[0] * small.shape[1] <= 24 * 16
    assert small.shape[0] * whole.shape[1] == small.shape[1] * whole.shape[0]
    assert (decoded.metadata.height, decoded.metadata.width) == whole.shape[:2]  # those of the file
    factor = whole.shape[0] // small.shape[0]
    expected = whole.reshape(small.shape[0], factor, small.shape[1], factor, 3).mean((1, 3))
    assert np.abs(expected - small).max() <= (12 if suffix == "jpg" else 1)


def test_a_picture_below_the_limit_is_read_as_it_is(tmp_path, monkeypatch):
    smooth_picture("RGB").save(tmp_path / "1.png")
    monkeypatch.setattr(pictures, "MAX_PIXELS", 96 * 64)
    np.testing.assert_array_equal(decode_video(tmp_path).frames[0], np.asarray(smooth_picture("RGB")))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_huge_picture_takes_little_memory(tmp_path, suffix):
    """144 million pixels: 432 MB as RGB, and several times that if copies are made at full size."""
    Image.new("L", (12_000, 12_000), 90).save(tmp_path / f"1.{suffix}", compress_level=1)
    processor = LongVLMVideoProcessor(num_frames=1)
    with peak_below(700):
        pixels = processor(tmp_path, do_normalize=False)["pixel_values_videos"]
    np.testing.assert_allclose(pixels, 90 / 255, atol=0.01)


def test_a_list_of_frame_files_is_read_one_by_one(tmp_path):
    for number in range(30):
        Image.new("L", (2000, 1000), number).save(tmp_path / f"{number}.png")
    files = [str(tmp_path / f"{number}.png") for number in range(30)]
    processor = LongVLMVideoProcessor(num_frames=10)
    with peak_below(120):  # all together: 180 MB
        listed = processor([[files]], return_metadata=True)
    folder = processor(tmp_path)
    np.testing.assert_array_equal(listed["pixel_values_videos"], folder["pixel_values_videos"])
    assert (listed["video_metadata"][0].height, listed["video_metadata"][0].width) == (1000, 2000)


def test_a_picture_past_pillows_limit_is_one_line(tmp_path, monkeypatch):
    folder = tmp_path / "frames"
    folder.mkdir()
    first = Image.fromarray(numbered_frame(1))
    first.save(folder / "1.png")
    animation = tmp_path / "animation.gif"
    first.save(animation, save_all=True, append_images=[Image.fromarray(numbered_frame(2))])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    processor = LongVLMVideoProcessor(num_frames=1)
    for video in (folder, folder / "1.png", [[[str(folder / "1.png")]]], animation, animation.read_bytes()):
        reason = r"(1\.png|animation\.gif|bytes>): the picture has more than 2,000 pixels, Pillow's limit; scale it"
        with pytest.raises(VideoDecodeError, match=reason) as caught:
            processor(video)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")  # Pillow's own
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_broken_picture_is_read_or_refused_in_one_line(tmp_path, suffix):
    """Pillow raises a dozen kinds of errors on broken files."""
    whole, chance = io.BytesIO(), random.Random(suffix)
    smooth_picture("RGB", 40, 30).save(whole, format=FORMATS[suffix])
    content, path, refused = whole.getvalue(), tmp_path / f"1.{suffix}", 0
    for attempt in range(150):
        broken = bytearray(content)
        for _ in range(chance.randint(1, 8)):  # mostly in the header, where it matters
            broken[chance.randrange(len(broken) if chance.random() < 0.3 else 60)] = chance.choice(
                (0, 1, 127, 255, chance.randrange(256))
            )
        path.write_bytes(broken[: chance.randrange(len(broken))] if attempt % 4 == 0 else broken)
        try:
            decode_video(tmp_path)
        except VideoDecodeError as error:
            refused += 1
            assert f"1.{suffix}: " in str(error) and "\n" not in str(error)
    assert refused > 20


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_a_broken_animation_is_read_or_refused_in_one_line(suffix):
    whole, chance = io.BytesIO(), random.Random(suffix)
    frames = [smooth_picture("RGB", 40, 30).rotate(90 * turn) for turn in range(4)]
    frames[0].save(whole, format=suffix, save_all=True, append_images=frames[1:], duration=40)
    content, refused = whole.getvalue(), 0
    for attempt in range(150):
        broken = bytearray(content)
        for _ in range(chance.randint(1, 8)):
            broken[chance.randrange(len(broken))] = chance.choice((0, 1, 127, 255, chance.randrange(256)))
        video = bytes(broken[: chance.randrange(1, len(broken))] if attempt % 4 == 0 else broken)
        for read in (decode_video, probe_video):
            try:
                read(video)
            except VideoDecodeError as error:
                refused += 1
                assert "bytes>: " in str(error) and "\n" not in str(error)
    assert refused > 20


def test_a_large_animation_is_read_smaller(tmp_path, monkeypatch):
    frames = [Image.fromarray(numbered_frame(number, 320, 64)) for number in range(3)]
    path = tmp_path / "animation.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    whole = decode_video(path)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 160 * 32)
    small = decode_video(path)
    for frame, reduced in zip(whole.frames, small.frames, strict=True):
        expected = frame.reshape(32, 2, 160, 2, 3).mean((1, 3))
        assert np.abs(expected - reduced).max() <= 1
    assert (small.metadata.height, small.metadata.width) == (64, 320)


def test_a_folder_in_which_a_frame_is_a_pipe_or_a_folder_is_refused(tmp_path):
    for number, make in enumerate((os.mkfifo, os.mkdir)):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / "1.png")
        with pytest.raises(VideoDecodeError, match=r"1\.png: not a file"):
            decode_video(folder)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_a_cut_animation_gives_the_frames_that_are_left(suffix):
    whole = io.BytesIO()
    frames = [smooth_picture("RGB", 40, 30).rotate(45 * turn) for turn in range(8)]
    frames[0].save(whole, format=suffix, save_all=True, append_images=frames[1:], duration=40)
    content = whole.getvalue()
    cut = content[: len(content) * 6 // 10]
    if suffix == "webp":  # its decoder takes only whole files
        with pytest.raises(VideoDecodeError, match="bytes>: "):
            decode_video(cut)
        return
    with pytest.warns(VideoDecodeWarning, match="bytes>: the animation is cut or damaged: .* frames"):
        decoded = decode_video(cut)
    assert 3 <= len(decoded.frames) <= 5
    for frame, expected in zip(decoded.frames, decode_video(content).frames, strict=False):
        np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("shape", [(60_000, 2), (2, 60_000), (40_000, 30)])
def test_a_picture_of_extreme_shape_takes_no_more_memory_than_its_crop(tmp_path, shape):
    """60,000 x 2 pixels that cover 224 x 224 would be 4.5 GB."""
    frames = tmp_path / "frames"
    frames.mkdir()
    shades = [Image.new("RGB", shape, (20 * number, 90, 10)) for number in range(5)]
    for number, image in enumerate(shades):
        image.save(frames / f"{number}.png")
    animation = tmp_path / "animation.gif"
    shades[0].save(animation, save_all=True, append_images=shades[1:])
    processor = LongVLMVideoProcessor(num_frames=5, short_video="once", do_normalize=False)
    processor(frames / "0.png", num_frames=1)  # what is loaded once
    for video in (frames, animation, animation.read_bytes(), frames / "1.png", shades):
        with peak_below(100):
            pixels = processor(video)["pixel_values_videos"][0]
        assert pixels.shape[1:] == (3, 224, 224)
        np.testing.assert_allclose(pixels[:, 1], 90 / 255, atol=0.02)
