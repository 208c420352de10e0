"""transformers' own test suites, which other packages can run on their models and processors too.

The wheel has no tests; the source archive has `tests/test_*.py`. Fetch it once for the installed version:

    python -m tests.helpers.transformers_suites   # `make test-suites` does it

    suite = load_suite("test_processing_common")
    class TestOurs(suite.ProcessorTesterMixin, unittest.TestCase): ...

Stand-ins take the place of the few files that these import and that the archive lacks.
"""

import functools
import importlib
import re
import subprocess
import sys
import tarfile
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import transformers

from longvlm.files import output_folder
from tests.helpers.paths import ROOT

FOLDER = ROOT / ".cache" / "transformers-suites" / transformers.__version__
PACKAGE = "transformers_suites"  # the name to import it by: `tests` is ours


def fetch() -> None:
    """Downloads the suites of the installed version, if they are not there."""
    if FOLDER.exists():
        return
    requirement = f"transformers=={transformers.__version__}"
    options = ["--quiet", "--no-deps", "--no-binary", "transformers"]
    with tempfile.TemporaryDirectory() as download, output_folder(FOLDER) as out:
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", download, requirement]
        subprocess.run(command, check=True)
        (archive,) = Path(download).glob("*.tar.gz")
        with tarfile.open(archive) as files:
            for member in files.getmembers():
                _, _, name = member.name.partition("/")
                if member.isfile() and name.startswith("tests/") and name.endswith(".py"):
                    member.name = name.removeprefix("tests/")
                    files.extract(member, out, filter="data")
        if not (out / "test_modeling_common.py").exists():
            raise RuntimeError(f"the source archive of {requirement} has no tests/test_modeling_common.py")
        (out / "__init__.py").touch()  # a package again, as in the repository


def load_suite(name: str, local_path: Callable[[str], str] = str) -> ModuleType:
    """The module `name` of transformers' tests.

    Args:
        name: such as `"test_modeling_common"`.
        local_path: gives a local file for each address of a picture or a video that the suite names.
    """
    package: Any = sys.modules.setdefault(PACKAGE, ModuleType(PACKAGE))
    package.__path__ = [str(FOLDER)]
    for stand_in, content in {
        f"{PACKAGE}.generation": {},
        f"{PACKAGE}.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
        f"{PACKAGE}.exporters": {},
        f"{PACKAGE}.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
        f"{PACKAGE}.utils": {},
        f"{PACKAGE}.utils.test_configuration_utils": {"config_common_kwargs": {}},
        "fetch_hub_objects_for_ci": {"url_to_local_path": local_path},
    }.items():
        vars(sys.modules.setdefault(stand_in, ModuleType(stand_in))).update(content)
    # Here PyAV reads the videos of tests that need torchcodec in transformers.
    with patch("transformers.testing_utils.require_torchcodec", lambda test: test):
        return importlib.import_module(f"{PACKAGE}.{name}")


def differs(reasons: dict[str, tuple[str, str]]) -> Callable[[type], type]:
    """
    For tests that ours cannot pass by design, one by one: `{test: (how it fails, why that is right)}`. Such a test is
    skipped with the reason if it fails with a message that matches the pattern; any other end of it is a failure.
    """

    def decorate(cls: type) -> type:
        for name, (pattern, reason) in reasons.items():
            if hasattr(cls, name):  # not in every version
                setattr(cls, name, _differing(getattr(cls, name), pattern, reason))
        return cls

    return decorate


def _differing(test: Callable, pattern: str, reason: str) -> Callable:
    @functools.wraps(test)
    def run(self, *args, **kwargs):
        try:
            test(self, *args, **kwargs)
        except unittest.SkipTest:
            raise
        except Exception as error:
            if not re.search(pattern, str(error)):
                raise
            self.skipTest(reason)
        self.fail(f"it passes now; no longer true: {reason}")

    return run


if __name__ == "__main__":
    fetch()
