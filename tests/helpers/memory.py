"""How much memory something takes at its peak, native libraries included."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _megabytes(name: str) -> float:
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) / 1024


@contextlib.contextmanager
def peak_below(megabytes: float) -> Iterator[None]:
    """Fails if the process grows by more than that in between."""
    try:
        RESET.write_text("5")  # the peak is measured from here on
    except OSError:
        pytest.skip("this system does not tell the peak of a process's memory")
    before = _megabytes("VmRSS")
    yield
    grown = _megabytes("VmHWM") - before
    assert grown < megabytes, f"grew by {grown:.0f} MB"
