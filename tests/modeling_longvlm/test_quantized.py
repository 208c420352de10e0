"""Quantised weights: what each library makes of the projector, and the documented way, the LLM alone."""

import json
import subprocess
import sys
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from transformers import BitsAndBytesConfig

import longvlm
from longvlm.features.extract import extract_features
from longvlm.features.fingerprint import feature_metadata
from longvlm.features.store import FeatureReader
from longvlm.modeling_longvlm.engine_longvlm import LongVLMEngine
from longvlm.quantization import NOT_QUANTIZED
from tests.helpers.documents import page_text
from tests.helpers.tiny_models import noise_video, save_tiny_longvlm, tiny_longvlm, tiny_text_config
from tests.helpers.video_files import write_video

bitsandbytes = pytest.importorskip("bitsandbytes")

PROJECTORS = ("linear", "mlp2x_gelu")
QUESTION = {"type": "text", "text": "What?"}
# Its blocks have 64 weights.
WIDE = {"text_config": tiny_text_config(hidden_size=64, intermediate_size=128)}


@pytest.fixture(scope="module", params=PROJECTORS)
def folder(request, tmp_path_factory):
    return save_tiny_longvlm(tmp_path_factory.mktemp(request.param), projector_type=request.param, **WIDE)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", 20)


def features_of(engine):
    with torch.no_grad():
        return engine.model.get_video_features(noise_video(8))


def relative_error(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def check_answers(engine, features):
    """Generation and scores, on features that were encoded before."""
    part = {"type": "video", "video": features.select([0])}
    messages = [{"role": "user", "content": [part, QUESTION]}]
    answer = engine.generate(messages, max_new_tokens=4, min_new_tokens=4, return_details=True)
    assert len(answer.token_ids) == 4 and all(torch.isfinite(torch.tensor(answer.logprobs)))
    assert all(score < 0 for score in engine.score_choices(messages, ["yes", "no"]))


@pytest.mark.parametrize(("bits", "error"), [(4, 0.25), (8, 0.03)])
def test_a_quantised_projector_computes_what_it_did_before(folder, bits, error):
    expected = features_of(longvlm.load(folder, device="cpu"))
    config = BitsAndBytesConfig(
        load_in_4bit=bits == 4, load_in_8bit=bits == 8, llm_int8_skip_modules=["model.vision_tower", "lm_head"]
    )
    engine = longvlm.load(folder, device="cpu", quantization_config=config)
    kinds = {type(layer) for layer in engine.model.model.multi_modal_projector.children()}
    assert kinds == {bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt}
    found = features_of(engine)
    torch.testing.assert_close(found.local_features[0], expected.local_features[0])
    assert found.pooler_output[0].dtype == torch.float32
    assert 0 < relative_error(found.pooler_output[0], expected.pooler_output[0]) < error
    check_answers(engine, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_all_parts_quantised(folder, film, bits, dtype):
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_compute_dtype=dtype)
    engine = longvlm.load(folder, device="cpu", dtype=dtype, quantization_config=config)
    features = features_of(engine)
    assert features.pooler_output[0].dtype == dtype and torch.isfinite(features.pooler_output[0]).all()
    check_answers(engine, features)
    engine.generate([{"role": "user", "content": [{"type": "video", "video": film}, QUESTION]}], max_new_tokens=4)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_flag_quantises_the_llm_and_nothing_else(folder, film, tmp_path, bits):
    whole = longvlm.load(folder, device="cpu")
    engine = longvlm.load(folder, device="cpu", **{f"load_in_{bits}bit": True})
    quantised = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    for name, layer in engine.model.named_modules():
        if isinstance(layer, nn.Linear):
            expected = quantised if ".language_model." in name else nn.Linear
            assert type(layer) is expected, name
    found, expected = features_of(engine), features_of(whole)
    assert torch.equal(found.pooler_output[0], expected.pooler_output[0])
    messages = [{"role": "user", "content": [{"type": "video", "video": film}, QUESTION]}]
    answer = engine.generate(messages, max_new_tokens=4, min_new_tokens=4, return_details=True)
    # Saved, it is loaded as it is.
    engine.model.save_pretrained(tmp_path)
    engine.processor.save_pretrained(tmp_path)
    again = longvlm.load(tmp_path, device="cpu")
    assert type(again.model.model.language_model.layers[0].mlp.up_proj) is quantised
    assert type(again.model.model.multi_modal_projector.linear_1) is nn.Linear
    same = again.generate(messages, max_new_tokens=4, min_new_tokens=4, return_details=True)
    assert same.token_ids == answer.token_ids
    assert same.logprobs == pytest.approx(answer.logprobs, abs=2e-3)  # some CPUs pack scales as bfloat16
    with pytest.raises(ValueError, match=r"is quantised, with its other weights in torch\.float32: leave out `dtype`"):
        longvlm.load(tmp_path, dtype="float16")
    assert longvlm.load(tmp_path, device="cpu", dtype="float32").model.dtype == torch.float32
    with pytest.raises(ValueError, match="is quantised already"):
        longvlm.load(tmp_path, load_in_4bit=True)


def test_packed_weights_that_the_configuration_does_not_tell_of_are_refused(folder, tmp_path):
    engine = longvlm.load(folder, device="cpu", load_in_4bit=True)
    engine.model.save_pretrained(tmp_path)
    engine.processor.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = config["quantization_config"] | {"load_in_4bit": False, "_load_in_4bit": False}
    for changed in ({}, None, whole):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": changed}))
        with pytest.raises(ValueError, match=r"its config.json describes[^\n]*again$"):
            longvlm.load(tmp_path, device="cpu")


def test_the_names_in_the_documentation_are_those_that_match():
    model, _ = tiny_longvlm(**WIDE)
    for name in NOT_QUANTIZED:
        assert isinstance(model.get_submodule(name), nn.Module)
        assert f'"{name}"' in page_text("docs/python.md")


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16], ids=str)
def test_dynamic_quantisation_of_torch(folder, dtype):
    engine = longvlm.load(folder, device="cpu")
    expected = features_of(engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao
        llm = torch.ao.quantization.quantize_dynamic(engine.model.model.language_model, {nn.Linear}, dtype=dtype)
        projector = torch.ao.quantization.quantize_dynamic(
            engine.model.model.multi_modal_projector, {nn.Linear}, dtype=dtype
        )
        whole = torch.ao.quantization.quantize_dynamic(engine.model, {nn.Linear}, dtype=dtype)
    engine.model.model.language_model, engine.model.model.multi_modal_projector = llm, projector
    assert not list(projector.parameters())
    found = features_of(engine)
    assert relative_error(found.pooler_output[0], expected.pooler_output[0]) < 0.03
    check_answers(engine, expected)
    # Features that were stored in half precision
    half = type(expected).cat([expected])
    half.local_features = tuple(local.half() for local in half.local_features)
    half.global_features = half.global_features.half()
    check_answers(engine, half)
    engine = LongVLMEngine(whole, engine.processor)
    check_answers(engine, features_of(engine))


def test_torchao(folder):
    torchao = pytest.importorskip("torchao.quantization")
    engine = longvlm.load(folder, device="cpu")
    expected = features_of(engine)
    spared = ("vision_tower", "lm_head")
    torchao.quantize_(
        engine.model,
        torchao.Int8WeightOnlyConfig(),
        lambda module, name: isinstance(module, nn.Linear) and not any(part in name for part in spared),
    )
    found = features_of(engine)
    assert 0 < relative_error(found.pooler_output[0], expected.pooler_output[0]) < 0.03
    check_answers(engine, found)


@pytest.mark.parametrize("weights", ["int8", "int4", "float8"])
def test_quanto(folder, weights):
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    expected = features_of(longvlm.load(folder, device="cpu"))
    config = QuantoConfig(weights=weights, modules_to_not_convert=["model.vision_tower", "lm_head"])
    engine = longvlm.load(folder, device="cpu", quantization_config=config)
    found = features_of(engine)
    assert found.pooler_output[0].dtype == torch.float32
    assert 0 < relative_error(found.pooler_output[0], expected.pooler_output[0]) < 0.2
    check_answers(engine, found)


def dynamic(engine):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.model = torch.ao.quantization.quantize_dynamic(engine.model, {nn.Linear})
    return engine


def torchao_(engine):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(engine.model, torchao.Int8WeightOnlyConfig())
    return engine


def quanto_config():
    pytest.importorskip("optimum.quanto")
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


@pytest.mark.parametrize(
    "load",
    [
        lambda load: load(quantization_config=BitsAndBytesConfig(load_in_4bit=True)),
        lambda load: load(quantization_config=BitsAndBytesConfig(load_in_8bit=True)),
        lambda load: dynamic(load()),
        lambda load: torchao_(load()),
        lambda load: load(quantization_config=quanto_config()),
    ],
    ids=["bitsandbytes 4", "bitsandbytes 8", "dynamic", "torchao", "quanto"],
)
def test_features_of_a_quantised_encoder_are_stored_as_those_of_another(folder, film, tmp_path, load):
    def metadata(engine):
        return feature_metadata(engine.model, engine.processor.video_processor)

    load_whole = partial(longvlm.load, folder, device="cpu")
    whole = metadata(load_whole())
    assert metadata(load_whole(load_in_4bit=True)) == whole  # its encoder is the same
    engine = load(load_whole)
    assert metadata(engine)["encoder_weights"] not in (whole["encoder_weights"], None)
    assert metadata(engine) == metadata(load(load_whole))
    extract_features([film], tmp_path / "features", model=engine.model, processor=engine.processor)
    features = FeatureReader(tmp_path / "features")["film"]
    expected = engine.encode(film).local_features[0]
    torch.testing.assert_close(features.local_features, expected.to(features.local_features))


# --- the command line ---


@pytest.mark.parametrize("flag", ["--load-in-4bit", "--load-in-8bit"])
def test_every_command_that_runs_a_model_quantises_it(run_command, folder, film, tmp_path, flag, monkeypatch):
    loaded = []
    from_pretrained = longvlm.LongVLMForConditionalGeneration.from_pretrained

    def remembering(*args, **kwargs):
        loaded.append(from_pretrained(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(longvlm.LongVLMForConditionalGeneration, "from_pretrained", remembering)
    options = ("--model", folder, flag)
    code, out, err = run_command("ask", film, "What?", "--max-new-tokens", 4, "--json", "--quiet", *options)
    assert (code, err) == (0, "") and json.loads(out)["answer"] is not None
    assert run_command("inspect", film, "--out", tmp_path / "film.png", *options)[0] == 0
    assert run_command("extract", film, "--out", tmp_path / "features", "--quiet", *options)[0] == 0
    for model, _ in loaded:
        assert getattr(model, f"is_loaded_in_{flag[10]}bit") and type(model.lm_head) is nn.Linear
    assert len(loaded) == 3


def test_what_a_user_can_do_wrong_is_one_line(run_command, folder, film, monkeypatch):
    def line(*options):
        code, out, err = run_command("ask", film, "What?", "--model", folder, "--quiet", *options)
        assert (code, out) == (2, "") and err.count("\n") == 1 and err.startswith("longvlm: error: ")
        return err

    assert "--load-in-4bit and --load-in-8bit exclude each other" in line("--load-in-4bit", "--load-in-8bit")
    monkeypatch.setattr("longvlm.quantization.find_spec", lambda name: None)
    assert "--load-in-8bit needs the package bitsandbytes" in line("--load-in-8bit")


@pytest.mark.slow
@pytest.mark.parametrize("flag", [(), ("--load-in-4bit",), ("--load-in-8bit",)], ids=str)
def test_the_libraries_say_nothing_on_stderr(folder, film, flag):
    """In a process of its own: they speak when they are imported."""
    command = [sys.executable, "-m", "longvlm_cli", "ask", film, "What?", "--model", folder, "--quiet", *flag]
    done = subprocess.run([*map(str, command), "--max-new-tokens", "4"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
