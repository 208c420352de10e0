"""LoRA adapters: `longvlm.load` and every command take their folder, and load it with its base."""

import json
import shutil

import pytest
import torch

import longvlm
from longvlm import LongVLMForConditionalGeneration
from longvlm.training.arguments import TuningArguments
from longvlm.training.tuning import prepare_model
from tests.helpers.tiny_models import save_tiny_longvlm, tiny_longvlm, tiny_text_config
from tests.helpers.video_files import write_video

peft = pytest.importorskip("peft")

WIDE = {"text_config": tiny_text_config(hidden_size=64, intermediate_size=128)}  # bitsandbytes has blocks of 64
SHORT = {"max_new_tokens": 4, "min_new_tokens": 4, "return_details": True}


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, and an adapter as `longvlm train` writes it, with the answer of the two as peft computes it."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_longvlm(folder / "base", untrained_parts=["multi_modal_projector"], **WIDE)
    model = LongVLMForConditionalGeneration.from_pretrained(folder / "base")
    adapted = prepare_model(model, TuningArguments(train="lora", lora_r=4))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)
    adapted.save_pretrained(folder / "adapter")
    longvlm.LongVLMProcessor.from_pretrained(folder / "base").save_pretrained(folder / "adapter")
    return folder


@pytest.fixture
def copied(world, tmp_path):
    """Copies that a test may change, still next to each other."""
    for name in ("base", "adapter"):
        shutil.copytree(world / name, tmp_path / name, ignore=shutil.ignore_patterns("*.py"))
    edit(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def edit(adapter, **changes):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def ask(film):
    content = [{"type": "video", "video": film}, {"type": "text", "text": "What?"}]
    return [{"role": "user", "content": content}]


def by_hand(world, film):
    """The answer of base and adapter, put together with peft alone."""
    base = LongVLMForConditionalGeneration.from_pretrained(world / "base")
    model = peft.PeftModel.from_pretrained(base, world / "adapter").eval()
    processor = longvlm.LongVLMProcessor.from_pretrained(world / "base")
    inputs = processor.apply_chat_template(
        ask(film), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(
        **inputs, max_new_tokens=4, min_new_tokens=4, output_logits=True, return_dict_in_generate=True
    )
    return generated.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(generated.logits)


def test_an_adapter_is_loaded_with_its_base(world, film):
    engine = longvlm.load(world / "adapter", device="cpu")
    assert type(engine.model) is LongVLMForConditionalGeneration
    assert not any(type(module).__module__.startswith("peft") for module in engine.model.modules())
    tokens, logits = by_hand(world, film)
    answer = engine.generate(ask(film), **SHORT)
    assert answer.token_ids == tokens
    expected = logits.log_softmax(-1)[range(4), tokens].tolist()
    assert answer.logprobs == pytest.approx(expected, abs=1e-4)
    alone = longvlm.load(world / "base", device="cpu").generate(ask(film), **SHORT)
    assert alone.logprobs != pytest.approx(expected, abs=1e-2)


def test_an_engine_takes_a_model_of_peft_as_it_is(world, film):
    expected = longvlm.load(world / "adapter", device="cpu").generate(ask(film), **SHORT)
    base = LongVLMForConditionalGeneration.from_pretrained(world / "base")
    model = peft.PeftModel.from_pretrained(base, world / "adapter").eval()
    engine = longvlm.LongVLMEngine(model, longvlm.LongVLMProcessor.from_pretrained(world / "base"))
    answer = engine.generate(ask(film), **SHORT)
    assert answer.token_ids == expected.token_ids and answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


def test_what_the_adapter_has_trained_no_longer_counts_as_untrained(world):
    assert longvlm.load(world / "base").model.config.untrained_parts == ["multi_modal_projector"]
    assert longvlm.load(world / "adapter").model.config.untrained_parts == []


def test_beside_a_quantised_base_it_is_not_merged(world, film):
    pytest.importorskip("bitsandbytes")
    engine = longvlm.load(world / "adapter", device="cpu", load_in_8bit=True)
    assert type(engine.model) is LongVLMForConditionalGeneration
    assert "lora" in type(engine.model.model.language_model.layers[0].mlp.up_proj).__module__
    whole = longvlm.load(world / "adapter", device="cpu").generate(ask(film), **SHORT)
    answer = engine.generate(ask(film), **SHORT)
    assert answer.logprobs == pytest.approx(whole.logprobs, abs=0.2) and answer.logprobs != whole.logprobs
    features = engine.encode(film)
    assert torch.equal(
        features.local_features[0], longvlm.load(world / "base", device="cpu").encode(film).local_features[0]
    )


def test_the_processor_is_the_adapters_or_else_the_bases(copied, film):
    expected = longvlm.load(copied / "adapter", device="cpu").generate(ask(film), **SHORT)
    (copied / "adapter" / "tokenizer_config.json").unlink()
    (copied / "adapter" / "processor_config.json").unlink()
    assert longvlm.load(copied / "adapter", device="cpu").generate(ask(film), **SHORT) == expected


def test_an_adapter_on_the_hub_finds_its_base_there(copied, film, tmp_path):
    expected = longvlm.load(copied / "adapter", device="cpu").generate(ask(film), **SHORT)
    edit(copied / "adapter", base_model_name_or_path="me/base")
    for name in ("base", "adapter"):  # as downloads lie in the cache
        repository = tmp_path / "cache" / f"models--me--{name}"
        shutil.copytree(copied / name, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    cached = {"cache_dir": tmp_path / "cache", "device": "cpu"}
    assert longvlm.load("me/adapter", **cached).generate(ask(film), **SHORT) == expected
    weights = repository.parent / "models--me--base" / "snapshots" / ("0" * 40) / "model.safetensors"
    cut(weights)
    for source in ("me/base", "me/adapter"):
        with pytest.raises(ValueError, match=r"model\.safetensors is damaged") as error:
            longvlm.load(source, **cached)
        assert str(weights) in str(error.value)


def test_ask_takes_an_adapter(run_command, world, film):
    code, out, err = run_command("ask", film, "What?", "--model", world / "adapter", "--quiet", "--max-new-tokens", 4)
    expected = longvlm.load(world / "adapter").generate(ask(film), max_new_tokens=4, do_sample=False)
    assert (code, out, err) == (0, expected + "\n", "")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def another_base(folder):
    model, _ = tiny_longvlm()  # half as wide
    model.save_pretrained(folder / "base")


def fewer_tensors(folder):
    from safetensors.torch import load_file, save_file

    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if "lora_B" in name)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, file)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            lambda folder: shutil.rmtree(folder / "base"),
            "for .*base, which cannot be loaded .there is no model",
        ),
        (lambda folder: edit(folder / "adapter", base_model_name_or_path=None), "does not name its model"),
        (lambda folder: edit(folder / "adapter", base_model_name_or_path="gone"), "adapter for gone, which cannot be"),
        (
            lambda folder: edit(folder / "adapter", base_model_name_or_path=str(folder / "adapter")),
            "is a LoRA adapter itself",
        ),
        (lambda folder: edit(folder / "adapter", peft_type="MAGIC"), "not an adapter that fits.*MAGIC"),
        (lambda folder: edit(folder / "adapter", target_modules=["no_such_layer"]), "not an adapter that fits"),
        (lambda folder: cut(folder / "adapter" / "adapter_config.json"), "adapter_config.json is not a JSON file"),
        (lambda folder: cut(folder / "adapter" / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
        (lambda folder: cut(folder / "adapter" / "tokenizer.json"), "adapter/tokenizer.json is not a JSON file"),
        (lambda folder: cut(folder / "base" / "model.safetensors"), "base/model.safetensors is damaged"),
        (
            lambda folder: (folder / "adapter" / "adapter_model.safetensors").unlink(),
            "has no adapter_model.safetensors",
        ),
        (another_base, "not an adapter that fits .*base: RuntimeError"),
        (fewer_tensors, "not an adapter that fits .*missing adapter keys"),
    ],
    ids=[
        *("no base", "base not named", "base not on the Hub", "base is an adapter", "kind", "layers", "config"),
        *("weights", "tokenizer", "weights of the base", "no weights", "another base", "tensors"),
    ],
)
def test_an_adapter_that_cannot_be_loaded_is_one_line(run_command, copied, film, damage, says):
    damage(copied)
    with pytest.raises((ValueError, OSError), match=says):
        longvlm.load(copied / "adapter", device="cpu")
    code, out, err = run_command("ask", film, "What?", "--model", copied / "adapter", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert str(copied / "adapter") in err or str(copied / "base") in err


def test_without_peft_one_line_says_what_to_install(run_command, world, film, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    code, out, err = run_command("ask", film, "What?", "--model", world / "adapter", "--quiet")
    assert (code, out, err.count("\n")) == (2, "", 1) and "pip install peft" in err


def test_training_does_not_start_from_an_adapter(run_command, world, tmp_path):
    (tmp_path / "rows.json").write_text('[{"q": "Who?", "a": "A man."}]')
    (tmp_path / "config.yaml").write_text(
        f"model: {world / 'adapter'}\ntrain_data: [{tmp_path / 'rows.json'}]\noutput_dir: {tmp_path / 'out'}\n"
    )
    code, out, err = run_command("train", tmp_path / "config.yaml", "--use_cpu", "true")
    assert (code, out, err.count("\n")) == (2, "", 1) and "is a LoRA adapter; give the model it belongs to" in err
