"""A bar for functions that report `progress(stage, done, total)`; the recipes run for hours, often into a log file."""

import sys

from tqdm import tqdm


class ProgressBar:
    """
    Shows one stage at a time.

    Args:
        unit: what is counted.
    """

    def __init__(self, unit: str):
        self.unit = unit
        self._bar: tqdm | None = None

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        if not total:
            print(stage, file=sys.stderr, flush=True)
            return
        if self._bar is None:
            # A log file gets a line every 30 seconds.
            self._bar = tqdm(total=total, desc=stage, unit=self.unit, mininterval=0.1 if sys.stderr.isatty() else 30)
        self._bar.update(done - self._bar.n)
        if done >= total:
            self._bar.close()
            self._bar = None
