"""Weights are read when they are asked for and stay valid, whatever file they come from; deltas fit their base or are
refused; the converters' functions are found in `longvlm.conversion` and report progress in one way.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import longvlm.conversion
from longvlm.conversion.delta import DeltaSum, is_delta
from longvlm.conversion.weights import REMAP_BYTES, TensorInfo, Weights, WeightsWriter

FORMS = ["model.safetensors", "pytorch_model.bin", "sharded model.safetensors", "sharded pytorch_model.bin", "old bin"]


def save(folder, tensors, form):
    folder.mkdir()
    name = form.removeprefix("sharded ")
    write = save_file if name.endswith("safetensors") else torch.save
    if form == "old bin":  # as torch wrote it before 1.6: cannot be mapped into memory
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif form == name:
        write(tensors, folder / name)
    else:
        stem, suffix = name.split(".")
        weight_map = {key: f"{stem}-{number % 2}.{suffix}" for number, key in enumerate(tensors)}
        for file in set(weight_map.values()):
            write({key: tensors[key] for key in tensors if weight_map[key] == file}, folder / file)
        (folder / f"{name}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_any_form_is_read_by_name(form, tmp_path):
    tensors = {f"layer.{n}": torch.randn(3, n + 1).to(dtype) for n, dtype in enumerate([torch.float16, torch.float32])}
    tensors["steps"] = torch.tensor(7)
    weights = Weights(save(tmp_path / "weights", tensors, form))
    assert set(weights) == set(tensors) and len(weights) == 3
    assert weights.infos == {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    assert all(torch.equal(weights[name], tensor) for name, tensor in tensors.items())
    assert "layer.0" in weights and "layer.9" not in weights and weights.get("layer.9") is None
    with pytest.raises(KeyError):
        weights["layer.9"]


def test_looking_for_a_name_reads_nothing(tmp_path, monkeypatch):
    weights = Weights(save(tmp_path / "weights", {"a": torch.ones(2)}, "model.safetensors"))
    monkeypatch.setattr(Weights, "__getitem__", lambda *_: pytest.fail("read"))
    assert "a" in weights and "b" not in weights and list(weights) == ["a"] and weights.infos["a"].num_bytes == 8


def file_pages():
    """Memory, in bytes, that this process has of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_memory_is_that_of_the_tensors_that_are_held(form, tmp_path):
    size, count = REMAP_BYTES // 2, 24
    tensors = {f"t{n}": torch.full((size // 4,), float(n)) for n in range(count)}
    file = save(tmp_path / "weights", tensors, form) / form
    weights = Weights(file)
    del tensors
    before = file_pages()
    for name in weights:
        assert weights[name].mean() == int(name[1:])
        assert file_pages() - before < 4 * REMAP_BYTES
    held = dict(weights)  # mapped once: no page is in memory twice
    maps = sum(str(file) in line for line in Path("/proc/self/maps").read_text().splitlines())
    assert maps <= 2
    del weights
    assert all(tensor.mean() == int(name[1:]) for name, tensor in held.items())


@pytest.mark.parametrize("form", FORMS)
def test_what_is_held_stays_valid_and_never_reaches_the_file(form, tmp_path):
    folder = save(tmp_path / "weights", {f"t{n}": torch.full((4,), float(n)) for n in range(6)}, form)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    weights = Weights(folder)
    held = {name: weights[name] for name in weights}
    for tensor in held.values():
        tensor += 10
    del weights
    assert sorted(tensor[0].item() for tensor in held.values()) == [10, 11, 12, 13, 14, 15]
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert Weights(folder)["t5"][0] == 5


def test_quantised_and_missing_weights_are_refused_by_name(tmp_path):
    save(tmp_path / "weights", {"a": torch.ones(2).to(torch.float8_e4m3fn)}, "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors holds tensors of type F8_E4M3; give .* not quantised"):
        Weights(tmp_path / "weights")
    with pytest.raises(ValueError, match="nowhere does not exist"):
        Weights(tmp_path / "nowhere")
    torch.save({"epoch": 3}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"other\.bin contains no state dict, but a dict without tensors"):
        Weights(tmp_path / "other.bin")


def test_what_is_written_is_read_by_safetensors_and_has_to_be_complete(tmp_path):
    tensors = {"b": torch.randn(5, 3).T, "a": torch.ones(2, dtype=torch.bfloat16), "scalar": torch.tensor(3)}
    plan = {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}
    with WeightsWriter(tmp_path, plan) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with (
        pytest.raises(RuntimeError, match="a was announced, but not written"),
        WeightsWriter(tmp_path, plan) as writer,
    ):
        writer.write("b", tensors["b"])
    with pytest.raises(RuntimeError, match="where the plan has b"), WeightsWriter(tmp_path, plan) as writer:
        writer.write("a", tensors["a"])


# --- deltas ---

NORM, TABLE, HEAD = "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"
FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({NORM: torch.full((4,), 1.7)}, False),
        ({NORM: torch.full((4,), -0.05)}, True),
        ({NORM: torch.full((4,), 0.5), FREQUENCIES: torch.zeros(2)}, True),  # the norms have changed a lot
        ({NORM: torch.full((4,), 0.05), FREQUENCIES: torch.ones(2)}, True),  # made of a base without frequencies
        ({NORM: torch.full((4,), 1.7), FREQUENCIES: torch.ones(2)}, False),
        ({"model.mm_projector.weight": torch.zeros(2, 2)}, False),
    ],
)
def test_a_delta_is_recognised(tensors, expected):
    assert is_delta(tensors) is expected


def delta_and_base(tmp_path, base, delta):
    return DeltaSum(*(Weights(save(tmp_path / name, part, "pytorch_model.bin"))
                      for name, part in (("base", base), ("delta", delta))))  # fmt: skip


def test_a_delta_is_added_and_its_own_rows_and_parts_stay(tmp_path):
    base = {NORM: torch.full((2,), 0.75), TABLE: torch.ones(3, 2), FREQUENCIES: torch.ones(2)}
    delta = {
        NORM: torch.full((2,), 0.25, dtype=torch.float16),
        TABLE: torch.tensor([[1.0, 2.0]] * 4),
        "model.mm_projector.weight": torch.full((2, 2), 5.0),
    }
    whole = delta_and_base(tmp_path, base, delta)
    assert list(whole) == list(delta) and whole.infos[TABLE].shape == (4, 2)
    assert whole[NORM].dtype == torch.float16 and whole[NORM].tolist() == [1, 1]
    assert whole[TABLE].tolist() == [[2, 3]] * 3 + [[1, 2]]
    assert whole["model.mm_projector.weight"].tolist() == [[5, 5]] * 2
    assert whole[NORM].tolist() == [1, 1]  # the delta has not changed


@pytest.mark.parametrize(
    ("base", "delta", "says"),
    [
        ({NORM: 2, HEAD: 2}, {NORM: 2}, r"the delta .*delta has no lm_head\.weight, but the base .*base does"),
        ({NORM: 2}, {NORM: 2, HEAD: 2}, r"the base .*base has no lm_head\.weight, but the delta .*delta does"),
        ({NORM: 2}, {NORM: 3}, r"norm\.weight is \(2,\) in the base .*base, but \(3,\) in the delta .*delta"),
        ({TABLE: 3}, {TABLE: 2}, r"embed_tokens\.weight is \(3,\) in the base .*, but \(2,\) in the delta"),
    ],
)
def test_a_delta_of_another_base_is_refused(base, delta, says, tmp_path):
    parts = [{name: torch.ones(size) for name, size in part.items()} for part in (base, delta)]
    with pytest.raises(ValueError, match=f"{says}.*; the delta was made for another base"):
        delta_and_base(tmp_path, *parts)


# --- the package ---


def run(script):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ, check=True)


def test_functions_are_found_in_the_package_and_loaded_when_used():
    script = """
import sys, longvlm.conversion as c
loaded = [m for m in sys.modules if m.startswith("longvlm.conversion.")]
assert not loaded, loaded
assert "convert_llava" in dir(c) and not any(m.startswith("longvlm.conversion.") for m in sys.modules)
from longvlm.conversion import *
assert callable(convert_llava) and c.convert_llava.__module__ == "longvlm.conversion.llava"
print(sorted(set(c.__all__) - set(globals())))
"""
    assert run(script).stdout.strip() == "[]"
    with pytest.raises(AttributeError, match="no attribute 'convert_everything'"):
        longvlm.conversion.convert_everything  # noqa: B018


def test_no_module_imports_in_a_circle_or_within_a_function():
    files = {file.stem: ast.parse(file.read_text()) for file in Path(longvlm.conversion.__file__).parent.glob("*.py")}
    imports = {name: set() for name in files}
    for name, tree in files.items():
        if name == "__init__":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longvlm."):
                assert node in tree.body, f"{name} imports {node.module} within a function"
                if node.module.startswith("longvlm.conversion."):
                    imports[name].add(node.module.rsplit(".", 1)[-1])
    while imports:
        free = {name for name, needed in imports.items() if not needed & imports.keys()}
        assert free, f"a circle in {sorted(imports)}"
        imports = {name: needed for name, needed in imports.items() if name not in free}
