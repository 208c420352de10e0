"""A saved folder is complete: it loads, answers and saves again where `longvlm` cannot be imported.

Each case runs in a process of its own, offline: a class that was loaded once stays registered for the whole process.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.dynamic_module_utils import get_imports

from longvlm import LongVLMForConditionalGeneration, LongVLMProcessor, LongVLMVideoProcessor
from longvlm.modeling_longvlm.remote_code import code_files, remove_code, save_code_and_config
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import save_tiny_longvlm, tiny_longvlm
from tests.helpers.video_files import write_video

QUESTION = "What happens?"
CODE = {
    "animated_pictures.py",
    "arriving_data.py",
    "chat_messages.py",
    "chat_template_form.py",
    "chat_templates_longvlm.py",
    "configuration_longvlm.py",
    "container_formats.py",
    "crop_spans.py",
    "downloads.py",
    "engine_longvlm.py",
    "feature_cache_longvlm.py",
    "field_pictures.py",
    "frame_display.py",
    "modeling_longvlm.py",
    "option_values.py",
    "pictures.py",
    "pipeline_inputs_longvlm.py",
    "pipeline_longvlm.py",
    "plain_numbers.py",
    "playlists.py",
    "processing_longvlm.py",
    "remote_code.py",
    "text_escaping.py",
    "time_windows.py",
    "token_merging.py",
    "video_decoders.py",
    "video_decoding.py",
    "video_errors.py",
    "video_index.py",
    "video_processing_longvlm.py",
    "video_reader.py",
    "video_sources.py",
    "video_state_longvlm.py",
    "video_times.py",
    "vision_tower_longvlm.py",
}

WITHOUT_PACKAGE = """
import sys
sys.modules["longvlm"] = None  # importing it fails from here on
try:
    import longvlm
except ImportError:
    pass
else:
    raise SystemExit("longvlm can be imported")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_longvlm(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", 20)


@pytest.fixture(scope="module")
def answer(film):
    """What the installed package answers."""
    from longvlm import VideoQuestionAnsweringPipeline

    model, processor = tiny_longvlm()
    pipe = VideoQuestionAnsweringPipeline(model=model, processor=processor)
    return pipe(video=film, question=QUESTION, max_new_tokens=8)["answer"]


def run(code: str, tmp_path, *arguments, **variables) -> str:
    """Standard output of `code` in a fresh process."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "PYTHONWARNINGS": "ignore"}
    environment |= variables
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_the_folder_holds_its_code_and_no_more(folder):
    assert {path.name for path in folder.glob("*.py")} == CODE
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_longvlm.LongVLMConfig",
        "AutoModel": "modeling_longvlm.LongVLMModel",
        "AutoModelForImageTextToText": "modeling_longvlm.LongVLMForConditionalGeneration",
        "AutoModelForMultimodalLM": "modeling_longvlm.LongVLMForConditionalGeneration",
    }
    assert config["custom_pipelines"]["video-question-answering"]["impl"] == (
        "pipeline_longvlm.VideoQuestionAnsweringPipeline"
    )
    assert not list(folder.glob("*.bin")) and list(folder.glob("*.safetensors"))


def test_the_code_needs_nothing_optional(folder):
    """From the Hub, transformers refuses a file whose imports are missing, inside functions too."""
    always = {"torch", "transformers", "numpy", "PIL", "tokenizers", "torchvision", "huggingface_hub"}
    standard = set(sys.stdlib_module_names)
    for path in folder.glob("*.py"):
        assert set(get_imports(path)) <= always | standard, path.name


def test_saving_leaves_the_model_as_it_was(tmp_path):
    model, _ = tiny_longvlm()
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert not hasattr(model.config, "custom_pipelines")
    after = model.config.to_dict()
    for settings in (before, after):
        for name in ("auto_map", "architectures", "dtype"):
            settings.pop(name, None)
    assert after == before


def test_a_model_that_was_sharded_saves_the_code_of_its_own_class(tmp_path):
    """FSDP swaps a model's class for one that is defined in torch."""
    model, _ = tiny_longvlm()
    kind = type(model)
    sharded = type(f"FSDP{kind.__name__}", (kind,), {"__module__": "torch.distributed.fsdp"})
    model.__class__ = sharded
    model.save_pretrained(tmp_path)
    assert type(model) is sharded
    assert {path.name for path in tmp_path.glob("*.py")} == code_files(kind).keys()
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [kind.__name__]


def test_code_and_configuration_are_saved_without_weights_as_with_them(tmp_path):
    model, _ = tiny_longvlm()
    model.save_pretrained(tmp_path / "whole")
    with torch.device("meta"):
        empty = type(model)(model.config)
    (tmp_path / "code").mkdir()
    save_code_and_config(empty, tmp_path / "code")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "code").iterdir()}
    left_out = {path.name for path in (tmp_path / "whole").iterdir()} - saved.keys()
    assert left_out == {"generation_config.json", "model.safetensors"}
    assert all((tmp_path / "whole" / name).read_bytes() == content for name, content in saved.items())


def test_the_code_is_taken_out_again(tmp_path):
    folder = save_tiny_longvlm(tmp_path / "model")
    code = code_files(LongVLMForConditionalGeneration, LongVLMProcessor, LongVLMVideoProcessor)
    assert code.keys() == CODE
    assert all((folder / name).read_bytes() == file.read_bytes() for name, file in code.items())
    remove_code(folder)
    assert not list(folder.glob("*.py"))
    for file in folder.glob("*.json"):
        assert not any(key in file.read_text() for key in ("auto_map", "custom_pipelines", "_longvlm.")), file.name
    assert AutoModelForImageTextToText.from_pretrained(folder).config.model_type == "longvlm"
    assert isinstance(AutoProcessor.from_pretrained(folder), LongVLMProcessor)


def test_the_pipeline_without_the_package(folder, film, answer, tmp_path):
    code = (
        WITHOUT_PACKAGE
        + f"""
from transformers import pipeline
pipe = pipeline("video-question-answering", model=sys.argv[1], trust_remote_code=True)
assert type(pipe).__module__.startswith("transformers_modules"), type(pipe)
assert type(pipe.model).__module__.startswith("transformers_modules"), type(pipe.model)
assert type(pipe.processor).__module__.startswith("transformers_modules"), type(pipe.processor)
print(pipe(video=sys.argv[2], question={QUESTION!r}, max_new_tokens=8)["answer"].encode())
pipe.save_pretrained("again")
"""
    )
    assert run(code, tmp_path, folder, film) == str(answer.encode())
    # What it saved is complete, too.
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == CODE
    code = code.replace('pipe.save_pretrained("again")', "")
    assert run(code, tmp_path, tmp_path / "again", film) == str(answer.encode())


def test_every_auto_class_without_the_package(folder, film, answer, tmp_path):
    code = (
        WITHOUT_PACKAGE
        + f"""
import torch
from transformers import (AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
                          AutoTokenizer, AutoVideoProcessor)
folder, film = sys.argv[1:]
trust = dict(trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, **trust)
assert (type(config).__name__, config.num_video_tokens(8)) == ("LongVLMConfig", 14)
base = AutoModel.from_pretrained(folder, **trust)
assert type(base).__name__ == "LongVLMModel"
video_processor = AutoVideoProcessor.from_pretrained(folder, **trust)
assert type(video_processor).__name__ == "LongVLMVideoProcessor"
assert AutoTokenizer.from_pretrained(folder, **trust).convert_tokens_to_ids("<vid_patch>") == config.video_token_id
processor = AutoProcessor.from_pretrained(folder, **trust)
assert type(processor).__name__ == "LongVLMProcessor"
chat = [{{"role": "user", "content": [{{"type": "video", "path": film}}, {{"type": "text", "text": {QUESTION!r}}}]}}]
inputs = processor.apply_chat_template(
    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
features = base.get_video_features(inputs["pixel_values_videos"], num_frames=inputs["num_frames"])
answers = set()
for auto in (AutoModelForImageTextToText, AutoModelForMultimodalLM):
    model = auto.from_pretrained(folder, **trust)
    assert type(model).__name__ == "LongVLMForConditionalGeneration"
    torch.testing.assert_close(model.get_video_features(inputs["pixel_values_videos"]).pooler_output[0],
                               features.pooler_output[0])
    generated = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
    answers.add(processor.decode(generated, skip_special_tokens=True).strip())
for thing in (model, processor):
    thing.save_pretrained("again")
assert len(answers) == 1
print(answers.pop().encode())
"""
    )
    assert run(code, tmp_path, folder, film) == str(answer.encode())
    assert {path.name for path in (tmp_path / "again").glob("*.py")} == CODE
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir() if path.suffix == ".safetensors"}
    assert again and all((folder / name).read_bytes() == content for name, content in again.items())


@pytest.mark.parametrize("trust", [None, True, False])
def test_the_installed_package_wins_over_the_folders_code(folder, film, answer, tmp_path, trust):
    code = f"""
import sys
import longvlm
from transformers import AutoModel, AutoModelForMultimodalLM, AutoProcessor, pipeline
pipe = pipeline("video-question-answering", model=sys.argv[1], trust_remote_code={trust})
assert type(pipe) is longvlm.VideoQuestionAnsweringPipeline
assert type(pipe.model) is longvlm.LongVLMForConditionalGeneration
assert type(AutoModel.from_pretrained(sys.argv[1])) is longvlm.LongVLMModel
assert type(AutoModelForMultimodalLM.from_pretrained(sys.argv[1])) is longvlm.LongVLMForConditionalGeneration
assert type(AutoProcessor.from_pretrained(sys.argv[1])) is longvlm.LongVLMProcessor
print(pipe(video=sys.argv[2], question={QUESTION!r}, max_new_tokens=8)["answer"].encode())
"""
    assert run(code, tmp_path, folder, film) == str(answer.encode())


def test_both_at_once_give_the_same_logits(folder, tmp_path):
    """The folder's own code against the installed one, in two processes."""
    body = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
generator = torch.Generator().manual_seed(0)
pixels = torch.randn(1, 7, 3, 56, 56, generator=generator)
with torch.no_grad():
    torch.save(model.get_video_features(pixels).pooler_output[0], sys.argv[2])
"""
    run(WITHOUT_PACKAGE + body, tmp_path, folder, tmp_path / "remote.pt")
    run("import longvlm\n" + body, tmp_path, folder, tmp_path / "installed.pt")
    remote, installed = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("remote", "installed"))
    assert torch.equal(remote, installed)


@pytest.mark.slow
def test_a_folder_of_one_transformers_loads_in_the_other(folder, film, answer, tmp_path):
    """Of the oldest supported version in the newest, or the other way round; `make test-floor` brings the oldest."""
    floor = ROOT / ".cache" / "transformers-5.17"
    if not (floor / "transformers").is_dir():
        pytest.skip("the oldest supported transformers is not here; run: make test-floor")
    here_is_floor = transformers.__file__.startswith(str(floor))
    code = (
        WITHOUT_PACKAGE
        + f"""
import transformers
from transformers import pipeline
pipe = pipeline("video-question-answering", model=sys.argv[1], trust_remote_code=True)
pipe.save_pretrained("again")
print(transformers.__version__, pipe(video=sys.argv[2], question={QUESTION!r}, max_new_tokens=8)["answer"].encode())
"""
    )
    version, there = run(code, tmp_path, folder, film, PYTHONPATH="" if here_is_floor else str(floor)).split(" ", 1)
    assert version != transformers.__version__
    assert there == str(answer.encode())
    # And back again.
    version, back = run(code, tmp_path, tmp_path / "again", film).split(" ", 1)
    assert version == transformers.__version__
    assert back == str(answer.encode())
