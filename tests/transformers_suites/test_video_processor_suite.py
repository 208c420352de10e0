"""transformers' common tests of video processors, on ours."""

import unittest

import pytest

from longvlm import LongVLMVideoProcessor
from tests.helpers.transformers_suites import FOLDER, differs, load_suite

if not FOLDER.exists():
    pytest.skip("transformers' suites are not here; run: make test-suites", allow_module_level=True)
suite = load_suite("test_video_processing_common")


class Tester:
    """Random videos, and what the processor should make of them."""

    batch_size, num_frames, num_channels, side = 5, 8, 3, 18
    min_resolution, max_resolution = 30, 80

    def prepare_video_inputs(self, equal_resolution=False, return_tensors="pil"):
        return suite.prepare_video_inputs(
            self.batch_size,
            self.num_frames,
            self.num_channels,
            self.min_resolution,
            self.max_resolution,
            equal_resolution=equal_resolution,
            return_tensors=return_tensors,
        )

    def expected_output_video_shape(self, videos):
        return self.num_frames, self.num_channels, self.side, self.side


@differs(
    {
        "test_call_sample_frames": (
            "ValueError not raised",
            "asking for more frames than there are takes what there is; the last step of the test",
        ),
        "test_video_processor_from_dict_with_kwargs": (
            "!= {'shortest_edge': 20}",
            "`size` is the output size, what others call crop_size; see test_sizes_given_to_from_dict... in "
            "tests/processing/test_video_processing.py",
        ),
    }
)
class TestVideoProcessor(suite.VideoProcessingTestMixin, unittest.TestCase):
    fast_video_processing_class = LongVLMVideoProcessor
    test_cast_dtype = True

    def setUp(self):
        super().setUp()
        self.video_processor_tester = Tester()

    @property
    def video_processor_dict(self):
        return {
            "do_resize": True,
            "size": {"shortest_edge": 20} if "from_dict" in self.id() else {"height": 18, "width": 18},
            "do_center_crop": True,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "do_convert_rgb": True,
            "num_frames": 8,
        }
