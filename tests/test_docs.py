"""What the pages say works: every block of Python runs, and every shell line names things that exist.

Blocks run as they are printed, each on its own, in a folder with the files that the pages assume: a film, a checkpoint
of one's own (that stands for the same id on the Hub), a checkout. No block is left out.
"""

import importlib
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import pytest
import yaml
from accelerate.state import AcceleratorState
from transformers import Trainer, TrainingArguments

import longvlm
from longvlm.evaluation import storyline
from longvlm.publishing.model_card import read_results
from tests.helpers.documents import PAGES, REPO_ID, anchors, blocks, blocks_of, links, page_text, spans
from tests.helpers.paths import ROOT
from tests.helpers.shell_lines import (
    WrongLine,
    accelerate_flags,
    check_line,
    longvlm_flags,
    module_flags,
    split_lines,
)

PROGRAMS = ("longvlm", "make", "pip", "python", "accelerate", "hf", "source", "pre-commit")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The reader's folder. The film has 60 frames: fewer than most blocks ask for, which saves half the time."""
    folder = tmp_path_factory.mktemp("desk")
    story = storyline.make_story(storyline.story_seed("test", 0), duration=6)
    storyline.write_video(story, folder / "film.mp4", fps=10, size=64)
    for name in ("story.mp4", "video.mp4"):
        shutil.copy(folder / "film.mp4", folder / name)
    for name in (REPO_ID, "my-longvlm"):
        shutil.copytree(longvlm.tiny_checkpoint(), folder / name)
    (folder / "evaluation").symlink_to(ROOT / "evaluation")
    return folder


@pytest.fixture
def stand_ins(desk, monkeypatch):
    """What differs from a reader's machine: where we are, how large the benchmark is, and TRL."""
    monkeypatch.chdir(desk)
    monkeypatch.delenv("LONGVLM_MODEL", raising=False)
    small = partial(storyline.write_benchmark, num_stories={"test": 1})
    monkeypatch.setattr(storyline, "write_benchmark", small)
    monkeypatch.setitem(sys.modules, "trl", trl())
    yield
    AcceleratorState._reset_state(reset_partial_state=True)  # or a later test finds a trainer's device


def trl() -> ModuleType:
    """TRL itself is no dependency: these have the arguments that the pages give, and train like `Trainer`."""

    @dataclass
    class SFTConfig(TrainingArguments):
        max_length: int | None = 1024
        dataset_kwargs: dict | None = None
        max_steps: int = 1
        save_strategy: str = "no"
        report_to: str = "none"
        use_cpu: bool = True
        dataloader_pin_memory: bool = False

    class SFTTrainer(Trainer):
        def __init__(self, model, args, data_collator, train_dataset, processing_class):
            assert args.max_length is None and args.dataset_kwargs == {"skip_prepare_dataset": True}
            super().__init__(
                model, args, data_collator, train_dataset=train_dataset, processing_class=processing_class
            )

    module = ModuleType("trl")
    module.SFTConfig, module.SFTTrainer = SFTConfig, SFTTrainer
    return module


GIVEN = {"evaluation/storyline/dataset_card.md": {"row": lambda: storyline.build_dataset("test", num_stories=1)[0]}}


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block, stand_ins, capsys):
    names = {"__name__": "__main__", **{name: make() for name, make in GIVEN.get(block.page, {}).items()}}
    exec(compile("\n" * block.line + block.text, str(ROOT / block.page), "exec"), names)
    if "print(" in block.text:
        assert capsys.readouterr().out.strip()
    if "trainer" in names:
        assert names["trainer"].train().training_loss > 0


def test_every_block_is_of_a_language_that_is_checked():
    languages = {block.language for page in PAGES for block in blocks_of(page)}
    assert languages <= {"python", "bash", "yaml", "json", "bibtex"}
    assert len(blocks("python")) >= 16
    for page in ("README.md", "docs/python.md", "docs/storyline.md", "docs/training.md", "docs/publishing.md"):
        assert page in {block.page for block in blocks("python")}
    # Were a fence overlooked, the fences would not come in pairs.
    for page in PAGES:
        assert page_text(page).count("```") == 2 * len(blocks_of(page)), page


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_shell_lines_are_valid(block):
    commands = split_lines(block.text)
    assert commands
    for words in commands:
        check_line(words)


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_within_sentences_exist(page):
    modules = []
    for span in spans(page):
        words = span.split()
        if words[0] in PROGRAMS and len(words) > 1:
            for command in split_lines(span):
                check_line(command, partial=True)
                modules += command[2:3] if command[:2] == ["python", "-m"] else []
    known = longvlm_flags() | accelerate_flags()
    known = known.union(*map(module_flags, modules))
    assert [span for span in spans(page) if span.startswith("--") and span.split()[0] not in known] == []


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("longvlm ask film.mp4 Who? --modle x", "--modle"),
        ("longvlm ask", "VIDEO"),
        ("longvlm answer film.mp4", "no command answer"),
        ("longvlm convert lava x --out y", "no command lava"),
        ("longvlm convert llava x", "--out"),
        ("longvlm assemble --language x --out y --merge-similarity cosine", "cosine"),
        ("longvlm train config.yaml --learning-rat 1", "--learning-rat"),
        ("HF_TOKEN=x longvlm publish x --repo 1 > log.txt", "--repo"),
        ("accelerate launch --num_procs 4 -m longvlm train x.yaml", "num_procs"),
        ("accelerate launch -m longvlm trian x.yaml", "trian"),
        ("make dmeo", "dmeo"),
        ("make test && make nothing", "nothing"),
        ("make test FAST=1", "FAST"),
        ('pip install ".[convrt]"', "convrt"),
        ("pip install tenserflow", "tenserflow"),
        ("python -m recipes.tiny.bild", "no such module"),
        ("python -m recipes.smollm2.run --folder x", "--folder"),
        ('longvlm ask film.mp4 "Who', "quotation"),
        ("frobnicate film.mp4", "not known"),
    ],
)
def test_a_wrong_line_is_found(line, problem):
    with pytest.raises(WrongLine, match=re.escape(problem)):
        for words in split_lines(line):
            check_line(words)


def test_the_readme_has_two_commands_for_a_fresh_checkout():
    commands = [
        words for block in blocks_of("README.md") if block.language == "bash" for words in split_lines(block.text)
    ]
    assert [words for words in commands if words[0] == "make"] == [["make", "demo"], ["make", "test"]]


@pytest.mark.parametrize("block", blocks("yaml", "json"), ids=str)
def test_data_can_be_read(block, tmp_path):
    if block.language == "yaml":  # tests/training runs them
        assert isinstance(yaml.safe_load(block.text), dict)
    else:
        assert block.page == "docs/publishing.md" and json.loads(block.text)
        (tmp_path / "results.json").write_text(block.text, encoding="utf-8")
        assert read_results(tmp_path / "results.json")


@pytest.mark.parametrize("page", PAGES)
def test_names_files_and_links_lead_somewhere(page):
    for span in spans(page):
        if name := re.match(r"longvlm(_cli)?(\.[A-Za-z_]\w*)+(?=[(\s]|$)", span):
            assert resolve(name[0]) is not None, span
        elif re.fullmatch(r"[\w./-]+", span) and "/" in span and (ROOT / span.split("/")[0]).is_dir():
            if span.startswith(".cache/"):  # made by the recipes
                continue
            assert (ROOT / span).exists(), span
    for link in links(page):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), link
        if anchor:
            assert anchor in anchors(os.path.relpath(file.resolve(), ROOT)), link


def resolve(name: str):
    """The module or attribute of that dotted name."""
    module, *rest = name.split(".")
    value = importlib.import_module(module)
    for part in rest:
        value = getattr(value, part, None) or importlib.import_module(f"{value.__name__}.{part}")
    return value


def test_the_workflow_calls_make_on_every_python_and_both_ends_of_transformers():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    commands = []
    for job in workflow["jobs"].values():
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [""])
        for line in (step["run"] for step in job["steps"] if "run" in step):
            # A line that does not depend on the matrix runs for each entry of it: once is enough here.
            commands += {line.replace("${{ matrix.target }}", target): None for target in targets}
    for command in commands:
        for words in split_lines(command):
            check_line(words)
    assert {"make lint", "make test-floor", "make test-newest", "make test SLOW=1"} <= set(commands)
    pythons = workflow["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert pythons == re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_citation_file_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert paper["title"] in page_text("README.md").replace("{", "").replace("}", "")
    assert len(paper["authors"]) == 5 and paper["year"] == 2024
