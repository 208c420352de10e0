"""README and docs do what they say: Python blocks run, commands have these options, links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
import yaml

import longvlm
from longvlm_cli.app import app
from tests.helpers.paths import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
# Blocks of Python that cannot run here, by a line of theirs, and why.
CANNOT_RUN = {
    'ask = pipeline("video-question-answering", model="me/my-longvlm", trust_remote_code=True)': (
        "the repository is the reader's own; tests/modeling_longvlm/test_remote_code.py does this with a folder"
    ),
}
# Commands of others, whose options are not checked here.
OTHER_COMMANDS = {"accelerate", "hf", "pip", "source", "python"}

# What the blocks find where they run: the video that they ask about, and a stand-in for TRL.
PREPARE = """
import os, sys
from pathlib import Path

from longvlm.evaluation import storyline

story = storyline.make_story(storyline.story_seed("test", 4), duration=12)
storyline.write_video(story, Path("film.mp4"), fps=8, size=96)
"""
TRL = '''
"""Stands in for TRL: the configuration keeps its options, and the trainer makes one batch as TRL would."""


class SFTConfig:
    def __init__(self, **options):
        self.options = options


class SFTTrainer:
    def __init__(self, model, *, processing_class, data_collator, train_dataset, args):
        assert args.options["dataset_kwargs"] == {"skip_prepare_dataset": True}
        assert args.options["remove_unused_columns"] is False and args.options["max_length"] is None
        batch = data_collator(train_dataset)
        assert model(**batch).loss.isfinite()
'''


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


PYTHON = [(f"{name(page)}-{number}", block) for page in PAGES for number, block in enumerate(blocks(page, "python"))]
RUN = [(title, block) for title, block in PYTHON if not any(line in block for line in CANNOT_RUN)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with what the pages speak of."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "trl.py").write_text(TRL)
    (folder / "evaluation").symlink_to(ROOT / "evaluation")
    subprocess.run([sys.executable, "-c", PREPARE], cwd=folder, check=True, env=environment(folder))
    return folder


def environment(folder: Path) -> dict[str, str]:
    paths = [str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONWARNINGS": "ignore"}


def run_together(titled_blocks, folder: Path) -> dict[str, str]:
    """Runs each block in names of its own, all in one process; title -> traceback of those that fail."""
    script = "import sys, traceback\nfailed = {}\n"
    for title, block in titled_blocks:
        script += f"try:\n    exec(compile({block!r}, {title!r}, 'exec'), {{'__name__': '__main__'}})\n"
        script += f"except BaseException:\n    failed[{title!r}] = traceback.format_exc()\n"
    script += "import json\nprint('\\n' + json.dumps(failed))\n"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, env=environment(folder), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    import json

    return json.loads(done.stdout.rstrip().rsplit("\n", 1)[1])


def test_every_python_block_runs(folder):
    assert len(RUN) >= 12
    failed = run_together(RUN, folder)
    assert not failed, "\n".join(f"--- {title}\n{trace}" for title, trace in failed.items())


def test_a_block_that_fails_is_noticed(folder):
    failed = run_together([("wrong", "import longvlm\nlongvlm.lode()\n"), ("right", "x = 1\n")], folder)
    assert list(failed) == ["wrong"] and "no attribute 'lode'" in failed["wrong"]


def test_blocks_that_do_not_run_are_known():
    left_out = [block for _, block in PYTHON if any(line in block for line in CANNOT_RUN)]
    assert len(left_out) == len(CANNOT_RUN)
    for _, block in PYTHON:
        compile(block, "block", "exec")


# --- shell ---


def shell_lines(page: Path) -> list[str]:
    """Commands of the page's shell blocks: comments left out, continued lines joined."""
    text = "".join(blocks(page, "bash")).replace("\\\n", " ")
    lines = (" ".join(shlex.split(line, comments=True, posix=False)) for line in text.splitlines())
    return [line for line in lines if line]


def inline_commands(page: Path) -> list[str]:
    """Commands in running text, `longvlm ...` or `make ...`."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.findall(r"`((?:longvlm|make) [a-z][^`]*)`", text)


def check(command: str) -> None:
    """
    Raises:
        ValueError: there is no such command, target or option.
    """
    words = shlex.split(command.split("|")[0].split(" < ")[0])
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    program, *arguments = words
    if program == "make":
        targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M)
        unknown = [word for word in arguments if "=" not in word and word not in targets]
        if unknown or not arguments:
            raise ValueError(f"make has no target {unknown}")
    elif program == "longvlm":
        check_longvlm(arguments)
    elif program == "accelerate" and "longvlm" in arguments:
        check_longvlm(arguments[arguments.index("longvlm") + 1 :])
    elif program not in OTHER_COMMANDS and not program.startswith("pre-commit"):
        raise ValueError(f"{program} is not known here")


def check_longvlm(arguments: list[str]) -> None:
    command = typer.main.get_command(app)
    arguments = [word for word in arguments if word not in ("...", "COMMAND")]
    context = click.Context(command, info_name="longvlm")
    while arguments and hasattr(command, "commands") and arguments[0] in command.commands:
        command = command.commands[arguments.pop(0)]
        context = click.Context(command, info_name=command.name, parent=context)
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for word in arguments:
        flag = word.split("=")[0]
        if flag.startswith("-") and flag != "-" and flag not in flags | {"--help"}:
            if command.name == "train" and flag.startswith("--"):
                continue  # options of the training, which tests/training checks
            raise ValueError(f"longvlm {command.name} has no option {flag}")
    if hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        raise ValueError(f"longvlm has no command {arguments[0]}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_exists_with_its_options(page):
    for command in [*shell_lines(page), *inline_commands(page)]:
        check(command)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_complete_command_lines_parse(page):
    """Those in shell blocks are whole: required options are there, and values are of the right kind."""
    for line in shell_lines(page):
        words = shlex.split(line.split(" < ")[0])
        if words[0] != "longvlm" or "COMMAND" in words:
            continue
        command, arguments = typer.main.get_command(app), words[1:]
        context = click.Context(command, info_name="longvlm")
        while hasattr(command, "commands"):
            command = command.commands[arguments.pop(0)]
            context = click.Context(
                command,
                parent=context,
                allow_extra_args=command.name == "train",
                ignore_unknown_options=command.name == "train",
            )
        command.parse_args(context, arguments)


@pytest.mark.parametrize(
    "command",
    ["longvlm ask a.mp4 Why? --colour red", "longvlm asks", "make everything", "lonvlm ask", "longvlm convert lava"],
)
def test_a_command_that_does_not_exist_is_noticed(command):
    with pytest.raises(ValueError):
        check(command)


# --- the rest ---


@pytest.mark.parametrize("page", [*PAGES, longvlm.tiny_checkpoint() / "README.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#")):
            assert (page.parent / target.split("#")[0]).exists(), target


def test_folders_and_files_that_the_pages_name_exist():
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it names what is gone, too
            continue
        for path in re.findall(r"`((?:[a-z_]+/)+[\w.-]*)`", page.read_text(encoding="utf-8")):
            if path.split("/")[0] in {p.name for p in ROOT.iterdir()}:
                assert (ROOT / path).exists(), f"{name(page)}: {path}"


def test_the_readme_has_the_two_commands_that_set_up_and_run():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    single = [block.strip() for block in re.findall(r"^```bash\n(.*?)^```$", readme, re.M | re.S)]
    assert single.count("make demo") == single.count("make test") == 1


def test_the_workflow_calls_make_on_three_pythons_and_both_ends_of_transformers():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    jobs = workflow["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    matrix = jobs["test"]["strategy"]["matrix"]
    commands = [c.replace("${{ matrix.target }}", target) for c in commands for target in matrix["target"]]
    for command in commands:
        check(command)
    assert {"make lint", "make test-floor", "make test-newest", "make test SLOW=1"} <= set(commands)
    assert len(matrix["python"]) == 3 and all(isinstance(version, str) for version in matrix["python"])


def test_the_citation_file_is_complete():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "license"} <= citation.keys()
    paper = citation["preferred-citation"]
    assert paper["title"] in (ROOT / "README.md").read_text(encoding="utf-8").replace("{", "").replace("}", "")
    assert len(paper["authors"]) == 5 and paper["year"] == 2024
