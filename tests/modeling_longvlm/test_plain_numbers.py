"""Numbers of any kind are numbers, in every option: NumPy's, torch's, whole floats; what is no number is refused."""

import json
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from longvlm import LongVLMProcessor, LongVLMVideoProcessor, VideoQuestionAnsweringPipeline
from longvlm.evaluation.merge_picture import draw_merging
from longvlm.features.extract import extract_features
from longvlm.modeling_longvlm.engine_longvlm import LongVLMEngine
from longvlm.modeling_longvlm.token_merging import derive_schedule, merge_tokens
from longvlm.training.collator import LongVLMDataCollator
from longvlm.training.data import build_dataset
from tests.helpers.tiny_models import tiny_config, tiny_longvlm
from tests.helpers.tokenizers_for_tests import byte_level_tokenizer

KINDS = (np.int64, np.int32, np.uint8, float, np.float32, np.float64, torch.tensor, lambda n: np.array(float(n)))
WRONG = (
    True,
    np.bool_(True),
    float("nan"),
    np.float32("nan"),
    float("inf"),
    -1,
    np.int64(-1),
    2.5,
    "4",
    [4],
)
VIDEO = np.random.default_rng(0).integers(0, 256, (12, 56, 56, 3), dtype=np.uint8)
MESSAGES = [{"role": "user", "content": [{"type": "video", "video": VIDEO}, {"type": "text", "text": "What?"}]}]


@pytest.fixture(scope="module")
def engine():
    return LongVLMEngine(*tiny_longvlm())


def refused(name, call, *arguments, **options):
    """One line that names the option."""
    with pytest.raises(ValueError) as caught:
        call(*arguments, **options)
    assert re.search(rf"\b{name}\b", str(caught.value)) and "\n" not in str(caught.value)


VIDEO_OPTIONS = {"num_frames": 3, "shortest_edge": 60, "video_start": 2, "video_end": 5, "fps": 3, "max_frames": 2}


@pytest.mark.parametrize("name", VIDEO_OPTIONS)
def test_options_of_a_video(name):
    value = VIDEO_OPTIONS[name]
    processor = LongVLMProcessor(LongVLMVideoProcessor(size={"height": 8, "width": 8}), byte_level_tokenizer())
    more = {"video_metadata": {"fps": 2.0, "total_num_frames": 12}, "return_tensors": "pt"}
    more |= {"fps": 2} if name == "max_frames" else {}

    def by_call(given):
        return processor("<video>", VIDEO, **{name: given}, **more)["pixel_values_videos"]

    def by_part(given):
        part = {"type": "video", "video": VIDEO, name: given, **more}
        part.pop("return_tensors")
        chat = [{"role": "user", "content": [part]}]
        return processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")[
            "pixel_values_videos"
        ]

    def by_setting(given):
        own = LongVLMVideoProcessor(**{"size": {"height": 8, "width": 8}, name: given})
        json.loads(own.to_json_string())
        return own(VIDEO, **more)["pixel_values_videos"]

    expected = by_call(value)
    for kind in KINDS:
        for way in (by_call, by_part, by_setting):
            assert torch.equal(way(kind(value)), expected), (way, kind)
    for wrong in WRONG:
        if wrong in (2.5,) and name in ("fps", "video_start", "video_end"):
            continue
        for way in (by_call, by_part, by_setting):
            refused(name, way, wrong)


def test_sizes_means_and_rates():
    expected = LongVLMVideoProcessor(size={"height": 8, "width": 16}, image_mean=[0.5] * 3, image_std=0.5)(VIDEO)
    size = {"height": np.int64(8), "width": 16.0}
    processor = LongVLMVideoProcessor(size=size, image_mean=np.full(3, 0.5), image_std=np.float64(0.5))
    assert torch.equal(processor(VIDEO)["pixel_values_videos"], expected["pixel_values_videos"])
    json.loads(processor.to_json_string())
    rate = {"video_metadata": {"fps": 30000 / 1001, "total_num_frames": 12}}
    assert processor(VIDEO, fps=Fraction(30000, 1001), **rate)["num_frames"].tolist() == [12]  # as PyAV writes a rate
    assert LongVLMVideoProcessor(rescale_factor=np.float64(-1)).rescale_factor == -1  # transformers' tests have it
    refused("size", LongVLMVideoProcessor, size={"height": 8.5, "width": 8})
    refused("image_mean", LongVLMVideoProcessor, image_mean=[0.5, float("nan"), 0.5])
    pieces = LongVLMVideoProcessor().iter_pieces(VIDEO, frames_per_piece=np.float64(5))
    assert [len(piece.pixel_values) for piece in pieces] == [5, 5, 2]
    with pytest.raises(ValueError, match="frames_per_piece"):
        next(LongVLMVideoProcessor().iter_pieces(VIDEO, frames_per_piece=True))


CONFIGURATION = {
    "frames_per_segment": 3,
    "tokens_per_segment": 3,
    "num_global_layers": 2,
    "merge_num_heads": 4,
    "vision_chunk_frames": 3,
    "vision_feature_layer": 1,
    "image_size": 56,
    "video_token_id": 3,
}


@pytest.mark.parametrize("name", CONFIGURATION)
def test_numbers_of_the_configuration(name, tmp_path):
    for kind in KINDS:
        config = tiny_config(**{name: kind(CONFIGURATION[name])})
        config.save_pretrained(tmp_path)
        saved = getattr(type(config).from_pretrained(tmp_path), name)
        assert saved == getattr(config, name) == CONFIGURATION[name] and type(saved) is int
    for wrong in WRONG:
        if (name, wrong) in (("vision_feature_layer", -1), ("image_size", [4])):
            continue
        refused(name, tiny_config, **{name: wrong})


def test_numbers_of_the_method(engine):
    tokens = torch.randn(2, 12, 16)
    config = tiny_config(merge_schedule=[np.int64(20), 10.0])
    assert config.merge_schedule == [20, 10] and json.loads(config.to_json_string())
    processor = LongVLMProcessor(
        tokenizer=byte_level_tokenizer(), frames_per_segment=np.int64(4), patches_per_frame=4.0
    )
    assert json.loads(processor.to_json_string())["frames_per_segment"] == 4
    features = engine.model.get_video_features(torch.zeros(1, 6, 3, 56, 56), num_frames=[np.int64(3)])
    for kind in KINDS:
        assert torch.equal(merge_tokens(tokens, kind(4)), merge_tokens(tokens, 4))
        assert torch.equal(merge_tokens(tokens, 5, num_heads=kind(8)), merge_tokens(tokens, 5, num_heads=8))
        assert torch.equal(merge_tokens(tokens, schedule=[kind(5)]), merge_tokens(tokens, schedule=[5]))
        assert derive_schedule(kind(100), kind(7)) == derive_schedule(100, 7)
        assert engine.model.config.num_video_tokens(kind(9)) == engine.processor.num_video_tokens(kind(9)) == 20
        assert engine.model.model.start_video(kind(3)).frames_per_segment == 3
        again = engine.model.get_video_features(torch.zeros(1, 6, 3, 56, 56), num_frames=[kind(3)])
        assert torch.equal(again.pooler_output[0], features.pooler_output[0])
        assert LongVLMEngine(engine.model, engine.processor, cache_bytes=kind(9)).cache.max_bytes == 9
    for wrong in WRONG:
        refused("num_tokens", merge_tokens, tokens, wrong)
        refused("num_heads", merge_tokens, tokens, 4, num_heads=wrong)
        refused("num_frames", engine.model.config.num_video_tokens, wrong)
        refused("num_frames", engine.processor.num_video_tokens, wrong)
        refused("frames_per_segment", engine.model.model.start_video, wrong)
        refused("max_bytes", LongVLMEngine, engine.model, engine.processor, cache_bytes=wrong)
        if wrong not in (-1, np.int64(-1)):
            refused("schedule", merge_tokens, tokens, schedule=[wrong])


GENERATION = {
    "max_new_tokens": 4,
    "min_new_tokens": 3,
    "max_length": 200,
    "num_beams": 2,
    "num_return_sequences": 1,
    "top_k": 5,
    "no_repeat_ngram_size": 2,
    "temperature": 2,
    "top_p": 1,
    "repetition_penalty": 3,
    "length_penalty": 2,
    "max_time": 100,
}
FRACTIONS = ("temperature", "top_p", "repetition_penalty", "length_penalty", "max_time")


@pytest.mark.parametrize("name", GENERATION)
def test_numbers_of_a_generation(engine, name):
    ids = torch.tensor([[5, 6, 7]])
    more = {} if name.startswith("max_") and name != "max_time" else {"max_new_tokens": 3}
    more |= {"do_sample": True} if name in ("top_k", "temperature", "top_p") else {}

    def answer(given):
        torch.manual_seed(0)
        return engine.generate(MESSAGES, **{name: given}, **more)

    def generate(given):
        torch.manual_seed(0)
        return engine.model.generate(ids, **{name: given}, **more).tolist()

    def configured(given):
        torch.manual_seed(0)
        return engine.model.generate(ids, generation_config=GenerationConfig(**{name: given}, **more)).tolist()

    if name == "max_length":  # includes the prompt
        assert len(generate(np.int64(9))[0]) == len(generate(9.0)[0]) == len(configured(torch.tensor(9))[0]) == 9
    else:
        expected = answer(GENERATION[name]), generate(GENERATION[name])
        for kind in KINDS[::2]:
            assert (answer(kind(GENERATION[name])), generate(kind(GENERATION[name]))) == expected, kind
        assert configured(np.float32(GENERATION[name])) == expected[1]
    for wrong in WRONG:
        if (name == "length_penalty" and wrong in (-1, np.int64(-1), 2.5)) or (wrong == 2.5 and name in FRACTIONS):
            continue
        for way in (answer, generate):
            refused(name, way, wrong)
        if not isinstance(wrong, (str, list)) and wrong == wrong and name in ("max_new_tokens", "num_beams"):
            refused(name, configured, wrong)


def test_numbers_of_the_pipeline_training_and_pictures(engine, tmp_path):
    pipe = VideoQuestionAnsweringPipeline(model=engine.model, processor=engine.processor, batch_size=np.int64(2))
    options = {"max_new_tokens": np.int64(3), "num_frames": 8.0, "min_new_tokens": 3.0}
    expected = pipe(video=VIDEO, question=["A?", "B?"], max_new_tokens=3, min_new_tokens=3, num_frames=8)
    assert pipe(video=VIDEO, question=["A?", "B?"], **options, batch_size=2.0, num_workers=np.int64(0)) == expected
    refused("batch_size", pipe, video=VIDEO, question=["A?"], batch_size=True)
    rows = [{"video": VIDEO, "question": "Who?", "answer": "A man."}]
    with pytest.raises(ValueError, match="would cut a video"):
        build_dataset([rows], engine.processor, max_length=np.float64(20), truncation=True)
    dataset, _ = build_dataset([rows], engine.processor, weights=np.array([2.0]), max_length=2000.0)
    assert len(dataset) == 2
    collator = LongVLMDataCollator(engine.processor, pad_to_multiple_of=np.float32(64))
    assert collator([dataset[0]])["input_ids"].shape[1] % 64 == 0
    for wrong in (float("nan"), -1, True):
        refused("weights", build_dataset, [rows], engine.processor, weights=[wrong])
        refused("max_length", build_dataset, [rows], engine.processor, max_length=wrong)
        model = {"model": engine.model, "processor": engine.processor}
        refused("shard_bytes", extract_features, {"v": VIDEO}, tmp_path, **model, shard_bytes=wrong)
        refused("segments", draw_merging, engine, "v.mp4", tmp_path / "v.png", segments=wrong)
