"""How the converters report progress: `progress(stage, done, total)`; a step without a count is `progress(stage)`."""

from typing import Protocol


class Progress(Protocol):
    """Called at the start of each step, and while a step with a count goes on."""

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None: ...


def silent(stage: str, done: int = 0, total: int = 0) -> None:
    """Reports nothing."""
