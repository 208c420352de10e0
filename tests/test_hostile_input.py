"""Bad and hostile input to every command and to the Python API: one line that says what is wrong, in little time and
memory, and no harm done. Each case is a row: what is given, and the line that comes back.
"""

import io
import json
import os
import resource
import shutil
import signal
import sys

import pytest
import torch
from safetensors.torch import save_file

from longvlm.conversion.original_features import read_feature_file
from longvlm.features.extract import extract_features
from longvlm.features.store import FeatureReader, FeatureWriter
from longvlm.publishing import checks
from longvlm.publishing.publish import publish
from longvlm_cli import app as cli
from tests.helpers.tiny_models import save_tiny_llm, save_tiny_longvlm, tiny_longvlm, tiny_vision_config
from tests.helpers.video_files import write_video

SECONDS, MEGABYTES = 30, 700
PICKLE = b"cos\nmkdir\n(S'harm'\ntR."
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(c)}: &{chr(c)} [{', '.join([f'*{chr(c - 1)}'] * 9)}]\n" for c in range(ord("b"), ord("k"))
)
RESULT = '[{"task_type": "a", "dataset_type": "b/c", "dataset_name": "d", "metric_type": "e", "metric_value": %s}]'
VIDEO, MODEL, LLM, CLIP, ROWS, FEATURES = "videos/v.mp4", "model", "llm", "clip", "rows.json", "features"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """What the cases spoil: links, pipes, a model, its parts, a video and its features. Nobody writes to it."""
    from transformers import CLIPVisionModel

    folder = tmp_path_factory.mktemp("world")
    (folder / "videos").mkdir()
    write_video(folder / VIDEO, 9, rate=8)
    save_tiny_longvlm(folder / MODEL)
    save_tiny_llm(folder / LLM)
    CLIPVisionModel(tiny_vision_config()).save_pretrained(folder / CLIP)
    (folder / ROWS).write_text(json.dumps([{"video": "v", "question": "Who?", "answer": "A man."}] * 4))
    model, processor = tiny_longvlm()
    extract_features([folder / "videos"], folder / FEATURES, model=model, processor=processor)
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")
    return folder


@pytest.fixture
def here(world, tmp_path, monkeypatch):
    """A working directory with links to the world."""
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path.readlink() if path.name == "loop" else path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "loading_problems", lambda folder: [])
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked the user"))
    return tmp_path


@pytest.fixture(autouse=True)
def bounds():
    """No case takes long, or much memory."""

    def too_long(*_):
        raise AssertionError(f"it took more than {SECONDS} seconds")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES * 1024


# --- how a case is written ---


def write(name, content):
    """A file, as an argument."""

    def make(here):
        data = content if isinstance(content, (bytes, str)) else json.dumps(content)
        (here / name).write_bytes(data.encode() if isinstance(data, str) else data)
        return name

    return make


def spoiled(source, name, change):
    """A copy of a folder in which one file is another: bytes, or a function of its JSON values."""

    def make(here):
        folder = here / f"my-{source}"
        shutil.copytree(here / source, folder)
        if callable(change):
            values = json.loads((folder / name).read_text())
            change(values)
            (folder / name).write_text(json.dumps(values))
        else:
            (folder / name).write_bytes(change)
        return folder.name

    return make


def training(**options):
    """A file of options."""
    values = {"model": MODEL, "train_data": [ROWS], "features": [FEATURES], "output_dir": "out", "max_steps": 1}
    values |= {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    return write("options.yaml", values | options)


def rows(name, content):
    """Options with these rows."""

    def make(here):
        write(name, content)(here)
        return training(train_data=[name])(here)

    return make


def extract(*arguments):
    return ("extract", *arguments, "--model", MODEL, "-q")


def assemble(language=LLM, vision=CLIP, *more):
    method = ("--frames-per-segment", 4, "--tokens-per-segment", 6, "--num-global-layers", 2)
    return ("assemble", "--language", language, "--vision", vision, "--out", "out", "-q", *method, *more)


def untrained(**values):
    """An encoder of which there is only this configuration."""
    config = write("encoder.json", tiny_vision_config().to_dict() | values)
    return tuple(part if part != "--vision" else "--vision-config" for part in assemble(LLM, config))


def publishing(folder=MODEL, *more, repo="me/x"):
    given = ("--license", "mit", "--base-model", "me/y") if "--license" not in more else ("--base-model", "me/y")
    return ("publish", folder, "--repo-id", repo, *given, "--dry-run", "-q", *more)


def card(metadata):
    def make(here):
        shutil.copytree(here / MODEL, here / "my-model")
        (here / "my-model" / "README.md").write_text(f"---\n{metadata}\n---\nMine.\n")
        return "my-model"

    return make


def beside(source, name):
    """A copy of a folder with one more file, with that name, which may be any bytes."""

    def make(here):
        shutil.copytree(here / source, here / "more")
        with open(os.path.join(b"more", name), "w") as file:
            file.write("x")
        return "more"

    return make


def without(source, name, pipe=False):
    """A copy of a folder in which a file is missing, or a pipe."""

    def make(here):
        shutil.copytree(here / source, here / "less")
        (here / "less" / name).unlink()
        if pipe:
            os.mkfifo(here / "less" / name)
        return "less"

    return make


COMMANDS = {
    "ask: a question in another encoding": (
        ["ask", VIDEO, "Wer \udcff?", "--model", MODEL],
        "the text is not valid Unicode",
    ),
    "extract: nothing but text": (
        ["extract", write("a.mp4", "text"), write("b.mp4", "text"), "--out", "out", "--model", MODEL],
        "none of the videos could be read; out/failed.jsonl says why",
    ),
    # extract
    "extract: NUL in a name": (extract("a\0b.mp4", "--out", "out"), "embedded null byte"),
    "extract: a circle of links": (extract("loop", "--out", "out"), "loop: no such file or folder"),
    "extract: a device": (extract("/dev/zero", "--out", "out"), "/dev/zero: no such file or folder"),
    "extract: a colour as a name": (extract("\x1b[31m.mp4", "--out", "out"), r"\x1b[31m.mp4: no such file or folder"),
    "extract: a list that is no text": (
        extract(write("list.txt", b"\xff\xfe\x80"), "--out", "out"),
        "list.txt is not UTF-8 text; a list of videos has one path a line",
    ),
    "extract: no videos": (extract("empty", "--out", "out"), "no videos in empty"),
    "extract: into a file": (extract(VIDEO, "--out", ROWS), f"{ROWS} is a file; give a folder for the features"),
    "extract: into a model": (extract(VIDEO, "--out", MODEL), "holds other .safetensors files"),
    "extract: into nowhere": (extract(VIDEO, "--out", "/proc/x"), "No such file or directory: '/proc/x'"),
    "extract: frames at no rate": (
        extract(VIDEO, "--out", "out", "--fps", "nan"),
        "must be a number above 0",
    ),
    "extract: endless frames": (extract(VIDEO, "--out", "out", "--fps", "inf"), "must be a number above 0"),
    "extract: a folder of the future": (
        extract(VIDEO, "--out", spoiled(FEATURES, "index.json", lambda values: values.update(version=9))),
        "index.json has version 9; this longvlm reads up to 2; update it",
    ),
    "extract: a deep index": (
        extract(VIDEO, "--out", spoiled(FEATURES, "index.json", b"[" * 10**5)),
        "index.json is not an index of LongVLM features",
    ),
    "extract: a deep list of failures": (
        extract(VIDEO, "--out", spoiled(FEATURES, "failed.jsonl", b"[" * 10**5)),
        "failed.jsonl is damaged; remove it and extract again",
    ),
    "extract: a damaged shard": (
        extract(VIDEO, "--out", spoiled(FEATURES, "features-00001.safetensors", b"\xff" * 99)),
        "features-00001.safetensors is damaged or not a shard of features",
    ),
    # train
    "train: a bomb": (("train", write("a.yaml", BOMB)), "a.yaml has aliases that make more than 100,000 values"),
    "train: nested too deeply": (("train", write("a.yaml", "{a: " * 50_000)), "a.yaml is nested too deeply"),
    "train: a tag that runs code": (
        ("train", write("a.yaml", "model: !!python/object/apply:os.mkdir [harm]")),
        "a.yaml is not YAML: could not determine a constructor",
    ),
    "train: an option twice": (("train", write("a.yaml", "model: a\nmodel: b")), "'model' is there 2 times"),
    "train: options from a pipe": (("train", "pipe"), "pipe: no such file"),
    "train: a list of models": (("train", training(model=["a"])), "model must be a single value, not ['a']"),
    "train: no model": (("train", training(model=None)), "the following arguments are required: --model"),
    "train: no data": (("train", training(train_data=None)), "the following arguments are required: --train_data"),
    "train: no rows": (("train", rows("rows.jsonl", "\n\n")), "no row is left to train on (0 rows kept, 0 dropped)"),
    "train: a huge weight": (("train", training(train_weights=[1e18])), "each needs one, from 0 to 1000"),
    "train: deep rows": (
        ("train", rows("deep.json", "[" * 10**5)),
        "deep.json is nested too deeply",
    ),
    "train: deep lines": (
        ("train", rows("deep.jsonl", "[" * 10**5)),
        "1 dropped: 1 bad line; the first is deep.jsonl, line 1: it is not JSON: maximum recursion depth",
    ),
    "train: rows that are none": (
        ("train", rows("n.json", [1, None, "x", [], {}])),
        "5 unknown form; the first is n.json, row 0: a row must be a mapping, not int",
    ),
    "train: a checkpoint that is a number": (
        ("train", training(resume_from_checkpoint=3)),
        "resume_from_checkpoint` 3 is not a complete checkpoint",
    ),
    "train: a template that repeats itself": (
        ("train", training(chat_template="{% for i in range(10**9) %}{% endfor %}")),
        "4 refused by the chat template; the first is rows.json, row 0: Range too big",
    ),
    "train: a template that looks behind the scenes": (
        ("train", training(chat_template="{{ ''.__class__.__mro__ }}")),
        "access to attribute '__class__' of 'str' object is unsafe",
    ),
    # assemble and convert
    "assemble: into the root": (assemble(LLM, CLIP, "--out", "/", "--overwrite"), "/ is a mount point"),
    "assemble: into here": (assemble(LLM, CLIP, "--out", ".", "--overwrite"), ". is or contains the current folder"),
    "assemble: into a circle": (assemble(LLM, CLIP, "--out", "loop"), "loop is a link that leads in a circle"),
    "assemble: from nothing": (assemble(""), "'' is neither a folder nor a Hub id"),
    "assemble: a name with NUL": (assemble("a\0b"), r"'a\x00b' is neither a folder nor a Hub id"),
    "assemble: GGUF that is none": (assemble(write("x.gguf", b"GGUF" + b"\xff" * 64)), "x.gguf"),
    "assemble: weights from a pipe": (
        assemble(without(LLM, "model.safetensors", pipe=True)),
        "less/model.safetensors is a pipe or a device, not a file",
    ),
    "assemble: settings from a pipe": (
        assemble(without(LLM, "generation_config.json", pipe=True)),
        "less/generation_config.json is a pipe or a device, not a file",
    ),
    "assemble: no weights": (assemble(without(LLM, "model.safetensors")), "model.safetensors"),
    "assemble: damaged weights": (
        assemble(spoiled(LLM, "model.safetensors", b"\xff" * 99)),
        "my-llm/model.safetensors is damaged",
    ),
    "assemble: a billion layers": (
        assemble(spoiled(LLM, "config.json", lambda values: values.update(num_hidden_layers=10**9))),
        "my-llm has 1,000,000,000 layers, says its configuration; at most 10,000 are loaded",
    ),
    "assemble: weights of another shape": (
        assemble(spoiled(LLM, "config.json", lambda values: values.update(intermediate_size=10**12))),
        "my-llm: its weights do not have the shapes that its config.json says",
    ),
    "assemble: an encoder of a billion layers": (untrained(num_hidden_layers=10**9), "has 1,000,000,000 layers"),
    "assemble: an encoder too large": (
        untrained(intermediate_size=10**12),
        "bytes of weights; there is",
    ),
    "assemble: an encoder of no width": (untrained(hidden_size="wide"), "'hidden_size' expected int, got str"),
    "assemble: an encoder without heads": (untrained(num_attention_heads=0), "(encoder) cannot be used"),
    "assemble: an encoder of no kind": (untrained(model_type="magic"), 'model_type "magic", unknown to transformers'),
    "assemble: huge pictures": (assemble(LLM, CLIP, "--image-size", 10**6), "it can be 1 to 4096 pixels"),
    "convert: an address": (
        ("convert", "llava", "http://127.0.0.1:1/x", "--out", "out", "-q"),
        "http://127.0.0.1:1/x is not a folder, and cannot be a Hub id",
    ),
    "convert: another kind of model": (("convert", "llava", MODEL, "--out", "out", "-q"), "is a longvlm model"),
    "convert: features from a circle": (
        ("convert", "features", "loop", "loop", "--out", "out", "-q"),
        "loop is not",
    ),
    "convert: features from a device": (
        ("convert", "original", "--llm", LLM, "--vision", CLIP, "--out", "out", "--feature-file", "/dev/zero", "-q"),
        "/dev/zero is a pipe or a device, not a file",
    ),
    "convert: a projector that runs code": (
        (
            "convert",
            "original",
            "--llm",
            LLM,
            "--vision",
            CLIP,
            "--out",
            "out",
            "-q",
            "--projector",
            write("p.bin", PICKLE),
        ),
        "p.bin holds more than tensors, or is damaged, and is not read: a pickle can run code",
    ),
    "convert: a deep description": (
        ("convert", "to-original", spoiled(MODEL, "config.json", b"[" * 10**5), "--out", "out", "-q"),
        "my-model/config.json is nested too deeply to be read as JSON",
    ),
    # publish
    "publish: a name that leads elsewhere": (publishing(repo="../x"), "--repo-id '../x'"),
    "publish: a name with a line break": (publishing(repo="me/x\nlicense: mit"), r"--repo-id 'me/x\nlicense: mit'"),
    "publish: a name that is a template": (publishing(repo="me/{{x}}"), "--repo-id 'me/{{x}}'"),
    "publish: a licence that is more metadata": (
        publishing(MODEL, "--license", "mit\nbase_model: evil"),
        r"license 'mit\nbase_model: evil' is not a licence name of the Hub",
    ),
    "publish: a licence whose name is a link": (
        publishing(MODEL, "--license", "other", "--license-name", "x](http://a)", "--license-link", "LICENSE"),
        "license_name 'x](http://a)' is not plain text on one line",
    ),
    "publish: a licence whose address is a script": (
        publishing(MODEL, "--license", "other", "--license-name", "x", "--license-link", "javascript:alert(1)"),
        "license_link 'javascript:alert(1)' is neither a web address nor the name of a file",
    ),
    "publish: markup in a tag": (
        publishing(MODEL, "--tag", "<script>"),
        "tag '<script>' is not plain text",
    ),
    "publish: markup in a language": (publishing(MODEL, "--language", "<b>"), "language '<b>' is not a language code"),
    "publish: a branch that leads elsewhere": (publishing(MODEL, "--branch", "../x"), "--branch '../x' cannot be the"),
    "publish: code of another repository": (
        publishing(
            spoiled(MODEL, "config.json", lambda values: values["auto_map"].update(AutoModel="evil/x--modeling.Model"))
        ),
        "config.json, auto_map: it does not point to the code of this package",
    ),
    "publish: a card that is a bomb": (
        publishing(card(f"license: mit\n{BOMB}datasets: *j")),
        "the card cannot be made: README.md has aliases that make more than 100,000 values",
    ),
    "publish: a card nested too deeply": (publishing(card("a: " + "{a: " * 9999)), "README.md is nested too deeply"),
    "publish: a card that runs code": (
        publishing(card("license: !!python/object/apply:os.mkdir [harm]")),
        "README.md is not YAML: could not determine a constructor",
    ),
    "publish: a number for a base model": (
        ("publish", card("license: mit\nbase_model: 3"), "--repo-id", "me/x", "--dry-run", "-q"),
        "base_model '3' is not a Hub id such as me/name",
    ),
    "publish: a result that is none": (
        publishing(MODEL, "--results", write("r.json", RESULT % "NaN")),
        "r.json is not a list of results with the fields of huggingface_hub.EvalResult: e is nan",
    ),
    "publish: results from a pipe": (publishing(MODEL, "--results", "pipe"), "pipe is a pipe or a device, not a file"),
    "publish: deep settings": (
        publishing(spoiled(MODEL, "tokenizer_config.json", b'{"a": ' * 10**5)),
        "tokenizer_config.json, line 1: not JSON that can be read: nested too deeply",
    ),
    "publish: settings that are no text": (
        publishing(spoiled(MODEL, "generation_config.json", "{}".encode("utf-16"))),
        "generation_config.json is not UTF-8, so transformers cannot read it",
    ),
    "publish: a video processor that is a list": (
        publishing(spoiled(MODEL, "processor_config.json", b'{"video_processor": []}')),
        'processor_config.json is not that of a LongVLM: "video_processor" is no object',
    ),
    "publish: too many frames": (
        publishing(
            spoiled(MODEL, "processor_config.json", lambda values: values["video_processor"].update(num_frames=10**30))
        ),
        "it can be 1 to 1,000,000",
    ),
    "publish: a file with a line break": (
        publishing(beside(MODEL, b"a\nb.md")),
        r"'a\nb.md' is not a name",
    ),
    "publish: a file that is not UTF-8": (publishing(beside(MODEL, b"a\xff.md")), r"'a\udcff.md' is not a name"),
    # all of them
    "a command that is none": (("\x1b[31m",), r"No such command '\x1b[31m'"),
    "a very long argument": (("x" * 10**6,), "No such command 'xxx"),
}


def filled(arguments, here):
    return [str(part(here) if callable(part) else part) for part in arguments]


@pytest.mark.parametrize("case", COMMANDS)
def test_a_command_refuses_it_with_one_line(case, here, monkeypatch, capfd):
    arguments, line = COMMANDS[case]
    monkeypatch.setattr(sys, "argv", ["longvlm", *filled(arguments, here)])
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capfd.readouterr()
    (said,) = (text for text in err.splitlines() if text.startswith("longvlm: error: "))
    assert ended.value.code == 2 and out == "" and line in said and len(said) < 700, err
    assert "Traceback" not in err and said.isprintable()
    assert not (here / "harm").exists() and not (here / "out" / "config.json").exists()


def add(folder, name="v", local=None, **facts):
    with FeatureWriter(folder / "out", num_global_layers=0) as writer:
        writer.add(name, torch.ones(2, 4) if local is None else local, torch.ones(0, 4), **facts)


def foreign_shard(here):
    """A folder whose shard holds other tensors than its metadata say."""
    shutil.copytree(here / FEATURES, here / "other", copy_function=shutil.copyfile)
    (shard,) = (here / "other").glob("*.safetensors")
    save_file({"x": torch.zeros(2)}, shard)
    return FeatureReader(here / "other")["v"]


API = {
    "a name of features with a line break": (lambda here: add(here, "a\nb"), r"'a\nb' cannot be the name of a video"),
    "a name of features that is not UTF-8": (lambda here: add(here, "a\udcff"), "cannot be the name of a video"),
    "an empty name": (lambda here: add(here, ""), "'' cannot be the name of a video"),
    "features that are whole numbers": (
        lambda here: add(here, local=torch.ones(2, 4).long()),
        "a float matrix",
    ),
    "features that are infinite": (lambda here: add(here, local=torch.full((2, 4), float("inf"))), "not finite"),
    "features in a cube": (lambda here: add(here, local=torch.ones(2, 2, 4)), "a float matrix"),
    "a video of endless length": (
        lambda here: add(here, duration=float("inf")),
        "duration=inf cannot be",
    ),
    "a video of minus one frames": (lambda here: add(here, num_frames=-1), "num_frames=-1 cannot be"),
    "features in a file": (lambda here: FeatureReader(here / ROWS), "contains no features: index.json is missing"),
    "features in a circle": (lambda here: FeatureReader(here / "loop"), "contains no features: index.json is missing"),
    "a shard of something else": (foreign_shard, "features-00001.safetensors is damaged or not a shard of features"),
    "features from an endless file": (lambda here: read_feature_file("/dev/zero"), "/dev/zero is a pipe or a device"),
    "features from a pipe": (lambda here: read_feature_file(here / "pipe"), "is a pipe or a device, not a file"),
    "a checkpoint that is a video": (
        lambda here: publish(here / VIDEO, "me/x"),
        "is not a folder; give the folder",
    ),
    "a repository that is a path": (lambda here: publish(here / MODEL, "/etc/x"), "`repo_id` '/etc/x'"),
}


@pytest.mark.parametrize("case", API)
def test_a_call_refuses_it_with_one_line(case, here):
    call, line = API[case]
    with pytest.raises((ValueError, OSError)) as error:
        call(here)
    assert line in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def test_a_file_whose_name_is_not_utf_8_fails_alone(here):
    """Any bytes can be the name of a file; the other videos are encoded, and the list of failures can be read."""
    (here / "mine").mkdir()
    for name in (b"good.mp4", b"b\xffad.mp4", b"line\nbreak.mp4"):
        shutil.copyfile(here / VIDEO, os.path.join(os.fsencode(here / "mine"), name))
    model, processor = tiny_longvlm()
    report = extract_features([here / "mine"], here / "out", model=model, processor=processor)
    assert (report.encoded, report.failed) == (1, 2)
    failed = [json.loads(line) for line in (here / "out" / "failed.jsonl").read_text().splitlines()]
    assert {one["video"] for one in failed} == {"b\udcffad", "line\nbreak"}
    assert all("cannot be the name of a video" in one["reason"] for one in failed)


def test_markup_in_results_and_settings_reaches_the_card_as_text(here):
    """Names are data: in the card they are neither HTML nor columns nor links."""
    from huggingface_hub import EvalResult

    values = {"task_type": "a", "dataset_type": "b/c", "metric_type": "accuracy", "metric_value": 0.5}
    hostile = EvalResult(**values, dataset_name="<script>x</script> | [a](http://b)\n# c")
    change = lambda values: values.update(untrained_parts=["<img src=x>"])  # noqa: E731
    folder = here / spoiled(MODEL, "config.json", change)(here)
    shown = publish(folder, "me/x", license="mit", base_model=["me/y"], results=[hostile], dry_run=True).card
    text = shown.split("---", 2)[2]
    assert r"\<script\>x\</script\> \| \[a\](http://b) # c" in text and r"\<img src=x\>" in text
