"""transformers' common tests of processors, on ours."""

import tempfile
import unittest
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from longvlm import LongVLMProcessor, LongVLMVideoProcessor
from tests.helpers.tiny_models import tiny_tokenizer
from tests.helpers.transformers_suites import FOLDER, differs, load_suite
from tests.helpers.video_files import write_video

if not FOLDER.exists():
    pytest.skip("transformers' suites are not here; run: make test-suites", allow_module_level=True)

FILES = tempfile.TemporaryDirectory()


def local_path(url: str) -> str:
    """A small file of our own for a picture or a video on the Hub that the suite names."""
    path = Path(FILES.name, url.rpartition("/")[2])
    if path.suffix in (".jpg", ".png"):
        Image.fromarray(np.zeros((40, 60, 3), dtype=np.uint8)).save(path)
    elif path.suffix == ".mp4":
        write_video(path, 11)
    return str(path)


suite = load_suite("test_processing_common", local_path)


@differs(
    {
        "test_chat_template_message_objects": (
            "parts of type .* not image_url",
            "an image in the conversation is refused; messages that are objects are in test_chat_messages.py",
        ),
        "test_get_num_multimodal_tokens_matches_processor_call": ("text and videos, not images", "it counts images"),
        "test_apply_chat_template_video_frame_sampling": (
            "ValueError not raised",
            "frames may also be sampled from pictures, the last step of the test",
        ),
    }
)
class TestProcessor(suite.ProcessorTesterMixin, unittest.TestCase):
    processor_class = LongVLMProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()

    @classmethod
    def _setup_video_processor(cls):
        return LongVLMVideoProcessor(size={"height": 56, "width": 56})

    @property
    def video_sampling_expectations(self):
        # 0.44 seconds at 10 frames a second: rounded, where others round down.
        cases = super().video_sampling_expectations
        (by_time,) = (case for case in cases if case.get("fps") and case.get("do_sample_frames", True))
        by_time["output_length"] = 4
        return cases
