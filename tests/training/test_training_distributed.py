"""Training on many GPUs, as far as CPUs can tell: the configurations of the docs, and FSDP on two CPU processes."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from accelerate import DeepSpeedPlugin, FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from longvlm.features.store import FeatureWriter
from longvlm.training.arguments import parse_arguments
from longvlm.training.train import train
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import save_tiny_longvlm, tiny_longvlm, tiny_text_config
from tests.helpers.video_files import write_video


def documented(name, folder):
    """A configuration of the docs, as a file."""
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    block = re.search(rf"```yaml\n# {re.escape(name)}\n(.*?)```", text, re.S).group(1)
    file = folder / name
    file.write_text(block)
    return str(file)


def is_launch_option(names):
    return set(names) <= {action.dest for action in launch_command_parser()._actions}


def test_the_fsdp_configuration_of_the_docs_wraps_each_layer_of_the_model(tmp_path, monkeypatch):
    config = load_config_from_file(documented("fsdp.yaml", tmp_path))
    assert config.distributed_type == DistributedType.FSDP and is_launch_option(config.fsdp_config)
    for name, value in config.fsdp_config.items():  # as `accelerate launch` hands them on
        monkeypatch.setenv(name.upper(), str(value))
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.cpu_ram_efficient_loading
    model, _ = tiny_longvlm()
    plugin.set_auto_wrap_policy(model)
    wrapped = {kind.__name__ for kind in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]}
    assert wrapped == {"LlamaDecoderLayer", "CLIPEncoderLayer", "CLIPVisionEmbeddings"}


def test_the_deepspeed_configuration_of_the_docs_is_understood(tmp_path):
    config = load_config_from_file(documented("deepspeed.yaml", tmp_path))
    assert config.distributed_type == DistributedType.DEEPSPEED and is_launch_option(config.deepspeed_config)
    made = DeepSpeedPlugin(**config.deepspeed_config).deepspeed_config
    assert made["zero_optimization"]["stage"] == 2 and made["gradient_clipping"] == 1.0


MODES = {
    "projector": {"train": "projector"},
    "lora": {"train": "lora", "lora_dropout": 0.0},
    "full": {"train": "full"},
    "with the vision tower": {"train": "full", "train_vision_tower": True},
}


def write_config(folder, mode, processes):
    """A training of 4 rows a step, whatever the number of processes."""
    name = f"{mode}, {processes}"
    config = {
        "model": str(folder / "model"),
        "train_data": [str(folder / "rows.json")],
        "output_dir": str(folder / name),
        "max_steps": 4,
        "per_device_train_batch_size": 4 // processes,
        "learning_rate": 0.05,
        "optim": "sgd",
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **MODES[mode],
    }
    if config.get("train_vision_tower"):
        config["video_folders"] = [str(folder / "videos")]
    else:
        config |= {"features": [str(folder / "features")], "check_features": False}
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


@pytest.mark.slow
def test_fsdp_on_two_processes_trains_to_the_weights_of_one_with_twice_the_batch(tmp_path):
    pytest.importorskip("peft")
    # Weights so large that what the LLM reads changes what it says.
    save_tiny_longvlm(tmp_path / "model", text_config=tiny_text_config(initializer_range=0.3))
    (tmp_path / "videos").mkdir()
    with FeatureWriter(tmp_path / "features", num_global_layers=2) as features:
        for name, frames in (("a", 9), ("b", 24)):
            write_video(tmp_path / "videos" / f"{name}.mp4", frames)
            features.add(name, torch.randn(12, 64), torch.randn(2, 64))
    rows = [{"video": "ab"[i % 2], "question": "Who?" * (1 + i % 3), "answer": "A man."} for i in range(12)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))

    launch = ["-m", "accelerate.commands.launch", "--config_file", documented("fsdp.yaml", tmp_path)]
    launch += ["--num_processes", "2", "--mixed_precision", "no", "-m", "tests.helpers.fsdp_on_cpu"]
    configs = [write_config(tmp_path, mode, processes=2) for mode in MODES]
    done = subprocess.run([sys.executable, *launch, *configs], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"trained"')]
    # Each process held half of every layer.
    assert printed == [{"trained": config, "shares": {"FSDPLlamaDecoderLayer": [0.5]}} for config in configs]

    for mode in MODES:
        trainer = train(*parse_arguments([write_config(tmp_path, mode, processes=1)]))
        one, two = tmp_path / f"{mode}, 1", tmp_path / f"{mode}, 2"
        losses = [
            [entry["loss"] for entry in history if "loss" in entry]
            for history in (
                trainer.state.log_history,
                json.loads((two / "trainer_state.json").read_text())["log_history"],
            )
        ]
        assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], abs=1e-5), mode
        weights, sharded = ({f.name: load_file(f) for f in folder.glob("*model.safetensors")} for folder in (one, two))
        assert len(weights) == 1 and sharded.keys() == weights.keys()
        for name in weights:
            torch.testing.assert_close(sharded[name], weights[name], atol=1e-5, rtol=0)
        # The steps were so large that this says something (LoRA's second matrices start at 0).
        start = load_file(tmp_path / "model" / "model.safetensors")
        changes = [
            tensor - start.get(key, 0) for key, tensor in weights[name].items() if key in start or "lora_B" in key
        ]
        assert max(change.abs().max() for change in changes) > 1e-3, mode
        # What is saved is a checkpoint like any other, with its code.
        files = [{file.name for file in folder.iterdir()} - {"projector.safetensors"} for folder in (one, two)]
        assert files[0] == files[1], mode
        if mode != "lora":
            configs_saved = [json.loads((folder / "config.json").read_text()) for folder in (one, two)]
            assert configs_saved[0] == configs_saved[1], mode
