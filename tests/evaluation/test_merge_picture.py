"""`longvlm inspect`: the picture shows the assignment that the features were made with."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import longvlm
from longvlm.evaluation.merge_picture import draw_merging
from tests.helpers.tiny_models import noise_video, save_tiny_longvlm, tiny_longvlm
from tests.helpers.video_files import write_video


def halves(number, width, height):
    """A dark and a bright half that change places every 4 frames."""
    frame = np.full((height, width, 3), 30, np.uint8)
    frame[:, : width // 2] = (200, 40, 40)
    return frame if number // 4 % 2 else np.ascontiguousarray(frame[:, ::-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_longvlm(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("options", [{}, {"merge_order": "time"}, {"vision_chunk_frames": 3}], ids=str)
def test_the_assignment_is_that_of_the_features(options):
    model, _ = tiny_longvlm(**options)
    pixels = noise_video(10)[0]
    assignment = model.model.get_token_assignment(pixels)
    features = model.get_video_features(pixels[None]).local_features[0]
    assert assignment.shape == (10, 16)
    patches = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    for token, feature in enumerate(features):
        torch.testing.assert_close(feature, patches[assignment == token].mean(0), atol=1e-5, rtol=1e-4)


def test_a_picture_of_what_was_merged(folder, tmp_path):
    film = write_video(tmp_path / "film.mp4", 40, draw=halves, size=(128, 128))
    numbers = draw_merging(
        longvlm.load(folder), film, tmp_path / "deep" / "film.png", num_frames=10, segments=2, frames=3
    )
    assert numbers == {"frames": 10, "segments": 3, "patches": 160, "local_tokens": 18, "global_tokens": 2}
    picture = np.asarray(Image.open(tmp_path / "deep" / "film.png").convert("RGB")).astype(int)
    red = (picture[..., 0] > 150) & (picture[..., 1] < 90)
    assert 0.1 < red.mean() < 0.5  # the red halves are seen, in the frames and in the tokens
    assert not list((tmp_path / "deep").glob("*.png"))[1:]


def test_the_command(folder, tmp_path):
    film = write_video(tmp_path / "film.mp4", 20)
    command = [sys.executable, "-m", "longvlm", "inspect", film, "--model", str(folder)]
    done = subprocess.run([*command, "--out", str(tmp_path / "film.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "film.png")
    assert Image.open(tmp_path / "film.png").format == "PNG"
    wrong = subprocess.run([*command, "--out", str(tmp_path / "film.jpg")], capture_output=True, text=True)
    assert wrong.returncode == 2 and ".png" in wrong.stderr.splitlines()[-1] and "Traceback" not in wrong.stderr
