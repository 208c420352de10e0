"""Prompts that are longer than the LLM's context are refused with both numbers, before anything long begins."""

import time

import pytest
from transformers import pipeline

from longvlm import LongVLMConfig
from longvlm.modeling_longvlm.engine_longvlm import LongVLMEngine
from tests.helpers.tiny_models import save_tiny_longvlm, tiny_longvlm, tiny_text_config
from tests.helpers.video_files import write_video

CONTEXT = 320  # tokens; a token is a byte, and the chat template takes about 170


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", 40)


@pytest.fixture
def engine():
    return LongVLMEngine(*tiny_longvlm(text_config=tiny_text_config(max_position_embeddings=CONTEXT)))


@pytest.fixture
def encoded(engine):
    """Frames that went into the vision tower."""
    frames = []
    engine.model.model.vision_tower.register_forward_hook(lambda module, args, output: frames.append(len(args[0])))
    return frames


def ask(question, *videos, **options):
    content = [{"type": "video", "video": video, **options} for video in videos]
    return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]


def test_a_prompt_fits_up_to_the_last_token(engine, film):
    answer = engine.generate(ask("What?", film), max_new_tokens=8, min_new_tokens=8, return_details=True)
    most = CONTEXT - answer.prompt_tokens
    whole = engine.generate(ask("What?", film), max_new_tokens=most, min_new_tokens=most, return_details=True)
    assert len(whole.token_ids) == most
    with pytest.raises(ValueError, match=f"{answer.prompt_tokens} tokens.* up to {most + 1}.* takes {CONTEXT} in all"):
        engine.generate(ask("What?", film), max_new_tokens=most + 1)
    # The row decides, not the padding beside it.
    batch = [ask("What?", film), ask("?", film)]
    assert len(engine.generate(batch, max_new_tokens=most)) == 2


@pytest.mark.parametrize("call", ["generate", "batch", "stream", "score_choices"])
def test_a_long_question_is_refused_before_its_video_is_opened(engine, call):
    long, short = ask("Why? " * 60, "no_such_film.mp4"), ask("Why?", "no_such_film.mp4")
    calls = {
        "generate": lambda: engine.generate(long, max_new_tokens=4),
        "batch": lambda: engine.generate([short, long], max_new_tokens=4),
        "stream": lambda: list(engine.stream(long, max_new_tokens=4)),
        "score_choices": lambda: engine.score_choices(long, ["yes", "no"]),
    }
    with pytest.raises(
        ValueError, match=rf"the prompt has 4\d\d tokens.* takes {CONTEXT} in all: shorten the text"
    ) as error:
        calls[call]()
    assert "\n" not in str(error.value) and "max_new_tokens" not in str(error.value)


def test_too_many_frames_are_refused_before_they_are_encoded(engine, film, encoded, tmp_path):
    # 40 frames are 62 tokens: 10 segments of 6, and 2 global ones.
    films = [film, *(write_video(tmp_path / f"{i}.mp4", range(i, i + 40)) for i in range(2))]
    with pytest.raises(ValueError, match=r"186 of them for videos.* takes 320 in all: .* or take fewer frames"):
        engine.generate(ask("What?", *films, num_frames=40), max_new_tokens=4)
    assert sum(encoded) == 80  # the first two fit
    # Features that were encoded before count as well.
    features = [engine.encode(film, num_frames=40) for film in films]
    with pytest.raises(ValueError, match="186 of them for videos"):
        engine.generate(ask("What?", *features), max_new_tokens=4)
    assert engine.generate(ask("What?", *features[:2]), max_new_tokens=4) is not None


def test_a_long_choice_is_refused(engine, film):
    assert len(engine.score_choices(ask("What?", film), ["yes", "no"])) == 2
    with pytest.raises(ValueError, match=f"takes {CONTEXT} in all"):
        engine.score_choices(ask("What?", film), ["yes", "no " * 60])


def test_max_length_counts_the_prompt(engine):
    messages = [{"role": "user", "content": "What?"}]
    assert engine.generate(messages, max_length=CONTEXT) is not None
    with pytest.raises(ValueError, match=f"takes {CONTEXT} in all"):
        engine.generate(messages, max_length=CONTEXT + 1)


def test_120_000_characters_are_refused_within_seconds_by_the_pipeline_and_by_ask(film, tmp_path, monkeypatch, capfd):
    from longvlm_cli import app as cli

    folder = save_tiny_longvlm(tmp_path / "model")
    question = "What is the first object? " * 4616
    pipe = pipeline("video-question-answering", model=str(folder))
    start = time.perf_counter()
    with pytest.raises(ValueError, match=r"the prompt has 120,\d\d\d tokens.* takes 2,048 in all"):
        pipe(video=film, question=question)
    assert time.perf_counter() - start < 10
    capfd.readouterr()
    monkeypatch.setattr("sys.argv", ["longvlm", "ask", film, question, "--model", str(folder), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    assert (ended.value.code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("longvlm: error: the prompt has 120,") and "takes 2,048 in all" in err


EXTENDED = {"factor": 4.0, "original_max_position_embeddings": 32768}
LLAMA_3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@pytest.mark.parametrize(
    ("model_type", "named", "rope", "tokens"),
    [
        ("llama", {"max_position_embeddings": 2048}, None, 2048),
        ("gpt2", {"n_positions": 1024}, None, 1024),
        ("mistral", {"max_position_embeddings": 32768, "sliding_window": 4096}, None, 32768),
        # These configurations name the length of the training; the factor extends it.
        ("llama", {"max_position_embeddings": 4096}, {"type": "linear", "factor": 4.0}, 16384),
        ("llama", {"max_position_embeddings": 4096}, {"type": "dynamic", "factor": 2.0}, 8192),
        ("qwen2", {"max_position_embeddings": 32768}, {"rope_type": "yarn", **EXTENDED}, 131072),
        # These name the extended length.
        ("qwen2", {"max_position_embeddings": 131072}, {"rope_type": "yarn", **EXTENDED}, 131072),
        ("llama", {"max_position_embeddings": 131072}, {"rope_type": "llama3", **LLAMA_3}, 131072),
        ("gemma3_text", {"max_position_embeddings": 131072}, {"rope_type": "linear", "factor": 8.0}, 131072),
        # Nothing limits these.
        ("mamba", {}, None, None),
        ("bloom", {}, None, None),
        ("falcon", {"alibi": True}, None, None),
    ],
)
def test_the_context_is_what_the_llm_can_take(model_type, named, rope, tokens):
    text = {"model_type": model_type, **named, **({} if rope is None else {"rope_scaling": dict(rope)})}
    assert LongVLMConfig(text_config=text).context_length == tokens


def test_without_a_limit_nothing_is_refused(engine, monkeypatch):
    monkeypatch.setattr(type(engine.model.config), "context_length", None)
    answer = engine.generate([{"role": "user", "content": "Why? " * 200}], max_new_tokens=4, return_details=True)
    assert answer.prompt_tokens > 2 * CONTEXT
