"""What all tests share: no network for the Hub, two threads, fixed seeds, and the `--slow` option.

Nothing here may import torch or transformers before the environment is set.
"""

import io
import os
import random
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "2")
if os.environ.get("PYTHONPATH"):  # tests start processes in other folders, with the same transformers
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, os.environ["PYTHONPATH"].split(os.pathsep)))

import numpy as np
import pytest


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    slow = pytest.mark.skip(reason="slow: run with --slow")
    gpu = pytest.mark.skip(reason="gpu: there is no accelerator here")
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(slow)
        if item.get_closest_marker("gpu") and not _has_accelerator():
            item.add_marker(gpu)


def _has_accelerator() -> bool:
    import torch

    return torch.accelerator.is_available()


def pytest_report_header(config):
    import torch
    import transformers

    where = os.path.dirname(transformers.__file__)
    return f"transformers {transformers.__version__} ({where}), torch {torch.__version__}"


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The same random numbers in every test, whatever ran before."""
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def run_command(monkeypatch, capfd):
    """Runs the command `longvlm` in this process: (*arguments, stdin="") -> (exit code, stdout, stderr)."""
    from longvlm_cli import app as cli

    def run(*arguments, stdin=""):
        monkeypatch.setattr(sys, "argv", ["longvlm", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return ended.value.code, out, err

    return run
