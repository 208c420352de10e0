"""Files as everybody here reads and writes them: a folder whole or not at all, JSON objects of strangers.

A folder is written beside its place first, then renamed. What a killed process has left beside it is cleared away by
the next one that writes there.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil


def check_free(out: str | Path, *, overwrite: bool = False) -> Path:
    """`out` as a path, if something may be written there.

    Raises:
        ValueError: it is a file, or a folder with something in it and not `overwrite`.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; give a folder to write to")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise ValueError(f"{out} is not empty; give another folder, or overwrite it with --overwrite (overwrite=True)")
    return out


@contextmanager
def output_folder(out: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives a folder to fill; at the end it takes the place of `out`. After an error nothing has changed."""
    out = check_free(out, overwrite=overwrite).resolve()  # what a link points to takes the new content
    out.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(out)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    previous = out.parent / f".{out.name}.previous-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        share_as_other_files(partial)
        if out.exists():
            out.rename(previous)
        try:
            partial.rename(out)
        except OSError:
            if previous.exists():
                previous.rename(out)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def _clear_leftovers(out: Path) -> None:
    """Removes the folders of processes that are gone; one that was killed between two renames has its old one back."""
    for kind in ("previous", "partial"):
        for folder in out.parent.glob(f".{glob.escape(out.name)}.{kind}-*"):
            pid = folder.name.rsplit("-", 1)[1]
            # Our own number is that of a process before us: containers give the same ones each time.
            if not pid.isdigit() or (int(pid) != os.getpid() and psutil.pid_exists(int(pid))):
                continue
            if kind == "previous" and not out.exists():
                folder.rename(out)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def share_as_other_files(path: Path) -> None:
    """safetensors writes for the owner alone: gives a file, or all in a folder, the mode that new files have here."""
    umask = os.umask(0)
    os.umask(umask)
    for file in path.rglob("*") if path.is_dir() else (path,):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)


def read_json_object(file: str | Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: it holds something else, or is no JSON.
        OSError: it cannot be read.
    """
    try:
        values = json.loads(Path(file).read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or not UTF-8
        raise ValueError(f"{file} is not a JSON file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} in JSON; an object, {{...}}, is wanted")
    return values
