"""Killed at random moments, every command goes on: nothing is lost, doubled, or half written and taken for whole.

`make test-kills`; the work is in `tests/helpers/kills.py`.
"""

import random
import subprocess
import sys

import pytest

from tests.helpers.paths import ROOT

# Kind of job -> kills, and runs that are resumed. All that make checkpoints: 50 kills.
KILLS = {
    "extract": (24, 6),
    "train": (12, 3),
    "assemble": (7, 2),
    "convert llava": (7, 2),
    "convert original": (8, 2),
    "convert open-clip": (7, 2),
    "convert to-original": (7, 2),
    "convert features": (7, 2),
    "publish": (7, 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KILLS)
def test_killed_at_random_moments_it_ends_as_if_nobody_had(kind, tmp_path):
    if kind == "convert open-clip":
        pytest.importorskip("open_clip")
    kills, runs = KILLS[kind]
    seed = random.SystemRandom().randrange(10**6)
    command = [sys.executable, "-m", "tests.helpers.kills", kind, tmp_path / "work", kills, runs, seed]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    assert int(done.stdout.split()[-1]) == kills


def test_the_kills_are_as_many_as_promised():
    extract, train, others = KILLS["extract"], KILLS["train"], [KILLS[kind][0] for kind in list(KILLS)[2:]]
    assert extract == (24, 6) and train == (12, 3) and sum(others) == 50
