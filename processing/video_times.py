"""Seconds from timestamps, as files carry them: missing, doubled, or on a clock that jumps."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

JUMP_SECONDS = 10.0  # a longer step is another clock, where it is also far longer than usual (FFmpeg's own limit)
JUMP_STEPS = 50


def interpolate_missing(times: Sequence[float | None]) -> list[float]:
    """Timestamps with the missing ones put between their neighbours, or one step outside them. One must be there."""
    known = np.array([i for i, time in enumerate(times) if time is not None])
    values = np.array([times[i] for i in known], dtype=np.float64)
    filled = np.interp(np.arange(len(times)), known, values)
    step = (values[-1] - values[0]) / (known[-1] - known[0]) if len(known) > 1 else 0.0
    before, after = np.arange(known[0]), np.arange(known[-1] + 1, len(times))
    filled[before] = values[0] - step * (known[0] - before)
    filled[after] = values[-1] + step * (after - known[-1])
    return filled.tolist()


def seconds_in_order(times: Sequence[float | None], time_base: Fraction, from_zero: bool) -> np.ndarray | None:
    """
    Args:
        times: timestamps in presentation order.
        from_zero: the first frame is second 0; the clock is of a kind that may jump.
    Returns:
        Seconds, never descending: after a jump, the clock goes on one usual step later. `None` if no time is usable.
    """
    if not len(times) or all(time is None for time in times):
        return None
    units = np.array(interpolate_missing(times))
    seconds = (units - units[0] if from_zero else units) * float(time_base)
    steps = np.diff(seconds)
    forward = steps[steps > 0]
    if not forward.size:
        return None if len(seconds) > 1 else seconds
    usual = float(np.median(forward))
    jumps = steps < 0
    if from_zero:
        jumps |= steps > max(JUMP_SECONDS, JUMP_STEPS * usual)
    if jumps.any():
        steps = np.where(jumps, usual, steps)
        seconds = seconds[0] + np.concatenate([[0.0], np.cumsum(steps)])
    return seconds
