"""On an accelerator: the numbers and answers of the CPU. Skipped where there is none."""

import numpy as np
import pytest
import torch

import longvlm
from longvlm.evaluation import storyline

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def engines():
    """longvlm-tiny in float32, on the CPU and on the accelerator."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return [longvlm.load(longvlm.tiny_checkpoint(), dtype="float32", device=device) for device in ("cpu", None)]


@pytest.fixture(scope="module")
def frames():
    story = storyline.make_story(storyline.story_seed("test", 0))
    return storyline.frames_at(story, storyline.middle_times(story, 100), size=64)


def ask(frames, question):
    content = [{"type": "video", "video": frames, "do_sample_frames": False}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def test_features_are_those_of_the_cpu(engines, frames):
    on_cpu, on_gpu = (engine.encode(frames, do_sample_frames=False) for engine in engines)
    assert on_gpu.local_features[0].device.type == torch.accelerator.current_accelerator().type
    # A merge is decided by similarities: a pair that is equal up to rounding may fall the other way.
    distance = (on_gpu.local_features[0].cpu() - on_cpu.local_features[0]).norm(dim=-1)
    assert (distance < 1e-2).float().mean() > 0.95
    torch.testing.assert_close(on_gpu.global_features.cpu(), on_cpu.global_features, atol=1e-3, rtol=1e-3)


def test_answers_are_those_of_the_cpu(engines, frames):
    story = storyline.make_story(storyline.story_seed("test", 0))
    questions = [question.question for question in storyline.make_questions(story)]
    batch = [ask(frames, question) for question in questions]
    on_cpu, on_gpu = (engine.generate(batch, max_new_tokens=8, do_sample=False) for engine in engines)
    assert np.mean([a == b for a, b in zip(on_cpu, on_gpu, strict=True)]) > 0.8
    assert "".join(engines[1].stream(batch[0], max_new_tokens=8, do_sample=False)) == on_gpu[0]


def test_half_precision_answers(frames):
    engine = longvlm.load(longvlm.tiny_checkpoint(), dtype="bfloat16")
    assert engine.generate(ask(frames, "What is the first object?"), max_new_tokens=8).strip()
    scores = engine.score_choices(ask(frames, "What is the first object?"), ["red star", "blue moon"])
    assert np.isfinite(scores).all()
