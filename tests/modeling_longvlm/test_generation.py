"""generate(): every way that users of transformers know, with videos."""

import inspect
from threading import Thread

import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    TextIteratorStreamer,
)

from longvlm import LongVLMForConditionalGeneration
from tests.helpers.tiny_models import noise_video, tiny_longvlm, tiny_text_config

NEW = 6
GREEDY = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False}


def prompts(model, processor, *texts, frames=(), **options):
    counts = [model.config.num_video_tokens(n) for n in frames]
    text = list(texts) if len(texts) > 1 else texts[0]
    return processor(text=text, num_video_tokens=counts, padding=True, return_tensors="pt", **options)


@pytest.fixture(scope="module")
def longvlm():
    # Weights large enough that the video and the question both matter to the answer.
    model, processor = tiny_longvlm()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "vision_tower" not in name:
                parameter.mul_(8)
    return model, processor


def answers(model, inputs, **options):
    generated = model.generate(**inputs, **{**GREEDY, **options})
    return generated[:, inputs["input_ids"].shape[1] :]


def test_greedy_is_the_most_likely_token_step_by_step(longvlm):
    model, processor = longvlm
    pixels = noise_video(9)
    inputs = prompts(model, processor, "<video>\nWhat happens?", frames=[9])
    ids = inputs["input_ids"]
    never = [model.config.video_token_id, model.config.video_start_token_id, model.config.video_end_token_id, 2]
    for _ in range(NEW):
        logits = model(input_ids=ids, pixel_values_videos=pixels).logits[:, -1]
        logits[:, never] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(answers(model, inputs, pixel_values_videos=pixels), ids[:, -NEW:])


def test_the_answer_depends_on_the_video(longvlm):
    model, processor = longvlm
    inputs = prompts(model, processor, "<video>\nWhat happens?", frames=[9])
    logits = [model(**inputs, pixel_values_videos=noise_video(9, seed=seed)).logits[0, -1] for seed in (0, 1)]
    assert (logits[0] - logits[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 5},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 2},
        {"use_cache": False},
        {"repetition_penalty": 1.2},
    ],
    ids=str,
)
def test_ways_of_generating(longvlm, options):
    """Pixels and features give the same answers in each way."""
    model, processor = longvlm
    pixels = noise_video(9)
    inputs = prompts(model, processor, "<video>\nWhat happens?", frames=[9])
    features = model.get_video_features(pixels)
    torch.manual_seed(0)
    from_pixels = answers(model, inputs, pixel_values_videos=pixels, **options)
    torch.manual_seed(0)
    from_features = answers(model, inputs, video_features=features, **options)
    assert from_pixels.shape == (options.get("num_return_sequences", 1), NEW)
    assert torch.equal(from_pixels, from_features)
    if not options.get("do_sample") and not options.keys() & {"num_beams", "repetition_penalty"}:
        assert torch.equal(from_pixels, answers(model, inputs, pixel_values_videos=pixels))


def test_assisted_by_a_smaller_model_of_the_same_kind(longvlm):
    model, processor = longvlm
    assistant, _ = tiny_longvlm(seed=5)
    pixels = noise_video(9)
    inputs = prompts(model, processor, "<video>\nWhat happens?", frames=[9])
    features = model.get_video_features(pixels)
    expected = answers(model, inputs, video_features=features)
    assert torch.equal(answers(model, inputs, video_features=features, assistant_model=assistant), expected)


def test_the_cache_of_an_earlier_turn(longvlm):
    """A second turn on the first one's cache: neither the video nor the first turn is computed again."""
    model, processor = longvlm
    pixels = noise_video(9)
    first = prompts(model, processor, "<video>\nFirst?", frames=[9])
    outputs = model.generate(**first, **GREEDY, pixel_values_videos=pixels, return_dict_in_generate=True)
    name = "cache" if "cache" in outputs else "past_key_values"
    more = processor.tokenizer(" Second?", return_tensors="pt", add_special_tokens=False)["input_ids"]
    ids = torch.cat([outputs.sequences, more], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = answers(model, inputs, pixel_values_videos=pixels)
    assert torch.equal(answers(model, inputs, **{name: outputs[name]}), expected)


@pytest.mark.parametrize("given", ["both videos", "the new video"])
def test_a_new_video_in_a_later_turn(longvlm, given):
    model, processor = longvlm
    first = prompts(model, processor, "<video> First?", frames=[9])
    second = prompts(model, processor, "And <video>?", frames=[5])
    pixels = noise_video(9, 5)
    outputs = model.generate(**first, **GREEDY, pixel_values_videos=pixels[:1], return_dict_in_generate=True)
    name = "cache" if "cache" in outputs else "past_key_values"
    ids = torch.cat([outputs.sequences, second["input_ids"]], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    both = {"pixel_values_videos": pixels, "num_frames": [9, 5]}
    expected = model.generate(**inputs, **GREEDY, **both, output_logits=True, return_dict_in_generate=True)
    videos = both if given == "both videos" else {"pixel_values_videos": pixels[1:, :5]}
    more = {"output_logits": True, "return_dict_in_generate": True, name: outputs[name]}
    actual = model.generate(**inputs, **GREEDY, **videos, **more)
    torch.testing.assert_close(actual.logits[0], expected.logits[0], atol=1e-3, rtol=1e-3)
    assert torch.equal(actual.sequences, expected.sequences)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_embeddings_instead_of_ids(longvlm, options):
    model, processor = longvlm
    inputs = prompts(model, processor, "<video>\nWhat?", frames=[5])
    expected = answers(model, inputs, pixel_values_videos=noise_video(5), **options)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["attention_mask"]
    generated = model.generate(
        inputs_embeds=embeddings, attention_mask=mask, pixel_values_videos=noise_video(5), **GREEDY, **options
    )
    assert torch.equal(generated[:, -NEW:], expected)


def test_without_a_prompt(longvlm):
    model, _ = longvlm
    assert model.generate(bos_token_id=1, **GREEDY).shape == (1, 1 + NEW)


def test_prefill_in_chunks_is_refused_with_videos(longvlm):
    model, processor = longvlm
    inputs = prompts(model, processor, "<video>", frames=[4])
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, pixel_values_videos=noise_video(4), prefill_chunk_size=8)


def test_several_videos_and_beams(longvlm):
    """Beams repeat each prompt's videos together, in order, and encode them once."""
    model, processor = longvlm
    pixels, frames = noise_video(9, 5, 8), [9, 5, 8]
    inputs = prompts(model, processor, "<video> and <video>: which?", "Short. <video>", frames=frames)
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda m, args, output: calls.append(1))
    beams = answers(model, inputs, pixel_values_videos=pixels, num_frames=torch.tensor(frames), num_beams=3)
    hook.remove()
    assert len(calls) == 3  # once a video: each fits into one chunk
    first = prompts(model, processor, "<video> and <video>: which?", frames=frames[:2])
    alone = answers(model, first, pixel_values_videos=pixels[:2], num_frames=[9, 5], num_beams=3)
    assert torch.equal(beams[:1], alone)
    second = prompts(model, processor, "Short. <video>", frames=frames[2:])
    alone = answers(model, second, pixel_values_videos=pixels[2:, :8], num_beams=3)
    assert torch.equal(beams[1:], alone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_batches_answer_as_single_prompts_do(attention):
    model, processor = tiny_longvlm()
    model.set_attn_implementation(attention)
    texts = [
        "<video>\nWhat is it?",
        "No video here.",
        "A much longer question about <video>, is it not?",
        "<video><video>",
    ]
    videos = [[9], [], [3], [5, 12]]
    frames = [n for group in videos for n in group]
    pixels = noise_video(*frames)
    batch = prompts(model, processor, *texts, frames=frames)
    together = answers(model, batch, pixel_values_videos=pixels, num_frames=torch.tensor(frames))
    first = 0
    for row, (text, group) in enumerate(zip(texts, videos, strict=True)):
        single = prompts(model, processor, text, frames=group)
        more = {}
        if group:
            more = {"pixel_values_videos": pixels[first : first + len(group)], "num_frames": group}
        assert torch.equal(answers(model, single, **more)[0], together[row])
        first += len(group)


def test_text_only(longvlm):
    model, processor = longvlm
    inputs = prompts(model, processor, "Just a question?")
    expected = model.generate(**inputs, **GREEDY)
    assert expected.shape[1] == inputs["input_ids"].shape[1] + NEW


def test_streaming(longvlm):
    model, processor = longvlm
    inputs = prompts(model, processor, "<video>\nWhat?", frames=[5])
    pixels = noise_video(5)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(
        target=model.generate, kwargs={**inputs, **GREEDY, "pixel_values_videos": pixels, "streamer": streamer}
    )
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == processor.batch_decode(answers(model, inputs, pixel_values_videos=pixels))[0]


def test_the_video_tower_runs_once_in_a_conversation(longvlm):
    model, processor = longvlm
    features = model.get_video_features(noise_video(9))
    calls = []
    hook = model.model.vision_tower.register_forward_hook(lambda m, args, output: calls.append(1))
    for text in ("<video>\nFirst?", "<video>\nFirst? Yes. Second?"):
        answers(model, prompts(model, processor, text, frames=[9]), video_features=features)
    hook.remove()
    assert not calls


def test_the_answer_holds_no_video_tokens(longvlm):
    model, processor = longvlm
    inputs = prompts(model, processor, "<video>\nWhat?", frames=[5])
    model.lm_head.weight.data[model.config.video_token_id] *= 1000  # would win every step it may win
    generated = answers(model, inputs, pixel_values_videos=noise_video(5))
    model.lm_head.weight.data[model.config.video_token_id] /= 1000
    assert not (generated == model.config.video_token_id).any()


def test_a_misspelled_option_is_refused(longvlm):
    model, processor = longvlm
    inputs = prompts(model, processor, "<video>", frames=[4])
    with pytest.raises(ValueError, match="pixel_value_video"):
        model.generate(**inputs, pixel_value_video=noise_video(4), pixel_values_videos=noise_video(4))


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


@pytest.mark.parametrize(
    "text_config",
    [
        LlamaConfig(**SMALL),
        Qwen2Config(**SMALL, num_key_value_heads=2, tie_word_embeddings=True),
        Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8),
        MistralConfig(**SMALL, num_key_value_heads=2),
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4),
    ],
    ids=lambda config: config.model_type,
)
def test_any_language_model(text_config, tmp_path):
    model, processor = tiny_longvlm(text_config=text_config)
    pixels = noise_video(5)
    inputs = prompts(model, processor, "<video>\nWhat?", frames=[5])
    expected = answers(model, inputs, pixel_values_videos=pixels)
    assert expected.shape == (1, NEW)
    tied = model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert tied == bool(text_config.tie_word_embeddings)
    model.save_pretrained(tmp_path)
    again = LongVLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(answers(again, inputs, pixel_values_videos=pixels), expected)


def test_sharded_checkpoint_bit_for_bit(tmp_path):
    model, _ = tiny_longvlm()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_device_map_and_dtype(tmp_path):
    model, processor = tiny_longvlm()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, device_map="auto", dtype=torch.bfloat16)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    inputs = prompts(again, processor, "<video>\nWhat?", frames=[5])
    assert answers(again, inputs, pixel_values_videos=noise_video(5)).shape == (1, NEW)


@pytest.mark.parametrize(
    "offloaded", ["lm_head", "model.vision_tower", "model.multi_modal_projector", "model.language_model"]
)
def test_a_model_that_is_partly_offloaded(tmp_path, offloaded):
    model, processor = tiny_longvlm()
    model.save_pretrained(tmp_path)
    parts = ("lm_head", "model.vision_tower", "model.multi_modal_projector", "model.language_model")
    device_map = {part: "disk" if part == offloaded else "cpu" for part in parts}
    again = AutoModelForImageTextToText.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=str(tmp_path / "offloaded")
    )
    inputs = prompts(again, processor, "<video>\nWhat?", frames=[5])
    expected = answers(model, inputs, pixel_values_videos=noise_video(5))
    assert torch.equal(answers(again, inputs, pixel_values_videos=noise_video(5)), expected)


def test_attention_switch_reaches_both_towers(tmp_path):
    model, _ = tiny_longvlm()
    model.save_pretrained(tmp_path)
    for attention in ("eager", "sdpa"):
        again = AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=attention)
        assert again.config.vision_config._attn_implementation == attention
        assert again.config.text_config._attn_implementation == attention


@pytest.mark.slow
def test_compiled_decode_step(longvlm):
    """The decode step compiles as one graph; the tokens are those of the uncompiled model."""
    model, processor = longvlm
    inputs = prompts(model, processor, "<video>\nWhat?", frames=[5])
    features = model.get_video_features(noise_video(5))
    expected = answers(model, inputs, video_features=features, cache_implementation="static")
    eager = model.forward
    compiled = torch.compile(eager, fullgraph=True, backend="inductor")

    def forward(input_ids=None, **kwargs):
        return (compiled if input_ids.shape[1] == 1 else eager)(input_ids=input_ids, **kwargs)

    # generate() looks at the signature to see which options the model takes.
    forward.__signature__ = inspect.signature(eager)
    model.forward = forward
    try:
        generated = answers(
            model, inputs, video_features=features, cache_implementation="static", disable_compile=True
        )
    finally:
        del model.forward
    assert torch.equal(generated, expected)


def test_long_prompts_beyond_the_context_are_warned_of(caplog):
    model, processor = tiny_longvlm(text_config=tiny_text_config(max_position_embeddings=32))
    inputs = prompts(model, processor, "<video>\nWhat happens in this video?", frames=[9])
    model.generate(**inputs, pixel_values_videos=noise_video(9), max_new_tokens=1)
    length = inputs["input_ids"].shape[1]
    assert any(f"{length} tokens" in record.message and "32" in record.message for record in caplog.records)
