"""`longvlm publish` and `push_to_hub`, with the real client against a Hub on loopback (`hub_stub.py`).

What arrived is compared byte for byte, and loaded back by its id in a process that cannot import `longvlm`: there
transformers looks at the imports of every file. Refusals and broken connections leave nothing behind.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants as hub_constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from longvlm.publishing import checks
from longvlm.publishing.publish import NotReady, publish
from longvlm_cli import app as cli
from tests.helpers.hub_stub import HubStub
from tests.helpers.paths import ROOT
from tests.helpers.tiny_models import save_tiny_longvlm, tiny_longvlm
from tests.helpers.video_files import write_video

CARD_OPTIONS = ("--license", "apache-2.0", "--base-model", "me/llm", "--base-model", "me/encoder")
CARD = {"license": "apache-2.0", "base_model": ["me/llm", "me/encoder"]}
WITHOUT_PACKAGE = 'import sys\nsys.modules["longvlm"] = None\n'


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return save_tiny_longvlm(tmp_path_factory.mktemp("made") / "model", untrained_parts=["multi_modal_projector"])


@pytest.fixture
def folder(made, tmp_path):
    """A checkpoint that a test may spoil."""
    return Path(shutil.copytree(made, tmp_path / "model"))


@pytest.fixture(scope="module")
def module_patch():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def connect(hub: HubStub, patch: pytest.MonkeyPatch) -> None:
    """Sends this process's huggingface_hub to the stub; without the pauses before it tries again."""
    patch.setattr(hub_constants, "ENDPOINT", hub.url)
    patch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    patch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None, time=time.time))
    patch.setenv("HF_TOKEN", HubStub.TOKEN)


@pytest.fixture
def hub(monkeypatch):
    with HubStub() as stub:
        connect(stub, monkeypatch)
        yield stub


@pytest.fixture
def quick(monkeypatch):
    """Without loading the folder in another process, where a test is about something else."""
    monkeypatch.setattr(checks, "loading_problems", lambda folder: [])


def command(capfd, *arguments):
    """Runs `longvlm publish` in this process: `(exit code, stdout, stderr)`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["longvlm", "publish", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
    out, err = capfd.readouterr()
    return ended.value.code, out, err


def run(code: str, cwd, hub: HubStub, *arguments) -> str:
    """Standard output of `code` in a fresh process that knows the stub and nothing else."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"},
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": HubStub.TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(Path(cwd) / "hf"),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# --- publish, and load back ---


@pytest.fixture(scope="module")
def published(made, module_patch):
    """The stub after a publication with every check, and what `publish` returned."""
    with HubStub() as stub:
        connect(stub, module_patch)
        yield stub, publish(made, "me/x", **CARD)


def test_everything_arrives_byte_for_byte_in_one_commit(published, made):
    hub, publication = published
    arrived = dict(hub.repos["me/x"].branches["main"])
    arrived.pop(".gitattributes")
    card = arrived.pop("README.md").decode()
    assert arrived == contents(made)
    assert card == publication.card and "license: apache-2.0" in card
    assert len(hub.repos["me/x"].commits) == 1
    assert publication.url == f"{hub.url}/me/x"
    assert "README.md" not in contents(made)  # the folder stays as it is


def test_card_snippets_run_and_answer_from_the_hub_without_the_package(published, tmp_path):
    """The usage snippets of the card, as they are, where `video.mp4` lies."""
    from longvlm import VideoQuestionAnsweringPipeline

    hub, publication = published
    snippets = re.findall(r"```python\n(.*?)```", publication.card, re.DOTALL)
    assert len(snippets) == 2 and all('"me/x"' in snippet for snippet in snippets)
    video = write_video(tmp_path / "video.mp4", 24, rate=8)
    check = (
        "\nparts = (ask, ask.model, ask.processor, model, processor)\n"
        "assert {type(part).__module__.split('.')[0] for part in parts} == {'transformers_modules'}\n"
    )
    printed = run(WITHOUT_PACKAGE + "\n".join(snippets) + check, tmp_path, hub)
    model, processor = tiny_longvlm()
    ask = VideoQuestionAnsweringPipeline(model=model, processor=processor)
    first = ask(video=str(video), question="What happens in the video?")["answer"]
    assert first and first in printed


def test_publishing_again_changes_nothing(published, made, quick):
    hub, _ = published
    connect_to = len(hub.repos["me/x"].commits), hub.repos["me/x"].branches["main"]
    publish(made, "me/x", **CARD)
    assert (len(hub.repos["me/x"].commits), hub.repos["me/x"].branches["main"]) == connect_to


# --- push_to_hub ---


@pytest.mark.slow
def test_push_to_hub_of_model_and_processor_is_complete(made, tmp_path):
    push = """
import sys
import longvlm
from transformers import AutoModelForImageTextToText, AutoProcessor
AutoModelForImageTextToText.from_pretrained(sys.argv[1]).push_to_hub("me/pushed")
AutoProcessor.from_pretrained(sys.argv[1]).push_to_hub("me/pushed")
"""
    with HubStub() as hub:
        run(push, tmp_path, hub, made)
        arrived = hub.repos["me/pushed"].branches["main"]
        code = checks.installed_code()
        assert {name: arrived[name] for name in code} == {name: path.read_bytes() for name, path in code.items()}
        assert json.loads(arrived["config.json"])["auto_map"]["AutoModel"] == "modeling_longvlm.LongVLMModel"
        assert arrived["model.safetensors"] == (made / "model.safetensors").read_bytes()
        check_loads_back(hub, "me/pushed", tmp_path)


def check_loads_back(hub, repo_id, tmp_path):
    load = """
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
ask = pipeline("video-question-answering", model=sys.argv[1], trust_remote_code=True)
for part in (model, processor, ask):
    assert type(part).__module__.startswith("transformers_modules"), type(part)
print(ask(video="video.mp4", question="What?", max_new_tokens=4)["answer"].encode())
"""
    write_video(tmp_path / "video.mp4", 24, rate=8)
    assert run(WITHOUT_PACKAGE + load, tmp_path, hub, repo_id).startswith("b")


@pytest.mark.slow
def test_push_to_hub_of_trainer_is_complete(made, tmp_path):
    train = """
import sys
import longvlm
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
frames = torch.randint(0, 256, (4, 3, 56, 56), dtype=torch.uint8)
row = dict(processor(text="<video>What?", videos=[list(frames)], return_tensors="pt"))
row["labels"] = row["input_ids"].clone()
row["labels"][row["labels"] >= model.config.video_token_id] = -100
arguments = TrainingArguments("out", max_steps=1, per_device_train_batch_size=1, remove_unused_columns=False,
                              report_to=[], push_to_hub=True, hub_model_id="me/trained", save_strategy="no",
                              use_cpu=True)
trainer = Trainer(model, arguments, train_dataset=[row], data_collator=lambda rows: rows[0],
                  processing_class=processor)
trainer.train()
trainer.push_to_hub()
"""
    with HubStub() as hub:
        run(train, tmp_path, hub, made)
        arrived = hub.repos["me/trained"].branches["main"]
        code = checks.installed_code()
        assert {name: arrived.get(name) for name in code} == {name: path.read_bytes() for name, path in code.items()}
        check_loads_back(hub, "me/trained", tmp_path)
    # What the Trainer leaves can be published as well; its arguments are a pickle.
    with pytest.raises(NotReady, match=r"training_args.bin is or may contain a pickle"):
        publish(tmp_path / "out", "me/y", **CARD, dry_run=True)
    publication = publish(tmp_path / "out", "me/y", **CARD, exclude=["training_args.bin"], dry_run=True)
    assert "training_args.bin" not in publication.sizes and "model.safetensors" in publication.sizes


# --- options ---


def test_dry_run_shows_files_and_card_and_asks_the_hub_nothing(hub, quick, folder, capfd):
    code, out, err = command(capfd, folder, "--repo-id", "me/x", *CARD_OPTIONS, "--dry-run")
    assert code == 0 and "error" not in err
    size = (folder / "model.safetensors").stat().st_size
    assert re.search(rf"^ *{size:,}  model.safetensors$", out, re.MULTILINE)
    assert "pipeline_tag: video-text-to-text" in out and "# x" in out
    assert not hub.requests and not (folder / "README.md").exists()


def test_progress_names_each_step(hub, quick, folder):
    steps = []
    publish(folder, "me/x", **CARD, progress=lambda stage, done=0, total=0: steps.append((stage, done, total)))
    loading = "loading the checkpoint in a process without this package"
    assert steps == [("checking the files", 0, 0), (loading, 0, 0), ("uploading", 0, 0)]


def test_address_goes_to_stdout(hub, quick, folder, capfd):
    code, out, err = command(capfd, folder, "--repo-id", "me/x", *CARD_OPTIONS, "--private", "--quiet")
    assert (code, out, err) == (0, f"{hub.url}/me/x\n", "")
    assert hub.repos["me/x"].private


def test_branch_and_pull_request_leave_main_alone(hub, quick, folder, capfd):
    arguments = (folder, "--repo-id", "me/x", *CARD_OPTIONS, "--commit-message", "Second try")
    code, out, _ = command(capfd, *arguments, "--branch", "wider")
    assert code == 0 and out == f"{hub.url}/me/x/tree/wider\n"
    code, out, _ = command(capfd, *arguments, "--create-pr")
    assert code == 0 and "/discussions/" in out
    repo = hub.repos["me/x"]
    assert set(repo.branches["main"]) == {".gitattributes"}
    assert [commit["branch"] for commit in repo.commits] == ["wider", "refs/pr/2"]
    assert repo.commits[0]["message"] == "Second try"
    assert all("model.safetensors" in repo.branches[branch] for branch in ("wider", "refs/pr/2"))
    code, _, err = command(capfd, *arguments, "--create-pr", "--branch", "wider")
    assert code == 2 and "exclude each other" in err


def test_weights_and_code_of_an_earlier_version_go_and_other_files_stay(hub, quick, folder):
    publish(folder, "me/x", **CARD)
    main = hub.repos["me/x"].branches["main"]
    main |= {"model-00001-of-00002.safetensors": b"old", "old_code.py": b"old", "demo.gif": b"mine"}
    publication = publish(folder, "me/x", **CARD)
    assert sorted(publication.deleted) == ["model-00001-of-00002.safetensors", "old_code.py"]
    main = hub.repos["me/x"].branches["main"]
    assert main["demo.gif"] == b"mine" and not {"model-00001-of-00002.safetensors", "old_code.py"} & main.keys()
    assert len(hub.repos["me/x"].commits) == 2


def test_own_card_keeps_its_text_and_gets_the_metadata(hub, quick, folder):
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n\n# My own words\n")
    card = publish(folder, "me/x", base_model=["me/llm"], dry_run=True).card
    assert card.endswith("# My own words\n")
    for line in ("license: mit", "- me/llm", "- mine", "- longvlm", "pipeline_tag: video-text-to-text"):
        assert line in card
    assert "My own words" not in publish(folder, "me/x", **CARD, new_card=True, dry_run=True).card


@pytest.mark.parametrize("own_card", [False, True])
def test_language_and_results_of_the_command_line_reach_the_card(own_card, hub, quick, folder, tmp_path, capfd):
    if own_card:
        (folder / "README.md").write_text("---\nlanguage: en\n---\n\n# My own words\n")
    result = {"task_type": "t", "dataset_type": "d", "dataset_name": "D", "metric_type": "accuracy"}
    (tmp_path / "results.json").write_text(json.dumps([result | {"metric_value": 0.625}]))
    options = ("--language", "de", "--results", tmp_path / "results.json", "--quiet")
    code, _, err = command(capfd, folder, "--repo-id", "me/x", *CARD_OPTIONS, *options)
    assert (code, err) == (0, "")
    card = hub.repos["me/x"].branches["main"]["README.md"].decode()
    assert "language:\n- de\n" in card and "value: 0.625" in card and "name: x" in card
    assert ("My own words" in card) == own_card


def test_llama_1_is_warned_about(hub, quick, folder, capfd):
    options = ("--license", "other", "--license-name", "llama", "--license-link", "https://example.org")
    code, _, err = command(
        capfd, folder, "--repo-id", "me/x", *options, "--base-model", "lmsys/vicuna-7b-v1.1", "--dry-run"
    )
    assert code == 0
    assert "longvlm: warning: lmsys/vicuna-7b-v1.1 is LLaMA-1" in err


# --- what is refused ---


def edit(name, change):
    def spoil(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values, indent=2))

    return spoil


def write(name, text):
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())


def note(text):
    return write("notes.md", f"first line\n{text}\n")


def drop_a_shard(folder):
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def path_in_weights(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "source": "/home/me/weights"})


SPOILED = {
    "pickled weights": (write("pytorch_model.bin", b"x"), "pytorch_model.bin is or may contain a pickle"),
    "numpy arrays": (write("features.npy", b"x"), "features.npy is or may contain a pickle"),
    "cut weights": (write("model.safetensors", b"x" * 100), "model.safetensors is damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
    "a shard missing": (drop_a_shard, "names model-00002-of-00002.safetensors, which does not exist"),
    "path in the weights": (path_in_weights, "model.safetensors, metadata source: the local path"),
    "path in config": (
        edit("config.json", lambda values: values["text_config"].update(_name_or_path="/srv2/models/llm")),
        r"config.json, line \d+: _name_or_path is the local path /srv2/models/llm",
    ),
    "relative path": (
        edit("tokenizer_config.json", lambda values: values.update(name_or_path="../llm")),
        r"tokenizer_config.json, line \d+: name_or_path is the local path ../llm",
    ),
    "relative path without dots": (
        edit("config.json", lambda values: values["vision_config"].update(_name_or_path="runs/clip/encoder")),
        r"config.json, line \d+: _name_or_path is the local path runs/clip/encoder",
    ),
    "hidden folder": (
        edit("config.json", lambda values: values["vision_config"].update(_name_or_path=".cache/encoder")),
        r"config.json, line \d+: _name_or_path is the local path .cache/encoder",
    ),
    "Windows path": (
        edit("tokenizer_config.json", lambda values: values.update(name_or_path="C:\\models\\llm")),
        r"name_or_path is the local path C:\\models",
    ),
    "path in text": (note("trained from /home/me/data"), "notes.md, line 2: the local path /home/me/data"),
    "Hub token": (note("hf_" + "aB3" * 12), "notes.md, line 2: a Hugging Face token"),
    "AWS key": (note("AKIA" + "A7" * 8), "an AWS key"),
    "GitHub token": (note("ghp_" + "a1" * 18), "a GitHub token"),
    "API key": (note("key=sk-" + "a1" * 24), "an API key"),
    "private key": (note("-----BEGIN RSA " + "PRIVATE KEY-----"), "a private key"),
    "password": (note("https://me:" + "secret@example.org/x"), "a password in an address"),
    "token in code": (write("extra.py", "token = 'hf_" + "aB3" * 12 + "'"), "extra.py, line 1: a Hugging Face token"),
    "changed code": (
        lambda folder: (folder / "token_merging.py").open("a").write("# mine\n"),
        r"code differs from the installed version \(token_merging.py\)",
    ),
    "code missing": (lambda folder: (folder / "token_merging.py").unlink(), r"code is missing \(token_merging.py\)"),
    "foreign code": (write("handler.py", "pass\n"), "handler.py is not code of this package"),
    "no auto_map": (edit("config.json", lambda values: values.pop("auto_map")), "config.json, auto_map"),
    "no pipeline": (edit("config.json", lambda values: values.pop("custom_pipelines")), "custom_pipelines"),
    "another model": (edit("config.json", lambda values: values.update(model_type="clip")), "a clip model"),
    "no processor": (lambda folder: (folder / "processor_config.json").unlink(), "save the processor"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "path in own card": (
        write("README.md", "---\nlicense: mit\n---\nin /home/me/x\n"),
        "README.md, line .*/home/me/x",
    ),
    "token in UTF-16": (
        write("notes.txt", ("first line\nhf_" + "aB3" * 12).encode("utf-16")),
        "notes.txt, line 2: a Hugging Face token",
    ),
    "token in a binary file": (
        write("notes.bin2", b"\xff\xfa\n" + b"AKIA" + b"A7" * 8),
        "notes.bin2, line 2: an AWS key",
    ),
    "config no object": (write("config.json", "[]"), "config.json holds a JSON list"),
    "index no object": (write("model.safetensors.index.json", "[]"), "model.safetensors.index.json is not an index"),
    "index of a list": (write("model.safetensors.index.json", '{"weight_map": []}'), "is not an index of shards"),
    "card not UTF-8": (write("README.md", b"\xff\xfe\x00bad"), "README.md is not UTF-8.*`new_card`"),
    "card not YAML": (write("README.md", "---\nlicense: [mit\n---\n"), "card cannot be made"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_folder_is_refused_and_the_message_says_where(case, hub, quick, folder):
    spoil, message = SPOILED[case]
    spoil(folder)
    with pytest.raises(NotReady, match=message) as refused:
        publish(folder, "me/x", **CARD)
    assert not hub.requests
    assert not any("\n" in problem or "aB3" in problem or "secret" in problem for problem in refused.value.problems)


LINKS = {
    "to a file of the system": "/etc/hostname",
    "to a file beside the folder": "../secret.txt",
    "through a link in the folder": "inner",
    "to nothing": "gone.txt",
    "in a circle": "notes.md",
    "to a device": "/dev/zero",
    "through /proc": "/proc/self/cwd/secret.txt",
}


@pytest.mark.parametrize("case", LINKS)
@pytest.mark.parametrize("name", ["notes.md", "more/notes.md", "config.json"])
def test_a_link_that_leads_out_of_the_folder_is_refused_by_name(case, name, hub, quick, folder, capfd):
    (folder.parent / "secret.txt").write_text("my secret")
    (folder / "inner").symlink_to(folder.parent / "secret.txt")
    (folder / "more").mkdir()
    target = name if case == "in a circle" else LINKS[case]
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(f"../{target}" if name.startswith("more/") and target[0] not in "/" else target)
    arguments = (folder, "--repo-id", "me/x", *CARD_OPTIONS, "--quiet", "--exclude", "inner")
    code, out, err = command(capfd, *arguments, "--dry-run")
    assert code == 2 and out == "" and "secret" not in err.replace("secret.txt", "")
    assert err == (
        f"longvlm: error: {name} is a link that leads out of the folder, or nowhere: put the file itself there, or "
        f"leave it out with --exclude {name}\n"
    )
    if name != "config.json":
        code, out, err = command(capfd, *arguments, "--exclude", name)
        assert code == 0 and err.startswith("left out: inner, ") and name not in hub.repos["me/x"].branches["main"]


def test_links_within_the_folder_and_within_a_hub_cache_are_followed(hub, quick, folder, tmp_path):
    (folder / "LICENCE").write_text("MIT")
    (folder / "LICENSE").symlink_to("LICENCE")
    model = tmp_path / "hub" / "models--me--y"
    snapshot = model / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (model / "blobs").mkdir()
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, model / "blobs" / f"{number:040}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040}")
    for source in (folder, snapshot):
        publish(source, "me/x", **CARD)
        arrived = {name: data for name, data in hub.repos["me/x"].branches["main"].items() if name != "README.md"}
        arrived.pop(".gitattributes")
        assert arrived == contents(folder)
    # Another model of the same cache is none of this one's.
    other = tmp_path / "hub" / "models--me--private" / "blobs"
    other.mkdir(parents=True)
    (other / "9").write_text("private")
    (snapshot / "notes.md").symlink_to("../../../models--me--private/blobs/9")
    with pytest.raises(NotReady, match=r"notes.md is a link that leads out of the folder"):
        publish(snapshot, "me/x", **CARD)


def test_what_is_left_out_is_named(hub, quick, folder, capfd):
    for name in (".env", ".git/config", ".git/objects/0", "runs/1/events", "checkpoint-5/model.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name in ("more/.hidden", "more/kept.md", "drafts/a.md", "drafts/b.md", "notes\x1b[31m.md"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    (folder / "latest").symlink_to("checkpoint-5")
    os.mkfifo(folder / "pipe.md")
    excluded = ("--exclude", "drafts/*", "--exclude", "notes*")
    code, out, err = command(capfd, folder, "--repo-id", "me/x", *CARD_OPTIONS, *excluded, "--quiet", "--dry-run")
    named = ".env, .git/, checkpoint-5/, drafts/, latest, more/.hidden, notes\\x1b[31m.md, pipe.md, runs/"
    assert code == 0 and err == f"left out: {named}\n"
    assert "  more/kept.md\n" in out and not any(name in out for name in ("latest", "drafts", "hidden", "pipe.md"))


def test_words_of_a_vocabulary_and_addresses_are_no_paths(hub, quick, folder):
    write("vocab.json", json.dumps({"/home/me/x": 0, "/usr/lib": 1}))(folder)
    note("see https://example.org/data/home/me and <video> USER:\\nA: /10")(folder)
    publish(folder, "me/x", **CARD, dry_run=True)


def test_every_problem_is_a_line_and_the_exit_code_is_2(hub, quick, folder, capfd):
    (folder / "token_merging.py").unlink()
    note("hf_" + "aB3" * 12)(folder)
    code, out, err = command(capfd, folder, "--repo-id", "me/x", "--quiet")
    lines = err.splitlines()
    assert (code, out) == (2, "") and all(line.startswith("longvlm: error: ") for line in lines)
    for part in ("--license", "--base-model", "token_merging.py", "Hugging Face token"):
        assert sum(part in line for line in lines) == 1
    assert not hub.requests


def test_excluded_configuration_is_a_problem(hub, quick, folder, capfd):
    code, _, err = command(capfd, folder, "--repo-id", "me/x", *CARD_OPTIONS, "--exclude", "config.json", "--quiet")
    assert code == 2 and "longvlm: error: config.json is missing: save the model again, or do not" in err
    assert "leave it out with --exclude\n" in err and not hub.requests


def test_update_code_publishes_the_installed_code(hub, quick, folder):
    (folder / "token_merging.py").write_text("old = True\n")
    (folder / "forgotten.py").write_text("old = True\n")
    publish(folder, "me/x", **CARD, update_code=True)
    arrived = hub.repos["me/x"].branches["main"]
    assert arrived["token_merging.py"] == (ROOT / "modeling_longvlm" / "token_merging.py").read_bytes()
    assert "forgotten.py" not in arrived and (folder / "token_merging.py").read_text() == "old = True\n"


@pytest.mark.parametrize(
    "repo_id, message", [("x", "USER/NAME"), ("a/b/c", "a/b/c"), ("me/x y", "me/x y"), ("me/" + "x" * 100, "me/x")]
)
def test_impossible_repository_names(repo_id, message, hub, quick, folder, capfd):
    code, _, err = command(capfd, folder, "--repo-id", repo_id, *CARD_OPTIONS, "--quiet")
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.slow
def test_folder_that_does_not_load_is_refused(hub, folder):
    """The check itself, in its own process: transformers would fill a missing weight with random values."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.multi_modal_projector.linear_1.weight"
    kept = {key: tensor for key, tensor in tensors.items() if key != name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotReady, match=f"missing weights: 1, for example {name}"):
        publish(folder, "me/x", **CARD)
    save_file(tensors | {name: torch.full_like(tensors[name], float("nan"))}, folder / "model.safetensors")
    with pytest.raises(NotReady, match="computes NaN"):
        publish(folder, "me/x", **CARD)
    assert not hub.requests


# --- failure is safe ---

LFS_PUT, LFS_BATCH, COMMIT, CREATE = r"PUT /lfs/", r"POST .*/lfs/objects/batch", r"POST .*/commit/", r"POST .*/create"
FAILURES = {
    "not allowed to create": (CREATE, (403, "You don't have the rights to create a model under this namespace")),
    "not allowed to write": (COMMIT, (403, "Forbidden: pass a write token")),
    "quota, told by the API": (LFS_BATCH, (403, "Private repository storage limit reached")),
    "quota, told by the storage": (LFS_PUT, (413, "Entity too large")),
    "storage full": (LFS_PUT, (507, "Insufficient storage")),
    "to be paid": (COMMIT, (402, "Payment required")),
    "too many requests": (COMMIT, (429, "Too many requests")),
    "error of the API": (COMMIT, (500, "Internal error")),
    "error of the storage": (LFS_PUT, (500, "Internal error")),
    "down at once": (CREATE, (503, "Service unavailable")),
    "connection dropped within the weights": (LFS_PUT, "drop"),
    "connection dropped within the commit": (COMMIT, "drop"),
}
EXPECTED = {
    402: "accepts no more data",
    413: "accepts no more data",
    507: "accepts no more data",
    403: "403",
    429: "429",
}


def check_failed(code, out, err):
    assert code == 2 and out == ""
    errors = [line for line in err.splitlines() if line.startswith("longvlm: error: ")]
    assert len(errors) == 1 and err.strip().endswith(errors[0]) and "Traceback" not in err
    return errors[0]


@pytest.mark.parametrize("case", FAILURES)
def test_failure_is_one_line_commits_nothing_and_the_next_run_finishes(case, hub, quick, folder, capfd):
    where, failure = FAILURES[case]
    hub.fail = lambda method, path: failure if re.fullmatch(where + ".*", f"{method} {path}") else None
    arguments = (folder, "--repo-id", "me/x", *CARD_OPTIONS, "--quiet")
    message = check_failed(*command(capfd, *arguments))
    if failure == "drop":
        assert "connection" in message and "try again, files that have arrived are not sent twice" in message
    elif "quota" in case or failure[0] in EXPECTED:
        assert ("accepts no more data" if "quota" in case else EXPECTED[failure[0]]) in message
    else:
        assert "an internal error" in message and str(failure[0]) in message
    assert not hub.repos or not hub.repos["me/x"].commits

    sent = len(hub.lfs)
    hub.fail = lambda method, path: None
    hub.requests.clear()
    code, out, err = command(capfd, *arguments)
    assert (code, out, err) == (0, f"{hub.url}/me/x\n", "")
    arrived = hub.repos["me/x"].branches["main"]
    assert {name: arrived[name] for name in contents(folder)} == contents(folder)
    assert len(hub.repos["me/x"].commits) == 1
    assert len(hub.asked(LFS_PUT)) == 1 - sent  # what had arrived was not sent again


def test_upload_broken_off_between_shards_goes_on_with_the_rest(hub, quick, folder, capfd):
    model, _ = tiny_longvlm()
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="150KB")
    oids = {hashlib.sha256(shard.read_bytes()).hexdigest() for shard in folder.glob("*.safetensors")}
    assert len(oids) > 2
    last = max(oids)
    hub.fail = lambda method, path: "drop" if path == f"/lfs/{last}" else None
    arguments = (folder, "--repo-id", "me/x", *CARD_OPTIONS, "--quiet")
    check_failed(*command(capfd, *arguments))
    missing = oids - hub.lfs.keys()
    assert last in missing and not hub.repos["me/x"].commits
    hub.fail = lambda method, path: None
    hub.requests.clear()
    assert command(capfd, *arguments)[0] == 0
    assert sorted(hub.asked(LFS_PUT)) == sorted(f"PUT /lfs/{oid}" for oid in missing)
    main = hub.repos["me/x"].branches["main"]
    assert {name: main[name] for name in contents(folder)} == contents(folder)


def test_wrong_token(hub, quick, folder, capfd, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    arguments = (folder, "--repo-id", "me/x", *CARD_OPTIONS, "--quiet")
    message = check_failed(*command(capfd, *arguments))
    assert "401" in message and "hf auth login" in message and not hub.repos
    monkeypatch.setenv("HF_TOKEN", HubStub.TOKEN)
    assert command(capfd, *arguments)[0] == 0


def test_no_network(hub, quick, folder, capfd, monkeypatch):
    hub.server.shutdown()
    hub.server.server_close()  # the port is closed now
    message = check_failed(*command(capfd, folder, "--repo-id", "me/x", *CARD_OPTIONS, "--quiet"))
    assert "connection" in message
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    message = check_failed(*command(capfd, folder, "--repo-id", "me/x", *CARD_OPTIONS, "--quiet"))
    assert "HF_HUB_OFFLINE" in message


def test_card_that_the_hub_refuses(hub, quick, folder, capfd):
    arguments = (folder, "--repo-id", "me/x", "--base-model", "none", "--license", "not-a-licence", "--quiet")
    message = check_failed(*command(capfd, *arguments))
    assert "license" in message and not hub.repos["me/x"].commits and not hub.lfs
