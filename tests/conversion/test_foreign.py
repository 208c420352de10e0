"""Damaged and hostile models of others: one line that names the file, no code run, nothing written."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from longvlm.conversion.assemble import assemble
from longvlm.conversion.llava import convert_llava
from longvlm.conversion.original import convert_original
from longvlm.conversion.weights import Weights
from tests.conversion.test_convert_llava import save_clip, transformers_llava
from tests.conversion.test_convert_original import BASE, DELTA, PROJECTOR, save_vision
from tests.helpers.tiny_models import save_tiny_llm

METHOD = {"num_global_layers": 2, "frames_per_segment": 4, "tokens_per_segment": 6}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    save_tiny_llm(folder / "llm")
    save_clip(folder / "clip")
    transformers_llava(folder / "llava")
    shutil.copytree(BASE, folder / "llama")
    save_vision(folder / "vision")
    return folder


def convert(kind, spoiled, sources, out):
    """Converts with the spoiled copy of one source."""
    if kind == "llm":
        assemble(sources / "clip", spoiled, out, **METHOD)
    elif kind == "clip":
        assemble(spoiled, sources / "llm", out, **METHOD)
    elif kind == "llava":
        convert_llava(spoiled, out, frames_per_segment=4, tokens_per_segment=6)
    else:
        vision = sources / "vision"
        convert_original(spoiled, out, delta=DELTA, projector=PROJECTOR, vision=vision, forward_check=False)


DAMAGE = {
    "nested too deeply": lambda data: b"[" * 10**5,
    "nested too deeply at the end": lambda data: data.rstrip()[:-1] + b', "x": ' + b"[" * 10**5 + b"]" * 10**5 + b"}",
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "a number of too many digits": lambda data: data.rstrip()[:-1] + b', "x": ' + b"9" * 5000 + b"}",
    "UTF-16": lambda data: data.decode().encode("utf-16"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", ["llm", "clip", "llava", "llama"])
def test_a_damaged_setting_is_refused_by_the_name_of_its_file(kind, damage, sources, tmp_path):
    """Also those that transformers would go on without, such as generation_config.json."""
    files = sorted(file.name for file in (sources / kind).glob("*.json"))
    assert "config.json" in files and len(files) >= 2
    for name in files:
        spoiled = tmp_path / name / kind
        shutil.copytree(sources / kind, spoiled)
        (spoiled / name).write_bytes(DAMAGE[damage]((spoiled / name).read_bytes()))
        with pytest.raises(ValueError, match=f"^{spoiled / name} (is|holds)") as error:
            convert(kind, spoiled, sources, tmp_path / "out")
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["llm", "clip"])
def test_code_that_a_model_brings_or_names_is_neither_run_nor_asked_about(kind, sources, tmp_path, monkeypatch):
    def asked(*arguments):
        raise AssertionError("the user was asked")

    monkeypatch.setattr("builtins.input", asked)
    spoiled = tmp_path / kind
    shutil.copytree(sources / kind, spoiled)
    (spoiled / "mine.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'harm')!r}).touch()\n")
    for place in ("mine.Config", "other/repository--mine.Config"):
        values = json.loads((sources / kind / "config.json").read_text())
        values |= {"model_type": "mine", "auto_map": {"AutoConfig": place, "AutoModel": place}}
        (spoiled / "config.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=f"^{spoiled} needs code of its own, and foreign code is not run here$"):
            convert(kind, spoiled, sources, tmp_path / "out")
    assert not (tmp_path / "harm").exists()


def test_values_that_no_model_has_are_one_line(sources, tmp_path):
    changes = {
        "llm": [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"model_type": "../llama"}, {"vocab_size": -1}],
        "clip": [{"hidden_size": None}, {"patch_size": 0}, {"model_type": ["clip"]}, {"vision_config": 3}],
    }
    for kind, all_values in changes.items():
        for number, values in enumerate(all_values):
            spoiled = tmp_path / str(number) / kind
            shutil.copytree(sources / kind, spoiled)
            config = json.loads((spoiled / "config.json").read_text())
            (spoiled / "config.json").write_text(json.dumps(config | values))
            with pytest.raises((ValueError, OSError)) as error:
                convert(kind, spoiled, sources, tmp_path / "out")
            assert str(spoiled) in str(error.value), values
            assert len(str(error.value)) < 2000


@pytest.mark.parametrize(
    "shard", ["../secret.safetensors", "/etc/passwd", "more/a.safetensors", "", "..", 3, None, ["a"]]
)
def test_an_index_that_names_files_elsewhere_is_refused(shard, tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json (names the shard|is not an index)"):
        Weights(folder)
    index.write_bytes(b'{"weight_map": ' + b"[" * 10**5)
    with pytest.raises(ValueError, match=r"is not an index of shards: .*nested too deeply"):
        Weights(folder)
