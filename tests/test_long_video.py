"""An hour of video takes no more memory than a minute (see benchmarks/long_video.py)."""

import json
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "long_video.py"


@pytest.mark.slow
def test_an_hour_takes_no_more_memory_than_a_minute():
    # In a process of its own, so that this one's memory does not count.
    done = subprocess.run([sys.executable, str(SCRIPT), "--json"], capture_output=True, text=True)
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert (numbers["minute"]["length"], numbers["long"]["length"]) == (60, 3600)
    assert numbers["minute"]["frames"] == numbers["long"]["frames"] == 100
    assert numbers["ratio"] <= 1.2
    assert done.returncode == 0, done.stderr
