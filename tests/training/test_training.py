"""Training on the CPU with tiny models: what learns, what stays, what is saved, and going on after a kill."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from packaging import version

import longvlm
import longvlm.evaluation
import longvlm.features
import longvlm.training
from longvlm import LongVLMForConditionalGeneration, LongVLMProcessor
from longvlm.features.extract import extract_features
from longvlm.training.added_token_rows import video_token_ids
from longvlm.training.arguments import parse_arguments
from longvlm.training.collator import LongVLMDataCollator
from longvlm.training.train import train
from longvlm.training.tuning import load_projector
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import save_tiny_longvlm, tiny_text_config
from tests.helpers.video_files import write_video

LLM = "model.language_model"


def lively(**changes):
    """An LLM whose random weights are so large that what it reads changes what it says."""
    return tiny_text_config(initializer_range=0.3, **changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, two videos, their features, and rows about them."""
    folder = tmp_path_factory.mktemp("world")
    save_tiny_longvlm(folder / "model", text_config=lively(), untrained_parts=["multi_modal_projector"])
    (folder / "videos").mkdir()
    write_video(folder / "videos" / "a.mp4", 9)
    write_video(folder / "videos" / "b.mp4", 24, size=(32, 32))
    rows = [{"video_id": "ab"[i % 2], "q": "Who?" * (1 + i % 3), "a": "A man."} for i in range(11)]
    rows += [{"q": "And two?", "a": "Four."}]
    (folder / "rows.json").write_text(json.dumps(rows))
    model = LongVLMForConditionalGeneration.from_pretrained(folder / "model")
    processor = LongVLMProcessor.from_pretrained(folder / "model")
    extract_features([folder / "videos"], folder / "features", model=model, processor=processor)
    return folder


def run(world, out, *, videos=False, **options):
    values = {
        "model": str(world / "model"),
        "train_data": [str(world / "rows.json")],
        "output_dir": str(out),
        "max_steps": 20,
        "per_device_train_batch_size": 2,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **({"video_folders": [str(world / "videos")]} if videos else {"features": [str(world / "features")]}),
        **options,
    }
    config = Path(f"{out}.yaml")
    config.write_text(yaml.safe_dump(values))
    return train(*parse_arguments([str(config)]))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def a_batch(world):
    collator = LongVLMDataCollator(LongVLMProcessor.from_pretrained(world / "model"))
    return collator([{"video_id": str(world / "videos" / "b.mp4"), "q": "Who?", "a": "A man."}])


def logits_of(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("tied", [False, True], ids=["own output layer", "tied embeddings"])
def test_projector_training_learns_and_changes_nothing_frozen(world, tmp_path, tied):
    if tied:
        text = lively(tie_word_embeddings=True)
        save_tiny_longvlm(tmp_path / "model", text_config=text, untrained_parts=["multi_modal_projector"])
    options = {"model": str(tmp_path / "model"), "check_features": False} if tied else {}
    before = LongVLMForConditionalGeneration.from_pretrained(tmp_path / "model" if tied else world / "model")
    trainer = run(world, tmp_path / "out", weight_decay=0.1, learning_rate=0.03, **options)
    assert sum(losses(trainer)[-6:]) < 0.9 * sum(losses(trainer)[:6])  # an epoch each
    after, info = LongVLMForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert after.config.untrained_parts == []
    ids = video_token_ids(after.config)
    changed = set()
    for (name, old), new in zip(before.state_dict().items(), after.state_dict().values(), strict=True):
        if torch.equal(old, new):
            continue
        changed.add(name)
        if "projector" not in name:
            rows = (old != new).any(1).nonzero().flatten().tolist()
            assert set(rows) <= set(ids)
    expected = {f"model.multi_modal_projector.linear_1.{kind}" for kind in ("weight", "bias")}
    expected |= {f"{LLM}.embed_tokens.weight"} | ({"lm_head.weight"} if tied else set())
    assert changed == expected
    # What is saved says what was trained.
    batch = a_batch(world)
    torch.testing.assert_close(logits_of(after, batch), logits_of(trainer.model, batch))
    # The small file alone makes the same of the model before.
    load_projector(before, tmp_path / "out" / "projector.safetensors")
    torch.testing.assert_close(logits_of(before, batch), logits_of(after, batch))
    report = json.loads((tmp_path / "out" / "data_report.json").read_text())
    assert report == {"kept": 12, "dropped": []}
    assert LongVLMProcessor.from_pretrained(tmp_path / "out").tokenizer.padding_side == "left"


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_lora_is_saved_and_loaded_with_the_same_logits(world, tmp_path, merge):
    peft = pytest.importorskip("peft")
    trainer = run(world, tmp_path / "out", train="lora", lora_r=4, merge_lora=merge, max_steps=6)
    batch = a_batch(world)
    base = LongVLMForConditionalGeneration.from_pretrained(world / "model")
    untouched = logits_of(base, batch)
    if merge:
        loaded = LongVLMForConditionalGeneration.from_pretrained(tmp_path / "out")
        assert loaded.config.untrained_parts == []
        expected = logits_of(trainer.model.base_model.model, batch)
    else:
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out")
        if version.parse(transformers.__version__) >= version.parse("5.24"):  # 5.17 loses the three tokens' rows
            alone = LongVLMForConditionalGeneration.from_pretrained(tmp_path / "out")
            torch.testing.assert_close(logits_of(alone, batch), logits_of(loaded, batch))
        expected = logits_of(trainer.model, batch)
        names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
        assert not any("vision_tower" in name for name in names)
        assert any("multi_modal_projector" in name for name in names)
        assert any("token" in name for name in names)
    torch.testing.assert_close(logits_of(loaded, batch), expected, atol=1e-5, rtol=1e-5)
    assert (expected - untouched).abs().max() > 1e-3


@pytest.mark.parametrize("bits", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_lora_learns_on_a_quantised_model_and_loads_beside_it(world, tmp_path, bits):
    pytest.importorskip("bitsandbytes")
    save_tiny_longvlm(tmp_path / "model", text_config=lively(hidden_size=64, intermediate_size=128))
    flag = {f"load_in_{bits}bit": True}
    options = {"model": str(tmp_path / "model"), "train": "lora", "lora_r": 4, "gradient_checkpointing": True, **flag}
    trainer = run(world, tmp_path / "out", learning_rate=0.02, **options)
    assert sum(losses(trainer)[-6:]) < 0.9 * sum(losses(trainer)[:6])
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}
    # The frozen weights are those of the base: adapter and base give what was trained.
    batch = a_batch(world)
    engine = longvlm.load(tmp_path / "out", device="cpu", **flag)
    torch.testing.assert_close(logits_of(engine.model, batch), logits_of(trainer.model, batch), atol=0.05, rtol=0.05)
    trained, whole, base = (
        logits_of(model, batch)
        for model in (
            trainer.model,
            longvlm.load(tmp_path / "out", device="cpu").model,  # merged into weights that are not quantised
            LongVLMForConditionalGeneration.from_pretrained(tmp_path / "model"),
        )
    )
    assert (whole - trained).abs().mean() < 0.5 * (base - trained).abs().mean()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"train": "projector"}, "`train` projector needs weights that are not quantised"),
        ({"train": "full"}, "`train` full needs weights that are not quantised"),
        ({"train": "lora", "merge_lora": True}, "`merge_lora` would round"),
        ({"train": "lora", "load_in_8bit": True}, "exclude each other"),
    ],
    ids=str,
)
def test_what_quantised_weights_do_not_allow(world, tmp_path, options, says):
    pytest.importorskip("bitsandbytes")
    save_tiny_longvlm(tmp_path / "model", text_config=lively(hidden_size=64, intermediate_size=128))
    with pytest.raises(ValueError, match=says):
        run(world, tmp_path / "out", model=str(tmp_path / "model"), load_in_4bit=True, **options)


def test_full_training_with_the_vision_tower_changes_every_part(world, tmp_path):
    run(world, tmp_path / "out", videos=True, train="full", train_vision_tower=True, max_steps=2)
    before = LongVLMForConditionalGeneration.from_pretrained(world / "model").state_dict()
    after = LongVLMForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for part in ("model.vision_tower", "model.multi_modal_projector", LLM, "lm_head"):
        assert any(name.startswith(part) for name in changed), part


@pytest.mark.parametrize("options", [{"train": "projector"}, {"train": "lora"}, {"train": "full"}], ids=str)
def test_what_is_trained_of_a_bfloat16_model_is_float32(world, tmp_path, options):
    trainer = run(world, tmp_path / "out", dtype="bfloat16", max_steps=1, **options)
    dtypes = {name: p.dtype for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert any("projector" in name for name in dtypes) and set(dtypes.values()) == {torch.float32}, dtypes
    frozen = {p.dtype for name, p in trainer.model.named_parameters() if "vision_tower" in name}
    assert frozen == {torch.bfloat16}


def test_the_loss_goes_to_tensorboard(world, tmp_path):
    pytest.importorskip("tensorboard")
    run(world, tmp_path / "out", max_steps=2, report_to="tensorboard")
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()


def test_rows_without_videos_leave_the_projector_as_it_is(world, tmp_path):
    (tmp_path / "text.json").write_text(json.dumps([{"q": "And two?", "a": "Four."}] * 4))
    options = {"train_data": [str(tmp_path / "text.json")], "max_steps": 2}
    trainer = run(world, tmp_path / "out", train_added_tokens=False, **options)
    before = LongVLMForConditionalGeneration.from_pretrained(world / "model")
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, trainer.model.get_parameter(name)), name
    # An LLM that is trained learns from them all the same.
    curve = losses(run(world, tmp_path / "lora", train="lora", **options))
    assert curve[1] < curve[0]


def test_training_from_features_equals_training_from_videos(world, tmp_path):
    from_features = losses(run(world, tmp_path / "features", max_steps=4))
    from_videos = losses(run(world, tmp_path / "videos", max_steps=4, videos=True))
    assert from_features == pytest.approx(from_videos, abs=1e-5)


SCHEDULES = {
    "shuffled": {},
    "by length": {"train_sampling_strategy": "group_by_length"},
    "accumulated": {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    "lora": {"train": "lora"},
    "bfloat16": {"dtype": "bfloat16"},  # what is trained is float32 all the same, and goes on as such
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_that_goes_on_gives_the_losses_of_one_that_was_never_stopped(world, tmp_path, name):
    # 6 steps an epoch, with accumulation 3: it goes on in the middle of a later one.
    options = {"max_steps": 15, "save_strategy": "steps", "save_steps": 4, **SCHEDULES[name]}
    whole = run(world, tmp_path / "whole", **options)
    # As after a kill while the third checkpoint was being written: what it lacks is written last.
    out = tmp_path / "killed"
    first = run(world, out, **options)
    assert losses(first) == losses(whole)
    shutil.rmtree(out / "checkpoint-15")
    (out / "checkpoint-12" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-8.* resume it with `resume_from_checkpoint` auto"):
        run(world, out, **options)
    resumed = run(world, out, resume_from_checkpoint="auto", **options)
    assert resumed.state.global_step == 15
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-6)
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_logits_before_the_first_answer_are_not_made_and_the_loss_is_the_same(world, tmp_path):
    trainer = run(world, tmp_path / "out", max_steps=1)
    collator = LongVLMDataCollator(LongVLMProcessor.from_pretrained(world / "model"))
    rows = [("a", "Who?", "A man."), ("b", "Who is it, and why?", "Two men.")]
    batch = collator(
        [{"video_id": str(world / "videos" / f"{video}.mp4"), "q": q, "a": answer} for video, q, answer in rows]
    )
    model, seen = trainer.model.train(), []
    hook = model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    results = []
    for loss_of in (lambda: trainer.compute_loss(model, batch), lambda: model(**batch, use_cache=False).loss):
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        results.append((loss, model.model.multi_modal_projector.linear_1.weight.grad.clone()))
    hook.remove()
    torch.testing.assert_close(results[0], results[1])
    answers = (batch["labels"] != -100).any(0).nonzero().flatten()
    assert seen == [batch["labels"].shape[1] - int(answers[0]) + 1, batch["labels"].shape[1]]
    assert seen[0] < seen[1] - 10


def test_smoothed_labels_are_of_the_next_token(world, tmp_path):
    smoothed = losses(run(world, tmp_path / "smoothed", max_steps=2, label_smoothing_factor=1e-9))
    assert smoothed == pytest.approx(losses(run(world, tmp_path / "plain", max_steps=2)), abs=1e-4)


def test_evaluation_during_training(world, tmp_path):
    trainer = run(
        world, tmp_path / "out", max_steps=4, eval_data=[str(world / "rows.json")], eval_strategy="steps", eval_steps=2
    )
    assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) == 2
    assert json.loads((tmp_path / "out" / "eval_data_report.json").read_text())["kept"] == 12


def test_features_that_do_not_fit_are_refused(world, tmp_path):
    save_tiny_longvlm(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="do not fit the model: encoder_weights"):
        run(world, tmp_path / "out", model=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="needs videos"):
        run(world, tmp_path / "out", train_vision_tower=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_stops_at_damaged_features_with_one_line(world, tmp_path, workers):
    shutil.copytree(world / "features", tmp_path / "features")
    (shard,) = (tmp_path / "features").glob("*.safetensors")
    damaged = bytearray(shard.read_bytes())
    damaged[-3] ^= 16
    shard.write_bytes(damaged)
    options = {"features": [str(tmp_path / "features")], "dataloader_num_workers": workers}
    with pytest.raises(ValueError, match=r'^[^ ]*\.safetensors: the features of the video "." are damaged') as error:
        run(world, tmp_path / "out", max_steps=8, **options)
    assert "remove this file and run what made it again" in str(error.value) and "\n" not in str(error.value)


def test_features_of_other_frames_are_trained_on_when_their_options_are_given(world, tmp_path):
    model = LongVLMForConditionalGeneration.from_pretrained(world / "model")
    processor, folder = LongVLMProcessor.from_pretrained(world / "model"), tmp_path / "features"
    options = {"num_frames": 4, "video_stream": 0}
    extract_features([world / "videos"], folder, model=model, processor=processor, video_options=options)
    with pytest.raises(
        ValueError, match=r"num_frames is 4 and not 8, video_stream is 0 and not None; .* give the num"
    ):
        run(world, tmp_path / "out", features=[str(folder)])
    from_features = losses(run(world, tmp_path / "out", features=[str(folder)], **options, max_steps=2))
    from_videos = losses(run(world, tmp_path / "videos", videos=True, **options, max_steps=2))
    assert from_features == pytest.approx(from_videos, abs=1e-5)


def test_a_model_without_global_tokens_is_trained_from_features_old_and_new(world, tmp_path):
    save_tiny_longvlm(tmp_path / "model", text_config=lively(), global_placement="none")
    model = LongVLMForConditionalGeneration.from_pretrained(tmp_path / "model")
    processor = LongVLMProcessor.from_pretrained(tmp_path / "model")
    assert processor.num_global_tokens == model.config.num_global_tokens == 0
    extract_features([world / "videos"], tmp_path / "features", model=model, processor=processor)
    options = {"model": str(tmp_path / "model"), "max_steps": 4}
    new = losses(run(world, tmp_path / "new", features=[str(tmp_path / "features")], **options))
    # The world's features have the global ones that such a model once stored as well.
    old = losses(run(world, tmp_path / "old", **options))
    from_videos = losses(run(world, tmp_path / "videos", videos=True, **options))
    assert new == pytest.approx(old, abs=1e-6) and new == pytest.approx(from_videos, abs=1e-5)
    # Nor can they be used by a model that needs them.
    with pytest.raises(ValueError, match="have 0 global layers, the model 2"):
        run(world, tmp_path / "needs", features=[str(tmp_path / "features")])


def test_rows_are_checked_with_progress_unless_bars_are_off(world, tmp_path):
    config = {"model": str(world / "model"), "train_data": [str(world / "rows.json")], "max_steps": 1}
    config |= {"features": [str(world / "features")], "save_strategy": "no", "report_to": "none", "use_cpu": True}
    config |= {"output_dir": str(tmp_path / "out")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    calls = []
    for off in ("false", "true"):
        arguments = parse_arguments([str(tmp_path / "config.yaml"), "--disable_tqdm", off])
        train(*arguments, progress=lambda *call: calls.append(call))
    assert calls == [("check rows", done, 12) for done in range(1, 13)]


def test_the_old_name_of_truncation_is_refused_with_the_new_one(tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text("model: m\ntrain_data: [x]\ntoo_long: truncate")
    with pytest.raises(ValueError, match=r"config\.yaml: too_long was renamed; give `truncation`: true"):
        parse_arguments([str(config)])
    config.write_text("model: m\ntrain_data: [x]\ntruncation: true\nuse_cpu: true")
    for flag in (["--too_long", "drop"], ["--too_long=drop"]):
        with pytest.raises(ValueError, match=r"--too_long.* was renamed; give `truncation`"):
            parse_arguments([str(config), *flag])
    for flags, expected in (([], True), (["--truncation", "false"], False)):
        _, data, *_ = parse_arguments([str(config), *flags, "--output_dir", str(tmp_path)])
        assert data.truncation is expected


def test_mistakes_in_a_configuration_are_told_in_one_line(tmp_path):
    config = tmp_path / "config.yaml"
    for text, message in {
        "model: m\ntrain_data: [x]\nlerning_rate: 1": "lerning_rate is not a training option; did you mean learn",
        "train_data: [x]": "required: --model",
        "model: m\ntrain_data: [x]\ntrain: everything": '`train` is "everything"; use one of projector, lora, full',
        "model: m\ntrain_data: [x]\nlearning_rate: fast": "invalid float value: 'fast'",
        "model: m\ntrain_data: [x]\ntrain_weights: [a]": "train_weights must be a list of numbers, not hold 'a'",
        "model: m\ntrain_data: [x]\ntrain_weights: [1, null]": "must be a list of numbers, not hold None",
        "model: m\ntrain_data: {x: 1}": "train_data must be a list of single values, not hold {'x': 1}",
        "- model": "must hold options",
    }.items():
        config.write_text(text)
        with pytest.raises(ValueError, match=re.escape(message)):
            parse_arguments([str(config)])
    config.write_text("model: m\ntrain_data: [x]\nlearning_rate: 2e-5\nuse_cpu: true")
    *_, training = parse_arguments([str(config), "--learning_rate", "1e-3", "--output_dir", str(tmp_path)])
    assert training.learning_rate == 1e-3 and training.remove_unused_columns is False
    # One value instead of a list of one.
    config.write_text("model: m\ntrain_data: rows.json\ntrain_weights: 2\nfeatures: features\nuse_cpu: true")
    _, data, *_ = parse_arguments([str(config), "--output_dir", str(tmp_path)])
    assert (data.train_data, data.train_weights, data.features) == (["rows.json"], [2.0], ["features"])


def command(*arguments):
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_example_of_the_docs_trains(world, tmp_path):
    text = re.search(r"```yaml\n(.*?)```", (ROOT / "docs" / "training.md").read_text(), re.S).group(1)
    config = yaml.safe_load(text)
    rows = json.loads((world / "rows.json").read_text())
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config["train_data"] = [str(world / "rows.json"), str(tmp_path / "chats.jsonl")]
    config |= {"model": str(world / "model"), "features": [str(world / "features")]}
    config |= {"output_dir": str(tmp_path / "out")}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    done = command("-m", "longvlm", "train", tmp_path / "config.yaml", "--use_cpu", "--max_steps", 2)
    assert '"steps": 2' in done.stdout and "24 rows kept, 0 dropped" in done.stderr
    LongVLMForConditionalGeneration.from_pretrained(tmp_path / "out")


def test_names_of_the_package_are_found_when_they_are_asked_for():
    for package in (longvlm.training, longvlm.features, longvlm.evaluation):
        assert package.__all__ == sorted(package.__all__) and set(package.__all__) <= set(dir(package))
        assert all(getattr(package, name) is not None for name in package.__all__)
        with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
            _ = package.nothing


def test_rows_trained_in_shards_are_stored_in_the_collected_table(world, tmp_path):
    trainer = run(world, tmp_path / "out", max_steps=2)
    collected = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    rows = collected["model.language_model.embed_tokens.added_rows"] = torch.arange(96.0).view(3, 32)
    trainer._save(str(tmp_path / "saved"), state_dict=collected)
    saved = LongVLMForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(saved.get_input_embeddings().weight[video_token_ids(saved.config)], rows)


@pytest.mark.slow
def test_a_killed_training_goes_on_to_the_same_losses(world, tmp_path):
    config = {
        "model": str(world / "model"),
        "train_data": [str(world / "rows.json")],
        "features": [str(world / "features")],
        "max_steps": 200,
        "save_steps": 20,
        "logging_steps": 1,
        "report_to": "none",
        "resume_from_checkpoint": "auto",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    module = ["-m", "longvlm", "train", tmp_path / "config.yaml", "--output_dir"]
    command(*module, tmp_path / "whole")
    process = subprocess.Popen(
        [sys.executable, *map(str, module), str(tmp_path / "killed")], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "killed" / "checkpoint-60").exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    command(*module, tmp_path / "killed")
    one, other = (
        [
            entry["loss"]
            for entry in json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"][:-1]
        ]
        for name in ("whole", "killed")
    )
    assert len(one) == 200 and other == pytest.approx(one, abs=1e-6)


@pytest.mark.slow
def test_two_processes_train_to_the_weights_of_one_with_twice_the_batch(world, tmp_path):
    config = {
        "model": str(world / "model"),
        "train_data": [str(world / "rows.json")],
        "features": [str(world / "features")],
        "max_steps": 5,
        "learning_rate": 1e-3,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "train_sampling_strategy": "sequential",
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    module = ["-m", "longvlm.training.train", tmp_path / "config.yaml"]
    command(*module, "--output_dir", tmp_path / "one", "--per_device_train_batch_size", 4)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2]
    command(*launch, *module, "--output_dir", tmp_path / "two", "--per_device_train_batch_size", 2)
    one, two, before = (
        LongVLMForConditionalGeneration.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "one", tmp_path / "two", world / "model")
    )
    assert any(not torch.equal(one[name], before[name]) for name in one)
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=0)
