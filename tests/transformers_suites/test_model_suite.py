"""transformers' common tests of models and configurations, on a tiny LongVLM."""

import unittest
from unittest.mock import patch

import pytest
import torch
from transformers.models.auto import modeling_auto

from longvlm import LongVLMConfig, LongVLMForConditionalGeneration, LongVLMModel
from tests.helpers.tiny_models import tiny_config
from tests.helpers.transformers_suites import FOLDER, differs, load_suite

if not FOLDER.exists():
    pytest.skip("transformers' suites are not here; run: make test-suites", allow_module_level=True)
suite = load_suite("test_modeling_common")
configurations = load_suite("test_configuration_common")


class LongVLMTester:
    """A tiny LongVLM and its inputs: prompts with one video each."""

    batch_size, frames, text_length = 3, 6, 7
    is_training = True

    def __init__(self):
        config = self.get_config()
        text = config.text_config
        self.hidden_size, self.num_hidden_layers = text.hidden_size, text.num_hidden_layers
        self.num_attention_heads = text.num_attention_heads
        self.image_size = config.vision_config.image_size
        self.video_tokens = config.num_video_tokens(self.frames)
        self.seq_length = self.encoder_seq_length = self.video_tokens + self.text_length

    def get_config(self):
        # Some tests cut the last rows off the embeddings, where the video tokens are otherwise.
        return tiny_config(video_token_id=3, video_start_token_id=4, video_end_token_id=5)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        words = torch.randint(6, config.text_config.vocab_size, (self.batch_size, self.text_length))
        video = torch.full((self.batch_size, self.video_tokens), config.video_token_id)
        input_ids = torch.cat([words[:, :2], video, words[:, 2:]], dim=1)
        return config, {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values_videos": torch.rand(self.batch_size, self.frames, 3, self.image_size, self.image_size),
        }


@differs(
    {
        "test_can_init_all_missing_weights": (
            "not properly handled .*\n{'`weight` in module `Linear` called from `CLIPPreTrainedModel`",
            "transformers skips CLIP's own initialization inside of models that are not transformers' own",
        ),
        "test_generation_tester_mixin_inheritance": (
            "must inherit from `GenerationTesterMixin`",
            "the archive lacks the tests of generate(); ours are tests/modeling_longvlm/test_generation.py",
        ),
        "test_multimodal_outputs_are_returned": (
            r"^False is not true$",
            "it wants image_outputs; for video_outputs see tests/modeling_longvlm/test_modeling.py",
        ),
    }
)
class TestModel(suite.ModelTesterMixin, unittest.TestCase):
    all_model_classes = (LongVLMModel, LongVLMForConditionalGeneration)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True  # it looks for the year in our files, which have none
    # The encoder's last norm is for its own pooled output, which the method does not read; see the test below.
    test_all_params_have_gradient = False

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        # By these tables the suite knows which labels a class takes.
        for table, name in (
            (modeling_auto.MODEL_MAPPING_NAMES, "LongVLMModel"),
            (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "LongVLMForConditionalGeneration"),
        ):
            cls.enterClassContext(patch.dict(table, longvlm=name))

    def setUp(self):
        self.model_tester = LongVLMTester()
        self.config_tester = configurations.ConfigTester(self, config_class=LongVLMConfig, has_text_modality=False)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_all_parameters_that_are_read_have_gradients(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        model = LongVLMForConditionalGeneration(config).train()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        unread = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert unread == {f"model.vision_tower.post_layernorm.{name}" for name in ("weight", "bias")}
