"""The whole way on real input: a real LLM from a GGUF file, real videos, a process of its own, no network.

The vision encoder and the projector have random weights, so the promise is not what is said of the video, but that
the LLM still knows what it knew, and that each real video becomes an answer.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from recipes.smollm2.language_model import smollm2_gguf
from tests.helpers.real_data import or_skip, real_videos

pytestmark = pytest.mark.slow

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 224,
    "patch_size": 14,
}
# In a process that cannot import longvlm, only the folder's own code is left.
ASK = """
import json, sys

if sys.argv[1] == "without":
    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "longvlm":
                raise ImportError("not installed")
    sys.meta_path.insert(0, Refuse())
else:
    import longvlm
from transformers import pipeline

pipe = pipeline("video-question-answering", model=sys.argv[2], trust_remote_code=sys.argv[1] == "without")
videos = sys.argv[3:]
questions = ["What is the capital of France?", "What moves?"]
answers = {video: [pipe(video=video, question=q, max_new_tokens=6)["answer"] for q in questions] for video in videos}
print(json.dumps({"answers": answers, "module": type(pipe.model).__module__}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Assembled by the command, as a user would."""
    language = or_skip(smollm2_gguf)
    folder = tmp_path_factory.mktemp("real")
    (folder / "clip.json").write_text(json.dumps(VISION))
    parts = ["--language", language, "--vision-config", folder / "clip.json", "--out", folder / "model"]
    command = [sys.executable, "-m", "longvlm", "assemble", *map(str, parts)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'model'}\n"
    return folder / "model"


@pytest.fixture(scope="module")
def videos():
    return or_skip(real_videos)


def test_real_llm_in_half_precision_passes_the_check_of_its_text(tmp_path):
    """Rounding alone moves single logits by half a unit there."""
    (tmp_path / "clip.json").write_text(json.dumps(VISION))
    parts = ["--language", or_skip(smollm2_gguf), "--vision-config", tmp_path / "clip.json", "--dtype", "bfloat16"]
    command = [sys.executable, "-m", "longvlm", "assemble", *map(str, parts), "--out", str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["with", "without"])
def test_answers_about_three_real_videos_in_a_fresh_process(checkpoint, videos, package, tmp_path):
    paths = [str(path) for path in videos.values()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", ASK, package, str(checkpoint), *paths]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["answers"]) == 3
    assert all(answer.strip() for answers in result["answers"].values() for answer in answers)
    assert result["module"].startswith("longvlm." if package == "with" else "transformers_modules.")


def test_the_language_model_still_knows_what_it_knew(checkpoint):
    from longvlm import LongVLMForConditionalGeneration, LongVLMProcessor

    model = LongVLMForConditionalGeneration.from_pretrained(checkpoint).eval()
    processor = LongVLMProcessor.from_pretrained(checkpoint)
    conversation = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in processor.decode(answer, skip_special_tokens=True)
    assert answer[-1] == processor.tokenizer.convert_tokens_to_ids("<|im_end|>")  # it stops by itself


def test_same_logits_as_the_gguf_file(checkpoint):
    from transformers import AutoModelForCausalLM

    from longvlm import LongVLMForConditionalGeneration

    language = smollm2_gguf()
    own = AutoModelForCausalLM.from_pretrained(language.parent, gguf_file=language.name, dtype=torch.float32).eval()
    model = LongVLMForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = torch.randint(0, own.config.vocab_size, (1, 40))
    with torch.no_grad():
        expected, logits = own(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(logits[..., : expected.shape[-1]], expected, atol=1e-4, rtol=1e-4)
    assert model.config.video_token_id == own.config.vocab_size


def test_every_frame_of_a_real_video_is_found(videos):
    from longvlm import LongVLMVideoProcessor

    processor = LongVLMVideoProcessor(num_frames=100)
    totals = {"bikes": 250, "bigbuckbunny": 132, "carphone_pristine": 120}
    for name, path in videos.items():
        result = processor(str(path), return_metadata=True, return_tensors="pt")
        metadata = result["video_metadata"][0]
        assert metadata.total_num_frames == totals[name]
        assert result["num_frames"].tolist() == [100]
        pixels = result["pixel_values_videos"][0]
        assert pixels.shape == (100, 3, 224, 224)
        # Real pictures: neither flat nor all the same.
        assert pixels.std() > 0.3 and not torch.equal(pixels[0], pixels[-1])
