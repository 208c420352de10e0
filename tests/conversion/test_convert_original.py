"""Checkpoints of the released code: what is converted says what the original says, and says it after any accident.

`fixtures/original_checkpoint` is a small one in the original's formats; `fixtures/original_tiny.*` is what the
released code made of it. Memory and kills are tried on a larger one of random numbers, in processes of their own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

import longvlm
from longvlm.conversion.original import VIDEO_TOKENS, convert_original
from longvlm.conversion.original_features import convert_features, read_feature_file
from longvlm.conversion.to_original import convert_to_original
from longvlm.conversion.weights import Weights
from longvlm_cli import app as cli
from tests.helpers.paths import FIXTURES
from tests.helpers.tiny_models import tiny_vision_config
from tests.helpers.video_files import write_video

ORIGINAL = FIXTURES / "original_checkpoint"
BASE, DELTA, PROJECTOR = ORIGINAL / "base", ORIGINAL / "delta", ORIGINAL / "mm_projector.bin"
EXPECTED = json.loads((FIXTURES / "original_tiny.json").read_text())
CASES = {case["name"]: case for case in EXPECTED["cases"]}
LLM = "model.language_model."


@pytest.fixture(scope="module")
def numbers():
    return load_file(FIXTURES / "original_tiny.safetensors")


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A CLIP of width 64 with the original's 256 patches a frame."""
    return save_vision(tmp_path_factory.mktemp("vision"))


def save_vision(folder, **changes):
    from transformers import CLIPVisionModel

    torch.manual_seed(0)
    values = {"image_size": 224, "num_hidden_layers": 6, **changes}
    CLIPVisionModel(tiny_vision_config(**values)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory, vision):
    """The paper's layout, every tensor in its source's dtype, and the report."""
    out = tmp_path_factory.mktemp("converted") / "out"
    report = convert_original(BASE, out, delta=DELTA, projector=PROJECTOR, vision=vision)
    return out, report


def check_golden(folder, numbers, names=tuple(CASES)):
    """Tokens equal, and logits within 1e-4 of the released code's."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    for name in names:
        case = CASES[name]
        content = [{"type": "video"}, {"type": "text", "text": case["question"]}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            num_video_tokens=case["num_video_tokens"],
        )
        assert torch.equal(inputs["input_ids"][0], numbers[f"{name}.input_ids"])
        local, memory = (torch.from_numpy(read_feature_file(ORIGINAL / case[kind])) for kind in ("local", "memory"))
        features = {"local_features": (local,), "global_features": memory[-5:][None]}
        with torch.no_grad():
            output = model(input_ids=inputs["input_ids"], video_features=features)
        projected = output.video_features.pooler_output[0]
        assert (projected - numbers[f"{name}.projected_features"]).abs().max() <= 1e-4
        logits = output.logits[0, numbers[f"{name}.logits_rows"], : EXPECTED["vocab_delta"]]
        assert (logits - numbers[f"{name}.logits"]).abs().max() <= 1e-4


# --- the numbers of the original ---


def test_merged_weights_are_the_originals_to_the_bit(converted, numbers):
    written = Weights(converted[0])
    for name, tensor in numbers.items():
        if not name.startswith("merged."):
            continue
        old = name.removeprefix("merged.")
        if old == "lm_head.weight":
            assert torch.equal(written[old][: EXPECTED["vocab_delta"]], tensor)
        elif old == "model.embed_tokens.weight":
            table = written[f"{LLM}embed_tokens.weight"]
            assert torch.equal(table, numbers["embed_tokens_final"])
            assert torch.equal(table[: EXPECTED["vocab_delta"]], tensor.float())
        else:
            assert torch.equal(written[LLM + old.removeprefix("model.")], tensor), name
    projector = torch.load(PROJECTOR, weights_only=True)
    for kind in ("weight", "bias"):
        found = written[f"model.multi_modal_projector.linear_1.{kind}"]
        assert torch.equal(found, projector[f"model.mm_projector.{kind}"])


def test_output_rows_of_added_tokens_are_the_mean_of_the_others(converted, numbers):
    table = Weights(converted[0])["lm_head.weight"]
    mean = numbers["merged.lm_head.weight"].float().mean(0).half()
    assert len(table) == EXPECTED["vocab_final"]
    assert all(torch.equal(row, mean) for row in table[EXPECTED["vocab_delta"] :])


def test_tokens_and_logits_are_the_originals(converted, numbers):
    check_golden(converted[0], numbers)


def test_the_tokenizer_alone_keeps_the_originals_ids(converted, numbers, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(converted[0])
    assert tokenizer.convert_tokens_to_ids(list(VIDEO_TOKENS)) == list(EXPECTED["added_token_ids"].values())
    case = CASES["video_205"]
    places = VIDEO_TOKENS[1] + VIDEO_TOKENS[0] * case["num_video_tokens"] + VIDEO_TOKENS[2]
    prompt = case["prompt_with_marker"].replace("<video>", places)
    assert tokenizer(prompt)["input_ids"] == numbers["video_205.input_ids"].tolist()
    tokenizer.save_pretrained(tmp_path)  # once more
    assert AutoTokenizer.from_pretrained(tmp_path)(prompt)["input_ids"] == numbers["video_205.input_ids"].tolist()
    # A space mark after an end token, as the fast tokenizer of the original's time had it.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a</s>a")["input_ids"]) == ["<s>", "▁a", "</s>", "▁a"]


def test_settings_are_the_originals(converted):
    config = longvlm.LongVLMConfig.from_pretrained(converted[0])
    assert (config.frames_per_segment, config.tokens_per_segment, config.num_global_layers) == (10, 30, 5)
    assert (config.merge_similarity, config.merge_num_heads, config.merge_order) == ("mean_head", 16, "matching")
    assert config.num_video_tokens(100) == 305
    processor = AutoProcessor.from_pretrained(converted[0])
    video = processor.video_processor
    assert (video.num_frames, video.do_center_crop, int(video.resample)) == (100, False, 0)
    assert "You are LongVLM" in processor.apply_chat_template([{"role": "user", "content": "Hello"}])


def test_released_layout_gives_205_tokens(vision, numbers, tmp_path):
    out = tmp_path / "out"
    features = ORIGINAL / CASES["video_205"]["local"]
    report = convert_original(BASE, out, delta=DELTA, projector=PROJECTOR, vision=vision, feature_file=features)
    assert (report.layout, report.tokens_per_video) == ("released", 205)
    config = longvlm.LongVLMConfig.from_pretrained(out)
    assert config.merge_schedule == [2880, 1440, 720, 360, 180, 90, 40]
    assert config.num_video_tokens(100) == AutoProcessor.from_pretrained(out).num_video_tokens(100) == 205
    check_golden(out, numbers, ["video_205"])


def test_the_converter_says_which_layout_fits_a_feature_file(vision, tmp_path):
    features = ORIGINAL / CASES["video_305"]["local"]
    sources = {"delta": DELTA, "projector": PROJECTOR, "vision": vision, "feature_file": features}
    with pytest.raises(ValueError, match="has the layout paper, not released"):
        convert_original(BASE, tmp_path / "out", layout="released", **sources)
    memory = ORIGINAL / CASES["video_305"]["memory"]
    with pytest.raises(ValueError, match=r"has 7 rows.*300 \(paper\) or 200 \(released\)"):
        convert_original(BASE, tmp_path / "out", **{**sources, "feature_file": memory})


def test_every_tensor_is_accounted_for(converted):
    out, report = converted
    model = AutoModelForImageTextToText.from_pretrained(out)
    assert report.written == len(model.state_dict()) and report.forward_checked
    assert len(report.left_out) == 2 and all("inv_freq" in name for name in report.left_out)
    assert sorted(report.replaced) == sorted(torch.load(PROJECTOR, weights_only=True))
    assert any("lm_head.weight (387, 32) -> (390, 32)" in line for line in report.reshaped)
    assert not report.missing and not report.unexpected
    assert "missing: none" in str(report) and "unexpected: none" in str(report)


# --- other forms of the same ---


@pytest.fixture
def whole(tmp_path, numbers):
    """A whole checkpoint of the original as one state dict, and a folder with everything but its weights."""
    folder = tmp_path / "whole"
    shutil.copytree(DELTA, folder, ignore=shutil.ignore_patterns("*.bin", "*.index.json"))
    config = json.loads((DELTA / "config.json").read_text())
    config |= {"vocab_size": EXPECTED["vocab_final"], "model_type": "LongVLM"}
    (folder / "config.json").write_text(json.dumps(config))
    tokens = {**EXPECTED["image_tokens_of_delta"], **EXPECTED["added_token_ids"]}
    (folder / "added_tokens.json").write_text(json.dumps(tokens))
    names = [name for name in numbers if name.startswith("merged.")]
    tensors = {name.removeprefix("merged."): numbers[name] for name in names}
    head = tensors["lm_head.weight"]
    tensors["lm_head.weight"] = torch.cat([head, torch.ones(3, head.shape[1], dtype=head.dtype)])
    tensors |= torch.load(PROJECTOR, weights_only=True)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    return folder, tensors


def save_sharded(folder, tensors, ending, shards=3, **options):
    names = list(tensors)
    stem = "model" if ending == "safetensors" else "pytorch_model"
    weight_map = {}
    for number in range(shards):
        part = {name: tensors[name].contiguous() for name in names[number::shards]}
        file = f"{stem}-{number + 1:05}-of-{shards:05}.{ending}"
        if ending == "safetensors":
            save_file(part, folder / file)
        else:
            torch.save(part, folder / file, **options)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("form", ["safetensors", "sharded safetensors", "sharded bin", "old bin"])
def test_a_whole_checkpoint_converts_in_any_form(whole, form, vision, numbers, tmp_path):
    folder, tensors = whole
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    elif form == "old bin":  # as torch wrote it before 1.6: cannot be mapped into memory
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        save_sharded(folder, tensors, form.split()[1])
    out = tmp_path / "out"
    report = convert_original(folder, out, vision=vision, forward_check=False)
    check_golden(out, numbers)
    assert torch.equal(Weights(out)["lm_head.weight"], tensors["lm_head.weight"])  # its own rows
    assert not report.replaced and "not run" in str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_that_of_every_tensor(dtype, vision, tmp_path):
    convert_original(BASE, tmp_path / "out", delta=DELTA, projector=PROJECTOR, vision=vision, dtype=dtype)
    assert {str(info.dtype) for info in Weights(tmp_path / "out").infos.values()} == {f"torch.{dtype}"}
    assert str(AutoModelForImageTextToText.from_pretrained(tmp_path / "out").dtype) == f"torch.{dtype}"


def test_shards_of_any_size_hold_the_same(converted, vision, tmp_path):
    out = tmp_path / "out"
    sources = {"delta": DELTA, "projector": PROJECTOR, "vision": vision}
    convert_original(BASE, out, max_shard_bytes=100_000, forward_check=False, **sources)
    assert len(list(out.glob("model-*.safetensors"))) > 5
    one, many = (AutoModelForImageTextToText.from_pretrained(f, dtype="float32") for f in (converted[0], out))
    for (name, a), (other, b) in zip(one.state_dict().items(), many.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)


def test_progress_has_one_form(vision, tmp_path):
    stages, counts = [], {}

    def progress(stage, done=0, total=0):
        stages.append(stage)
        if total:
            counts.setdefault(stage, []).append((done, total))

    out, shards, features = tmp_path / "out", tmp_path / "shards", ORIGINAL / "features"
    sources = {"delta": DELTA, "projector": PROJECTOR, "vision": vision}
    report = convert_original(BASE, out, **sources, progress=progress)
    assert list(dict.fromkeys(stages)) == [
        "comparing the sources",
        "loading the vision encoder",
        "writing",
        "checking",
        "running it on a generated clip",
    ]
    convert_features(features / "local", features / "memory", shards, progress=progress)
    convert_to_original(out, tmp_path / "back", features=shards, progress=progress)
    totals = {"writing": report.num_bytes, "converting features": 2, "writing features": 2}
    assert counts.keys() == totals.keys()
    for stage, steps in counts.items():
        assert steps == sorted(steps) and steps[-1] == (totals[stage], totals[stage])


# --- it works like any other checkpoint ---


def test_pipeline_and_ask_answer_about_a_video(converted, tmp_path, monkeypatch, capsys):
    video = write_video(tmp_path / "film.mp4", 12)
    ask = pipeline("video-question-answering", model=str(converted[0]), dtype=torch.float32, device="cpu")
    options = {"num_frames": 4, "max_new_tokens": 3}
    assert isinstance(ask(video=str(video), question="What is it?", **options)["answer"], str)
    arguments = ["--model", str(converted[0]), "--num-frames", "4", "--max-new-tokens", "3", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["longvlm", "ask", str(video), "What is it?", *arguments, "--json", "--quiet"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0 and "answer" in json.loads(capsys.readouterr().out)


def run_cli(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["longvlm", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


def test_command_there_and_back_is_exact(vision, tmp_path, monkeypatch, capsys):
    checkpoint, back, shards = tmp_path / "out", tmp_path / "back", tmp_path / "shards"
    sources = ("--llm", BASE, "--delta", DELTA, "--projector", PROJECTOR, "--vision", vision)
    assert run_cli(monkeypatch, "original", *sources, "--out", checkpoint, "--no-forward-check") == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == str(checkpoint) and "every one accounted for" in captured.err
    features = ORIGINAL / "features"
    assert run_cli(monkeypatch, "features", features / "local", features / "memory", "--out", shards, "--quiet") == 0
    assert run_cli(monkeypatch, "to-original", checkpoint, "--out", back, "--features", shards, "--quiet") == 0
    before, after = (torch.load(f, weights_only=True) for f in (PROJECTOR, back / "mm_projector.bin"))
    assert list(before) == list(after)
    for name in before:
        assert before[name].dtype == after[name].dtype and torch.equal(before[name], after[name])
    files = sorted(f.relative_to(features) for f in features.rglob("*.pkl"))
    assert files == sorted(f.relative_to(back) for f in back.rglob("*.pkl"))
    for file in files:
        old, new = (np.load(folder / file, allow_pickle=True) for folder in (features, back))  # as numpy reads them
        assert old.dtype == new.dtype and np.array_equal(old, new)


def test_the_original_cannot_take_what_it_does_not_know(converted, tmp_path):
    changed = tmp_path / "changed"
    shutil.copytree(converted[0], changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"merge_similarity": "per_head"}))
    with pytest.raises(ValueError, match="merge_similarity='per_head'; the original knows only 'mean_head'"):
        convert_to_original(changed, tmp_path / "back")
    with pytest.raises(ValueError, match="is a llama model, not a LongVLM"):
        convert_to_original(BASE, tmp_path / "back")


# --- sources that do not fit ---


def copy(source, folder, **changes):
    """A copy of a folder of the fixture with other tensors."""
    shutil.copytree(source, folder)
    for name, change in changes.items():
        tensors = torch.load(folder / name.replace("__", "-").replace("_bin", ".bin"), weights_only=True)
        change(tensors)
        torch.save(tensors, folder / name.replace("__", "-").replace("_bin", ".bin"))
    return folder


def test_wrong_sources_are_told_in_one_line(vision, tmp_path):
    def refused(match, **changes):
        sources = {"llm": BASE, "delta": DELTA, "projector": PROJECTOR, "vision": vision, **changes}
        with pytest.raises((ValueError, OSError), match=match) as error:
            convert_original(sources.pop("llm"), tmp_path / "out", **sources)
        assert "\n" not in str(error.value)
        assert not list(tmp_path.glob("out")) and not list(tmp_path.glob(".out*"))

    refused("is a delta, not a whole model; swap `llm` and `delta`", llm=DELTA, delta=BASE)
    refused("is a delta, not a whole model; give it as `delta`", llm=DELTA, delta=None)
    refused("is a whole model, not a delta; give it as `llm`", delta=BASE)
    refused(r"390 rows.*tokenizer of .* 384 tokens.*is this only the base\? give LLaVA's delta as `delta`", delta=None)
    refused("video tokens' rows are missing: give mm_projector.bin as `projector`", projector=None)
    refused("contain no vision encoder; give the CLIP model as `vision`", vision=None)
    refused("mm_projector.bin does not exist", projector=tmp_path / "mm_projector.bin")
    refused("is not a folder", llm=tmp_path / "nowhere" / "at" / "all")
    refused('`layout` "other" is not known; use one of paper, released', layout="other")
    refused('`dtype` "int8" is not known', dtype="int8")

    (incomplete := tmp_path / "missing_shard").mkdir()
    shutil.copytree(DELTA, incomplete, dirs_exist_ok=True)
    (incomplete / "pytorch_model-00002-of-00002.bin").unlink()
    refused("is missing pytorch_model-00002-of-00002.bin", delta=incomplete)
    for name in ("config.json", "pytorch_model.bin"):
        (folder := tmp_path / f"base without {name}").mkdir()
        shutil.copytree(BASE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(name))
        refused("has no config.json" if name == "config.json" else "contains no weights", llm=folder)
    shutil.copytree(DELTA, bare := tmp_path / "no tokenizer", ignore=shutil.ignore_patterns("tokenizer.model"))
    refused("no tokenizer: tokenizer.model", delta=bare)

    narrow = save_vision(tmp_path / "narrow", hidden_size=32)
    refused("takes features of width 64, but .*narrow gives 32", vision=narrow)

    def projector_of(**tensors):
        values = {k: v for k, v in (torch.load(PROJECTOR, weights_only=True) | tensors).items() if v is not None}
        torch.save(values, tmp_path / "other.bin")
        return tmp_path / "other.bin"

    wide = {"model.mm_projector.weight": torch.zeros(48, 64), "model.mm_projector.bias": torch.zeros(48)}
    refused("gives 48 channels, but the language model has 32", projector=projector_of(**wide))
    refused("embeddings of width 48", projector=projector_of(**{"model.embed_tokens.weight": torch.zeros(390, 48)}))
    refused("rows are missing", projector=projector_of(**{"model.embed_tokens.weight": None}))
    refused("contains no model.mm_projector.weight", projector=projector_of(**{"model.mm_projector.weight": None}))
    refused("holds extra, which a LongVLM has no place for", projector=projector_of(extra=torch.zeros(1)))

    def widened(tensors):
        tensors["model.norm.weight"] = torch.zeros(48, dtype=torch.float16)

    other = copy(DELTA, tmp_path / "other delta", **{"pytorch_model__00002__of__00002_bin": widened})
    refused(r"model.norm.weight is \(32,\) in the base .*base, but \(48,\) in the delta .*other delta", delta=other)
    removed = copy(
        BASE, tmp_path / "holes", pytorch_model_bin=lambda t: t.pop("model.layers.1.self_attn.q_proj.weight")
    )
    refused("1 missing: model.language_model.layers.1.self_attn.q_proj.weight", llm=removed, delta=None,
            projector=projector_of(**{"model.embed_tokens.weight": torch.zeros(387, 32)}))  # fmt: skip


def test_arguments_in_errors_are_flags_on_the_command_line(vision, tmp_path, monkeypatch, capsys):
    sources = ("--llm", DELTA, "--delta", BASE, "--vision", vision, "--out", tmp_path / "out", "--quiet")
    assert run_cli(monkeypatch, "original", *sources) == 2
    assert f"--llm {DELTA} is a delta, not a whole model; swap --llm and --delta" in capsys.readouterr().err


def test_a_pickle_that_would_run_something_is_refused(vision, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    torch.save({"model.mm_projector.weight": Attack()}, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match="holds more than tensors"):
        convert_original(BASE, tmp_path / "out", delta=DELTA, projector=tmp_path / "mm_projector.bin", vision=vision)
    assert not (tmp_path / "harm").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["sentencepiece", "google.protobuf"])
def test_what_reads_a_tokenizer_is_named_if_it_is_missing(module, vision, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r'needs .*pip install "longvlm\[convert\]"'):
        convert_original(BASE, tmp_path / "out", delta=DELTA, projector=PROJECTOR, vision=vision)


# --- memory, and being killed ---

CONVERT = """
import sys
from longvlm.conversion.original import convert_original
folder, out = sys.argv[1:]
convert_original(f"{folder}/base", out, delta=f"{folder}/delta", projector=f"{folder}/mm_projector.bin",
                 vision=f"{folder}/vision")
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


def save_large(folder, layers):
    """Base and delta of `layers` shards of 25 MB each, a layer a shard."""
    hidden, inner, vocab = 1024, 2752, EXPECTED["vocab_final"]
    config = json.loads((BASE / "config.json").read_text())
    config |= {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}

    def shard(layer, rows, scale):
        def table(*shape):
            return torch.full(shape, scale / 100, dtype=torch.float16)

        attention, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        tensors = {f"{attention}{name}_proj.weight": table(hidden, hidden) for name in "qkvo"}
        tensors |= {f"{mlp}{name}_proj.weight": table(inner, hidden) for name in ("gate", "up")}
        tensors[f"{mlp}down_proj.weight"] = table(hidden, inner)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{layer}.{name}.weight"] = table(hidden) * 100
        if layer == 0:
            tensors["model.norm.weight"] = table(hidden) * 100
            tensors["model.embed_tokens.weight"] = table(rows, hidden)
            tensors["lm_head.weight"] = table(rows, hidden)
        return tensors

    for name, source, rows, scale in (("base", BASE, vocab - 6, 1.0), ("delta", DELTA, vocab - 3, 0.0)):
        part = folder / name
        shutil.copytree(source, part, ignore=shutil.ignore_patterns("*.bin", "*.index.json"))
        (part / "config.json").write_text(json.dumps(config | {"vocab_size": rows}))
        weight_map = {}
        for layer in range(layers):
            tensors, file = shard(layer, rows, scale), f"pytorch_model-{layer:05}.bin"
            torch.save(tensors, part / file)
            weight_map |= dict.fromkeys(tensors, file)
        (part / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    values = {"weight": torch.zeros(hidden, 64), "bias": torch.zeros(hidden)}
    tensors = {f"model.mm_projector.{name}": tensor for name, tensor in values.items()}
    torch.save({**tensors, "model.embed_tokens.weight": torch.ones(vocab, hidden)}, folder / "mm_projector.bin")
    save_vision(folder / "vision")
    return folder


def start(folder, out):
    # With a fixed threshold what is freed goes back at once: the peak is that of what was held.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", CONVERT, str(folder), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from /proc")
def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    few, many = 1, 8
    folders = [save_large(tmp_path / str(layers), layers) for layers in (few, many)]
    processes = [start(folder, tmp_path / f"out {folder.name}") for folder in folders]
    peaks = [int(process.communicate()[0].split()[-1]) / 1024 for process in processes]
    # Seven more shards of base and delta are 350 MB more to read, and 175 MB more to write and to run.
    assert peaks[1] - peaks[0] < 40, f"{peaks[0]:.0f} MB with {few} shard, {peaks[1]:.0f} MB with {many}"
    assert peaks[1] < 25 + 1000


@pytest.mark.slow
def test_nothing_is_left_half_written_when_it_is_killed(tmp_path):
    folder = save_large(tmp_path / "sources", 2)
    terminated, killed = tmp_path / "terminated", tmp_path / "killed"

    sources = {"delta": folder / "delta", "projector": folder / "mm_projector.bin", "vision": folder / "vision"}
    options = [text for name, path in sources.items() for text in (f"--{name}", str(path))]
    command = [sys.executable, "-m", "longvlm", "convert", "original", "--llm", str(folder / "base"), *options]
    with (
        subprocess.Popen([*command, "--out", str(terminated), "--quiet"]) as first,
        start(folder, killed) as second,
    ):
        stops = {terminated: (first, signal.SIGTERM), killed: (second, signal.SIGKILL)}
        deadline = time.monotonic() + 90
        while stops:  # each as soon as it has begun to write
            for out, (process, stop) in list(stops.items()):
                assert process.poll() is None and time.monotonic() < deadline, "it never began to write"
                if list(tmp_path.glob(f".{out.name}.partial-*/*.safetensors")):
                    process.send_signal(stop)
                    del stops[out]
            time.sleep(0.005)
    assert first.returncode == 143 and not list(tmp_path.glob("*terminated*"))
    assert not killed.exists() and list(tmp_path.glob(".killed.partial-*"))
    # The next run clears away what the killed one could not.
    convert_original(folder / "base", killed, **sources, forward_check=False)
    assert not list(tmp_path.glob(".killed*"))
    assert AutoModelForImageTextToText.from_pretrained(killed).config.text_config.num_hidden_layers == 2
