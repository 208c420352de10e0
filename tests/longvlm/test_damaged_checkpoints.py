"""Every file of a checkpoint, damaged in every way: one line that names it, never an answer."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModel

import longvlm
from longvlm.conversion.assemble import assemble
from tests.helpers.tiny_models import save_tiny_llm, save_tiny_longvlm, tiny_longvlm, tiny_vision_config

FILES = (
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
DAMAGE = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "noise": lambda content: bytes(range(256)) * 4,
    "zeros": lambda content: bytes(len(content)),
    "a JSON list": lambda content: b"[]",
    "null": lambda content: b"null",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save_tiny_longvlm(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    model, processor = tiny_longvlm()
    model.save_pretrained(folder, max_shard_size="100KB")
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def copy_of(tmp_path):
    def copied(folder):
        return shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.py"))

    return copied


def line_about(folder):
    with pytest.raises((ValueError, OSError)) as error:
        longvlm.load(folder, device="cpu")
    message = str(error.value)
    assert "\n" not in message and str(folder) in message, message
    return message


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(whole, copy_of, name, damage):
    folder = copy_of(whole)
    (folder / name).write_bytes(DAMAGE[damage]((folder / name).read_bytes()))
    message = line_about(folder)
    assert str(folder / name) in message and "again" in message


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model-00002-of"])
def test_a_damaged_shard_or_index_is_named(sharded, copy_of, name, damage):
    folder = copy_of(sharded)
    (file,) = folder.glob(f"{name}*")
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    assert str(file) in line_about(folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "has no weights (model.safetensors); copy, download"),
        ("processor_config.json", "processor_config.json is missing"),
        ("tokenizer.json", "has no tokenizer (tokenizer.json)"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
    ],
)
def test_a_missing_file_is_named(whole, copy_of, name, says):
    folder = copy_of(whole)
    (folder / name).unlink()
    assert says in line_about(folder)


def test_a_missing_shard_is_named(sharded, copy_of):
    folder = copy_of(sharded)
    (file,) = folder.glob("model-00002-of*")
    file.unlink()
    assert f"{file} is missing" in line_about(folder)


def change(*path, to):
    def changed(values):
        *outer, last = path
        place = values
        for key in outer:
            place = place[key]
        place[last] = to
        return values

    return changed


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("config.json", lambda values: {}, "model_type is None, says config.json"),
        ("config.json", change("vision_config", to=3), "config.json.*vision_config must be a configuration"),
        ("config.json", change("frames_per_segment", to=-1), "config.json.*at least 1, got -1"),
        ("config.json", change("text_config", "hidden_size", to="x"), "config.json.*hidden_size"),
        ("config.json", change("text_config", "model_type", to="nope"), "config.json.*'nope'"),
        # Weights that do not fit would be replaced by random ones.
        ("config.json", change("text_config", "num_hidden_layers", to=3), r"its config.json.*layers\.2.* missing"),
        ("config.json", change("text_config", "intermediate_size", to=96), r"its config.json.*\(32, 64\) and not"),
        ("generation_config.json", change("max_new_tokens", to="x"), "generation_config.json"),
        ("processor_config.json", lambda values: {}, "processor_config.json.*no video_processor"),
        ("processor_config.json", change("video_processor", to=[1]), "processor_config.json"),
        ("processor_config.json", change("video_processor", "size", to="big"), "processor_config.json.*big"),
        ("tokenizer.json", lambda values: {}, "tokenizer.json is not a tokenizer"),
        ("tokenizer_config.json", change("extra_special_tokens", to=3), "tokenizer_config.json.*extra_special_tokens"),
        ("tokenizer_config.json", lambda values: {}, "tokenizer_config.json is missing, or does not name"),
    ],
)
def test_values_that_cannot_be_are_named_with_their_file(whole, copy_of, name, changed, says):
    folder = copy_of(whole)
    (folder / name).write_text(json.dumps(changed(json.loads((folder / name).read_text()))))
    with pytest.raises((ValueError, OSError), match=says) as error:
        longvlm.load(folder, device="cpu")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_weights_that_lack_a_tensor_are_refused(whole, copy_of):
    folder = copy_of(whole)
    weights = load_file(folder / "model.safetensors")
    del weights["model.multi_modal_projector.linear_1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "multi_modal_projector.linear_1.weight is missing" in line_about(folder)


@pytest.mark.parametrize("damage", [*DAMAGE, "a pickle"])
def test_damaged_weights_of_torch_are_named_and_run_nothing(whole, copy_of, tmp_path, damage):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    folder = copy_of(whole)
    file = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), file)
    (folder / "model.safetensors").unlink()
    assert longvlm.load(folder, device="cpu")
    file.write_bytes(pickle.dumps(Evil()) if damage == "a pickle" else DAMAGE[damage](file.read_bytes()))
    assert str(file) in line_about(folder)
    assert not (tmp_path / "evil").exists()


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model and a vision encoder, for `assemble`."""
    folder = tmp_path_factory.mktemp("parts")
    save_tiny_llm(folder / "language")
    CLIPVisionModel(tiny_vision_config()).save_pretrained(folder / "vision")
    return folder


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("language", "config.json"),
        ("language", "generation_config.json"),
        ("language", "model.safetensors"),
        ("language", "tokenizer.json"),
        ("language", "tokenizer_config.json"),
        ("vision", "config.json"),
        ("vision", "model.safetensors"),
    ],
)
def test_a_damaged_file_of_a_part_is_named(parts, copy_of, tmp_path, part, name, damage):
    folders = {"language": parts / "language", "vision": parts / "vision"} | {part: copy_of(parts / part)}
    file = folders[part] / name
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises((ValueError, OSError)) as error:
        assemble(folders["vision"], folders["language"], tmp_path / "out", num_global_layers=2)
    assert str(file) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_language_model_that_lacks_a_tensor_is_refused(parts, copy_of, tmp_path):
    folder = copy_of(parts / "language")
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing 1 weights of LlamaForCausalLM, for example model\.norm\.weight"):
        assemble(parts / "vision", folder, tmp_path / "out", num_global_layers=2)


def test_the_command_line_says_it_in_one_line(whole, copy_of, monkeypatch, capfd, tmp_path):
    from longvlm_cli import app as cli

    folder = copy_of(whole)
    (tmp_path / "rows.json").write_text('[{"video_id": "a", "q": "Who?", "a": "A man."}]')
    (tmp_path / "config.yaml").write_text(
        f"model: {folder}\ntrain_data: [{tmp_path / 'rows.json'}]\noutput_dir: {tmp_path / 'out'}\nuse_cpu: true\n"
    )
    film = tmp_path / "film.mp4"
    film.write_bytes(b"not opened")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    for words in (
        ("ask", film, "What?", "--model", folder),
        ("inspect", film, "--model", folder, "--out", tmp_path / "film.png"),
        ("extract", film, "--model", folder, "--out", tmp_path / "features"),
        ("train", tmp_path / "config.yaml"),
    ):
        monkeypatch.setattr("sys.argv", ["longvlm", *map(str, words), *(["--quiet"] if words[0] == "ask" else [])])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert (ended.value.code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"longvlm: error: {folder / 'model.safetensors'} is damaged: ")
