"""Checks of a checkpoint folder before it goes to the Hub; each returns its problems, one line each.

Weights: only safetensors, and complete. Text: no credentials, no local paths. Code: that of the installed package,
byte for byte. And as a whole: it loads and answers in a process without this package.
"""

import codecs
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from longvlm.files import read_json_object
from longvlm.modeling_longvlm.modeling_longvlm import LongVLMForConditionalGeneration
from longvlm.modeling_longvlm.remote_code import CONFIG_ENTRIES, code_files
from longvlm.processing.processing_longvlm import LongVLMProcessor
from longvlm.processing.video_processing_longvlm import LongVLMVideoProcessor

# Files that can run code when they are opened.
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
# Words in a vocabulary may look like paths.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")

SECRETS = {
    "a Hugging Face token": r"\b(hf|api_org)_[A-Za-z0-9]{30,}\b",
    "an AWS key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
    "a GitHub token": r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b",
    "a GitLab token": r"\bglpat-[A-Za-z0-9_-]{20,}",
    "an API key (sk-...)": r"\bsk-[A-Za-z0-9_-]{32,}",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a Slack token": r"\bxox[abprs]-[0-9A-Za-z-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\b[a-z][a-z0-9+.-]{,20}://[^/\s:@\"']{1,200}:[^/\s:@\"'{}<>]{1,200}@",
}
_FOLDERS = (
    "home|Users|root|tmp|mnt|data|work|workspace|scratch|srv|opt|var|media|private|Volumes|content|kaggle|gpfs|nfs|"
    "lustre"
)
# In running text: typical folders of a machine. As a JSON value: anything that begins like a path.
PATH_IN_TEXT = (
    rf"(?<![\w.:/\\<>$}}*-])(/({_FOLDERS})/[^\s\"'<>|)`,]+|file:///[^\s\"'<>)`]+|[A-Za-z]:(\\\\?|/)Users\b\S*)"
)
PATH_AS_VALUE = r"(/[^/\s]+/|~[/\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file://)\S.*"


def weight_problems(files: Mapping[str, Path]) -> list[str]:
    """`files`: name in the repository -> local file."""
    problems = [
        f"{name} is or may contain a pickle, which can run code when it is opened: save weights as safetensors, or "
        f"leave the file out with `exclude` {name}"
        for name in sorted(files)
        if name.lower().endswith(PICKLES)
    ]
    weights = [name for name in sorted(files) if name.endswith(".safetensors")]
    if not weights:
        problems.append("there are no weights: save the model with save_pretrained")
    for name in weights:
        try:
            with safe_open(files[name], "pt") as tensors:
                for key, value in (tensors.metadata() or {}).items():
                    problems += [f"{name}, metadata {key}: {found}" for _, found in _suspicious(value)]
        except SafetensorError as error:
            problems.append(f"{name} is damaged ({error}): save the model again")
    for name in sorted(files):
        if name.endswith(".safetensors.index.json"):
            try:
                shards = {str(shard) for shard in read_json_object(files[name])["weight_map"].values()}
            except (ValueError, KeyError, TypeError, AttributeError):
                problems.append(f'{name} is not an index of shards (it has no "weight_map"): save the model again')
                continue
            problems += [f"{name} names {shard}, which does not exist" for shard in sorted(shards - set(weights))]
    return problems


def text_problems(files: Mapping[str, Path]) -> list[str]:
    """Credentials and local paths, each with file and line. Code is compared elsewhere."""
    problems = []
    for name, path in sorted(files.items()):
        if name.endswith((".safetensors", *PICKLES)):
            continue
        content = path.read_bytes()
        try:
            problems += problems_in_text(name, content.decode("utf-8"))
        except UnicodeDecodeError:
            if name.endswith(".json"):
                problems.append(f"{name} is not UTF-8, so transformers cannot read it: save it again, as UTF-8")
            # Text in another encoding, or a binary file: both can contain credentials.
            marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
            text = content.decode("utf-16" if content.startswith(marks) else "latin-1", errors="replace")
            found = _suspicious(text, paths=False)
            problems += [f"{name}, line {line}: {what}" for line, what in found]
    return problems


def problems_in_text(name: str, text: str) -> list[str]:
    """The same for the text of one file."""
    paths = not name.endswith((*VOCABULARIES, ".py"))
    found = list(_suspicious(text, paths=paths))
    if name.endswith(".json"):
        found += _problems_in_json(text, {line for line, _ in found}, paths=paths)
    return [f"{name}, line {line}: {what}" for line, what in sorted(found)]


def _suspicious(text: str, *, paths: bool = True) -> Iterator[tuple[int, str]]:
    """Yields line number and finding. A secret is named, not shown."""
    for number, line in enumerate(text.splitlines(), 1):
        for kind, pattern in SECRETS.items():
            if re.search(pattern, line):
                yield number, f"{kind}: remove it, and revoke it where it was issued"
        match = re.search(PATH_IN_TEXT, line) if paths else None
        if match:
            yield number, f"the local path {match[0]:.200}: write a Hub id instead, or remove it"


def _problems_in_json(text: str, known: set[int], *, paths: bool) -> list[tuple[int, str]]:
    """Local paths on other lines than the `known` ones, or that it is not JSON."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        return [(error.lineno, f"not JSON: {error.msg}")]
    except ValueError as error:  # a number of thousands of digits
        return [(1, f"not JSON: {error}")]
    except RecursionError:
        return [(1, "not JSON that can be read: nested too deeply")]
    lines, found = text.splitlines(), []
    for key, value in _strings(values) if paths else ():
        # A Hub id has one slash at most.
        is_local_model = key in ("_name_or_path", "name_or_path") and (value.startswith(".") or value.count("/") > 1)
        if not is_local_model and not re.fullmatch(PATH_AS_VALUE, value):
            continue
        written = json.dumps(value)
        number = next((n for n, line in enumerate(lines, 1) if written in line), 1)
        if number not in known:
            found.append((number, f"{key} is the local path {value:.200}: write a Hub id instead, or remove it"))
    return found


def _strings(value) -> Iterator[tuple[str, str]]:
    """Every string in a JSON value, with its key. Without recursion, whose limit is lower than that of the parser."""
    waiting = [("a value", value)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, str):
            yield key, value
        elif isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((key, item) for item in value)


def installed_code() -> dict[str, Path]:
    """The files that travel with a checkpoint: name -> file of the installed package."""
    return code_files(LongVLMForConditionalGeneration, LongVLMProcessor, LongVLMVideoProcessor)


def code_problems(files: Mapping[str, Path]) -> list[str]:
    """Where the code differs from that of the installed package, or the configuration does not point to it."""
    expected, problems = installed_code(), []
    remedy = "`update_code` uploads that of the installed version instead"
    missing = sorted(expected.keys() - files.keys())
    other = sorted(name for name in expected.keys() & files.keys() if not _same(files[name], expected[name]))
    if missing:
        problems.append(
            f"code is missing ({', '.join(missing)}), so the checkpoint does not load without this package: {remedy}"
        )
    if other:
        problems.append(f"code differs from the installed version ({', '.join(other)}): {remedy}")
    for name in sorted(files):
        if name.endswith(".py") and name not in expected:
            problems.append(f"{name} is not code of this package: remove it, or leave it out with `exclude` {name}")
    if "config.json" not in files:
        return [*problems, "config.json is missing: save the model again, or do not leave it out with `exclude`"]
    config = read_json_object(files["config.json"])
    for key, value in CONFIG_ENTRIES.items():
        if config.get(key) != value:
            problems.append(f"config.json, {key}: it does not point to the code of this package: save the model again")
    return problems


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def loading_problems(folder: Path) -> list[str]:
    """Loads `folder` in a separate process, offline and without this package, and asks about a generated clip."""
    script = Path(__file__).with_name("load_without_package.py")
    with tempfile.TemporaryDirectory() as empty:  # no cache: neither its models nor its code
        environment = {**os.environ, "HF_HOME": empty, "HF_MODULES_CACHE": empty, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(folder.absolute())],
            env=environment,
            cwd=empty,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
    if done.returncode == 0:
        return []
    lines = done.stderr.strip().splitlines()
    reason = lines[-1] if lines else f"the process ended with code {done.returncode} (out of memory?)"
    return [f"the checkpoint does not load and answer in a process without this package: {reason}"]
