"""The configuration: the paper's numbers by default, JSON and back, impossible values refused in one line."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, CLIPConfig, LlamaConfig, Qwen3Config, SiglipConfig

from longvlm import LongVLMConfig, LongVLMForConditionalGeneration
from tests.helpers.tiny_models import tiny_config, tiny_longvlm, tiny_text_config, tiny_vision_config


def test_defaults_are_the_papers():
    config = LongVLMConfig()
    assert config.patches_per_frame == 256
    assert config.num_video_tokens(100) == 305
    assert config.vision_config.hidden_size == 1024
    assert config.text_config.model_type == "llama"


def test_the_released_schedule_ends_at_205_tokens():
    released = [2880, 1440, 720, 360, 180, 90, 40]
    config = LongVLMConfig(merge_schedule=released)
    assert config.tokens_per_segment == 20
    assert config.num_video_tokens(100) == 205
    assert LongVLMConfig(merge_schedule=released, image_size=336).tokens_per_segment == 50


@pytest.mark.parametrize(("frames", "tokens"), [(1, 5 + 30), (10, 35), (11, 65), (95, 305), (101, 335), (3600, 10805)])
def test_number_of_video_tokens(frames, tokens):
    assert LongVLMConfig().num_video_tokens(frames) == tokens


def test_a_segment_with_fewer_patches_than_tokens_is_not_merged():
    config = tiny_config(tokens_per_segment=100, num_global_layers=0)
    assert config.num_video_tokens(4) == 64
    assert config.num_video_tokens(5) == 64 + 16


def test_json_round_trip(tmp_path):
    config = tiny_config(
        merge_schedule=[30, 20], merge_order="time", global_placement="suffix", projector_type="mlp2x_gelu"
    )
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is LongVLMConfig
    assert {**again.to_dict(), "_name_or_path": ""} == config.to_dict()
    again.save_pretrained(tmp_path / "again")
    first, second = (json.loads((d / "config.json").read_text()) for d in (tmp_path, tmp_path / "again"))
    assert first == second
    assert type(again.text_config) is LlamaConfig
    assert again.get_text_config() is again.text_config


def test_positional_and_keyword_sub_configurations():
    vision, text = tiny_vision_config(), tiny_text_config()
    for config in (
        LongVLMConfig(vision, text, merge_num_heads=4, num_global_layers=2),
        LongVLMConfig(
            vision_config=vision.to_dict(), text_config=text.to_dict(), merge_num_heads=4, num_global_layers=2
        ),
    ):
        assert config.vision_config.hidden_size == 64 and config.text_config.hidden_size == 32


@pytest.mark.parametrize("whole", [CLIPConfig(), SiglipConfig()], ids=lambda c: c.model_type)
def test_the_vision_part_of_a_two_tower_configuration_is_taken(whole):
    assert LongVLMConfig(whole).vision_config.model_type == whole.vision_config.model_type
    assert LongVLMConfig(whole.to_dict()).vision_config.to_dict() == whole.vision_config.to_dict()


def test_token_ids_default_to_the_last_rows():
    config = LongVLMConfig(text_config=Qwen3Config(vocab_size=1000))
    assert (config.video_token_id, config.video_start_token_id, config.video_end_token_id) == (997, 998, 999)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokens_per_segment": 0}, ["tokens_per_segment", "0", "1"]),
        ({"frames_per_segment": 0}, ["frames_per_segment", "0", "1"]),
        ({"frames_per_segment": 2.5}, ["frames_per_segment", "2.5"]),
        ({"num_global_layers": 3}, ["num_global_layers", "3", "2"]),
        ({"num_global_layers": -1}, ["num_global_layers", "-1", "0"]),
        ({"vision_feature_layer": -4}, ["vision_feature_layer", "-4", "-3"]),
        ({"vision_feature_layer": 3}, ["vision_feature_layer", "3", "2"]),
        ({"merge_num_heads": 5}, ["merge_num_heads", "5", "64"]),
        ({"merge_schedule": [4, 0]}, ["merge_schedule", "0"]),
        ({"merge_similarity": "l2"}, ["merge_similarity", "'l2'", "'per_head'"]),
        ({"merge_order": "space"}, ["merge_order", "'space'", "'time'"]),
        ({"global_placement": "middle"}, ["global_placement", "'middle'", "'none'"]),
        ({"projector_type": "qformer"}, ["projector_type", "'qformer'", "'linear'"]),
        ({"vision_chunk_frames": 0}, ["vision_chunk_frames", "0"]),
        ({"image_size": 10}, ["10 x 10", "14 x 14"]),
        ({"image_size": "x"}, ["image_size", "'x'"]),
        ({"merge_schedule": 5}, ["merge_schedule", "5"]),
        ({"video_end_token_id": 5, "video_start_token_id": 5}, ["ids of their own", "5"]),
        ({"video_token_id": -1}, ["video_token_id", "-1"]),
    ],
)
def test_impossible_values_are_named(options, words):
    with pytest.raises(ValueError) as error:
        tiny_config(**options)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vision_config": {"model_type": "no_such_encoder"}}, ["vision_config", "'no_such_encoder'"]),
        ({"text_config": "meta-llama"}, ["text_config", "str"]),
        ({"vision_config": {"model_type": "resnet"}}, ["vision_config", "'resnet'", "patch_size"]),
        ({"vision_config": {"model_type": "convnext"}}, ["vision_config", "'convnext'", "hidden_size"]),
        ({"vision_config": {"model_type": "llama"}}, ["vision_config", "'llama'", "image_size"]),
        ({"text_config": {"model_type": "t5"}}, ["text_config", "'t5'", "causal"]),
        ({"text_config": {"model_type": "vit"}}, ["text_config", "'vit'", "causal"]),
    ],
)
def test_unknown_sub_configurations_are_named(options, words):
    with pytest.raises(ValueError) as error:
        LongVLMConfig(**options)
    for word in words:
        assert word in str(error.value)


def test_the_text_part_of_a_composite_configuration_is_taken():
    assert LongVLMConfig(text_config={"model_type": "gemma3"}).text_config.model_type == "gemma3_text"


def test_whole_numbers_of_any_kind():
    assert (
        LongVLMConfig().num_video_tokens(np.int64(100)) == LongVLMConfig().num_video_tokens(torch.tensor(100)) == 305
    )


def test_a_schedule_set_later_is_heeded(tmp_path):
    model, _ = tiny_longvlm()
    model.save_pretrained(tmp_path)
    again = LongVLMForConditionalGeneration.from_pretrained(tmp_path, merge_schedule=[20, 10])
    assert again.config.tokens_per_segment == 64 - 30
    again.config.merge_schedule = [32, 16]
    features = again.get_video_features(torch.randn(1, 4, 3, 56, 56))
    assert len(features.local_features[0]) == again.config.tokens_per_segment == 16


def test_no_frame_is_no_video():
    with pytest.raises(ValueError, match="num_frames"):
        LongVLMConfig().num_video_tokens(0)
