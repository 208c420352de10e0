"""Which files of a folder are published, which are left out, and which links are not followed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

# Never published: files that git, the Hub's client, Python and the Trainer keep for themselves.
LEFT_OUT = (".*", "*/.*", "__pycache__/*", "*/__pycache__/*", "checkpoint-*/*", "runs/*")


@dataclass
class FolderFiles:
    """What is in a folder, by the names that files have in the repository.

    Attributes:
        files: what is published: name -> local file.
        left_out: what is not: names of files, of links to folders, and of whole folders (`runs/`).
        links: links to files elsewhere, which are not followed.
        unnameable: names that not every system can have.
    """

    files: dict[str, Path] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)
    unnameable: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Why the folder cannot be published, one line each."""
        return [
            f"{name} is a link that leads out of the folder, or nowhere: put the file itself there, or leave it out "
            f"with `exclude` {name}"
            for name in self.links
        ] + [
            f"{name!r} is not a name for the Hub (line breaks, control characters, or not UTF-8): rename the file"
            for name in self.unnameable
        ]


def collect_files(folder: Path, exclude: Sequence[str] = ()) -> FolderFiles:
    """Looks through the folder. Patterns of `exclude` are those of names in the repository, such as `notes/*.md`."""
    found, inside, skipped = FolderFiles(), folder.resolve(), []
    for parent, folders, names in os.walk(folder):  # which does not follow links
        for path in (Path(parent) / name for name in (*folders, *names)):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                continue
            if path.is_dir() or any(fnmatch(name, pattern) for pattern in (*LEFT_OUT, *exclude)):
                skipped.append(name)
            elif not name.isprintable():
                found.unnameable.append(name)
            elif path.is_symlink() and not _may_be_followed(path, inside):
                found.links.append(name)
            elif path.is_file():
                found.files[name] = path
            else:  # a pipe, a socket, a device
                skipped.append(name)
    found.files = dict(sorted(found.files.items()))
    found.links.sort()
    found.left_out = _by_folder(skipped, [*found.files, *found.links, *found.unnameable])
    return found


def _may_be_followed(link: Path, inside: Path) -> bool:
    """Whether a link leads to a file in the folder or, from a snapshot in a Hub cache, to one of its model's blobs."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # it leads nowhere, or in a circle
        return False
    # models--me--x/snapshots/REVISION holds links to models--me--x/blobs/DIGEST.
    in_cache = inside.parent.name == "snapshots" and target.parent == inside.parent.parent / "blobs"
    return target.is_file() and (in_cache or target.is_relative_to(inside))


def _by_folder(skipped: Sequence[str], others: Sequence[str]) -> list[str]:
    """The names, with a folder instead of the files in it where all of them are skipped."""
    used = {parent for name in others for parent in Path(name).parents}
    short = set()
    for name in skipped:
        unused = [parent for parent in Path(name).parents if parent not in {*used, Path()}]
        short.add(f"{unused[-1].as_posix()}/" if unused else name)
    return sorted(short)
