"""Pieces of a story that are stories themselves: few events are easier to learn from than many."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from longvlm.evaluation.storyline import Story, middle_times


def cut_story(story: Story, start: float, end: float) -> Story:
    """The story from `start` to `end` seconds, of the events whose middle lies within."""

    def moved(one):
        return replace(one, start=one.start - start, end=one.end - start)

    inside = [event for event in story.events if start <= (event.start + event.end) / 2 < end]
    scenes = [scene for scene in story.scenes if scene.start < end and scene.end > start]
    return replace(story, duration=end - start, events=tuple(map(moved, inside)), scenes=tuple(map(moved, scenes)))


def find_pieces(story: Story, num_frames: int, size: int, most: int, seed: int) -> list[tuple[int, int]]:
    """First and end of at most `most` runs of `size` of the story's frames that cut no event and hold one at least."""
    on_stage = [
        next((i for i, event in enumerate(story.events) if event.start <= time < event.end), None)
        for time in middle_times(story, num_frames)
    ]

    def between(frame: int) -> bool:
        return frame in (0, num_frames) or on_stage[frame - 1] is None or on_stage[frame - 1] != on_stage[frame]

    possible = [
        (first, first + size)
        for first in range(num_frames - size + 1)
        if between(first) and between(first + size) and any(i is not None for i in on_stage[first : first + size])
    ]
    chosen = np.random.default_rng([seed, size]).permutation(len(possible))[:most]
    return [possible[i] for i in sorted(chosen)]


def piece_of(story: Story, num_frames: int, first: int, end: int) -> Story:
    """The story of the frames `first` to `end`."""
    return cut_story(story, first / num_frames * story.duration, end / num_frames * story.duration)


def windows_of(story: Story, num_segments: int, most_events: int, seed: int) -> Sequence[tuple[int, int]]:
    """First and end of runs of segments, one after the other, from gap to gap with 1 to `most_events` events each."""
    dice, length = np.random.default_rng([seed, most_events]), story.duration / num_segments
    windows, first = [], 0
    while first < len(story.events):
        last = min(first + int(dice.integers(1, most_events + 1)), len(story.events)) - 1
        start = int(story.events[first].start / length) if first else 0
        end = int(np.ceil(story.events[last].end / length)) if last + 1 < len(story.events) else num_segments
        windows.append((start, end))
        first = last + 1
    return windows
