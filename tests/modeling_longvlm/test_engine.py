"""The engine: message lists in, answers out; features cached for many threads; choices scored on one prefill."""

import functools
import http.server
import json
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, LlamaConfig, MistralConfig

import longvlm
from longvlm import VideoDecodeError
from longvlm.evaluation import storyline
from longvlm.modeling_longvlm.engine_longvlm import Answer, LongVLMEngine
from tests.helpers.paths import FIXTURES
from tests.helpers.tiny_models import save_tiny_longvlm, tiny_longvlm, tiny_text_config
from tests.helpers.video_files import write_video
from tests.helpers.web_server import serve

SHORT = {"max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    where = tmp_path_factory.mktemp("films")
    return [write_video(where / f"{i}.mp4", range(i * 30, i * 30 + 20)) for i in range(3)]


@pytest.fixture
def engine():
    return LongVLMEngine(*tiny_longvlm())


@pytest.fixture
def encoded(engine, monkeypatch):
    """Frames that were appended to the states of videos."""
    frames, start_video = [], type(engine.model.base_model).start_video

    def counting(model, *args, **kwargs):
        state = start_video(model, *args, **kwargs)
        append = state.append

        def counted(pixel_values, *args):
            frames.append(len(pixel_values))
            return append(pixel_values, *args)

        state.append = counted
        return state

    monkeypatch.setattr(type(engine.model.base_model), "start_video", counting)
    return frames


def ask(question, *videos, **options):
    content = [{"type": "video", "video": video, **options} for video in videos]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def by_hand(engine, messages, **options):
    """The answer without the engine: everything goes through the processor and `generate()` as pixels."""
    inputs = engine.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    generated = engine.model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return engine.processor.decode(generated, skip_special_tokens=True).strip()


# --- answers ---


def test_a_part_of_a_video_is_encoded_for_itself(engine, films, encoded):
    """20 frames at 25 a second; the window has frames 5 to 14."""
    window = {"video_start": 0.2, "video_end": 0.6}
    features = engine.encode(films[0], num_frames=10, **window)
    assert encoded == [10] and features.num_frames == (10,) and features.duration == (pytest.approx(0.8),)
    first, last = features.segment_seconds[0][0, 0].item(), features.segment_seconds[0][-1, 1].item()
    assert 0.2 <= first <= last < 0.6  # seconds of the whole video
    messages = ask("What?", films[0], num_frames=10, **window)
    answer = engine.generate(messages, **SHORT)
    assert encoded == [10]
    engine.generate(ask("What?", films[0], num_frames=10), **SHORT)
    engine.generate(ask("What?", films[0], nframes=10, video_start=0.2), **SHORT)
    assert encoded == [10, 10, 10]
    assert answer == by_hand(engine, messages, **SHORT)
    with pytest.raises(ValueError, match="video_start cannot be applied to features"):
        engine.generate(ask("What?", features, video_start=0.2))
    with pytest.raises(ValueError, match="`video_start` 1 is past the end"):
        engine.generate(ask("What?", films[0], video_start=1))


def test_one_question(engine, films):
    messages = ask("What moves?", films[0])
    answer = engine.generate(messages, **SHORT)
    assert isinstance(answer, str) and answer == by_hand(engine, messages, **SHORT)


def test_several_turns_several_videos_and_text_alone(engine, films):
    turns = [
        {"role": "system", "content": "Be brief."},
        *ask("What moves?", films[0], films[1]),
        {"role": "assistant", "content": "A square."},
        *ask("And here?", films[2]),
    ]
    assert engine.generate(turns, **SHORT) == by_hand(engine, turns, **SHORT)
    text = [{"role": "user", "content": "No video at all?"}]
    assert engine.generate(text, **SHORT) == by_hand(engine, text, **SHORT)


def test_a_mixed_batch_is_each_alone(engine, films):
    batch = [
        ask("A?", films[0]),
        [{"role": "user", "content": "Text alone?"}],
        ask("Longer question about two?", films[1], films[2]),
    ]
    assert engine.generate(batch, **SHORT) == [engine.generate(one, **SHORT) for one in batch]
    assert engine.generate(batch[:1], **SHORT) == [engine.generate(batch[0], **SHORT)]


def test_options_stand_in_the_part(engine, films, encoded):
    engine.generate(ask("A?", films[0], num_frames=4), **SHORT)
    assert sum(encoded) == 4
    two = [
        {"type": "video", "video": films[1], "num_frames": 3},
        {"type": "video", "video": films[1], "fps": 10},
        {"type": "text", "text": "Which?"},
    ]
    engine.generate([{"role": "user", "content": two}], **SHORT)
    assert sum(encoded) == 4 + 3 + 8  # 20 frames at 25 a second are 0.8 seconds


def test_an_answer_that_was_begun_is_continued(engine, films):
    begun = [*ask("What?", films[0]), {"role": "assistant", "content": "The square"}]
    details = engine.generate(begun, return_details=True, **SHORT)
    full = engine.generate(begun, return_full_text=True, **SHORT)
    assert full.endswith(f"The square{engine.processor.tokenizer.decode(details.token_ids)}".strip())


def test_details(engine, films):
    messages = ask("What moves?", films[0])
    details = engine.generate(messages, return_details=True, **SHORT)
    assert isinstance(details, Answer)
    assert details.text == engine.generate(messages, **SHORT)
    assert len(details.token_ids) == len(details.logprobs) == 5 and details.finish_reason == "length"
    inputs = engine.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert details.prompt_tokens == inputs["input_ids"].shape[1]
    ids = torch.cat([inputs.pop("input_ids"), torch.tensor([details.token_ids])], dim=1)
    inputs.pop("attention_mask")
    logits = engine.model(input_ids=ids, **inputs).logits[0, details.prompt_tokens - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(details.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(details.logprobs), expected, atol=1e-5, rtol=1e-4)


def test_details_of_beams_and_of_a_batch(engine, films):
    batch = [ask("What moves, and where to?", films[0]), ask("A?", films[1])]
    several = engine.generate(batch, return_details=True, num_beams=3, num_return_sequences=2, **SHORT)
    assert [len(one) for one in several] == [2, 2] and all(len(a.logprobs) == 5 for one in several for a in one)
    single = [engine.generate(one, return_details=True, **SHORT) for one in batch]
    together = engine.generate(batch, return_details=True, **SHORT)
    for one, other in zip(single, together, strict=True):
        assert (one.text, one.token_ids, one.prompt_tokens) == (other.text, other.token_ids, other.prompt_tokens)
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-4, rtol=1e-4)


def test_the_end_token_and_stop_strings_end_an_answer(engine, films):
    messages = ask("What moves?", films[0])
    details = engine.generate(messages, return_details=True, max_new_tokens=8, min_new_tokens=8)
    third = details.token_ids[2]
    first = details.token_ids.index(third) + 1
    ended = engine.generate(messages, return_details=True, max_new_tokens=8, eos_token_id=third)
    assert ended.finish_reason == "stop" and ended.token_ids == details.token_ids[:first]
    # In a batch the row that is done is padded; that is not part of its answer.
    batch = [messages, ask("Another question?", films[1])]
    alone = [engine.generate(one, return_details=True, max_new_tokens=8, eos_token_id=third) for one in batch]
    together = engine.generate(batch, return_details=True, max_new_tokens=8, eos_token_id=third)
    assert [(a.token_ids, a.finish_reason) for a in together] == [(a.token_ids, a.finish_reason) for a in alone]
    string = engine.processor.tokenizer.decode(details.token_ids[:2])
    if string.strip():
        stopped = engine.generate(messages, return_details=True, max_new_tokens=8, stop_strings=[string])
        assert stopped.finish_reason == "stop" and len(stopped.token_ids) <= 3


@pytest.mark.parametrize("content", ["", " \n", "\u200b", [], ["\t"], None], ids=ascii)
def test_a_conversation_that_asks_nothing_is_refused_before_its_video_is_opened(engine, content):
    content = [{"type": "video", "video": "no_such_film.mp4"}, *content] if isinstance(content, list) else content
    asked = [*ask("What?"), {"role": "assistant", "content": "A square."}, {"role": "user", "content": content}]
    for call in (engine.generate, lambda messages: list(engine.stream(messages))):
        with pytest.raises(ValueError, match="question is empty"):
            call(asked)
    with pytest.raises(ValueError, match="question is empty"):
        engine.score_choices(asked, ["yes", "no"])


def test_only_the_last_message_must_ask(engine, films):
    messages = [
        {"role": "user", "content": [{"type": "video", "video": films[0]}]},
        {"role": "assistant", "content": "I see it."},
        {"role": "user", "content": "What moves?"},
    ]
    assert engine.generate(messages, **SHORT)
    # A system message alone, or the beginning of an answer, are asked about what came before.
    assert engine.generate([*ask("What?", films[0]), {"role": "assistant", "content": "It"}], **SHORT)


def test_should_stop(engine, films, encoded):
    calls = []

    def after_three():
        calls.append(1)
        return len(calls) > 3

    text = [{"role": "user", "content": "No video?"}]
    details = engine.generate(text, return_details=True, should_stop=after_three, max_new_tokens=50, min_new_tokens=50)
    assert details.finish_reason == "cancelled" and len(details.token_ids) == 4
    cancelled = engine.generate(ask("A?", films[0]), return_details=True, should_stop=lambda: True)
    assert cancelled == Answer("", [], [], "cancelled", 0)
    assert sum(encoded) == 0 and len(engine.cache) == 0


def test_features_in_a_message(engine, films, encoded):
    features = engine.encode(films[0], num_frames=6)
    assert features.num_frames == (6,) and features.duration == (pytest.approx(0.8),)
    assert features.segment_seconds[0].shape == (2, 2) and features.frames_per_segment == (4,)
    answer = engine.generate(ask("What?", features), **SHORT)
    assert answer == engine.generate(ask("What?", films[0], num_frames=6), **SHORT)
    assert sum(encoded) == 6
    with pytest.raises(ValueError, match="num_frames cannot be applied"):
        engine.encode(features, num_frames=3)


def test_bad_messages_are_one_line(engine, films, tmp_path):
    for wrong in ("What?", [], [[]], [{"content": "What?"}], ["What?"], None):
        with pytest.raises(ValueError, match=r"messages|conversation") as error:
            engine.generate(wrong)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="without a video"):
        engine.generate([{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}])
    with pytest.raises(VideoDecodeError, match="no_such_film"):
        engine.generate(ask("What?", str(tmp_path / "no_such_film.mp4")))
    assert engine.generate(ask("Still there?", films[0]), **SHORT)


# --- streaming ---


def test_a_stream_is_the_answer_in_bits(engine, films):
    messages = ask("What moves?", films[0])
    bits = list(engine.stream(messages, max_new_tokens=30, min_new_tokens=30))
    assert "".join(bits) == engine.generate(messages, max_new_tokens=30, min_new_tokens=30)
    assert all(bits)


def test_closing_a_stream_stops_the_generation(engine, films):
    steps = []
    engine.model.lm_head.register_forward_hook(lambda *_: steps.append(1))
    # Sampled: the likeliest bytes of random weights may never make a whole word.
    sampled = {"do_sample": True, "temperature": 5.0}
    stream = engine.stream(ask("What?", films[0]), max_new_tokens=1500, min_new_tokens=1500, **sampled)
    next(stream)
    stream.close()
    done = len(steps)
    assert done < 1400
    time.sleep(0.05)
    assert len(steps) == done
    assert not [thread for thread in threading.enumerate() if thread.name == "longvlm-stream"]


def test_errors_come_out_of_a_stream(engine, tmp_path, films):
    with pytest.raises(VideoDecodeError, match="no_such_film"):
        list(engine.stream(ask("What?", str(tmp_path / "no_such_film.mp4"))))
    with pytest.raises(ValueError, match="one conversation at a time"):
        engine.stream([ask("A?", films[0]), ask("B?", films[0])])
    with pytest.raises(ValueError, match="num_beams"):
        engine.stream(ask("A?", films[0]), num_beams=2)


# --- choices ---


def naive_score(engine, messages, choice):
    """Everything rendered, tokenized and run as a whole."""
    options = {"tokenize": True, "return_dict": True}
    prompt = engine.processor.apply_chat_template(messages, add_generation_prompt=True, **options)["input_ids"][0]
    answered = [*messages, {"role": "assistant", "content": choice}]
    inputs = engine.processor.apply_chat_template(answered, return_tensors="pt", **options)
    ids = inputs["input_ids"][0].tolist()
    start = next(i for i, (a, b) in enumerate(zip([*prompt, None], ids, strict=False)) if a != b)
    end = ids.index(engine.processor.tokenizer.eos_token_id, start) + 1
    with torch.no_grad():
        logprobs = engine.model(**inputs).logits[0].float().log_softmax(-1)
    return sum(logprobs[i - 1, ids[i]].item() for i in range(start, end))


TEXTS = {
    "llama": tiny_text_config,
    "mistral with a window": lambda: MistralConfig(**{**_sizes(), "sliding_window": 16}),
}


def _sizes():
    config = tiny_text_config()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
             "tie_word_embeddings")  # fmt: skip
    return {name: getattr(config, name) for name in names}


@pytest.mark.parametrize("text_config", TEXTS.values(), ids=TEXTS)
def test_scores_are_those_of_the_whole_text(text_config, films):
    engine = LongVLMEngine(*tiny_longvlm(text_config=text_config()))
    choices = ["red", "a blue square", "b", "red and <vid_patch> </s> green"]
    messages = ask("What moves?", films[0])
    expected = [naive_score(engine, messages, choice) for choice in choices]
    assert engine.score_choices(messages, choices) == pytest.approx(expected, abs=1e-4)
    assert [engine.score_choices(messages, [choice])[0] for choice in choices] == pytest.approx(expected, abs=1e-4)
    turns = [*messages, {"role": "assistant", "content": "A square."}, *ask("And here?", films[1])]
    assert engine.score_choices(turns, choices[:2]) == pytest.approx(
        [naive_score(engine, turns, choice) for choice in choices[:2]], abs=1e-4
    )
    text = [{"role": "user", "content": "No video?"}]
    assert engine.score_choices(text, ["yes", "no"]) == pytest.approx(
        [naive_score(engine, text, choice) for choice in ("yes", "no")], abs=1e-4
    )


@pytest.mark.parametrize("template", ["vicuna_v1_1", "long_vlm_v1", "chatml"])
def test_templates_that_end_a_turn_in_their_own_way(films, template):
    engine = LongVLMEngine(*tiny_longvlm())
    chatml = (
        "{% for m in messages %}{{ '[' + m.role + ']\n' + m.content + '</s>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
    )
    engine.processor.chat_template = chatml if template == "chatml" else engine.processor._find_template(template)
    messages = ask("What moves?", films[0])
    expected = [naive_score(engine, messages, choice) for choice in ("red", "blue")]
    assert engine.score_choices(messages, ["red", "blue"]) == pytest.approx(expected, abs=1e-4)


def test_a_template_that_writes_a_thought_before_the_last_answer(films):
    engine = LongVLMEngine(*tiny_longvlm())
    engine.processor.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% if m.role == 'assistant' and loop.last %}{{ '(thought) ' }}"
        "{% endif %}{{ m.content }}{% if m.role == 'assistant' %}{{ '</s>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    messages = ask("What moves?", films[0])
    assert engine.score_choices(messages, ["red", "blue"]) == pytest.approx(
        [naive_score(engine, messages, choice) for choice in ("red", "blue")], abs=1e-4
    )


def test_the_video_goes_through_the_llm_once(engine, films):
    lengths = []
    language_model = engine.model.model.language_model
    language_model.register_forward_hook(lambda module, args, output: lengths.append(output[0].shape[1]))
    engine.score_choices(ask("What?", films[0]), ["red", "green", "blue"])
    assert len(lengths) == 4 and all(length < 10 for length in lengths[1:])


def test_choices_that_cannot_be_scored(engine, films):
    messages = ask("What?", films[0])
    for wrong in ([], [""], ["red", 3], ["  "]):
        with pytest.raises(ValueError, match="choices"):
            engine.score_choices(messages, wrong)
    with pytest.raises(ValueError, match="ends with an answer"):
        engine.score_choices([*messages, {"role": "assistant", "content": "red"}], ["red"])
    with pytest.raises(ValueError, match="one conversation"):
        engine.score_choices([messages, messages], ["red"])


# --- the cache ---


def test_a_video_is_encoded_once_for_all_kinds_of_questions(engine, films, encoded):
    messages = ask("What?", films[0])
    engine.generate(messages, **SHORT)
    engine.score_choices(messages, ["a", "b"])
    list(
        engine.stream([*messages, {"role": "assistant", "content": "A."}, {"role": "user", "content": "B?"}], **SHORT)
    )
    engine.generate([messages, ask("Else?", films[0])], **SHORT)
    assert sum(encoded) == 8


def test_threads_that_ask_about_one_video_encode_it_once(engine, films, encoded):
    start, answers = threading.Barrier(6), [None] * 6

    def run(number):
        start.wait()
        answers[number] = engine.generate(ask(f"Question {number}?", films[0]), **SHORT)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(encoded) == 8
    assert answers == [engine.generate(ask(f"Question {number}?", films[0]), **SHORT) for number in range(6)]


def test_threads_with_videos_of_their_own(engine, films):
    expected = [engine.generate(ask("What?", film), **SHORT) for film in films]
    engine.cache.clear()
    answers = [None] * 3

    def run(number):
        answers[number] = engine.generate(ask("What?", films[number]), **SHORT)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected


def test_who_waits_for_a_failure_tries_for_himself(engine, films):
    entered, go_on, results = threading.Event(), threading.Event(), []

    def failing(stage, done, total):
        entered.set()
        go_on.wait(10)
        raise RuntimeError("interrupted")

    def first():
        with pytest.raises(RuntimeError, match="interrupted"):
            engine.encode(films[0], progress=failing)

    threads = [threading.Thread(target=first)]
    threads[0].start()
    assert entered.wait(10)
    threads.append(threading.Thread(target=lambda: results.append(engine.encode(films[0]))))
    threads[1].start()
    time.sleep(0.05)
    go_on.set()
    for thread in threads:
        thread.join()
    assert len(results) == 1 and len(engine.cache) == 1


def test_the_cache_is_bounded_and_keys_are_small(films):
    engine = LongVLMEngine(*tiny_longvlm())
    size = engine.encode(films[0]).num_bytes
    assert engine.cache.num_bytes == size > 0
    small = LongVLMEngine(engine.model, engine.processor, cache_bytes=2 * size)
    for film in [*films, films[0], films[1]]:
        small.encode(film)
        assert small.cache.num_bytes <= 2 * size and len(small.cache) <= 2
    frames = np.zeros((8, 300, 300, 3), np.uint8)
    small.encode(frames)
    assert all(len(key) == 32 for key in small.cache._entries)
    nothing = LongVLMEngine(engine.model, engine.processor, cache_bytes=0)
    nothing.encode(films[0])
    assert len(nothing.cache) == nothing.cache.num_bytes == 0
    with pytest.raises(ValueError, match="max_bytes"):
        LongVLMEngine(engine.model, engine.processor, cache_bytes=-1)


def test_a_file_that_is_gone_is_not_answered_from_the_cache(engine, tmp_path):
    film = write_video(tmp_path / "film.mp4", 10)
    engine.encode(film)
    (tmp_path / "film.mp4").unlink()
    with pytest.raises(VideoDecodeError, match=r"film\.mp4"):
        engine.encode(film)


def test_a_pipe_is_known_by_what_comes_from_it(engine, tmp_path, encoded):
    """Its name, `/dev/fd/63`, is that of the next one, too."""
    film, other = write_video(tmp_path / "film.mp4", 10), write_video(tmp_path / "other.mp4", range(50, 60))
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def encode(content):
        writer = threading.Thread(target=lambda: pipe.write_bytes(Path(content).read_bytes()))
        writer.start()
        features = engine.encode(pipe)
        writer.join()
        return features

    first = encode(film)
    assert encode(film) is first and sum(encoded) == 8
    assert encode(other) is not first and sum(encoded) == 16


def test_a_video_that_was_opened_is_downloaded_once_for_all_questions(engine, tmp_path, encoded):
    content = Path(write_video(tmp_path / "film.mkv", 10)).read_bytes()
    seen = []
    with serve({"/film.mkv": lambda answer: answer.send(content)}) as server:
        open_video = engine.processor.video_processor.open_video
        with open_video(server.url + "/film.mkv", progress=lambda *step: seen.append(step)) as film:
            parts = [{"type": "video", "video": film}, {"type": "text", "text": "Who?"}]
            for _ in range(2):
                engine.generate([{"role": "user", "content": parts}], max_new_tokens=2)
            assert sum(encoded) == 8  # once, too
        engine.encode(server.url + "/film.mkv", progress=lambda *step: seen.append(step))
        assert server.asked == ["/film.mkv"] * 2
    assert [step for step in seen if step[0] == "download"][-1] == ("download", len(content), len(content))


def test_an_address_is_known_by_what_comes_from_it(engine, tmp_path, encoded):
    write_video(tmp_path / "film.mp4", 10)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/film.mp4"
        first = engine.encode(url)
        assert engine.encode(url) is first and sum(encoded) == 8
        write_video(tmp_path / "film.mp4", range(50, 70))
        assert engine.encode(url) is not first and sum(encoded) == 16
        (tmp_path / "film.mp4").unlink()
        with pytest.raises(VideoDecodeError, match="404"):
            engine.encode(url)
        server.shutdown()
    file = write_video(tmp_path / "file.mp4", 10)
    assert engine.encode(f"file://{file}") is engine.encode(file)


def test_cached_features_do_not_hold_a_graph(engine, films):
    features = engine.encode(films[0])
    assert not features.local_features[0].requires_grad and features.last_hidden_state is None


def test_no_question_makes_graphs_of_frames(engine, films):
    kept = []
    layer = next(layer for layer in engine.model.model.vision_tower.modules() if isinstance(layer, torch.nn.Linear))
    layer.register_forward_hook(lambda layer, args, output: kept.append(output.requires_grad))
    engine.generate(ask("What?", films[0]), **SHORT)
    list(engine.stream(ask("What?", films[1]), **SHORT))
    engine.encode(films[2])
    assert len(kept) >= 3 and not any(kept)


def test_progress(engine, films):
    steps = []
    engine.encode(films[0], progress=lambda *step: steps.append(step))
    assert ("decode", 8, 8) in steps and steps[-1] == ("encode", 8, 8)
    steps.clear()
    engine.encode(films[0], progress=lambda *step: steps.append(step))
    assert steps == []


def test_pickling_and_nothing_left_on_the_model(engine, films):
    expected = engine.generate(ask("What?", films[0]), **SHORT)
    assert not [m for m in engine.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    again = pickle.loads(pickle.dumps(engine))
    assert len(again.cache) == 0 and again.generate(ask("What?", films[0]), **SHORT) == expected


# --- longvlm.load ---


def test_load(tmp_path, films, monkeypatch):
    folder = save_tiny_longvlm(tmp_path / "model")
    engine = longvlm.load(folder, dtype="float32", device="cpu", cache_bytes=1000)
    assert isinstance(engine, longvlm.LongVLMEngine) and engine.cache.max_bytes == 1000
    assert not engine.model.training and engine.model.dtype == torch.float32
    assert engine.generate(ask("What?", films[0]), **SHORT)
    assert longvlm.load(str(folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16
    monkeypatch.setenv("LONGVLM_MODEL", str(folder))
    assert longvlm.load().model.config.text_config.hidden_size == 32
    monkeypatch.delenv("LONGVLM_MODEL")
    assert longvlm.load().model.config.text_config.hidden_size == 192
    assert longvlm.load(folder, attn_implementation="eager").model.config._attn_implementation == "eager"


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(ValueError, match="no model folder"):
        longvlm.load(tmp_path / "nothing")
    LlamaConfig().save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"not a LongVLM .its model_type is llama"):
        longvlm.load(tmp_path / "llama")
    for content, message in (("[]", "JSON list"), ("{", "not a JSON file"), ("{}", "model_type is None")):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "config.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            longvlm.load(tmp_path / "odd")
    with pytest.raises(ValueError, match="is a file"):
        longvlm.load(longvlm.tiny_checkpoint() / "config.json")
    with pytest.raises(ValueError, match='"float7" is not known'):
        longvlm.load(dtype="float7")
    with pytest.raises(ValueError, match="device"):
        longvlm.load(device="abacus")
    with pytest.raises(ValueError, match="device_map"):
        longvlm.load(device="cpu", device_map="auto")


def test_the_bundled_checkpoint_answers_as_before():
    """`tiny_answers.json` was written by the pipeline as it was before there was an engine."""
    engine = longvlm.load(longvlm.tiny_checkpoint(), dtype="float32")
    size = engine.processor.video_processor.size["height"]
    for number, expected in json.loads((FIXTURES / "tiny_answers.json").read_text()).items():
        story = storyline.make_story(storyline.story_seed("test", int(number)))
        frames = storyline.frames_at(story, storyline.middle_times(story, 100), size=size)
        batch = [ask(question, frames, do_sample_frames=False) for question in expected]
        assert engine.generate(batch, max_new_tokens=8) == list(expected.values())


# --- the cache among threads, features as they come, settings of generation ---


def test_palette_images_with_other_colours_are_other_videos(engine):
    def film(colour):
        return [Image.new("RGB", (56, 56), colour).quantize() for _ in range(4)]

    red, blue = engine.encode(film("red")), engine.encode(film("blue"))
    assert engine.encode(film("red")) is red and not torch.equal(red.local_features[0], blue.local_features[0])


def test_waiting_threads_get_features_that_are_too_large_to_keep():
    engine = LongVLMEngine(*tiny_longvlm(), cache_bytes=0)
    encoded, encode = [], engine._encode

    def slow(*args):
        encoded.append(1)
        time.sleep(0.5)
        return encode(*args)

    engine._encode = slow
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda _: engine.encode(frames), range(6)))
    assert encoded == [1] and all(one is results[0] for one in results)


def test_a_stopped_generation_does_not_wait_for_another_threads_encoding():
    engine = LongVLMEngine(*tiny_longvlm(), cache_bytes=1 << 20)
    encoding, finish, encode = threading.Event(), threading.Event(), engine._encode

    def slow(*args):
        encoding.set()
        assert finish.wait(30)
        return encode(*args)

    engine._encode = slow
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(engine.encode, frames)
        assert encoding.wait(30)
        asked = [{"role": "user", "content": [{"type": "video", "video": frames}, {"type": "text", "text": "?"}]}]
        answers = engine.generate(asked, should_stop=lambda: True, return_details=True, num_return_sequences=2)
        assert [one.finish_reason for one in answers] == ["cancelled"] * 2 and not other.done()
        finish.set()
        other.result(30)


def test_features_of_cleared_weights_are_not_kept():
    engine = LongVLMEngine(*tiny_longvlm(), cache_bytes=1 << 20)
    encode = engine._encode

    def cleared_meanwhile(*args):
        features = encode(*args)
        engine.cache.clear()
        return features

    engine._encode = cleared_meanwhile
    engine.encode(np.zeros((4, 56, 56, 3), np.uint8))
    assert len(engine.cache) == 0


def test_features_may_be_a_mapping_but_only_of_one_video(engine):
    frames = np.zeros((4, 56, 56, 3), np.uint8)
    features = engine.encode(frames)
    mapping = {"local_features": list(features.local_features), "global_features": features.global_features}
    options = {"max_new_tokens": 4, "do_sample": False}
    assert engine.generate(ask("What?", mapping), **options) == engine.generate(ask("What?", frames), **options)
    with pytest.raises(ValueError, match=r"features of one video, got those of 2.*select"):
        engine.generate(ask("What?", type(features).cat([features, features])))


def test_settings_of_a_generation_config_count(engine):
    messages = [{"role": "user", "content": "What?"}]
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    answer = engine.generate(messages, generation_config=config, return_details=True)
    assert len(answer.token_ids) <= 3
    longer = engine.generate(messages, generation_config=GenerationConfig(do_sample=False), return_details=True)
    assert len(longer.token_ids) > 20 or longer.finish_reason == "stop"  # not transformers' 20
    text = engine.generate(messages, max_new_tokens=8, do_sample=False, return_details=True)
    token = engine.processor.tokenizer.decode(text.token_ids[1:2], skip_special_tokens=False)
    settings = engine.model.generation_config
    settings.stop_strings = [token]
    try:
        stopped = engine.generate(messages, max_new_tokens=8, do_sample=False, return_details=True)
    finally:
        settings.stop_strings = None
    assert stopped.finish_reason == "stop" and len(stopped.token_ids) <= 2


def test_segments_are_as_long_as_the_configuration_says_for_the_number_of_frames(engine, monkeypatch):
    monkeypatch.setattr(type(engine.model.config), "segment_length", lambda self, frames: 8 if frames > 6 else 4)
    long, short = (engine.encode(np.zeros((frames, 56, 56, 3), np.uint8), num_frames=frames) for frames in (7, 5))
    assert long.frames_per_segment == (8,) and short.frames_per_segment == (4,)


def test_what_a_template_refuses_is_one_line(engine):
    template = "{{ raise_exception('system messages are not supported') }}"
    with pytest.raises(ValueError, match="refuses this conversation: system messages are not supported"):
        engine.generate([{"role": "user", "content": "What?"}], chat_template=template)
