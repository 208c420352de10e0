"""How files are read and written here: files and folders whole or not at all, JSON and YAML within bounds.

Everything is first written beside its destination, then renamed. What a killed process left there is removed by the
next one that writes to the same destination.
"""

import glob
import hashlib
import itertools
import json
import os
import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

_numbers = itertools.count()  # two threads may write to one place


def _machine() -> str:
    """Where process ids mean the same: this machine and, in a container, its namespace."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = ""
    return hashlib.blake2b(f"{platform.node()} {namespace}".encode(), digest_size=6).hexdigest()


_MACHINE = _machine()
_UMASK = os.umask(0)
os.umask(_UMASK)


def check_free(out: str | Path, *, overwrite: bool = False) -> Path:
    """`out` as a path, if something may be written there.

    Raises:
        ValueError: it is a file, a folder with something in it and not `overwrite`, or one that must not be replaced.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write to")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty; give another folder, or replace its contents with `overwrite`")
    if out.is_dir():
        _check_replaceable(out)
    return out


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yields the name of a file to write; at the end that file replaces `path`, complete even after a power cut.

    The name has the suffix of `path`, since many savers choose the format by it. After an error `path` is unchanged.
    """
    path = _target(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    partial = path.parent / f".{path.name}.partial-{_writer()}{path.suffix}"
    try:
        yield partial
        share_as_other_files(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def output_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a folder to fill; at the end it replaces `out`. After an error `out` is unchanged."""
    out = _target(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(out)  # first: it may restore a folder
    check_free(out, overwrite=overwrite)
    writer = _writer()
    partial, previous = (out.parent / f".{out.name}.{kind}-{writer}" for kind in ("partial", "previous"))
    partial.mkdir()
    try:
        yield partial
        share_as_other_files(partial)
        try:
            if out.exists():
                out.rename(previous)
            partial.rename(out)
        except BaseException:  # also an interruption between the two
            if previous.exists() and not out.exists():
                previous.rename(out)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if out.exists():
            shutil.rmtree(previous, ignore_errors=True)


def _target(path: str | Path) -> Path:
    """What is written: not a link, but what it points to."""
    try:
        return Path(path).resolve()
    except (RuntimeError, OSError):
        raise ValueError(f"{path} is a link that leads in a circle; give another place to write to") from None


def _check_replaceable(out: Path) -> None:
    """
    Raises:
        ValueError: the folder is a mount point, which cannot be renamed, or replacing it would remove far too much.
    """
    resolved = out.resolve()
    if os.path.ismount(resolved):
        raise ValueError(f"{out} is a mount point, which cannot be replaced as a whole; give a folder inside it")
    for name, place in (("the current folder", Path.cwd()), ("your home folder", Path.home())):
        if place.resolve().is_relative_to(resolved):
            raise ValueError(f"{out} is or contains {name}, so its contents are not replaced; give another folder")


def _writer() -> str:
    """Names who writes: process, machine, and the number of the file or folder."""
    return f"{os.getpid()}.{_MACHINE}.{next(_numbers)}"


def _clear_leftovers(out: Path) -> None:
    """Removes what dead processes left beside `out`; restores a folder that was lost between two renames."""
    for kind in ("previous", "partial"):
        for left in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            if not _is_abandoned(left):
                continue
            if kind == "previous" and not out.exists():
                left.rename(out)
            elif left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    """Whether nobody is writing it any more; its name says which process started it, and on which machine."""
    writer = re.search(r"\.(?:partial|previous)-(\d+)\.(\w+)\.\d+", path.name)
    if writer is None or writer[2] != _MACHINE:
        return False
    pid = int(writer[1])
    if pid != os.getpid():
        return not psutil.pid_exists(pid)
    # Containers hand out the same ids each time: an earlier process may have had ours.
    try:
        return path.stat().st_mtime < psutil.Process().create_time()
    except FileNotFoundError:
        return False


def share_as_other_files(path: Path) -> None:
    """Gives a file, or all files in a folder, the default mode of new files; safetensors writes for the owner only."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if not file.is_symlink():  # else what it points to would be changed, which is not ours
            file.chmod((0o777 if file.is_dir() else 0o666) & ~_UMASK)


def check_regular(file: str | Path) -> None:
    """
    Raises:
        ValueError: it is there, but a pipe, a device or the like, which might never end, and not a file.
    """
    path = Path(file)
    if path.exists() and not path.is_file():
        raise ValueError(f"{file} is a {'folder' if path.is_dir() else 'pipe or a device'}, not a file")


def read_json(file: str | Path) -> Any:
    """The value in a JSON file of a user: in UTF-8, or in UTF-16 or UTF-32 with a mark at its start.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
        OSError: it cannot be read.
    """
    check_regular(file)
    return _parse(file, Path(file).read_bytes())


def read_json_object(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint, which is UTF-8, without a mark; transformers reads nothing else.

    Raises:
        ValueError: it holds something else, or is not JSON.
        OSError: it cannot be read.
    """
    check_regular(file)
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a JSON file: {error}") from None
    values = _parse(file, text)
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a JSON {type(values).__name__}; expected an object, {{...}}")
    return values


def _parse(file: str | Path, content: str | bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError as error:  # not JSON, not text, or a number of thousands of digits
        reason = str(error).partition("; use sys.")[0]
        raise ValueError(f"{file} is not a JSON file: {reason}") from None
    except RecursionError:
        raise ValueError(f"{file} is nested too deeply to be read as JSON") from None


MAX_YAML = 2**18  # characters; PyYAML takes seconds for so many
MAX_YAML_VALUES = 100_000


def parse_yaml(content: str | bytes, name: str | Path) -> Any:
    """The value in a YAML text, without tags that make objects.

    Args:
        name: of the file, for errors.

    Raises:
        ValueError: it is not YAML, or too much of it: nested too deeply, or with aliases that multiply; or a key is
            there twice, of which YAML would take the last.
    """
    import yaml

    if len(content) > MAX_YAML:
        raise ValueError(f"{name} has {len(content):,} characters; the limit for YAML is {MAX_YAML:,}")
    loader = None
    try:
        loader = yaml.SafeLoader(content)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > MAX_YAML_VALUES:
            raise ValueError(f"{name} has aliases that make more than {MAX_YAML_VALUES:,} values; write them out")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply to be read as YAML") from None
    except (ValueError, OverflowError) as error:  # a number or a date that cannot be one
        raise ValueError(str(error) if str(name) in str(error) else f"{name} is not YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _count_values(node: Any, counts: dict[Any, int]) -> int:
    """How many values a node of YAML makes if every alias is written out.

    Raises:
        ValueError: it contains itself, or a mapping has a key twice.
    """
    if node in counts:  # an alias
        if not counts[node]:
            raise ValueError("an alias stands within what it names")
        return counts[node]
    counts[node] = 0
    parts = []
    if node.id == "sequence":
        parts = node.value
    elif node.id == "mapping":
        keys = Counter((key.tag, key.value) for key, _ in node.value if key.id == "scalar")
        for (_, key), times in keys.items():
            if times > 1:
                raise ValueError(f"{key!r:.60} is there {times} times; leave the others out")
        parts = [part for pair in node.value for part in pair]
    counts[node] = 1 + sum(_count_values(part, counts) for part in parts)
    return counts[node]
