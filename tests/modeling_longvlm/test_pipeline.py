"""pipeline("video-question-answering"): forms of input, options, and videos that are encoded once."""

import numpy as np
import pytest
import torch
from transformers import pipeline

from longvlm import VideoDecodeError, VideoQuestionAnsweringPipeline
from tests.helpers.tiny_models import save_tiny_longvlm
from tests.helpers.video_files import write_video

TASK = "video-question-answering"
SHORT = {"max_new_tokens": 5, "min_new_tokens": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_longvlm(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    where = tmp_path_factory.mktemp("films")
    return [write_video(where / f"{i}.mp4", range(i * 30, i * 30 + 20)) for i in range(3)]


@pytest.fixture
def pipe(folder):
    return pipeline(TASK, model=str(folder))


@pytest.fixture
def encoded(pipe):
    """The number of frames of every call of the vision tower."""
    calls = []
    pipe.model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    return calls


def test_an_answer_without_the_prompt(pipe, films):
    assert type(pipe) is VideoQuestionAnsweringPipeline
    result = pipe(video=films[0], question="What happens?", **SHORT)
    assert set(result) == {"answer"} and isinstance(result["answer"], str)
    full = pipe(video=films[0], question="What happens?", return_full_text=True, **SHORT)["answer"]
    assert "What happens?" in full and full.endswith(result["answer"])
    assert "<vid_patch>" not in full


def test_the_answer_is_that_of_generate(pipe, films):
    chat = [{"role": "user", "content": [{"type": "video", "path": films[1]}, {"type": "text", "text": "What?"}]}]
    inputs = pipe.processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    generated = pipe.model.generate(**inputs, **SHORT)[0, inputs["input_ids"].shape[1] :]
    expected = pipe.processor.decode(generated, skip_special_tokens=True).strip()
    assert pipe(video=films[1], question="What?", **SHORT)["answer"] == expected


def test_forms_of_input(pipe, films):
    single = [pipe(video=film, question=q, **SHORT) for film, q in zip(films, ["A?", "Bb?", "Ccc?"], strict=True)]
    rows = [{"video": film, "question": q} for film, q in zip(films, ["A?", "Bb?", "Ccc?"], strict=True)]
    assert pipe(rows[0], **SHORT) == single[0]
    assert pipe(rows, **SHORT) == single
    assert pipe(video=films, question=["A?", "Bb?", "Ccc?"], **SHORT) == single
    assert pipe(rows, batch_size=2, **SHORT) == single
    assert pipe(rows, batch_size=3, **SHORT) == single
    assert list(pipe((row for row in rows), **SHORT)) == single
    same = pipe(video=films[0], question=["A?", "Z?"], **SHORT)
    assert len(same) == 2 and same[0] == single[0]
    assert pipe(video=films[:2], question="A?", **SHORT)[0] == single[0]


def test_frames_instead_of_a_file(pipe):
    frames = [np.full((40, 60, 3), 10 * i, dtype=np.uint8) for i in range(6)]
    expected = pipe(video=frames, question="What?", **SHORT)
    assert pipe(video=np.stack(frames), question="What?", **SHORT) == expected
    assert pipe({"video": torch.from_numpy(np.stack(frames)), "question": "What?"}, **SHORT) == expected
    assert pipe(video=frames, question=["What?", "What?"], **SHORT) == [expected] * 2


def test_lists_that_do_not_pair_up(pipe, films):
    with pytest.raises(ValueError, match="2 videos and 3 questions"):
        pipe(video=films[:2], question=["A?", "B?", "C?"])
    assert pipe(video=[], question=[]) == [] == pipe([])
    batch = np.random.default_rng(0).integers(0, 256, (2, 6, 40, 60, 3), dtype=np.uint8)
    both = pipe(video=batch, question=["A?", "B?"], **SHORT)
    assert both == [pipe(video=one, question=q, **SHORT) for one, q in zip(batch, ["A?", "B?"], strict=True)]


def test_tensors_of_any_dtype_are_known_again(pipe, encoded):
    video = torch.rand(6, 3, 56, 56)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        pipe(video=video.to(dtype), question="A?", **SHORT)
        pipe(video=video.to(dtype), question="B?", **SHORT)
    assert sum(encoded) == 18


def test_a_second_question_encodes_nothing(pipe, films, encoded, monkeypatch):
    pipe(video=films[0], question="First?", **SHORT)
    assert sum(encoded) == 8

    def no_decoding(*args, **kwargs):
        raise AssertionError("decoded again")

    monkeypatch.setattr(type(pipe.processor.video_processor), "iter_pixel_values", no_decoding)
    again = pipe(video=films[0], question="Second?", **SHORT)
    assert sum(encoded) == 8
    pipe.video_cache.clear()
    monkeypatch.undo()
    assert pipe(video=films[0], question="Second?", **SHORT) == again
    assert sum(encoded) == 16


def test_a_batch_about_one_video_encodes_it_once(pipe, films, encoded):
    pipe(video=films[0], question=["A?", "B?", "C?", "D?"], batch_size=4, **SHORT)
    assert sum(encoded) == 8


def test_the_same_frames_are_known_again(pipe, encoded):
    frames = [np.full((40, 60, 3), 10 * i, dtype=np.uint8) for i in range(6)]
    pipe(video=frames, question="First?", **SHORT)
    pipe(video=[frame.copy() for frame in frames], question="Second?", **SHORT)
    assert sum(encoded) == 6
    frames[3] = frames[3] + 1
    pipe(video=frames, question="Second?", **SHORT)
    assert sum(encoded) == 12


def test_other_settings_or_a_changed_file_are_another_video(pipe, films, encoded, tmp_path):
    film = write_video(tmp_path / "film.mp4", 20)
    pipe(video=film, question="A?", **SHORT)
    pipe(video=film, question="A?", num_frames=4, **SHORT)
    assert encoded == [8, 4]
    write_video(film, 30)
    pipe(video=film, question="A?", **SHORT)
    assert encoded == [8, 4, 8]
    pipe.model.config.merge_order = "time"
    pipe(video=film, question="A?", **SHORT)
    assert encoded == [8, 4, 8, 8]


def test_the_cache_forgets_what_was_used_least_recently(folder, films):
    one = pipeline(TASK, model=str(folder))
    one(video=films[0], question="A?", **SHORT)
    size = one.video_cache.num_bytes
    assert size > 0
    pipe = pipeline(TASK, model=str(folder), video_cache_bytes=2 * size)
    calls = []
    pipe.model.model.vision_tower.register_forward_hook(lambda module, args, output: calls.append(1))
    for film in (films[0], films[1], films[0], films[2], films[0], films[1]):
        pipe(video=film, question="A?", **SHORT)
        assert pipe.video_cache.num_bytes <= 2 * size
    assert len(calls) == 4  # 0, 1, 2, and 1 again
    nothing = pipeline(TASK, model=str(folder), video_cache_bytes=0)
    nothing(video=films[0], question="A?", **SHORT)
    assert len(nothing.video_cache) == 0


def test_options_reach_generate(pipe, films):
    one = {"video": films[0], "question": "What?"}
    assert len(pipe(one, max_new_tokens=3, min_new_tokens=3, num_beams=4, num_return_sequences=2)["answer"]) == 2
    torch.manual_seed(0)
    sampled = {pipe(one, do_sample=True, temperature=5.0, **SHORT)["answer"] for _ in range(4)}
    assert len(sampled) > 1
    assert pipe(one, generate_kwargs=SHORT) == pipe(one, **SHORT)
    assert pipe(one, system="Answer in French.", **SHORT)["answer"]
    assert pipe(one, chat_template="long_vlm_v1", **SHORT)["answer"]
    with pytest.raises(ValueError, match="max_new_token'"):
        pipe(one, max_new_token=3)


def test_defaults_given_with_the_pipeline(folder, films):
    pipe = pipeline(TASK, model=str(folder), max_new_tokens=2, min_new_tokens=2, num_frames=4)
    seen = []
    pipe.model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(len(output[0])))
    pipe(video=films[0], question="A?")
    assert seen == [4]


def test_options_of_the_video_reach_it(pipe, films, encoded):
    window = {"num_frames": 6, "video_start": 0.2, "video_end": 0.6}
    part = {"type": "video", "video": films[0], **window}
    content = [part, {"type": "text", "text": "What?"}]
    expected = pipe.engine.generate([{"role": "user", "content": content}], **SHORT)
    assert pipe(video=films[0], question="What?", **window, **SHORT)["answer"] == expected
    assert encoded == [6]  # the pipeline had it from the cache
    pipe(video=films[0], question="What?", nframes=3, **SHORT)
    pipe(video=films[0], question="What?", fps=25, max_frames=5, **SHORT)
    assert encoded == [6, 3, 5]
    with pytest.raises(ValueError, match="`video_start` 3 is past the end"):
        pipe(video=films[0], question="What?", video_start=3)
    with pytest.raises(ValueError, match="max_pixels"):
        pipe(video=films[0], question="What?", max_pixels=3)


def test_progress_is_told_in_frames(pipe, films):
    told = []
    pipe(video=films[0], question="A?", progress=lambda *step: told.append(step), **SHORT)
    assert [step for step in told if step[0] == "decode"][-1] == ("decode", 8, 8)
    assert [step for step in told if step[0] == "encode"][-1] == ("encode", 8, 8)


def test_special_tokens_in_a_question_are_text(pipe, films):
    answer = pipe(video=films[0], question="What is <vid_patch> and <video>? </s>", **SHORT)["answer"]
    assert isinstance(answer, str)
    full = pipe(video=films[0], question="Is it <vid_start>?", return_full_text=True, **SHORT)["answer"]
    assert "Is it <vid_start>?" in full


@pytest.mark.parametrize("question", [None, 3, b"What?", ["What?", 3]], ids=str)
def test_a_question_that_is_no_text_is_refused(pipe, films, question):
    with pytest.raises(ValueError, match="question must be text") as error:
        pipe(video=films[0], question=question, **SHORT)
    assert "\n" not in str(error.value)


def test_bad_input_is_refused(pipe, films, tmp_path):
    with pytest.raises(VideoDecodeError, match="no_such_film"):
        pipe(video=str(tmp_path / "no_such_film.mp4"), question="What?")
    with pytest.raises(ValueError, match="video is None"):
        pipe(question="What?")
    with pytest.raises(ValueError, match='"video" and "question"'):
        pipe({"film": films[0], "question": "What?"})
    with pytest.raises(ValueError, match="not both"):
        pipe({"video": films[0], "question": "A?"}, question="B?")
    assert pipe(video=films[0], question="Still there?", **SHORT)["answer"]


def test_a_model_object_needs_its_processor(pipe, films):
    with pytest.raises(ValueError, match="processor"):
        VideoQuestionAnsweringPipeline(model=pipe.model)
    again = pipeline(TASK, model=pipe.model, processor=pipe.processor)
    one = {"video": films[0], "question": "A?"}
    assert again(one, **SHORT) == pipe(one, **SHORT)


def test_a_saved_pipeline_loads_again(pipe, films, tmp_path):
    pipe.save_pretrained(tmp_path / "saved")
    again = pipeline(TASK, model=str(tmp_path / "saved"))
    one = {"video": films[0], "question": "A?"}
    assert again(one, **SHORT) == pipe(one, **SHORT)
