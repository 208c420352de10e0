"""Shell lines of the documentation, checked without running them: what they name must exist.

`longvlm` goes through the parser of the command itself, `make` through the Makefile, `accelerate launch` through
accelerate's parser. A program that is not known here is an error.
"""

import importlib.util
import re
import shlex
import tomllib
from dataclasses import fields
from functools import cache
from pathlib import Path

import typer
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement
from transformers import TrainingArguments

from longvlm.training.arguments import DataArguments, ModelArguments, TuningArguments
from longvlm_cli.app import app
from tests.helpers.paths import ROOT

# Commands of other projects, whole: there is nothing of ours in them.
FOREIGN = (["hf", "auth", "login"], ["pre-commit", "install"], ["source", ".venv/bin/activate"])
PLACEHOLDERS = {"COMMAND": "ask"}  # in prose


class WrongLine(AssertionError):
    """A line that would not work."""


def split_lines(text: str) -> list[list[str]]:
    """A block of shell -> the words of each command, without comments, redirections and variables in front."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        try:
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError as error:
            raise WrongLine(f"{line}: {error}") from error
        command: list[str] = []
        after_redirection = False
        for word in [*words, ";"]:
            if re.fullmatch(r"[|;&()]+", word):
                if command:
                    commands.append(command)
                command = []
            elif re.fullmatch(r"[<>]+", word):
                after_redirection = True
            elif after_redirection:
                after_redirection = False
            elif command or not re.fullmatch(r"[A-Za-z_]\w*=.*", word):
                command.append(word)
    return commands


def check_line(words: list[str], *, partial: bool = False) -> None:
    """
    Args:
        words: of one command.
        partial: it is mentioned in a sentence: arguments may be left out, but none may be wrong.

    Raises:
        WrongLine: the program, a command, an option or a target does not exist.
    """
    words = [PLACEHOLDERS.get(word, word) for word in words] if partial else words
    if words in FOREIGN:
        return
    program, *arguments = words
    if program == "python" and arguments[:1] == ["-m"]:
        return _check_module(arguments[1:], partial)
    checks = {"longvlm": _check_longvlm, "make": _check_make, "pip": _check_pip, "accelerate": _check_accelerate}
    if program not in checks:
        raise WrongLine(f"{shlex.join(words)}: {program} is not known")
    checks[program](arguments, partial)


@cache
def longvlm_flags() -> frozenset[str]:
    """All flags of all commands."""

    def collect(command) -> set[str]:
        found = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        return found.union(*map(collect, getattr(command, "commands", {}).values()))

    return frozenset(flag for flag in collect(typer.main.get_command(app)) if flag.startswith("-"))


@cache
def accelerate_flags() -> frozenset[str]:
    return frozenset(launch_command_parser()._option_string_actions)


def module_flags(module: str) -> set[str]:
    """The flags that the source of a module names."""
    return set(re.findall(r"--[a-z][a-z-]+", module_file(module).read_text(encoding="utf-8")))


def module_file(module: str) -> Path:
    """The source of a module that `python -m` runs from a checkout."""
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None or found.origin is None:
        raise WrongLine(f"python -m {module}: there is no such module")
    if found.submodule_search_locations is not None:
        return module_file(f"{module}.__main__")
    return Path(found.origin)


def _check_longvlm(arguments: list[str], partial: bool) -> None:
    command, path, rest = typer.main.get_command(app), ["longvlm"], list(arguments)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name not in command.commands:
            raise WrongLine(f"{' '.join(path)} has no command {name}")
        command = command.commands[name]
        path.append(name)
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    flags |= {"--help", "-h"}
    if partial or flags & {"--help", "--version"} & set(rest):
        if wrong := [word for word in rest if word.startswith("-") and word != "-" and word not in flags]:
            raise WrongLine(f"{' '.join(path)} has no option {wrong[0]}")
        return
    try:
        context = command.make_context(" ".join(path), rest)
    except Exception as error:  # click's, which typer may bring along under another name
        if not hasattr(error, "format_message"):
            raise
        raise WrongLine(f"{' '.join(path)}: {error.format_message()}") from error
    if path[1:] == ["train"]:
        groups = (ModelArguments, DataArguments, TuningArguments, TrainingArguments)
        options = {f"--{field.name}" for group in groups for field in fields(group)}
        if wrong := [word for word in context.args if word.startswith("--") and word not in options]:
            raise WrongLine(f"longvlm train has no option {wrong[0]}")


@cache
def _makefile() -> tuple[set[str], set[str]]:
    """Targets and variables."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", text, flags=re.M)), set(re.findall(r"\$\((?:if \$\()?([A-Z]+)\)", text))


def _check_make(arguments: list[str], partial: bool) -> None:
    targets, variables = _makefile()
    for argument in arguments:
        name, has_value, value = argument.partition("=")
        if name not in (variables if has_value else targets):
            raise WrongLine(f"make {argument}: the Makefile has no {name}")
        if name == "ARGS" and not (ROOT / value).exists():
            raise WrongLine(f"make {argument}: there is no {value}")


def _check_pip(arguments: list[str], partial: bool) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {Requirement(line).name for line in project["dependencies"]}
    if arguments[:1] != ["install"]:
        raise WrongLine(f"pip {shlex.join(arguments)}: not an installation")
    for argument in arguments[1:]:
        checkout = re.fullmatch(r"\.(?:\[(.*)\])?", argument)
        if checkout is None and Requirement(argument).name not in needed:
            raise WrongLine(f"pip install {argument}: not one of the dependencies")
        for extra in (checkout[1] or "").split(",") if checkout else ():
            if extra and extra not in project["optional-dependencies"]:
                raise WrongLine(f"pip install {argument}: there is no extra {extra}")


def _check_accelerate(arguments: list[str], partial: bool) -> None:
    if arguments[:1] != ["launch"]:
        raise WrongLine(f"accelerate {shlex.join(arguments)}: not a launch")
    parser = launch_command_parser()
    if partial and "-m" not in arguments:
        arguments = [*arguments, "script.py"]

    def error(message: str):
        raise WrongLine(f"accelerate {shlex.join(arguments)}: {message}")

    parser.error = error  # type: ignore[method-assign]
    options = parser.parse_args(arguments[1:])
    if options.module:
        _check_module([options.training_script, *options.training_script_args], partial)


def _check_module(words: list[str], partial: bool) -> None:
    module, *arguments = words
    if module in ("longvlm", "longvlm_cli"):
        return _check_longvlm([word for word in arguments if word != "..."], partial)
    known = module_flags(module)
    if wrong := [word for word in arguments if word.startswith("--") and word not in known]:
        raise WrongLine(f"python -m {module} has no option {wrong[0]}")
